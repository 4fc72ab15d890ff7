"""The closed set of steps that a plan is made of: frozen values that can be printed. Pure.

Every step says in which network namespace it runs, by name: ``host``, ``gateway``, ``workload``.
``describe()`` is the line for ``ttp plan`` and ``-v``: a command that does the same by hand.
``undo()`` is the step that takes it back; each undo step succeeds when there is nothing to undo.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from nsrun.spec import LabUplink


@dataclass(frozen=True)
class MakeNamespace:
    """A new network namespace. It has no name in the kernel; it goes with its last user."""

    name: str

    def describe(self) -> str:
        return f"ip netns add {self.name}"

    def undo(self) -> Step | None:
        return DropNamespace(self.name)


@dataclass(frozen=True)
class AttachNamespace:
    """The network namespace that process ``pid`` made: new, empty, and of user ``owner``."""

    name: str
    pid: int
    owner: int

    def describe(self) -> str:
        return f"ip netns attach {self.name} {self.pid}"

    def undo(self) -> Step | None:
        return DropNamespace(self.name)


@dataclass(frozen=True)
class OpenNamespace:
    """The network namespace of descriptor ``fd``, which somebody else made and keeps.

    One that is to be set up (``empty``) has no link but loopback.
    """

    name: str
    fd: int
    empty: bool

    def describe(self) -> str:
        return f"ip netns attach {self.name} (descriptor {self.fd})"

    def undo(self) -> Step | None:
        return DropNamespace(self.name)


@dataclass(frozen=True)
class DropNamespace:
    name: str

    def describe(self) -> str:
        return f"ip netns del {self.name}"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class SetSysctl:
    """A kernel parameter of one namespace; it goes with the namespace. Source: ip-sysctl.rst."""

    where: str
    key: str
    value: str

    def describe(self) -> str:
        return f"ip netns exec {self.where} sysctl -w {self.key}={self.value}"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class Ip:
    """Lines of ip(8), in a namespace; ``@name`` stands for another one. See nsrun/netlink.py.

    Links, addresses and routes made here go with the namespace they are in.
    """

    where: str
    commands: tuple[str, ...]

    def describe(self) -> str:
        lines = (f"ip -n {self.where} {command.replace('@', '')}" for command in self.commands)
        return "\n".join(lines)

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class AddLink:
    """A link from a namespace that outlives ours: ``command`` is of ip(8), ``peer`` its other end.

    It goes with either end, wherever that has been moved to.
    """

    where: str
    command: str
    peer: str

    def describe(self) -> str:
        return f"ip -n {self.where} {self.command.replace('@', '')}"

    def undo(self) -> Step | None:
        return DropLink("gateway", self.peer)


@dataclass(frozen=True)
class DropLink:
    where: str
    link: str

    def describe(self) -> str:
        return f"ip -n {self.where} link del {self.link}"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class AwaitLink:
    """A link that is up passes packets some ms later; those that are sent before are lost."""

    where: str
    link: str

    def describe(self) -> str:
        return f"until ip -n {self.where} link show {self.link} | grep 'state UP'; do :; done"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class LoadRules:
    """One nft transaction. A whole table is read back afterwards and compared (P12).

    It goes with its namespace.
    """

    where: str
    text: str

    def describe(self) -> str:
        return f"ip netns exec {self.where} nft -f - <<'EOF'\n{self.text}EOF"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class SetElements:
    """Adds and deletes elements of sets and maps, in one transaction; ``inverse`` takes it back."""

    where: str
    text: str
    inverse: str

    def describe(self) -> str:
        return f"ip netns exec {self.where} nft -f - <<'EOF'\n{self.text}EOF"

    def undo(self) -> Step | None:
        return DropElements(self.where, self.inverse)


@dataclass(frozen=True)
class DropElements:
    """Takes elements out of sets and maps; somebody else may have flushed them already."""

    where: str
    text: str

    def describe(self) -> str:
        return f"ip netns exec {self.where} nft -f - <<'EOF'\n{self.text}EOF"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class MakeDirectory:
    """A directory of ours; it is kept (guards) or removed with the gateway's runtime directory."""

    path: str
    mode: int
    uid: int
    gid: int

    def describe(self) -> str:
        return f"install -d -m {self.mode:o} -o {self.uid} -g {self.gid} {self.path}"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class WriteFile:
    path: str
    text: str
    mode: int
    uid: int
    gid: int

    def describe(self) -> str:
        owner = f"-m {self.mode:o} -o {self.uid} -g {self.gid}"
        return f"install {owner} /dev/stdin {self.path} <<'EOF'\n{self.text}EOF"

    def undo(self) -> Step | None:
        return RemoveFile(self.path)


@dataclass(frozen=True)
class RemoveFile:
    path: str

    def describe(self) -> str:
        return f"rm -f {self.path}"

    def undo(self) -> Step | None:
        return None


@dataclass(frozen=True)
class StartUplink:
    """The first of ``candidates`` that gives the gateway an address and a default route."""

    candidates: tuple[str | LabUplink, ...]

    name = "uplink"

    def describe(self) -> str:
        names = [
            c if isinstance(c, str) else f"lab ({c.address} on {c.bridge})" for c in self.candidates
        ]
        return f"start uplink: {', else '.join(names)}"

    def undo(self) -> Step | None:
        return StopProcess(self.name)


@dataclass(frozen=True)
class StartTor:
    """Tor in the gateway namespace: no capability, no new privileges, dies with the supervisor."""

    torrc: str
    uid: int
    gid: int
    supervisor: int

    name = "tor"

    def command(self) -> tuple[str, ...]:
        """The whole command line: setpriv(1) gives up what Tor does not need, then execs it.

        No signal comes of a supervisor that died before it was asked for: hence the test.
        """
        user = (f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups")
        return (
            *("setpriv", *(user if self.uid else ())),  # rootless: there is no other user to be
            *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--pdeathsig=KILL"),
            *("sh", "-c", f'[ $PPID = {self.supervisor} ] && exec "$@"', "sh"),
            *("tor", "--defaults-torrc", "/dev/null", "--hush", "-f", self.torrc),
        )

    def describe(self) -> str:
        return f"ip netns exec gateway {shlex.join(self.command())}"

    def undo(self) -> Step | None:
        return StopProcess(self.name)


@dataclass(frozen=True)
class StartRecorder:
    """All that goes over ``link``, until its end, into ``file``, which the client has opened."""

    link: str
    file: str

    name = "recorder"

    def describe(self) -> str:
        return f"ip netns exec gateway tcpdump -i {self.link} -w {self.file}"

    def undo(self) -> Step | None:
        return StopProcess(self.name)


@dataclass(frozen=True)
class StopProcess:
    name: str

    def describe(self) -> str:
        return f"stop {self.name}"

    def undo(self) -> Step | None:
        return None


Step = (
    MakeNamespace
    | AttachNamespace
    | OpenNamespace
    | DropNamespace
    | SetSysctl
    | Ip
    | AddLink
    | DropLink
    | AwaitLink
    | LoadRules
    | SetElements
    | DropElements
    | MakeDirectory
    | WriteFile
    | RemoveFile
    | StartUplink
    | StartTor
    | StartRecorder
    | StopProcess
)
