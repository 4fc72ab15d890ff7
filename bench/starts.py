"""How long things take to start: a lab, a gateway, a command beside those of other tools."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from stem import SocketError
from stem.control import Controller

from figures import Figure
from labs import TTP, Lab, plain_environment, run, spawn, timed, ttp
from nsrun.errors import NsrunError

ROUNDS = 100  # of short commands: about 7 s
BURST = 30
STARTS = 3
SOCKS = "127.0.0.1:9150"


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


def cold_starts(lab: Lab) -> Iterator[Figure]:
    """All on the simulated host, each with a data directory of its own: empty, then used."""
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
                run(*lab.host, TTP, "gateway", "up", name, "--torrc", f"{lab.files}/fragment")
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


def warm_starts(lab: Lab) -> Iterator[Figure]:
    environment = plain_environment(lab)
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
        label = what.replace("`", "")
        yield Figure(what, found, "ms", plot="starts", label=label, ours=what == ours)
    ratios = [mine / least for mine, least in zip(times[ours], times[floor], strict=True)]
    yield Figure("ratio of `ttp run -- true` to `python3 -c pass`", ratios, "", most=1.5)
    rush = [spawn(commands[ours], environment) for _ in range(BURST)]
    yield Figure("`ttp run -- true`, each right after the last", rush, "ms")
    yield from orjail(lab)


def orjail(lab: Lab) -> Iterator[Figure]:
    """The script that ORJAIL names, on the lab's host; it starts a Tor, and waits for nothing.

    What it leaves in root's home directory it leaves in an empty one of its own.
    """
    script = os.environ.get("ORJAIL")
    if not script or os.geteuid() != 0:
        return
    torrc = "mkdir -p /etc/tor /var/lib/tor && cp fragment /etc/tor/torrc"
    home = "mount -t tmpfs none ~root"
    each = f"cd {lab.files} && {torrc} && {home} && exec {script} -u root --host-torrc true"
    command = (*lab.host, "unshare", "--mount", "bash", "-c", each)
    values: list[float] = []
    for _ in range(STARTS):
        with timed(values):
            run(*command)
    label = "orjail true"
    yield Figure(
        f"`{label}`", [1000 * v for v in values], "ms", plot="starts", label=label, ours=False
    )
