"""Run a plan: for each step push its undo, then do it. No decision is made here.

The same loop and the same steps serve a command, a container and the host; what differs is the
namespace that a step names.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nsrun import netlink, ruleset
from nsrun.errors import MissingError, NsrunError, VerifyError
from nsrun.facts import search_path
from nsrun.netns import Namespace, namespace_at, own_namespace_of
from nsrun.steps import (
    AddLink,
    AttachNamespace,
    AwaitLink,
    DropElements,
    DropLink,
    DropNamespace,
    Ip,
    LoadRules,
    MakeDirectory,
    MakeNamespace,
    OpenNamespace,
    RemoveFile,
    SetElements,
    SetSysctl,
    StartRecorder,
    StartTor,
    StartUplink,
    Step,
    StopProcess,
    WriteFile,
)


class Describing(Protocol):
    """A step, of whichever plan."""

    def describe(self) -> str: ...


class Process(Protocol):
    """Something started that can be stopped; stopping what has ended is no error."""

    def stop(self) -> None: ...


@dataclass
class Machine:
    """The effects. ``starters`` make long-lived processes, from their step, by the name that they
    are stopped by; ``echo`` is told every step.
    """

    namespaces: dict[str, Namespace] = field(default_factory=dict)
    starters: dict[str, Callable[[Any], Process]] = field(default_factory=dict)
    echo: Callable[[str], None] = lambda _: None
    processes: dict[str, Process] = field(default_factory=dict)

    def do(self, step: Step) -> None:
        """Carry out one step. Raises NsrunError with the command that does the same by hand."""
        self.echo(step.describe())
        try:
            self._do(step)
        except OSError as error:
            by_ip = isinstance(step, Ip | AddLink)
            line = error.filename if by_ip and error.filename else first_line(step)
            raise NsrunError(f"do: {line}", error.strerror or error) from error

    def _do(self, step: Step) -> None:
        match step:
            case MakeNamespace() | AttachNamespace() | OpenNamespace():
                self.namespaces[step.name] = _namespace(step)
            case DropNamespace(name):
                if name in self.namespaces:
                    self.namespaces.pop(name).close()
            case SetSysctl(where, key, value):
                self.namespaces[where].call(_write_sysctl, key, value)
            case Ip() | AddLink() | DropLink():
                self._ip(step)
            case AwaitLink(where, link):
                self.namespaces[where].tell(netlink.NETLINK_ROUTE, netlink.await_up, link)
            case LoadRules(where, text):
                self._load(step, where, text)
            case SetElements(where, text):
                self.namespaces[where].tell(netlink.NETLINK_NETFILTER, netlink.elements, text)
            case DropElements(where, text):
                self.namespaces[where].tell(netlink.NETLINK_NETFILTER, _drop_elements, text)
            case MakeDirectory(path, mode, uid, gid):
                Path(path).mkdir(parents=True, exist_ok=True)
                os.chown(path, uid, gid)
                Path(path).chmod(mode)
            case WriteFile(path, text, mode, uid, gid):
                _write_file(path, text, mode, uid, gid)
            case RemoveFile(path):
                Path(path).unlink(missing_ok=True)
            case StartUplink() | StartTor() | StartRecorder():
                self.processes[step.name] = self.starters[step.name](step)
            case StopProcess(name):
                if name in self.processes:
                    self.processes.pop(name).stop()

    def _ip(self, step: Ip | AddLink | DropLink) -> None:
        match step:
            case Ip(_, commands):
                pass
            case AddLink(_, command):
                commands = (command,)
            case DropLink(_, link):
                commands = (f"link del {link}",)
        known = {f"@{name}": space.fd for name, space in self.namespaces.items()}
        try:
            self.namespaces[step.where].tell(netlink.NETLINK_ROUTE, netlink.ip, commands, known)
        except OSError as error:
            if not (isinstance(step, DropLink) and error.errno == errno.ENODEV):
                raise  # else it is gone already, and absence is success

    def _load(self, step: Step, where: str, text: str) -> None:
        self._run(step, where, ("nft", "-f", "-"), text)
        if table := re.match(r"table (inet \S+)", text):
            listed = self._run(step, where, ("nft", "list", "table", *table[1].split()), "")
            if ruleset.outline(listed) != ruleset.outline(text):
                raise VerifyError(
                    f"load the rules of the {where}",
                    "the kernel lists other rules than were sent",
                    "another program may be changing them; nothing was opened",
                )

    def _run(self, step: Step, where: str, command: tuple[str, ...], text: str) -> str:
        try:
            done = self.namespaces[where].call(
                subprocess.run,
                command,
                input=text,
                capture_output=True,
                text=True,
                env={**os.environ, "PATH": search_path(), "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise MissingError(
                f"run {command[0]}", "it is not installed", "run the project's set-up step"
            ) from error
        if done.returncode != 0:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
            raise NsrunError(f"set up the {where}", last[0], f"the step was: {first_line(step)}")
        return done.stdout


def first_line(step: Describing) -> str:
    """The first line of what a person would type; what is fed into it has any number."""
    return step.describe().partition("\n")[0].removesuffix(" <<'EOF'")


def apply(steps: Iterable[Step], do: Callable[[Step], None]) -> ExitStack:
    """Do all steps; what comes back takes them back when it is closed.

    When a step fails, all before it are taken back, in reverse, and its error is raised.
    """
    with ExitStack() as back:
        for step in steps:
            inverse = step.undo()
            if inverse is not None:
                back.callback(do, inverse)  # first: an undo that finds nothing is no error
            do(step)
        return back.pop_all()


def _namespace(step: MakeNamespace | AttachNamespace | OpenNamespace) -> Namespace:
    match step:
        case MakeNamespace():
            return Namespace()
        case AttachNamespace(_, pid, owner):
            return own_namespace_of(pid, owner)
        case OpenNamespace(_, fd, empty):
            return namespace_at(fd, empty)


def _drop_elements(kernel: socket.socket, text: str) -> None:
    for line in text.splitlines():
        with suppress(FileNotFoundError):  # absence is success
            netlink.elements(kernel, line)


def _write_sysctl(key: str, value: str) -> None:
    path = Path("/proc/sys") / key.replace(".", "/")
    try:
        path.write_text(value)
    except OSError as error:
        raise NsrunError(
            f"set {key} to {value}", error.strerror, "is /proc/sys read-only?"
        ) from error


def _write_file(path: str, text: str, mode: int, uid: int, gid: int) -> None:
    with suppress(FileNotFoundError):
        Path(path).unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "w") as file:
        os.fchown(fd, uid, gid)
        file.write(text)
