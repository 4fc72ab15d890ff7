"""Uplinks that the kernel carries, and the host's side of such a one: its table and forwarding.

On the host, names are the state: link ``ttp-<name>``, table ``inet ttp_<name>``, and in the
comments of the table's rules the sysctls that were off before. So a crash leaves all that its
undoing needs. The functions work on the network namespace of the calling thread, and none of them
sends a packet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nsrun.errors import MissingError, NsrunError, UsageError
from nsrun.facts import search_path

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = {"pasta": "passt", "ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}

Command = tuple[str, ...]

INTERFACE = "uplink"
MTU = 65520  # slirp4netns allows 65521

GOING = 2.0  # seconds for the link of a killed gateway to go

_UNDO = "ttp undo: "
_SYSCTLS = Path("/proc/sys/net")


@dataclass(frozen=True)
class Lab:
    """A veth into the namespace at ``netns`` of a lab, on the bridge there.

    ``address`` and ``address6`` carry their prefix length.
    """

    name: str
    netns: str
    bridge: str
    address: str
    router: str
    address6: str = ""
    router6: str = ""
    kind: ClassVar[str] = "lab"

    @property
    def peer(self) -> str:
        return f"gw-{self.name}"[:15]  # IFNAMSIZ

    @property
    def families(self) -> tuple[int, ...]:
        return (4, 6) if self.address6 else (4,)

    def helper(self) -> Command:
        return ()

    def links(self, gateway: str) -> tuple[Command, ...]:
        there = ("nsenter", f"--net={self.netns}", "ip", "link", "set", self.peer)
        return (
            _veth(self.peer, gateway, MTU, self.netns),
            (*there, "addrgenmode", "none"),
            (*there, "master", self.bridge, "up"),
            (*there, "type", "bridge_slave", "flood", "off"),  # as on the lab's own ports
        )

    def addresses(self) -> tuple[Command, ...]:
        return link_addresses(self.address, self.router, self.address6, self.router6)


@dataclass(frozen=True)
class Veth:
    """A veth ``ttp-<name>`` to the host, which forwards and masquerades the gateway's TCP only.

    A host that drops forwarded packets by a rule of its own (Docker, ufw) drops these as well: an
    accept in our table does not overrule another table's drop.
    """

    name: str
    address: str
    router: str
    address6: str = ""
    router6: str = ""
    kind: ClassVar[str] = "veth"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]{1,11}", self.name):
            raise UsageError("make a veth uplink", f"{self.name!r} does not fit into a link's name")

    @property
    def peer(self) -> str:
        return f"ttp-{self.name}"

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(a for a in (self.address, self.address6) if a)

    @property
    def families(self) -> tuple[int, ...]:
        return (4, 6) if self.address6 else (4,)

    def helper(self) -> Command:
        return ()

    def links(self, gateway: str) -> tuple[Command, ...]:
        prefix, prefix6 = self.address.partition("/")[2], self.address6.partition("/")[2]
        own6 = ("ip", "address", "add", f"{self.router6}/{prefix6}", "dev", self.peer, "nodad")
        return (
            _veth(self.peer, gateway, 1500, ""),  # the host's wire has no more
            ("ip", "link", "set", self.peer, "addrgenmode", "none"),
            ("ip", "address", "add", f"{self.router}/{prefix}", "dev", self.peer),
            *((own6,) if self.address6 else ()),
            ("ip", "link", "set", self.peer, "up"),
        )

    def addresses(self) -> tuple[Command, ...]:
        return link_addresses(self.address, self.router, self.address6, self.router6)


def rules(name: str, addresses: Sequence[str], opened: Sequence[str]) -> str:
    """The host's table; ``opened`` are the sysctls that we turned on for the way back.

    An interface that did not forward before still forwards to our links only.
    """
    table, peer = f"ttp_{name}", f"ttp-{name}"
    sources = [
        f"{'ip6' if ':' in address else 'ip'} saddr {address.split('/')[0]}"
        for address in addresses
    ]
    nd = "nd-neighbor-solicit, nd-neighbor-advert"
    closed = [
        f'meta nfproto {sysctl.split("/")[0]} iifname "{sysctl.split("/")[2]}" '
        f'oifname != "ttp-*" drop comment "{_UNDO}{sysctl}"'
        for sysctl in opened
    ]
    return "\n".join(
        (
            f"table inet {table}",
            f"delete table inet {table}",
            f"table inet {table} {{",
            "  chain input {",
            "    type filter hook input priority filter; policy accept;",
            f'    iifname "{peer}" icmpv6 type {{ {nd} }} accept comment "the link itself"',
            f'    iifname "{peer}" drop comment "P5 no service of the host"',
            "  }",
            "  chain forward {",
            "    type filter hook forward priority filter; policy accept;",
            *(f'    iifname "{peer}" {s} meta l4proto tcp accept' for s in sources),
            f'    iifname "{peer}" drop comment "P3 nothing but the TCP of Tor"',
            f'    oifname "{peer}" ct state established,related accept',
            f'    oifname "{peer}" drop comment "nobody connects to the gateway"',
            *(f"    {line}" for line in closed),
            "  }",
            "  chain postrouting {",
            "    type nat hook postrouting priority srcnat; policy accept;",
            *(f'    oifname != "{peer}" {source} masquerade' for source in sources),
            "  }",
            "}",
            "",
        )
    )


def egress(family: int) -> str | None:
    """The host's interface towards the internet, by its routing policy; no packet is sent."""
    target = {4: "198.51.100.1", 6: "2001:db8::1"}[family]  # documentation: nobody's special route
    found = ask(("ip", f"-{family}", "-json", "route", "get", target))
    return json.loads(found)[0].get("dev") if found else None


def sweep_veth(own: str = "") -> list[str]:
    """Undo what veth uplinks of killed gateways left on the host; the names of their tables.

    For the link of ``own``, which nobody alive should have, it waits a moment: the kernel may be
    about to remove it.
    """
    deadline = time.monotonic() + GOING
    while _has_link(f"ttp_{own}") and time.monotonic() < deadline:
        time.sleep(0.01)  # the interval of the poll
    left = left_tables()
    for table in left:
        close_host(table)
    return left


def left_tables() -> list[str]:
    """Tables of gateways that are gone: the links go with the gateway, the tables do not."""
    return [table for table in _tables() if not _has_link(table)]


def _has_link(table: str) -> bool:
    return f"ttp-{table.removeprefix('ttp_')}:" in Path("/proc/thread-self/net/dev").read_text()


def way_back(interface: str, families: tuple[int, ...]) -> list[str]:
    """The sysctls that let replies, which arrive on ``interface``, through to a link of ours.

    The kernel asks the interface on which a packet *arrives*, so the one towards the internet needs
    it as well, but no other. IPv6 knows it by interface since Linux 6.17 (force_forwarding); before
    that, only for the whole host, which would stop it from accepting router advertisements.
    """
    name = {4: "forwarding", 6: "force_forwarding"}
    return [f"ipv{family}/conf/{interface}/{name[family]}" for family in families]


def forwards_ipv6() -> bool:
    """Whether the host has IPv6 and can forward it for one link without becoming a router."""
    interface = egress(6)
    return interface is not None and (
        _read("ipv6/conf/all/forwarding") == "1"
        or _read(f"ipv6/conf/{interface}/force_forwarding") != ""
    )


def open_host(name: str, addresses: Sequence[str], doing: str) -> None:
    """Let the TCP of ``addresses`` on the link of ``name`` out, masqueraded, and replies back.

    Raises NsrunError; ``close_host`` undoes it, half done too.
    """
    families = sorted({6 if ":" in address else 4 for address in addresses})
    ways, own = [], []
    for family in families:
        if family == 6 and _read("ipv6/conf/all/forwarding") == "1":
            continue
        interface = egress(family)
        if interface is None:
            raise NsrunError(
                doing, "the host has no default route", "connect it to a network first"
            )
        ways += way_back(interface, (family,))
        own += way_back(f"ttp-{name}", (family,))
    others = {way for table in _tables() for way in _opened(table)}
    opened = [way for way in ways if _read(way) == "0" or way in others]
    run(("nft", "-f", "-"), doing, rules(name, addresses, opened))
    for way in (*opened, *own):
        (_SYSCTLS / way).write_text("1")


def close_host(table: str) -> None:
    """Undo ``open_host``, but for what another link needs."""
    # forwarding first: with it off, nothing misses the table
    others = {way for other in _tables() if other != table for way in _opened(other)}
    for way in _opened(table):
        if way not in others and (_SYSCTLS / way).exists():
            (_SYSCTLS / way).write_text("0")
    ask(("nft", "delete", "table", "inet", table))


def _opened(table: str) -> list[str]:
    listed = ask(("nft", "list", "table", "inet", table))
    return re.findall(rf'"{_UNDO}(ipv[46]/conf/[^/"]+/(?:force_)?forwarding)"', listed)


def _tables() -> list[str]:
    listed = ask(("nft", "list", "tables", "inet"))
    return re.findall(r"^table inet (ttp_[a-z0-9_]{1,11})$", listed, re.MULTILINE)


def _read(sysctl: str) -> str:
    path = _SYSCTLS / sysctl
    return path.read_text().strip() if path.exists() else ""


def run(argv: Command, doing: str, stdin: str | None = None) -> None:
    """Run a program of the system. Raises NsrunError with its complaint."""
    ran = _finish(argv, doing, stdin)
    if ran.returncode:
        raise NsrunError(doing, f"{shlex.join(argv)}: {ran.stderr.strip()}")


def ask(argv: Command) -> str:
    """What the program says; nothing when what it is asked for is not there."""
    ran = _finish(argv, f"run {argv[0]}", None)
    return "" if ran.returncode else ran.stdout


def _finish(argv: Command, doing: str, stdin: str | None) -> subprocess.CompletedProcess[str]:
    try:
        environment = {**os.environ, "PATH": search_path()}  # a user's may lack nft
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise missing(argv[0], doing, error) from error


def missing(program: str, doing: str, error: OSError) -> MissingError:
    """The error for a program that is not installed, or cannot be executed."""
    hint = f"install it: apt install {PACKAGES.get(program, program)}"
    if not isinstance(error, FileNotFoundError):
        return MissingError(doing, f"{program} cannot be executed: {error.strerror}", hint)
    return MissingError(doing, f"there is no program {program}", hint)


def _veth(peer: str, gateway: str, mtu: int, netns: str) -> Command:
    here = ("ip", "link", "add", peer, "mtu", str(mtu), *(("netns", netns) if netns else ()))
    there = ("peer", "name", INTERFACE, "mtu", str(mtu), "netns", gateway)
    return (*here, "type", "veth", *there)


def link_addresses(address: str, router: str, address6: str, router6: str) -> tuple[Command, ...]:
    """The commands that bring the gateway's end up; an empty address leaves its family out."""
    link = ("dev", INTERFACE)
    v4 = (
        ("ip", "address", "add", address, *link),
        ("ip", "route", "add", "default", "via", router, *link),
    )
    v6 = (
        ("ip", "address", "add", address6, *link, "nodad"),
        ("ip", "-6", "route", "add", "default", "via", router6, *link),
    )
    up = ("ip", "link", "set", INTERFACE, "up")
    return (up, *(v4 if address else ()), *(v6 if address6 else ()))
