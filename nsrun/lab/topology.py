"""What a lab is made of: nodes, addresses, links and names.

    inet ── isp0 ═════ wan0 ── router ── lan0 (bridge) ┬─ p-host ═ eth0 ── host
    relays, exits,             forwards, masquerades   ├─ p-lan  ═ eth0 ── lan
    onion service,                                     └─ gw-…   ═ uplink ── a gateway
    web, DNS

`inet` plays the internet: it answers at every address, and each relay and server has its own.
`lan` holds what a home network has: a resolver, a web server, a metadata service.
Pure: nothing here reads a file, the clock or the environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

OR_PORT = 9001
DIR_PORT = 9030
SOCKS_PORT = 9050

NAMESPACES = ("host", "router", "lan", "inet")

WEB, WEB6 = "11.200.0.80", "2600:11c8::80"
DNS, DNS6 = "11.200.0.53", "2600:11c8::53"
SERVICE, SERVICE6 = "11.201.0.1", "2600:11c9::1"

ISP, ISP6 = "11.250.0.1", "2600:11fa::1"
WAN, WAN6 = "11.250.0.2", "2600:11fa::2"  # what the internet sees of the LAN
# From where a router looks for a neighbour whom it only forwards to (RFC 4861, 7.2.2): without
# such an address it finds nobody, and answers are lost as soon as it has to look again. The host
# has one as real ones do: pasta asks for it.
ISP_LINK, WAN_LINK, ROUTER_LINK, HOST_LINK = "fe80::1", "fe80::2", "fe80::1", "fe80::10"

# On the bridge nothing is flooded: what relays still send to a gateway that died is on no wire of
# others. So it may forget nobody who is silent for long.
NO_FLOOD = "type bridge_slave flood off"
DAY = 8_640_000  # hundredths of a second

LAN_PREFIX, LAN_PREFIX6 = "192.168.77.0/24", "2001:db8:77::/64"
ROUTER, ROUTER6 = "192.168.77.1", "2001:db8:77::1"
HOST, HOST6 = "192.168.77.10", "2001:db8:77::10"
GATEWAY, GATEWAY6 = "192.168.77.50", "2001:db8:77::50"
RESOLVER, RESOLVER6 = "192.168.77.53", "2001:db8:77::53"
LAN_WEB, LAN_WEB6 = "192.168.77.80", "2001:db8:77::80"
NOBODY, NOBODY6 = "192.168.77.99", "2001:db8:77::99"  # free on the LAN, to be claimed
METADATA = "169.254.169.254"  # where clouds serve a machine's credentials

#: Services that tell a client its address, by their real names.
ORACLES = (
    "check.torproject.org",
    "torproject.org",
    "www.torproject.org",
    "api.ipify.org",
    "ifconfig.me",
)
#: A name whose owner claims to be in the LAN of who asks, as for DNS rebinding.
REBIND = "rebind.example"
ORACLE4, ORACLE6 = "api4.my-ip.io", "api6.my-ip.io"
#: Names under .test that the web server's certificate covers; DNS answers for all of *.test.
WEB_NAMES = ("test", "www.test", "web.test", "a.test", "b.test", "c.test", "*.web.test")
#: UDP ports of the echo server: echo, NTP, QUIC, STUN, WireGuard.
ECHO_PORTS = (7, 123, 443, 3478, 51820)


class Role(Enum):
    AUTHORITY = "authority"
    RELAY = "relay"
    EXIT = "exit"


@dataclass(frozen=True)
class Node:
    """One relay. Tor avoids two relays of one /16 (IPv6: /32) in a circuit, so each has its own."""

    name: str
    role: Role
    number: int

    @property
    def address(self) -> str:
        return f"11.{self.number}.0.1"

    @property
    def address6(self) -> str:
        return f"2600:11{self.number:02x}::1"

    @property
    def outbound(self) -> str:
        """Where the streams of an exit come from; a different address than its ORPort's."""
        return f"11.{self.number}.0.2"

    @property
    def outbound6(self) -> str:
        return f"2600:11{self.number:02x}::2"

    @property
    def addresses(self) -> tuple[str, ...]:
        own = (self.address, self.address6)
        return (*own, self.outbound, self.outbound6) if self.role is Role.EXIT else own


# Onion services need eleven: the layers of vanguards-lite and the legs of Conflux may not meet.
NODES = (
    *(Node(f"auth{i}", Role.AUTHORITY, i) for i in (1, 2, 3)),
    *(Node(f"relay{i}", Role.RELAY, 0x10 + i) for i in (1, 2, 3, 4)),
    *(Node(f"exit{i}", Role.EXIT, 0x20 + i) for i in (1, 2, 3, 4)),
)
AUTHORITIES = tuple(node for node in NODES if node.role is Role.AUTHORITY)
EXITS = tuple(node for node in NODES if node.role is Role.EXIT)
EXIT_ADDRESSES = frozenset(a for node in EXITS for a in (node.outbound, node.outbound6))


def check_name(name: str) -> bool:
    """Whether ``name`` can name a lab: it is part of interface names, which hold 15 bytes."""
    return re.fullmatch(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", name) is not None


# -- Links -------------------------------------------------------------------------------------


def inet_links() -> str:
    """Commands for ``ip -batch`` in `inet`; `router` exists."""
    addresses = [WEB, WEB6, DNS, DNS6, SERVICE, SERVICE6]
    addresses += [address for node in NODES for address in node.addresses]
    return _lines(
        "link set lo up",
        *(f"address add {address} dev lo" for address in addresses),
        "link add isp0 type veth peer name wan0 netns router",
        f"address add {ISP}/30 dev isp0",
        f"address add {ISP6}/64 dev isp0 nodad",
        f"address add {ISP_LINK}/64 dev isp0 nodad",
        "link set isp0 addrgenmode none up",
        # whatever else is sent to the internet arrives here too, and is answered: a leak succeeds
        "route add local 0.0.0.0/0 dev lo table main",
        "route add local ::/0 dev lo table main",
    )


def router_links() -> str:
    """Commands for ``ip -batch`` in `router`, after those of `inet`."""
    return _lines(
        "link set lo up",
        f"address add {WAN}/30 dev wan0",
        f"address add {WAN6}/64 dev wan0 nodad",
        f"address add {WAN_LINK}/64 dev wan0 nodad",
        "link set wan0 addrgenmode none up",
        f"route add default via {ISP}",
        f"route add default via {ISP6}",
        # its own address: else it takes that of a new port, and frames to the old one are flooded
        f"link add lan0 address 02:00:00:00:77:01 type bridge mcast_snooping 0 ageing_time {DAY}",
        "link set lan0 addrgenmode none",
        f"address add {ROUTER}/24 dev lan0",
        f"address add {ROUTER6}/64 dev lan0 nodad",
        f"address add {ROUTER_LINK}/64 dev lan0 nodad",
        "link set lan0 up",
        *(
            line
            for name in ("host", "lan")
            for line in (
                f"link add p-{name} type veth peer name eth0 netns {name}",
                f"link set p-{name} addrgenmode none master lan0 up",
                f"link set p-{name} {NO_FLOOD}",
            )
        ),
        f"route add {METADATA} dev lan0",
    )


def host_links() -> str:
    """Commands for ``ip -batch`` in `host`, after those of `router`."""
    return _on_lan(HOST, HOST6) + _lines(f"address add {HOST_LINK}/64 dev eth0 nodad")


def lan_links() -> str:
    return _on_lan(RESOLVER, RESOLVER6) + _lines(
        f"address add {LAN_WEB}/24 dev eth0",
        f"address add {LAN_WEB6}/64 dev eth0 nodad",
        f"address add {METADATA}/32 dev eth0",
    )


def router_rules() -> str:
    """nft text: all of the LAN shares the router's address, as behind a home router."""
    return """table inet lab
delete table inet lab
table inet lab {
  chain uplink {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "wan0" masquerade comment "the LAN shares one public address"
  }
}
"""


def _on_lan(address: str, address6: str) -> str:
    return _lines(
        "link set lo up",
        f"address add {address}/24 dev eth0",
        f"address add {address6}/64 dev eth0 nodad",
        "link set eth0 addrgenmode none up",
        f"route add default via {ROUTER}",
        f"route add default via {ROUTER6}",
    )


def _lines(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


def wires(name: str) -> dict[str, tuple[str, str]]:
    """The links of the lab ``name``, each as the namespace and interface to capture at.

    All of them are out of reach of what runs in `host` or behind the gateway.
    """
    return {
        "host": ("router", "p-host"),
        "lan": ("router", "p-lan"),
        "gateway": ("router", f"gw-{name}"),
        "internet": ("router", "wan0"),
    }


# -- Names -------------------------------------------------------------------------------------


def inet_dns() -> str:
    """dnsmasq.conf of the authoritative server in `inet`: *.test and the oracles, nothing else."""
    return _lines(
        *_dnsmasq(),
        "no-resolv",
        "local=//",  # names without a dot
        "address=/#/",  # NXDOMAIN for what is not named here
        f"address=/test/{WEB}",
        f"address=/test/{WEB6}",
        *(f"host-record={name},{WEB},{WEB6}" for name in ORACLES),
        f"host-record={ORACLE4},{WEB}",
        f"host-record={ORACLE6},{WEB6}",
        f"host-record={REBIND},{LAN_WEB}",
        f"ptr-record={_reverse(WEB)},www.test",
        *(f"ptr-record={_reverse(node.outbound)},{node.name}.test" for node in EXITS),
        'txt-record=test,"lab of ttp"',
        "mx-host=test,mail.test,10",
    )


def lan_dns() -> str:
    """dnsmasq.conf of the LAN's resolver: what a home router hands out."""
    return _lines(
        *_dnsmasq(),
        "no-resolv",
        f"server={DNS}",
        "local=/lan/",
        f"host-record=router.lan,{ROUTER},{ROUTER6}",
        f"host-record=nas.lan,{LAN_WEB},{LAN_WEB6}",
    )


def resolv_conf(nameservers: Iterable[str]) -> str:
    return _lines(*(f"nameserver {address}" for address in nameservers))


def _dnsmasq() -> tuple[str, ...]:
    return (
        "keep-in-foreground",
        "pid-file=",
        "no-hosts",
        "log-queries",
        "log-facility=-",
    )


def _reverse(address: str) -> str:
    return ".".join(reversed(address.split("."))) + ".in-addr.arpa"
