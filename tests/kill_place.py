"""A host in a lab with one gateway, whose parts are killed: the actors, and what must be so after.

At each death something tries to get out: a squatter, which is a workload from before there are
rules on, and strays from within every namespace that the supervisor has made. What they achieve
is seen by taps outside; here it is seen what remains: processes, links, the host's state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import probe
from harness import ROOT, host_changes, host_state
from mortal import Moment, Mortal, Wanted
from nsrun import client, linux, paths
from nsrun.address import BLOCKS
from nsrun.apply import Machine
from nsrun.facts import probe as probe_facts
from nsrun.gateway.__main__ import main as supervise
from nsrun.netns import Namespace
from nsrun.plan import Facts, Workload, workload_steps
from nsrun.spec import GatewaySpec

TTP = str(ROOT / ".venv" / "bin" / "ttp")
PROGRAM = (ROOT / "tests" / "probe.py").read_text()  # as text: a user may not reach the file
PESTER = ("/usr/bin/python3", "-ISc", PROGRAM, "--for")
ORACLE = "http://check.torproject.org/api/ip"
GROUP, GUEST = 54300, 54330  # whom root's gateway is for, and one of them


def eventually(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)  # the interval of the poll


def never(_moment: Moment) -> bool:
    return False


def become_guest() -> None:
    """No more than a member of the group; /proc/self is ours again, as after an exec (proc(5))."""
    os.setgroups([GROUP])
    os.setresgid(GUEST, GUEST, GUEST)
    os.setresuid(GUEST, GUEST, GUEST)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)
    os.environ["HOME"] = "/"


@dataclass
class Place:
    """The host, and one gateway that dies again and again. ``home`` is for files of ours."""

    spec: GatewaySpec
    home: Path
    cases: list[str] = field(default_factory=list)
    _clients: int = 0
    host: str = field(default_factory=host_state)
    facts: Facts = field(default_factory=probe_facts)

    # -- the actors ----------------------------------------------------------------------------

    def supervisor(self, wanted: Wanted, *, deep: bool = False) -> Mortal:
        """The real one, in the foreground, as a lab starts it; it stops at every wanted moment."""
        request = os.memfd_create("request")
        os.write(request, json.dumps({**asdict(self.spec), "detach": False}).encode())
        os.lseek(request, 0, os.SEEK_SET)
        made = Mortal(supervise, wanted, self._standard(request, "supervisor"), deep=deep)
        os.close(request)
        return made

    def client(self, *arguments: str, wanted: Wanted = never, guest: bool = False) -> Mortal:
        """``ttp ARGUMENTS`` that stops at every operation by which it becomes the command.

        A ``guest`` is a user whose group root's gateway is for.
        """

        def main() -> None:
            if guest:
                become_guest()
            sys.argv = ["ttp", *arguments]
            client.main()

        return self.process(main, wanted)

    def process(self, main: Callable[[], object], wanted: Wanted = never) -> Mortal:
        """Somebody who wants something of the gateway."""
        null = os.open(os.devnull, os.O_RDWR)
        self._clients += 1
        made = Mortal(main, wanted, self._standard(null, f"client{self._clients}"))
        os.close(null)
        return made

    def said(self) -> str:
        """What the last client complained of."""
        return (self.home / f"client{self._clients}.log").read_text()

    def _standard(self, stdin: int, log: str) -> tuple[int, str]:
        return stdin, str(self.home / f"{log}.log")

    def ask(self, **request: object) -> dict[str, Any]:
        answer, descriptors = client.ask(client.connect(f"{self.spec.runtime}/api"), request)
        os.close(descriptors["supervisor"])
        return answer

    def run(self, *command: str, name: str = "") -> list[str]:
        return [
            TTP,
            "run",
            "-g",
            self.spec.name,
            *(("--name", name) if name else ()),
            "--",
            *command,
        ]

    @contextmanager
    def up(self, wanted: Wanted = never) -> Iterator[Mortal]:
        """A gateway whose Tor has bootstrapped, or is at a wanted moment already."""
        gateway = self.supervisor(wanted)
        try:
            eventually(self.answers, "the supervisor")
            self.ask(do="wait", timeout=20)
            yield gateway
        except BaseException:
            gateway.tell()
            time.sleep(0.2)  # for its handler, which says nothing to us
            raise
        finally:
            gateway.kill()

    def workloads(self) -> list[str]:
        """Names of those that are given out."""
        return [workload["name"] for workload in self.ask(do="inspect")["workloads"]]

    def links(self, gateway: Mortal) -> list[str]:
        """Of the gateway's namespace."""
        table = Path(spaces(gateway.pid)[0]).parents[1] / "net" / "dev"
        return [line.split(":")[0].strip() for line in table.read_text().splitlines()[2:]]

    def answers(self) -> bool:
        try:
            client.connect(f"{self.spec.runtime}/api").close()
        except client.NotHereError:
            return False
        return True

    @contextmanager
    def busy(self, *, guest: bool = False) -> Iterator[int]:
        """A workload that pesters every wire: its process id."""
        command = self.run(*PESTER, "60", name="busy")[1:]
        process = self.client(*command, guest=guest)
        try:
            begins = PESTER[0].encode()
            eventually(lambda: _command_line(process.pid).startswith(begins), "the command")
            yield process.pid
        finally:
            process.kill()

    def squat(self, supervisor: int) -> int:
        """A workload by the real steps, but by hand and at once, that pesters until it is killed.

        It is not in the gateway's sets, as there may be none yet. Returns its process id.
        """
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            with _last_stand():
                linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
                gateway_path = spaces(supervisor)[0]
                _join_users(supervisor)
                machine = Machine({"gateway": Namespace(gateway_path)})
                for step in workload_steps(Workload(BLOCKS[0], 99))[:-1]:
                    machine.do(step)
                linux.setns(machine.namespaces["workload"].fd, linux.CLONE_NEWNET)
                machine.namespaces["gateway"].close()
                os.write(tell, b".")
                probe.pester(60)
        os.close(tell)
        assert os.read(ready, 1), "there is no squatter"
        os.close(ready)
        return pid

    def stray(self, supervisor: int, first: int = 0) -> None:
        """Try to get out of every namespace of the supervisor, as whoever it runs as.

        The gateway's is the ``first``, those of workloads that are ready come after it.
        """
        for index, path in list(enumerate(spaces(supervisor)))[first:]:
            try:
                space = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # it has been given out meanwhile, and its thread is gone
            pid = os.fork()
            if pid == 0:
                with _last_stand():
                    _join_users(supervisor)
                    linux.setns(space, linux.CLONE_NEWNET)
                    # Tor's user may send TCP from the gateway: that is not guarded
                    probe.strays(streams=index > 0 or self.facts.tor_uid != 0)
            os.close(space)
            os.waitpid(pid, 0)
        helper = part(supervisor, "uplink")
        if helper is not None:  # it was woken by what was sent
            eventually(lambda: _state(helper) not in ("R", "D"), "the uplink to be done with it")

    # -- what must be so -----------------------------------------------------------------------

    def case(self, who: str, moment: Moment) -> None:
        self.cases.append(f"{time.strftime('%H:%M:%S')} {who} killed, {moment}")

    def as_before(self) -> None:
        changes = host_changes(self.host)
        assert not changes, f"the host is not as before:\n{changes}"

    def dies(self, gateway: Mortal, *workloads: int) -> None:
        """Kill the supervisor: its processes end, the gateway's namespace and its links go."""
        children = descendants(gateway.pid)
        gateway.kill()
        eventually(lambda: all(map(dead, children)), f"the end of {children}")
        eventually(lambda: not any(map(has_link, workloads)), "the workloads' links to go")

    def kill_part(self, gateway: Mortal, who: str) -> bool:
        """Kill Tor, or the uplink's helper, or delete its link if it has none. Was there one?"""
        pid = part(gateway.pid, who)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: dead(pid), f"the end of the {who}")
            return True
        if who == "tor" or self.spec.uplinks[0] in ("pasta", "slirp4netns"):
            return False
        delete = ("ip", "link", "delete", "uplink")
        space = spaces(gateway.pid)[0]
        return subprocess.run(("nsenter", f"--net={space}", *delete)).returncode == 0

    def works(self) -> None:
        """A command gets through Tor: the gateway is whole."""
        said = ""

        def fetch() -> bool:
            nonlocal said
            curl = self.run("curl", "-sS", "--max-time", "5", ORACLE)
            with subprocess.Popen(curl, stdout=-1, stderr=-1, text=True) as process:
                try:
                    out, errors = process.communicate(timeout=20)
                except subprocess.TimeoutExpired:
                    said += f"process {process.pid} hangs: {_stands(process.pid)}\n"
                    process.kill()
                    return False
            said += f"{time.strftime('%H:%M:%S')} {process.returncode} {errors}"
            return '"IsTor":true' in out

        try:
            eventually(fetch, "the gateway to work", 30)
        except AssertionError as error:
            error.add_note(said)
            raise

    def recovers(self, gateway: Mortal) -> None:
        """It works again by itself; then it goes down as ever."""
        eventually(self.answers, "the supervisor")
        self.ask(do="wait", timeout=20)
        self.works()
        self.ask(do="down")
        assert gateway.wait() == 0

    def nothing_left(self) -> None:
        """The next command comes and goes; then everything is as it was."""
        with self.up() as gateway:
            self.recovers(gateway)
        self.as_before()
        left = [str(path) for path in Path(paths.runtime()).rglob("*") if path.name != "gateways"]
        assert not left, left


# ---- what /proc tells --------------------------------------------------------------------------


def spaces(pid: int) -> list[str]:
    """The network namespaces of a process's threads, but our own: a gateway's is the first."""
    own = Path("/proc/self/ns/net").stat().st_ino
    found: dict[int, str] = {}
    for thread in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
        with suppress(FileNotFoundError):
            found.setdefault((thread / "ns/net").stat().st_ino, str(thread / "ns/net"))
    return [path for inode, path in found.items() if inode != own]


def descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def part(gateway: int, name: str) -> int | None:
    """The process id of ``tor``, or of the uplink's helper, if it runs."""
    names = ("tor",) if name == "tor" else ("past", "pass", "slirp4netns")  # pasta is passt
    for pid in descendants(gateway):
        with suppress(FileNotFoundError):
            if not dead(pid) and Path(f"/proc/{pid}/comm").read_text().startswith(names):
                return pid
    return None


def recorders(gateway: int) -> list[int]:
    """The processes that record a link of a gateway."""
    found = []
    for pid in descendants(gateway):
        with suppress(OSError):
            if b"nsrun.leak.record" in _command_line(pid) and not dead(pid):
                found.append(pid)
    return found


def dead(pid: int) -> bool:
    """Also when nobody has reaped it, as PID 1 of a container often does not."""
    return _state(pid) in ("", "Z")


def _state(pid: int) -> str:
    """As in proc(5): R, S, D, Z, T; nothing if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stands(pid: int) -> str:
    """What a process is doing: its command line, where it waits in the kernel, the system call."""
    files = (Path(f"/proc/{pid}/{name}") for name in ("cmdline", "wchan", "syscall"))
    return " ".join(file.read_text().replace("\0", " ")[:200] for file in files)


def has_link(pid: int) -> bool:
    """Whether a workload still has its link to the gateway."""
    return "eth0:" in Path(f"/proc/{pid}/net/dev").read_text()


def end(pid: int) -> None:
    """Kill a child of ours and wait for it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _join_users(pid: int) -> None:
    """Join the user namespace of a process, if it is not ours already."""
    users = Path(f"/proc/{pid}/ns/user")
    if not users.samefile("/proc/self/ns/user"):
        fd = os.open(users, os.O_RDONLY)
        linux.setns(fd, linux.CLONE_NEWUSER)
        os.close(fd)


@contextmanager
def _last_stand() -> Iterator[None]:
    """The life of a fork: it never returns."""
    code = 1
    try:
        yield
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        os._exit(code)
