"""What tells the hosts of a LAN that this machine is their router: for servers of DHCP and of
router advertisements, beside the rules that make it one. Pure.

As their resolver they may have any address, as DNS to every one goes to Tor; they get this
machine's. Sources: dnsmasq(8), dhcpd.conf(5), Kea's reference manual, radvd.conf(5).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface
from typing import Literal

from nsrun.errors import UsageError

Server = Literal["dnsmasq", "dhcpd", "kea", "radvd"]
FEWEST = 8  # addresses of a network, for some to be left to give out


@dataclass(frozen=True)
class Lan:
    """An interface, and this machine's first addresses there; by IPv6 none that is link-local."""

    interface: str
    four: IPv4Interface | None = None
    six: IPv6Interface | None = None

    @property
    def range(self) -> tuple[IPv4Address, IPv4Address]:
        """The half of the network that this machine is not in. Raises UsageError."""
        if self.four is None:
            raise _nothing(self, "it has no address by IPv4")
        network = self.four.network
        half = network.num_addresses // 2
        if half < FEWEST // 2:
            raise _nothing(self, f"its network {network} is too small")
        if self.four.ip < network[half]:
            return network[half], network[-2]
        return network[1], network[half - 1]


def configuration(lans: Iterable[Lan], server: Server) -> str:
    """For ``server``, whole. Raises UsageError where there is nothing to tell."""
    forms = {"dnsmasq": _dnsmasq, "dhcpd": _dhcpd, "kea": _kea, "radvd": _radvd}
    return forms[server](list(lans))


def _dnsmasq(lans: list[Lan]) -> str:
    lines = ["# /etc/dnsmasq.d/ttp.conf", "port=0", "bind-dynamic"]
    for lan in lans:
        lines.append(f"interface={lan.interface}")
        if lan.four is None and lan.six is None:
            raise _nothing(lan, "it has no address")
        if lan.four:
            tag = lan.interface
            low, high = lan.range
            lines += [
                f"dhcp-range=set:{tag},{low},{high},{lan.four.netmask},12h",
                f"dhcp-option=tag:{tag},option:router,{lan.four.ip}",
                f"dhcp-option=tag:{tag},option:dns-server,{lan.four.ip}",
            ]
        if lan.six:
            prefix, tag = lan.six.network, f"{lan.interface}/6"  # which no interface can be called
            lines += [
                *_as_router(lan),
                "enable-ra",
                f"dhcp-range=set:{tag},{prefix[0]},ra-only,{prefix.prefixlen}",
                f"dhcp-option=tag:{tag},option6:dns-server,[{lan.six.ip}]",
            ]
    return _text(dict.fromkeys(lines))


def _dhcpd(lans: list[Lan]) -> str:
    names = " ".join(lan.interface for lan in lans)
    lines = [f'# /etc/dhcp/dhcpd.conf, with INTERFACESv4="{names}" in /etc/default/isc-dhcp-server']
    for lan in lans:
        low, high = lan.range
        assert lan.four is not None, "it has a range"
        lines += [
            f"subnet {lan.four.network[0]} netmask {lan.four.netmask} {{",
            f"  range {low} {high};",
            f"  option routers {lan.four.ip};",
            f"  option domain-name-servers {lan.four.ip};",
            "}",
        ]
    return _text(lines)


def _kea(lans: list[Lan]) -> str:
    subnets = []
    for number, lan in enumerate(lans, 1):
        low, high = lan.range
        assert lan.four is not None, "it has a range"
        told = {"routers": str(lan.four.ip), "domain-name-servers": str(lan.four.ip)}
        subnets.append(
            {
                "id": number,
                "subnet": str(lan.four.network),
                "interface": lan.interface,
                "pools": [{"pool": f"{low} - {high}"}],
                "option-data": [{"name": name, "data": data} for name, data in told.items()],
            }
        )
    names = [lan.interface for lan in lans]
    server = {"interfaces-config": {"interfaces": names}, "subnet4": subnets}
    return "// /etc/kea/kea-dhcp4.conf\n" + json.dumps({"Dhcp4": server}, indent=2) + "\n"


def _radvd(lans: list[Lan]) -> str:
    lines = ["# /etc/radvd.conf"]
    for lan in lans:
        if lan.six is None:
            raise _nothing(lan, "it has no address by IPv6 but a link-local one")
        lines += [
            *_as_router(lan),
            f"interface {lan.interface} {{",
            "  AdvSendAdvert on;",
            f"  prefix {lan.six.network} {{ }};",
            f"  RDNSS {lan.six.ip} {{ }};",
            "};",
        ]
    return _text(lines)


def _as_router(lan: Lan) -> list[str]:
    """Who says in its neighbour advertisements that it is none is dropped as one (RFC 4861,
    7.2.5). Of one interface alone this forwards nothing (Linux, ip-sysctl.rst)."""
    return [f"# as root: sysctl -w net.ipv6.conf.{lan.interface.replace('.', '/')}.forwarding=1"]


def _nothing(lan: Lan, cause: str) -> UsageError:
    hint = f"ip address show dev {lan.interface}"
    return UsageError(f"tell the hosts at {lan.interface} of this machine", cause, hint)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
