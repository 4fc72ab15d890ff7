"""Steps that only a whole host needs; the others are those of nsrun/steps.py. Pure.

Each undo succeeds when there is nothing to undo, so that a plan of which nobody knows how far it
got can be taken back as a whole, from its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsrun.host.policy import HostPolicy
from nsrun.steps import MakeDirectory, RemoveFile, WriteFile

# Where programs find who looks names up for them: systemd-resolved (nss-resolve), avahi (nss-mdns)
# and nscd.
DOORS = ("/run/systemd/resolve", "/run/avahi-daemon", "/run/nscd")
_MANAGER = "org.freedesktop.NetworkManager"
#: Reload() with DNS_RC: it writes resolv.conf anew, and does nothing else.
ASK_MANAGER = (
    *("busctl", "--quiet", "--auto-start=no", "--timeout=5", "call", _MANAGER),
    *("/org/freedesktop/NetworkManager", _MANAGER, "Reload", "u", "2"),
)


@dataclass(frozen=True)
class CloseHost:
    """The first effect: from here on nothing new leaves, until the table is taken away (P4)."""

    text: str

    def describe(self) -> str:
        return f"nft -f - <<'EOF'\n{self.text}EOF"

    def undo(self) -> HostStep | None:
        return OpenHost()


@dataclass(frozen=True)
class OpenHost:
    """The table goes, and with it the session: the network is as before."""

    def describe(self) -> str:
        return "nft delete table inet ttp"

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class OwnDirectory:
    """A directory that was not there, and goes with the session."""

    path: str
    mode: int
    uid: int
    gid: int

    def describe(self) -> str:
        return f"install -d -m {self.mode:o} -o {self.uid} -g {self.gid} {self.path}"

    def undo(self) -> HostStep | None:
        return RemoveDirectory(self.path)


@dataclass(frozen=True)
class RemoveDirectory:
    """With the files in it, which Tor has made; no directory below it is touched."""

    path: str

    def describe(self) -> str:
        return f"find {self.path} -maxdepth 1 -delete"

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class AddListeners:
    """Addresses on loopback for Tor to listen at, for others: HostPolicy.listeners.

    They are nobody's source address: by their scope, and by being deprecated (RFC 6724, 5).
    """

    addresses: tuple[str, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """For ``ip -batch``; again and again if need be."""
        how = {4: "/32 dev lo scope host", 6: "/128 dev lo nodad preferred_lft 0"}
        return tuple(
            f"address replace {one}{how[6 if ':' in one else 4]}" for one in self.addresses
        )

    def describe(self) -> str:
        return "\n".join(f"ip {command}" for command in self.commands)

    def undo(self) -> HostStep | None:
        return DropListeners(self.addresses)


@dataclass(frozen=True)
class DropListeners:
    addresses: tuple[str, ...]

    def describe(self) -> str:
        return "\n".join(f"ip address del {one} dev lo" for one in self.addresses)

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class StartUnit:
    """A volatile unit; done when it says that it is ready."""

    path: str
    text: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def describe(self) -> str:
        return (
            f"install -m 644 /dev/stdin {self.path} <<'EOF'\n{self.text}EOF\n"
            f"systemctl daemon-reload\nsystemctl start {self.name}"
        )

    def undo(self) -> HostStep | None:
        return StopUnit(self.path)


@dataclass(frozen=True)
class StopUnit:
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def describe(self) -> str:
        return f"systemctl stop {self.name}\nrm -f {self.path}\nsystemctl daemon-reload"

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class TorifyHost:
    """The full table in the place of the closed one, in one transaction, and read back (P12)."""

    text: str
    closed: str
    policy: HostPolicy

    def describe(self) -> str:
        return f"nft -f - <<'EOF'\n{self.text}EOF"

    def undo(self) -> HostStep | None:
        return CutHost(self.closed, self.policy)


@dataclass(frozen=True)
class CutHost:
    """Closed again; then what was redirected is ended, before it could go on in clear.

    That is every socket whose connection was led to a port of Tor's, long idle and half closed
    ones as well, and these connections in conntrack's table, and nobody else's (P9). Of a LAN's it
    is the socket of Tor's: who is at the other end is sent a reset.
    """

    closed: str
    policy: HostPolicy

    def describe(self) -> str:
        trans, dns = self.policy.trans_port, self.policy.dns_port
        return (
            f"nft -f - <<'EOF'\n{self.closed}EOF\n"
            f"ss --kill (what was redirected to port {trans})\n"
            f"conntrack --delete (what was redirected to ports {trans} and {dns})"
        )

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class CoverFile:
    """``target``, a symlink itself, reads as ``source``, a file of ``text``, while it is mounted.

    ``manager``: it is NetworkManager's, which shall write it anew, when it can again.
    """

    target: str
    source: str
    text: str
    manager: bool

    def describe(self) -> str:
        itself = "--options X-mount.nocanonicalize=target"
        return f"mount --bind --make-private {itself} {self.source} {self.target}"

    def undo(self) -> HostStep | None:
        return UncoverFile(self.target, self.source, self.text, self.manager)


@dataclass(frozen=True)
class UncoverFile:
    """What was written to ``target`` meanwhile is written to the file beneath, if it is no link."""

    target: str
    source: str
    text: str
    manager: bool

    def describe(self) -> str:
        ask = f"\n{' '.join(ASK_MANAGER)} (if it has another text)" if self.manager else ""
        return f"umount {self.target}{ask}"

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class LeadResolved:
    """systemd-resolved reads a drop-in more, and forgets what it knew."""

    path: str
    text: str

    def describe(self) -> str:
        return (
            f"install -D -m 644 /dev/stdin {self.path} <<'EOF'\n{self.text}EOF\n"
            "systemctl restart systemd-resolved.service"
        )

    def undo(self) -> HostStep | None:
        return FreeResolved(self.path)


@dataclass(frozen=True)
class FreeResolved:
    path: str

    def describe(self) -> str:
        return f"rm -f {self.path}\nsystemctl restart systemd-resolved.service"

    def undo(self) -> HostStep | None:
        return None


@dataclass(frozen=True)
class BarUsers:
    """Name services that would ask for these users as somebody else, in clear, take no connection
    of theirs any more (P6): their sockets have access lists (acl(5)), and so will new ones."""

    users: tuple[int, ...]

    def describe(self) -> str:
        return (
            f"setfacl -m {_entries(self.users, 'r--')} (sockets in {', '.join(DOORS)})\n"
            f"setfacl -d -m {_entries(self.users, 'r-x')} {' '.join(DOORS)}"
        )

    def undo(self) -> HostStep | None:
        return FreeUsers(self.users)


@dataclass(frozen=True)
class FreeUsers:
    users: tuple[int, ...]

    def describe(self) -> str:
        return f"setfacl -R -x {_entries(self.users)} {' '.join(DOORS)}"

    def undo(self) -> HostStep | None:
        return None


def _entries(users: tuple[int, ...], allowed: str = "") -> str:
    return ",".join(f"u:{user}{allowed and ':' + allowed}" for user in users)


HostStep = (
    CloseHost
    | OpenHost
    | OwnDirectory
    | RemoveDirectory
    | AddListeners
    | DropListeners
    | MakeDirectory
    | WriteFile
    | RemoveFile
    | StartUnit
    | StopUnit
    | TorifyHost
    | CutHost
    | CoverFile
    | UncoverFile
    | LeadResolved
    | FreeResolved
    | BarUsers
    | FreeUsers
)
