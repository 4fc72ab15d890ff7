"""What the whole-host mode lets through: the options of ``ttp start``, plus facts. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Literal

from nsrun.address import AUTOMAP6, LISTENER6
from nsrun.errors import NsrunError, UsageError

TRANS_PORT, DNS_PORT = 9041, 9054

# What the LAN bypass is about: private use (RFC 1918), link-local (RFC 3927, RFC 4291, 2.5.6),
# unique local (RFC 4193).
LAN4 = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16")
LAN6 = ("fe80::/10", "fc00::/7")

# Well-known resolvers for DNS over HTTPS. A list cannot be complete: a program that asks another
# one does so through Tor.
DOH4 = (
    "1.1.1.1",
    "1.0.0.1",
    "8.8.8.8",
    "8.8.4.4",
    "9.9.9.9",
    "149.112.112.112",
    "208.67.222.222",
    "208.67.220.220",
)
DOH6 = (
    "2606:4700:4700::1111",
    "2606:4700:4700::1001",
    "2001:4860:4860::8888",
    "2001:4860:4860::8844",
    "2620:fe::fe",
    "2620:fe::9",
    "2620:0:ccc::2",
    "2620:0:ccd::2",
)

#: Where .onion names may be mapped to: the documented range first, then shared address space.
AUTOMAPS = ("10.192.0.0/10", "100.96.0.0/11", "172.24.0.0/13")

Own = Literal["all", "users", "onion", "none"]
"""Which of the machine's own traffic is caught."""

_INTERFACE = re.compile(r"(?!-)(?:[A-Za-z0-9_.:@-]{1,15}|[A-Za-z0-9_.:@-]{1,14}\*)")
_CGROUP = re.compile(r"[A-Za-z0-9_.@-]+")


@dataclass(frozen=True)
class HostPolicy:
    """``own`` is caught, but for what is exempt; the rest is refused, or with ``own`` other than
    ``all`` left alone.

    ``tor_uid``         Tor leaves, by TCP
    ``tor_resolvers``   addresses that its helpers may ask for names, which Tor cannot answer before
                        they have connected it
    ``tor_udp``         its helpers leave by UDP as well, to public addresses
    ``automap4``        where Tor maps .onion to, see choose_automap(); ``automap6`` as well
    ``users``           with ``own`` users: theirs
    ``lan``             LAN4 and LAN6 are reached directly, but for their resolvers
    ``ipv6``            False: refused, whoever sends it
    ``allow_root``      uid 0 is exempt
    ``bypass_users``    exempt, as ``bypass_groups`` and ``bypass_cgroup``, which must be there
                        when the rules are loaded: its name is made a number then
    ``tor_cgroup``      Tor's, likewise, where it is known: nobody else is reached at its ports
    ``services``        TCP ports of services: connections to them that are older than the rules
                        go on, where the kernel did not follow connections before
    ``gateway_for``     interfaces, ``*`` at the end for any rest of a name: what arrives there to
                        be forwarded goes through Tor, which must listen on ``listeners``

    What arrives elsewhere to be forwarded is refused, but between hosts of the LAN if ``lan``.
    """

    tor_uid: int
    tor_resolvers: tuple[str, ...] = ()
    tor_udp: bool = False
    trans_port: int = TRANS_PORT
    dns_port: int = DNS_PORT
    automap4: str = AUTOMAPS[0]
    automap6: str = str(AUTOMAP6)
    own: Own = "all"
    users: tuple[int, ...] = ()
    lan: bool = True
    ipv6: bool = True
    allow_root: bool = False
    bypass_users: tuple[int, ...] = ()
    bypass_groups: tuple[int, ...] = ()
    bypass_cgroup: str = ""
    tor_cgroup: str = ""
    services: tuple[int, ...] = (22,)
    gateway_for: tuple[str, ...] = ()
    table: str = "ttp"

    @property
    def listeners(self) -> tuple[str, ...]:
        """Addresses of this machine, on loopback, where Tor takes what others send.

        Not those of ``gateway_for``, which come and go, and of IPv6 are several: an answer from
        another one than was asked is none. By IPv4 it is the first of ``automap4``, which no
        network of the host has, and Tor gives to no name: none ends with 0 or 255 (addressmap.c).
        """
        if not self.gateway_for:
            return ()
        four = str(IPv4Network(self.automap4)[0])
        return (four, str(LISTENER6)) if self.ipv6 else (four,)

    def __post_init__(self) -> None:
        doing = "make rules for the host"
        if bool(self.users) != (self.own == "users"):
            raise UsageError(doing, "users are caught, but none is named")
        if self.own == "none" and not self.gateway_for:
            raise UsageError(doing, "neither this machine's traffic nor a LAN's is caught")
        exempt = self.allow_root or self.bypass_users or self.bypass_groups or self.bypass_cgroup
        if self.own == "none" and exempt:
            raise UsageError(doing, "nobody here is caught, so that nobody can be exempt")
        if {*self.users} & {*self.bypass_users, *((0,) if self.allow_root else ())}:
            raise UsageError(doing, "a user cannot be caught and be exempt")
        if self.own == "onion" and not (self.lan or self.gateway_for):
            raise UsageError(doing, "only .onion is caught, so that the LAN is left alone")
        if self.trans_port == self.dns_port:
            raise UsageError(doing, f"port {self.dns_port} cannot be for TCP and for DNS at once")
        if self.tor_uid in (*self.bypass_users, *self.users):
            raise UsageError(doing, f"Tor runs as uid {self.tor_uid}, which is not a user of it")
        for name in self.gateway_for:
            check_interface(doing, name)
        for resolver in self.tor_resolvers:
            ip_address(resolver)  # it becomes a word of a rule
        for group in filter(None, (self.bypass_cgroup, self.tor_cgroup)):
            if not _CGROUP.fullmatch(group):
                raise UsageError(doing, f"{group!r} is no name of a control group")


def check_interface(doing: str, name: str) -> None:
    """Raises UsageError unless it names one that others can be behind, or with ``*`` several."""
    if not _INTERFACE.fullmatch(name):
        raise UsageError(doing, f"{name!r} is no name of an interface")
    if name == "lo" or (name.endswith("*") and "lo".startswith(name[:-1])):
        raise UsageError(doing, f"{name!r} is loopback, too, where nobody else is")


def choose_automap(host_networks: Iterable[str]) -> str:
    """The first of AUTOMAPS that overlaps none of the host's own networks (as ``10.0.0.0/24``).

    Else a host of the LAN and a .onion name could have the same address. Raises NsrunError.
    """
    taken = [
        network
        for network in (ip_network(text, strict=False) for text in host_networks)
        if isinstance(network, IPv4Network)
    ]
    for automap in AUTOMAPS:
        if not any(IPv4Network(automap).overlaps(network) for network in taken):
            return automap
    raise NsrunError(
        "choose addresses for .onion names",
        f"the host's own networks overlap {', '.join(AUTOMAPS)}",
        "leave one of these ranges free",
    )
