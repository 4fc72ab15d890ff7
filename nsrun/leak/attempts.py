"""Judge what a program sent on its own link: what would have been a leak without ttp. Pure.

The record of a workload's link (``ttp run --pcap``) has what the program tried, before the gateway
took it to Tor or refused it. Fit for Tor is TCP to public addresses and DNS to the configured
resolver. All else is an *attempt*: it went nowhere here, and would go out elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from nsrun.address import BLOCKS, AddressBlock
from nsrun.leak.frames import PROTOCOLS, Frame, Icmp, Ip, Tcp, Udp
from nsrun.ruleset import PRIVATE4, PRIVATE6

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PRIVATE = tuple(ip_network(text) for text in (*PRIVATE4, *PRIVATE6))
LOOPBACK = ip_network("127.0.0.0/8")
METADATA = ip_network("169.254.169.254/32")
SERVICES = {
    67: "DHCP", 123: "NTP", 137: "NetBIOS", 443: "QUIC", 1900: "SSDP", 3478: "STUN",
    5353: "mDNS", 5355: "LLMNR", 19302: "STUN", 51820: "WireGuard",
}  # fmt: skip
# Group membership (RFC 3810), router solicitation and neighbour discovery (RFC 4861): a link that
# comes up is greeted by the kernel. No workload can send these itself, that takes a raw socket.
KERNELS_OWN6 = frozenset({131, 132, 133, 135, 136, 143})
UNREACHABLE = {4: 3, 6: 1}  # the kernel's answer to an answer that came too late


@dataclass(frozen=True)
class Attempt:
    """A packet that may not be sent."""

    frame: Frame
    why: str
    guard: str
    """The comment of the gateway's rule that stopped it; it begins with the promise."""

    @property
    def time(self) -> str:
        """UTC, to the microsecond."""
        seconds, nanoseconds = divmod(self.frame.time_ns, 1_000_000_000)
        return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}.{nanoseconds // 1000:06}"


@dataclass(frozen=True)
class Allowed:
    """Packets that a test expects: what is None, or empty, is not looked at."""

    network: Network | None = None
    port: int | None = None
    protocol: str = ""
    """``tcp``, ``udp``, ``icmp`` or another name, or number, of an IP protocol."""

    def covers(self, frame: Frame) -> bool:
        ip = frame.body
        if not isinstance(ip, Ip):
            return False
        port = ip.body.target_port if isinstance(ip.body, Tcp | Udp) else None
        names = {str(ip.protocol), PROTOCOLS.get(ip.protocol, "")}
        return (
            (self.network is None or ip_address(ip.target) in self.network)
            and (self.port is None or self.port == port)
            and (not self.protocol or self.protocol in names)
        )


def block_of(gateway: str) -> AddressBlock:
    """The addresses inside the gateway that has this one. Raises StopIteration if none has."""
    return next(block for block in BLOCKS if str(block.gateway) == gateway)


def sent(frame: Frame, block: AddressBlock) -> bool:
    """Whether the workload sent it. Both ends of a link have one MAC, so the addresses tell; what
    is no packet to a workload from without counts as sent."""
    if not isinstance(frame.body, Ip):
        return True
    source, target = ip_address(frame.body.source), ip_address(frame.body.target)
    from_workload = _in_links(source, block) and source not in (block.gateway, block.gateway6)
    return from_workload or not _in_links(target, block)


def examine(frame: Frame, block: AddressBlock) -> Attempt | None:
    """Why this packet, which the workload sent, is an attempt; None if it is fit for Tor."""
    ip = frame.body
    if not isinstance(ip, Ip):
        return Attempt(frame, "not IP", "no rule: a gateway routes IP and nothing else")
    if _kernels_own(ip):
        return None
    found = _reason(ip, block)
    if found is None:
        return None
    why, guard = found
    if not _in_links(ip_address(ip.source), block):
        guard = "P5 no spoofing, no link-local"
    return Attempt(frame, why, guard)


def _reason(ip: Ip, block: AddressBlock) -> tuple[str, str] | None:
    target = ip_address(ip.target)
    resolver = target in (block.gateway, block.gateway6) or target in LOOPBACK
    onion = target in block.automap or target in block.automap6
    private = any(target in network for network in PRIVATE) and not onion
    tcp = "P3 other TCP is refused" if private else f"P1 TCP goes to Tor, ipv{ip.version}"
    match ip.body:
        case Udp(target_port=53) if resolver:
            return None
        case Udp(target_port=53):
            return f"DNS to {target}, not the resolver", f"P2 DNS goes to Tor, ipv{ip.version}"
        case Tcp(target_port=53):
            return f"DNS by TCP to {target}", tcp
        case Tcp() if private:
            return f"TCP to {_place(target)}", tcp
        case Tcp():
            return None
        case Udp(target_port=port):
            service = SERVICES.get(port, "")
            kind = f"UDP ({service})" if service else "UDP"
            why = f"{kind} to {_place(target)}" if private else f"{kind}, which Tor does not carry"
        case Icmp():
            why = "ICMP, which Tor does not carry"
        case _:
            name = PROTOCOLS.get(ip.protocol, str(ip.protocol))
            why = f"IP protocol {name}, not readable as TCP or DNS"
    return why, "P3 all else is refused"


def _place(target: Address) -> str:
    if target in METADATA:
        return "the metadata service of clouds"
    if target.is_multicast or target == IPv4Address("255.255.255.255"):
        return "everybody on the LAN"
    return "the host" if target in LOOPBACK else "the LAN, or another private network"


def _kernels_own(ip: Ip) -> bool:
    match ip.body:
        case Icmp(version=version, kind=kind) if kind == UNREACHABLE[version]:
            return True
        case Icmp(version=6, kind=kind):
            source = ip_address(ip.source)
            return kind in KERNELS_OWN6 and (source.is_unspecified or source.is_link_local)
    return False


def _in_links(address: Address, block: AddressBlock) -> bool:
    return address in block.links or address in block.links6
