"""Labs from outside: start, find, enter and end them. Nothing here prints.

Files of the lab NAME, in <runtime>/labs/NAME: ``lock`` (held for as long as its holder lives),
``log`` (of the holder), ``lab.json`` (once it is up), ``ca-bundle.pem``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import nsrun
from nsrun import facts, linux, paths
from nsrun.errors import NsrunError, UsageError
from nsrun.lab.description import Description, Order
from nsrun.lab.programs import LOGS, RUN, lock, wait_for
from nsrun.lab.topology import NAMESPACES, check_name

Progress = Callable[[int, str], None]

SUPERVISOR = "supervisor"

#: Where distributions keep the certificates they trust, all in one file.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


ABSENT = (FileNotFoundError, NotADirectoryError)  # also where the runtime directory is a file
SILENCE = 120.0  # seconds that a holder may say nothing: longer than each of its own waits

#: Tell OpenSSL, curl, Python's requests and git which certificates to trust.
CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO")


@dataclass(frozen=True)
class Status:
    """A running lab: what its holder said, and what can be seen of it now."""

    lab: Description
    memory_mb: float  # proportional set size of the network: relays, onion service, web, DNS
    dead: tuple[str, ...]  # programs that have ended, and should not have


def up(name: str, progress: Progress, *, gateway: bool = True, onion: bool = False) -> Description:
    """Start the lab ``name``; return when its network, and its gateway, carry traffic.

    The onion service is published about 1.5 s later; ``onion`` waits for that as well.
    Raises UsageError when the lab is up already, and NsrunError when it does not come up; then
    nothing of it remains.
    """
    with prepared(name, gateway=gateway, onion=onion) as (order, file):
        return _start(order, file, progress)


@contextmanager
def prepared(name: str, *, gateway: bool, onion: bool) -> Iterator[tuple[Order, IO[str]]]:
    """What a holder is told, and the lock that it inherits. Raises UsageError if it is held."""
    started = time.time()
    directory = _directory(name)
    for parent in (Path(paths.runtime()), _labs(), directory):
        paths.make_private(str(parent))
        parent.chmod(0o711)  # ca-bundle.pem is for every user; the rest is guarded one by one
    paths.make_private(paths.cache())
    with (directory / "lock").open("a+") as file:
        try:
            wait_for(lambda: lock(file), 0.2, "the lock")  # _holder() takes it for an instant
        except NsrunError:
            raise UsageError(
                f"start the lab {name}", "it is up already", f"ttp lab down {name}"
            ) from None
        file.truncate(0)
        (directory / "lab.json").unlink(missing_ok=True)  # of a lab that was killed
        order = Order(
            name=name,
            directory=str(directory),
            runtime=paths.runtime(),
            cache=paths.cache(),
            gateway=paths.gateway(name) if gateway else "",
            onion=onion,
            ca_bundle=next((path for path in SYSTEM_BUNDLES if os.access(path, os.R_OK)), ""),
            started=started,
        )
        yield order, file


def down(name: str) -> None:
    """End a lab and all programs in it, and remove its files.

    Raises UsageError when there is none; a lab that was killed counts as one.
    """
    try:
        holder = _holder(_directory(name))
    except ABSENT:
        raise UsageError(f"end the lab {name}", "there is none", "ttp lab status") from None
    if holder is not None:
        with suppress(ProcessLookupError, FileNotFoundError):  # it may end by itself meanwhile
            _end(holder)
    _forget(name)


def names() -> list[str]:
    """All labs that are up."""
    try:
        found = sorted(_labs().iterdir())
    except ABSENT:
        return []
    return [path.name for path in found if (path / "lab.json").exists() and _holder(path)]


def describe(name: str) -> Description:
    """Raises UsageError when the lab is not up."""
    directory = _directory(name)
    with suppress(*ABSENT):
        if _holder(directory):
            return Description(**json.loads((directory / "lab.json").read_text()))
    raise UsageError(f"find the lab {name}", "it is not up", f"ttp lab up {name}")


def status(name: str) -> Status:
    """Raises UsageError when the lab is not up."""
    lab = describe(name)
    sizes = {program: _memory(pid) for program, pid in lab.programs.items()}
    network = sum(size or 0 for program, size in sizes.items() if program != SUPERVISOR)
    dead = tuple(program for program, size in sizes.items() if size is None)
    return Status(lab, round(network / 1024, 1), dead)


def logs(name: str) -> list[str]:
    """Names of all logs of a lab: of its programs, and of its servers (web, lan)."""
    return sorted(path.stem for path in _inside(describe(name), LOGS).glob("*.log"))


def log(name: str, program: str) -> str:
    """What a program of the lab has logged. Raises UsageError when there is no such log."""
    if program not in logs(name):
        known = ", ".join(logs(name))
        raise UsageError(f"show the log of {program}", "there is none", f"there are: {known}")
    return _inside(describe(name), LOGS / f"{program}.log").read_text(errors="replace")


def enter(name: str, namespace: str, command: list[str]) -> NoReturn:
    """Become ``command``, run inside the lab, as its root. Raises OSError if it cannot be run."""
    lab = describe(name)
    if namespace not in NAMESPACES:
        known = ", ".join(NAMESPACES)
        raise UsageError(f"enter {namespace}", "no such namespace", f"one of {known}")
    here = os.readlink("/proc/self/cwd")  # noqa: PTH115  getcwd(3) fails if it was removed
    runtime = paths.runtime()  # before the change of user
    join(lab.pid, namespace)
    with suppress(OSError):
        os.chdir(here)
    os.environ.update(dict.fromkeys(CA_VARIABLES, lab.ca_bundle))
    # so that ttp finds its gateways, and what it keeps goes with the lab
    os.environ |= {"TTP_RUNTIME_DIR": runtime, "TTP_STATE_DIR": str(RUN / "state")}
    os.environ["PATH"] = facts.search_path()  # root's, who we are there
    os.execvp(command[0], command)


def join(holder: int, namespace: str) -> None:
    """Move this process, of one thread, into a namespace of the lab held by process ``holder``."""
    kinds = [("mnt", linux.CLONE_NEWNS)]
    if not Path(f"/proc/{holder}/ns/user").samefile("/proc/self/ns/user"):
        kinds.insert(0, ("user", linux.CLONE_NEWUSER))
    opened = [(os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY), flag) for kind, flag in kinds]
    for fd, flag in opened:
        linux.setns(fd, flag)
        os.close(fd)
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    linux.setns(fd, linux.CLONE_NEWNET)
    os.close(fd)
    if namespace == "inet":  # where the LAN's resolver is out of reach
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(str(RUN / "resolv.inet"), "/etc/resolv.conf", flags=linux.MS_BIND)


def _start(order: Order, file: IO[str], progress: Progress) -> Description:
    """Start the holder, which inherits the lock, and follow it until it is ready."""
    with Path(order.directory, "log").open("w") as log_file:
        holder = subprocess.Popen(
            [sys.executable, "-P", "-m", "nsrun.lab"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            pass_fds=(file.fileno(),),
            start_new_session=True,  # a Ctrl-C at this terminal is not for the lab
            env=_environment(),
            text=True,
        )
    file.write(str(holder.pid))
    file.flush()
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        with holder.stdin as stdin:
            json.dump(dataclasses.asdict(order), stdin)
        with holder.stdout as stdout:
            for message in _messages(stdout.fileno(), order.name):
                if "ready" in message:
                    progress(100, "up")
                    # it outlives us: no warning about that, please
                    holder.returncode = 0
                    return describe(order.name)
                if "error" in message:
                    raise NsrunError(**message["error"])
                progress(message["progress"], message["summary"])
        words = Path(order.directory, "log").read_text().strip().splitlines()
        raise NsrunError(f"start the lab {order.name}", words[-1] if words else "its holder died")
    except BaseException:
        holder.terminate()
        holder.send_signal(signal.SIGCONT)  # one that is stopped hears nothing else
        holder.wait()
        _forget(order.name)
        raise


def _messages(pipe: int, name: str) -> Iterator[dict[str, Any]]:
    """What a holder says while it boots. Raises NsrunError after SILENCE."""
    said = b""
    while select.select([pipe], [], [], SILENCE)[0]:
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *lines, said = (said + data).split(b"\n")
        yield from map(json.loads, lines)
    raise NsrunError(f"start the lab {name}", f"its holder is silent for {SILENCE:g} s")


def _environment() -> dict[str, str]:
    """A long-lived process keeps nothing of the shell that happened to start it."""
    package = Path(nsrun.__file__).parents[1]
    return {"PATH": facts.search_path(), "PYTHONPATH": str(package), "LANG": "C.UTF-8"}


def _end(pid: int) -> None:
    """End a holder, then whatever else is still running in its namespaces."""
    with ExitStack() as held:

        def hold(path: Path | str) -> int:
            fd = os.open(path, os.O_RDONLY)
            held.callback(os.close, fd)
            return os.fstat(fd).st_ino

        holder = os.pidfd_open(pid)
        held.callback(os.close, holder)
        # while they are open, no other namespace can have these numbers
        own = {hold("/proc/self/ns/net"), hold("/proc/self/ns/mnt")}
        theirs = {hold(f"/proc/{pid}/ns/mnt"), hold(f"/proc/{pid}/ns/net")}
        with suppress(FileNotFoundError):  # it may not have come that far
            root = Path(f"/proc/{pid}/root/run/netns")
            theirs |= {hold(root / name) for name in NAMESPACES}
        signal.pidfd_send_signal(holder, signal.SIGCONT)  # one that is stopped hears nothing else
        signal.pidfd_send_signal(holder, signal.SIGTERM)
        if not _ended(holder, 10):
            signal.pidfd_send_signal(holder, signal.SIGKILL)
            _ended(holder, 10)
        wait_for(lambda: not _kill_in(theirs - own), 10, "the lab's last program to end")


def _ended(pidfd: int, seconds: float) -> bool:
    watch = select.poll()
    watch.register(pidfd, select.POLLIN)
    return bool(watch.poll(seconds * 1000))


def _kill_in(namespaces: set[int]) -> bool:
    """Kill every process in these namespaces; return whether there was one."""
    found = False
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            inside = {(process / "ns" / kind).stat().st_ino for kind in ("net", "mnt")}
            if inside & namespaces:
                found = True
                os.kill(int(process.name), signal.SIGKILL)
    return found


def _forget(name: str) -> None:
    shutil.rmtree(_directory(name), ignore_errors=True)
    shutil.rmtree(paths.gateway(name), ignore_errors=True)


def _holder(directory: Path) -> int | None:
    """The holder's process id, while it lives. Raises FileNotFoundError if there never was one."""
    with (directory / "lock").open() as file:
        return None if lock(file) else int(file.read() or 0) or None


def _memory(pid: int) -> int | None:
    """Proportional set size in KiB; None for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), None
    )


def _inside(lab: Description, path: Path) -> Path:
    """A path of the lab's private file system, from outside."""
    return Path(f"/proc/{lab.pid}/root{path}")


def _labs() -> Path:
    return Path(paths.runtime(), "labs")


def _directory(name: str) -> Path:
    if not check_name(name):
        raise UsageError(f"use {name!r} as the name of a lab", "not 2 to 12 of a-z, 0-9 and -")
    return _labs() / name
