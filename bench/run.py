"""What ``make bench`` measures: the lab, a gateway's start, a warm ``ttp run``, a download.

    bench/run.py            print the table
    bench/run.py --write    write it to docs/benchmarks.md as well

Runs as the calling user, in less than three minutes, in a lab of its own. What is compared is
measured in turns, round by round, and reported as the median. Root's caches and state are replaced
in a private mount namespace, a user's by XDG variables, so nothing of it stays.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stem import SocketError
from stem.control import Controller

from nsrun import facts, linux
from nsrun.errors import NsrunError

ROOT = Path(__file__).resolve().parents[1]
TTP = str(Path(sys.executable).with_name("ttp"))
ROUNDS = 100  # of short commands: about 7 s
BURST = 30
STARTS = 3
DOWNLOADS = 5
BYTES = 20_000_000
IDLE = 5.0  # seconds
SOCKS = "127.0.0.1:9150"
MEGA = 1e6
NETNS = Path("/run/netns")


@dataclass(frozen=True)
class Figure:
    """One line of the table: the median of some values, and what it should be."""

    what: str
    values: Sequence[float]
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def value(self) -> float:
        return median(self.values)

    def cells(self) -> tuple[str, ...]:
        low, high = min(self.values), max(self.values)
        spread = f"{_round(low)}–{_round(high)}" if len(self.values) > 1 else ""
        value = f"{_round(self.value)}{f' {self.unit}' if self.unit else ''}"
        return (self.what, value, spread, str(len(self.values)), *self._target())

    def _target(self) -> tuple[str, str]:
        unit = f" {self.unit}" if self.unit else ""
        if self.most is not None:
            return f"≤ {self.most:g}{unit}", "met" if self.value <= self.most else "**not met**"
        if self.least is not None:
            return f"≥ {self.least:g}{unit}", "met" if self.value >= self.least else "**not met**"
        return "", ""


@dataclass(frozen=True)
class Lab:
    """A running lab, and the way to its simulated host: a command prefix that costs 2 ms."""

    name: str
    files: Path
    torrc: str
    host: tuple[str, ...]


# -- the lab -----------------------------------------------------------------------------------


def boots(name: str) -> Iterator[Figure]:
    """``ttp lab up`` returns when an address oracle, asked through three relays, saw an exit."""
    cold: list[float] = []
    baked: list[float] = []
    for index in range(1 + STARTS):
        with timed(baked if index else cold):
            ttp("lab", "up", name, "--no-gateway")
        origin = json.loads(ttp("lab", "status", "--json", name))[0]["baked"]
        assert origin is bool(index), "the cache of bakes was not ours alone"
        ttp("lab", "down", name)
    what = "lab, to its first HTTP request through three relays"
    yield Figure(f"{what}, from nothing", cold, "s", most=12)
    yield Figure(f"{what}, from a bake", baked, "s", most=3)


@contextmanager
def lab_up(name: str, files: Path) -> Iterator[tuple[Lab, list[Figure]]]:
    """A lab with its gateway, and how long that took until ``ttp run`` had brought an answer."""
    try:
        elapsed: list[float] = []
        with timed(elapsed):
            ttp("lab", "up", name)
            answer = ttp("run", "-g", name, "--", "curl", "-sS", "http://torproject.org/api/ip")
        assert json.loads(answer)["IsTor"] is True
        found = json.loads(ttp("lab", "status", "--json", name))[0]
        pid = found["pid"]
        user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        network = f"--net=/proc/{pid}/root/run/netns/host"
        host = ("nsenter", f"--target={pid}", *user, "--mount", network, "--")
        if user:  # root of the lab, to whom /var/lib is still closed
            run(*host, "mount", "--bind", str(files / "lib"), "/var/lib")
        what = "lab with gateway from a bake, to the answer to a first `ttp run -- curl`"
        memory = Figure("memory of the lab's network after boot", [found["memory_mb"]], "MB", 250)
        yield Lab(name, files, found["client_torrc"], host), [Figure(what, elapsed, "s"), memory]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough: the lab still has to go
        subprocess.run((TTP, "lab", "down", name), capture_output=True)


# -- the gateway's start -----------------------------------------------------------------------


def cold_starts(lab: Lab) -> Iterator[Figure]:
    """All on the simulated host, each with a data directory of its own: empty, then used."""
    fragment = lab.files / "fragment"
    fragment.write_text(lab.torrc)
    for state in ("empty", "cached"):
        alone: list[float] = []
        owned: list[float] = []
        gateway: list[float] = []
        for index in range(STARTS):
            with tor(lab, f"alone{index}", alone):
                pass
            with tor(lab, f"owned{index}", owned, owned=True):
                pass
            name = f"{lab.name}-{index}"
            with timed(gateway):
                run(*lab.host, TTP, "gateway", "up", name, "--torrc", str(fragment))
            run(*lab.host, TTP, "gateway", "down", name)
        yield Figure(f"Tor alone, to bootstrapped, {state} data directory", alone, "s")
        yield Figure(f"Tor with a controller, as a gateway's, {state}", owned, "s")
        yield Figure(f"`ttp gateway up`, to ready, {state}", gateway, "s")
        for what, tors in (("Tor alone", alone), ("Tor with a controller", owned)):
            more = [(ours - its) * 1000 for ours, its in zip(gateway, tors, strict=True)]
            yield Figure(f"`ttp gateway up` minus {what}, {state}", more, "ms", most=300)


@contextmanager
def tor(lab: Lab, name: str, seconds: list[float], *, owned: bool = False) -> Iterator[None]:
    """A tor on the simulated host; its time to 100 % is added to ``seconds``.

    ``owned`` as a supervisor's: with __OwningControllerProcess and a control connection, Tor
    bootstraps at once, while otherwise it waits for the first tick of its clock, a second.
    """
    data = lab.files / name
    data.mkdir(mode=0o700, exist_ok=True)
    control = data / "control"
    control.unlink(missing_ok=True)
    lines = [f"DataDirectory {data}", "ClientOnly 1", "ShutdownWaitLength 0", "Log notice stdout"]
    if owned:
        lines += [f"ControlSocket {control}", f"__OwningControllerProcess {os.getpid()}"]
    port = "0" if owned else SOCKS
    torrc = data.with_suffix(".torrc")
    torrc.write_text("\n".join([*lines, f"SocksPort {port}", lab.torrc]))
    dying = ("setpriv", "--pdeathsig", "KILL", "--")
    begin = time.perf_counter()
    process = subprocess.Popen(
        (*lab.host, *dying, "tor", "--defaults-torrc", "/dev/null", "-f", str(torrc)),
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        with controller(control) if owned else nullcontext():
            await_words(process, b"Bootstrapped 100%", 60)
        seconds.append(time.perf_counter() - begin)
        yield
    finally:
        process.terminate()
        process.communicate()


def controller(path: Path) -> Controller:
    """Connect as the supervisor does. Raises NsrunError."""
    deadline = time.monotonic() + 20
    while True:
        try:
            connected = Controller.from_socket_file(str(path))
            connected.authenticate()
            return connected
        except SocketError as error:
            if time.monotonic() > deadline:
                raise NsrunError("wait 20 s for tor's control socket", error) from error
        time.sleep(0.005)  # the interval of the poll


def await_words(process: subprocess.Popen[bytes], words: bytes, seconds: float) -> None:
    assert process.stdout is not None
    deadline, said = time.monotonic() + seconds, b""
    while words not in said:
        left = max(0, deadline - time.monotonic())
        ready = select.select([process.stdout], [], [], left)[0]
        more = process.stdout.read(65536) if ready else b""
        if not more:
            last = (said.decode(errors="replace").splitlines() or ["nothing"])[-1]
            raise NsrunError(f"wait {seconds:g} s for “{words.decode()}” from tor", last)
        said += more


# -- a command -----------------------------------------------------------------------------------


def warm_starts(lab: Lab) -> Iterator[Figure]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["TTP_GATEWAY"] = lab.name
    # site-packages of the interpreter itself may hold .pth files that cost many times the rest
    clean = lab.files / "python"
    run(f"{sys.base_prefix}/bin/python3", "-m", "venv", "--without-pip", str(clean))
    floor, ours = "`python3 -c pass`, ttp's interpreter, no packages", "`ttp run -- true`"
    commands: dict[str, tuple[str, ...]] = {
        floor: (str(clean / "bin" / "python3"), "-c", "pass"),
        ours: (TTP, "run", "--", "true"),
        "`unshare -Urn true`": ("unshare", "-Urn", "true"),
    }
    if Path("/usr/bin/python3").exists():
        commands["`/usr/bin/python3 -c pass`"] = ("/usr/bin/python3", "-c", "pass")
    if os.geteuid() == 0:
        run("ip", "netns", "add", lab.name)
        commands["`ip netns exec NAME true`"] = ("ip", "netns", "exec", lab.name, "true")
    if shutil.which("torsocks"):
        commands["`torsocks true`"] = ("torsocks", "true")
    if shutil.which("bwrap"):
        bwrap = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "true")
        commands["`bwrap --unshare-all --ro-bind / / true`"] = bwrap
    times: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(ROUNDS):
        for what, command in commands.items():
            times[what].append(spawn(command, environment))
    for what, found in times.items():
        yield Figure(what, found, "ms")
    ratios = [mine / least for mine, least in zip(times[ours], times[floor], strict=True)]
    yield Figure("ratio of `ttp run -- true` to `python3 -c pass`", ratios, "", most=1.5)
    rush = [spawn(commands[ours], environment) for _ in range(BURST)]
    yield Figure("`ttp run -- true`, each right after the last", rush, "ms")


def spawn(command: tuple[str, ...], environment: dict[str, str]) -> float:
    """Milliseconds from before the command is started until it has ended."""
    begin = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, environment)
    _, status = os.waitpid(pid, 0)
    elapsed = time.perf_counter() - begin
    if status:
        raise NsrunError(f"run {' '.join(command)}", f"wait status {status}")
    return elapsed * 1000


def downloads(lab: Lab) -> Iterator[Figure]:
    """Once the first byte is there; a new circuit each time, on both sides."""
    url = f"http://web.test/bytes/{BYTES}"
    form = "%{size_download} %{time_starttransfer} %{time_total}"
    curl = ("curl", "-sS", "-m", "30", "-o", "/dev/null", "-w", form)
    ours, socks = [], []
    with tor(lab, "socks", []):
        for index in range(DOWNLOADS):
            ours.append(rate(ttp("run", "-g", lab.name, "--", *curl, url)))
            proxy = f"socks5h://circuit{index}:x@{SOCKS}"
            socks.append(rate(run(*lab.host, *curl, "--proxy", proxy, url)))
    yield Figure(f"download of {BYTES / MEGA:g} MB by `ttp run -- curl`", ours, "MB/s")
    yield Figure("the same through the SocksPort of a Tor alone", socks, "MB/s")
    ratios = [mine / theirs for mine, theirs in zip(ours, socks, strict=True)]
    yield Figure("ratio of the two", ratios, "", least=1)


def rate(said: str) -> float:
    size, begin, end = (float(word) for word in said.split())
    assert size == BYTES, f"curl got {size:g} bytes"
    return size / MEGA / (end - begin)


# -- at rest -----------------------------------------------------------------------------------


def at_rest(lab: Lab) -> Iterator[Figure]:
    """The supervisor of the lab's gateway, after all the workloads above."""
    pid = json.loads(ttp("gateway", "inspect", lab.name))["pid"]
    before = cpu_ms(pid)
    time.sleep(IDLE)  # nothing is awaited: this is the interval that is measured
    used = cpu_ms(pid) - before
    what = f"supervisor after {ROUNDS + BURST + DOWNLOADS + 1} workloads"
    yield Figure(f"{what}, proportional set size", [memory(pid, "Pss")], "MB", most=40)
    yield Figure(f"{what}, resident set size", [memory(pid, "Rss")], "MB", most=40)
    yield Figure(f"{what}, CPU in {IDLE:g} s of rest", [used], "ms")
    what = "memory of the lab's network after the downloads"
    found = json.loads(ttp("lab", "status", "--json", lab.name))[0]["memory_mb"]
    yield Figure(what, [found], "MB", most=250)


def memory(pid: int, key: str) -> float:
    """In MB; proportional set size shares what is mapped by several processes among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / MEGA


def cpu_ms(pid: int) -> float:
    """Of all threads, user and system, in steps of a clock tick (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


# -- the machine, and the table ------------------------------------------------------------------


def machine() -> list[str]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpus if line.startswith("model name")), "")
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    busy = "otherwise idle" if load < 0.5 else "**not idle**: take times as upper bounds"
    return [
        f"{model or platform.machine()}, {cores} cores, kernel {platform.release()}",
        f"Python {platform.python_version()}, {words('tor')}, {words('nft')}",
        f"as {'an unprivileged user' if os.geteuid() else 'root'}, {time.strftime('%Y-%m-%d')}",
        f"load average when it began: {load:.2f}, so the machine was {busy}",
    ]


def words(program: str) -> str:
    """Name and version, as the program says it."""
    first = run(program, "--version").splitlines()[0]
    return first.partition(" (")[0].replace("version ", "").rstrip(".")


def table(figures: Sequence[Figure]) -> str:
    """Markdown that can be read as it is."""
    heads = ("what", "median", "range", "n", "target", "")
    rows = [heads, *(figure.cells() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"| {line} |\n" for line in lines)


def document(about: Sequence[str], figures: Sequence[Figure], seconds: float) -> str:
    return f"""# Benchmarks

Made by `make bench` (`bench/run.py --write`) in {seconds:.0f} s. Times depend on the machine,
and on a busy one so do ratios. All of it ran in a lab, so the network takes no time.

{"".join(f"- {line}" + chr(10) for line in about)}
{table(figures)}
How it was measured:

- What is compared was run in turns; ratios and differences are those of one round. The range is
  from the least to the greatest.
- *lab*: from the start of `ttp lab up` to its end, when it has asked an address oracle through
  three relays and been seen as an exit. Memory is the proportional set size of all its programs.
- *start*: on the lab's simulated host, with the lab's authorities. `ttp gateway up` ends when its
  Tor has bootstrapped. *Tor alone* waits a second for the first tick of its clock; a Tor with
  `__OwningControllerProcess` and a control connection, as every gateway has, does not. So only the
  difference to the latter tells what ttp adds: command line, supervisor, uplink, rules.
- *commands*: from before `posix_spawn` to after `waitpid`, without `PYTHON*` variables. The floor
  is the interpreter of ttp in an empty venv: what lies in its site-packages is not its own cost.
  `ttp run` is on a gateway that is up, and keeps three workloads ready.
- *download*: from the first byte to the last, by a new circuit each time. The gateway's Tor and
  the one with a SocksPort are two processes.
- *supervisor*: the proportional set size is less when other Python programs share its pages.
"""


# -- doing -------------------------------------------------------------------------------------


def run(*command: str) -> str:
    """Standard output of a command. Raises NsrunError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NsrunError(f"run {' '.join(command[:4])} …", last)
    return done.stdout


def ttp(*arguments: str) -> str:
    return run(TTP, *arguments)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)


@contextmanager
def kept_apart(files: Path) -> Iterator[None]:
    """Let this process and its children see a cache, a state and `ip netns` of their own."""
    files.chmod(0o711)  # the gateway's Tor is another user
    for name in ("cache", "lib"):
        (files / name).mkdir()
    if os.geteuid() != 0:
        os.environ |= {"XDG_CACHE_HOME": f"{files}/cache", "XDG_STATE_HOME": f"{files}/lib"}
        yield
        return
    made = not NETNS.exists()
    NETNS.mkdir(exist_ok=True)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount(f"{files}/cache", "/var/cache", flags=linux.MS_BIND)
    linux.mount(f"{files}/lib", "/var/lib", flags=linux.MS_BIND)
    linux.mount("bench", str(NETNS), "tmpfs")
    try:
        yield
    finally:
        linux.umount(str(NETNS))
        if made:
            NETNS.rmdir()


def measure(files: Path) -> Iterator[Figure]:
    name = f"bench{os.getpid()}"
    say("lab: from nothing, and from a bake")
    yield from boots(name)
    with lab_up(name, files) as (lab, booted):
        yield from booted
        say(f"commands: {ROUNDS} rounds")
        yield from warm_starts(lab)
        say("downloads")
        yield from downloads(lab)
        say("rest")
        yield from at_rest(lab)
        say("gateway: cold starts")
        yield from cold_starts(lab)


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _round(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--write"}:
        print(__doc__, file=sys.stderr)
        return 2
    os.environ["PATH"] = facts.search_path()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    began, about = time.monotonic(), machine()
    try:
        with tempfile.TemporaryDirectory(prefix="ttp-bench-") as name, kept_apart(Path(name)):
            figures = list(measure(Path(name)))
    except NsrunError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    seconds = time.monotonic() - began
    print("\n".join(about), f"in {seconds:.0f} s", "", table(figures), sep="\n", end="")
    if "--write" in arguments:
        (ROOT / "docs" / "benchmarks.md").write_text(document(about, figures, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
