"""The effects of a whole host's steps, on top of those of every plan (nsrun/apply.py)."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from nsrun import ruleset
from nsrun.apply import Machine, first_line
from nsrun.errors import MissingError, NsrunError, VerifyError
from nsrun.facts import search_path
from nsrun.host import cover, doors, flows
from nsrun.host.steps import (
    DOORS,
    AddListeners,
    BarUsers,
    CloseHost,
    CoverFile,
    CutHost,
    DropListeners,
    FreeResolved,
    FreeUsers,
    HostStep,
    LeadResolved,
    OpenHost,
    OwnDirectory,
    RemoveDirectory,
    StartUnit,
    StopUnit,
    TorifyHost,
    UncoverFile,
)
from nsrun.steps import Step

RESOLVED_UNIT = "systemd-resolved.service"
TABLE = "inet ttp"


class HostMachine:
    """``echo`` is told every step; ``rules`` is the fingerprint of the table loaded last."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.echo = echo
        self.rules = ""
        self._common = Machine()

    def do(self, step: HostStep | Step) -> None:
        """Carry out one step. Raises NsrunError with the command that does the same by hand."""
        self.echo(step.describe())
        try:
            self._do(step)
        except OSError as error:
            raise NsrunError(f"do: {first_line(step)}", error.strerror or error) from error

    def _do(self, step: HostStep | Step) -> None:
        match step:
            case CloseHost(text) | TorifyHost(text):
                self.rules = load(text)
            case OpenHost():
                load(f"table {TABLE}\ndelete table {TABLE}\n")  # never fails for want of one
            case CutHost(closed, policy):
                if listed():  # else nothing was redirected, or not by us
                    load(closed)
                    flows.cut(policy)
            case AddListeners() | DropListeners():
                _set_listeners(step)
            case OwnDirectory(path, mode, uid, gid):
                Path(path).mkdir(exist_ok=True)
                os.chown(path, uid, gid)
                Path(path).chmod(mode)
            case RemoveDirectory(path):
                _remove_directory(path)
            case StartUnit(path, text):
                _write(path, text)
                systemctl("daemon-reload")
                systemctl("start", step.name)
            case StopUnit(path):
                _stop(path, step.name)
            case CoverFile(target, source):
                cover.cover(target, source)
            case UncoverFile(target, source, text, manager):
                cover.uncover(target, source, text)
                if manager:
                    cover.ask_manager(target)
            case LeadResolved(path, text):
                Path(path).parent.mkdir(exist_ok=True)
                _write(path, text)
                restart(RESOLVED_UNIT)
            case FreeResolved(path):
                _free_resolved(path)
            case BarUsers(users) | FreeUsers(users):
                (doors.bar if isinstance(step, BarUsers) else doors.free)(DOORS, users)
            case _:
                self._common.do(step)


def load(text: str) -> str:
    """One nft transaction; a table in it is read back and compared (P12). Raises NsrunError.

    The fingerprint is of what was compared, whoever changes it afterwards.
    """
    nft(("-f", "-"), text)
    wanted, there = ruleset.outline(text), listed()
    if wanted and ruleset.outline(there) != wanted:
        raise _tampered()
    return _digest(there)


def fingerprint() -> str:
    """Of our table, as the kernel lists it: a rule more, or one that is weakened, changes it."""
    return _digest(listed())


def _digest(table: str) -> str:
    return sha256(table.encode()).hexdigest()


def verify(wanted: str) -> None:
    """Raises VerifyError unless our table still has this fingerprint."""
    if fingerprint() != wanted:
        raise _tampered()


def _tampered() -> VerifyError:
    return VerifyError(
        "rely on the rules of the host",
        "the kernel lists other rules than were sent",
        "another program may be changing them; `ttp restart` loads them anew",
    )


def listed() -> str:
    """Our table as the kernel lists it; empty if there is none."""
    if TABLE not in nft(("list", "tables")):
        return ""
    return nft(("--stateless", "list", "table", *TABLE.split()))


def _set_listeners(step: AddListeners | DropListeners) -> None:
    if isinstance(step, AddListeners):
        ip("-batch", "-", text="\n".join(step.commands))
        return
    for address in loopback().intersection(step.addresses):
        ip("address", "del", address, "dev", "lo")


def loopback() -> frozenset[str]:
    """Addresses of loopback. Raises NsrunError."""
    (link,) = json.loads(ip("-json", "address", "show", "dev", "lo"))
    return frozenset(one["local"] for one in link["addr_info"])


def ip(*arguments: str, text: str = "") -> str:
    """What ip(8) printed. Raises NsrunError."""
    return _output("read or change addresses of the host", "iproute2", ("ip", *arguments), text)


def nft(arguments: Sequence[str], text: str = "") -> str:
    """What nft(8) printed. Raises NsrunError."""
    return _output("load the rules of the host", "nftables", ("nft", *arguments), text)


def _output(doing: str, package: str, command: Sequence[str], text: str) -> str:
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C"}
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        cause, hint = f"{command[0]} is not installed", f"apt-get install {package}"
        raise MissingError(doing, cause, hint) from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise NsrunError(doing, said, f"the step was: {' '.join(command)}")
    return done.stdout


def systemctl(*arguments: str) -> None:
    """Raises NsrunError with what it said."""
    done = subprocess.run(("systemctl", "--quiet", *arguments), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        unit = arguments[-1]
        raise NsrunError(f"systemctl {' '.join(arguments)}", said, f"journalctl --unit {unit}")


def is_active(unit: str) -> bool:
    """Whether it runs, or is about to: systemd starts some again by itself."""
    states = ("active", "activating", "reloading")
    done = subprocess.run(("systemctl", "is-active", unit), capture_output=True, text=True)
    return done.stdout.strip() in states


def main_process(unit: str) -> int:
    """0 if it does not run; needs no privilege."""
    command = ("systemctl", "show", "--property=MainPID", "--value", unit)
    return int(subprocess.run(command, capture_output=True, text=True).stdout.strip() or 0)


def restart(unit: str, *, wait: bool = True) -> None:
    """systemd starts nothing more often than a few times in ten seconds, if it is not told to."""
    subprocess.run(("systemctl", "--quiet", "reset-failed", unit), capture_output=True)
    systemctl("restart", *(() if wait else ("--no-block",)), unit)


def _write(path: str, text: str) -> None:
    """Anew, for all to read: no link that lies there is followed."""
    Path(path).unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)


def _stop(path: str, name: str) -> None:
    """A slice with commands in it stays until these have ended: they are not ours to end."""
    if Path(path).exists():
        busy = Path(f"/sys/fs/cgroup/{name}/cgroup.events")  # of a slice (cgroups(7))
        if not (busy.exists() and "populated 1" in busy.read_text()):
            systemctl("stop", name)
        Path(path).unlink()
        systemctl("daemon-reload")
        # a unit that had failed is remembered without its file
        subprocess.run(("systemctl", "--quiet", "reset-failed", name), capture_output=True)


def _free_resolved(path: str) -> None:
    """One that does not run has been stopped by an undo that was killed, or that failed."""
    file = Path(path)
    if file.exists() or not is_active(RESOLVED_UNIT):
        file.unlink(missing_ok=True)
        restart(RESOLVED_UNIT)
    with suppress(OSError):  # somebody else's drop-ins are in it
        file.parent.rmdir()


def _remove_directory(path: str) -> None:
    try:
        for entry in os.scandir(path):
            if not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)
        Path(path).rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # else somebody else has begun to use it
            raise
