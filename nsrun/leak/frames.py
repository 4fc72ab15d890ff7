"""Decode what a tap saw: an Ethernet frame, or a bare IP packet from a tun device.

Pure, and total: a frame that is cut, malformed or unknown decodes to one that says so. Only as
much is told apart as a judge needs, and nothing is guessed: what is not understood is never
mistaken for something that is. ``str()`` of a frame is one line in the manner of tcpdump(8).

Frame ── ethernet: Ethernet | None (tun)
      └─ body: Ip ── body: Tcp | Udp | Icmp | Unreadable | None (another protocol, a fragment)
               Arp
               Marker     a tap's proof that it sees
               Unreadable
               None       another ethertype
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop

ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
ETHERTYPE_VLAN, ETHERTYPE_QINQ = 0x8100, 0x88A8
ETHERTYPE_MARKER = 0x88B5  # IEEE 802, local experimental ethertype 1
ETHERNET_MINIMUM = 60  # shorter frames are padded to this, without the check sequence

PROTOCOLS = {
    1: "icmp", 2: "igmp", 4: "ip-in-ip", 6: "tcp", 17: "udp", 33: "dccp", 41: "ip6-in-ip",
    47: "gre", 50: "esp", 51: "ah", 58: "icmp6", 59: "no-next-header", 89: "ospf", 103: "pim",
    112: "vrrp", 132: "sctp", 136: "udplite",
}  # fmt: skip
EXTENSIONS = {
    0: "hop-by-hop", 43: "routing", 44: "fragment", 51: "ah", 60: "destination-options",
    135: "mobility", 139: "hip", 140: "shim6",
}  # fmt: skip
ICMP_TYPES = {
    0: "echo reply", 3: "unreachable", 5: "redirect", 8: "echo request", 9: "router advertisement",
    10: "router solicitation", 11: "time exceeded", 13: "timestamp request",
}  # fmt: skip
ICMP6_TYPES = {
    1: "unreachable", 2: "packet too big", 3: "time exceeded", 128: "echo request",
    129: "echo reply", 130: "listener query", 131: "listener report", 132: "listener done",
    133: "router solicitation", 134: "router advertisement", 135: "neighbour solicitation",
    136: "neighbour advertisement", 137: "redirect", 143: "listener report v2",
}  # fmt: skip
DNS_PORTS = frozenset({53, 5353, 5355})  # DNS, mDNS (RFC 6762), LLMNR (RFC 4795)
DNS_TYPES = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA",
    33: "SRV", 43: "DS", 48: "DNSKEY", 64: "SVCB", 65: "HTTPS", 252: "AXFR", 255: "ANY",
}  # fmt: skip

# Starts with a zero byte: on a tun device this is a packet of IP version 0, which nobody routes.
_MARKER = b"\0nsrun tap\0"
TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A layer that cannot be decoded, and why."""

    why: str

    def __str__(self) -> str:
        return f"unreadable: {self.why}"


@dataclass(frozen=True, slots=True)
class Tcp:
    source_port: int
    target_port: int
    flags: str
    """As tcpdump writes them: S SYN, F FIN, R RST, P PSH, ``.`` ACK, U URG, E ECE, W CWR."""
    question: str = ""

    def __str__(self) -> str:
        return f"tcp [{self.flags}]{_comma(self.question)}"


@dataclass(frozen=True, slots=True)
class Udp:
    source_port: int
    target_port: int
    question: str = ""
    """The first DNS question, ``A? example.org``; empty if there is none."""

    def __str__(self) -> str:
        return f"udp{_comma(self.question)}"


@dataclass(frozen=True, slots=True)
class Icmp:
    version: int
    kind: int
    code: int
    about: str = ""
    """The address that a neighbour solicitation or advertisement is about (RFC 4861)."""

    def __str__(self) -> str:
        names = ICMP_TYPES if self.version == 4 else ICMP6_TYPES
        name = names.get(self.kind, f"type {self.kind}")
        return f"icmp{'' if self.version == 4 else '6'} {name}{_comma(self.about)}"


@dataclass(frozen=True, slots=True)
class Ip:
    version: int
    source: str
    target: str
    hop_limit: int
    protocol: int
    extensions: tuple[str, ...] = ()
    """IPv6 extension headers in order; ``options`` stands for those of IPv4."""
    fragment: int | None = None
    """Offset in bytes if this is one of several fragments, or claims to be."""
    body: Tcp | Udp | Icmp | Unreadable | None = None

    def __str__(self) -> str:
        ports = self.body if isinstance(self.body, Tcp | Udp) else None
        source = f"{self.source}.{ports.source_port}" if ports else self.source
        target = f"{self.target}.{ports.target_port}" if ports else self.target
        protocol = PROTOCOLS.get(self.protocol, f"protocol {self.protocol}")
        what = protocol if self.body is None else str(self.body)
        if isinstance(self.body, Unreadable):
            what = f"{protocol}, {self.body}"
        extras = "".join(f", {name}" for name in self.extensions)
        if self.fragment is not None:
            extras += f", fragment at {self.fragment}"
        return f"IP{'' if self.version == 4 else '6'} {source} > {target}: {what}{extras}"


@dataclass(frozen=True, slots=True)
class Arp:
    operation: int
    sender_mac: str
    sender: str
    target: str

    def __str__(self) -> str:
        if self.operation == 1:
            return f"ARP who-has {self.target} tell {self.sender}"
        if self.operation == 2:
            return f"ARP {self.sender} is-at {self.sender_mac} (to {self.target})"
        return f"ARP operation {self.operation}, {self.sender} > {self.target}"


@dataclass(frozen=True, slots=True)
class Marker:
    """The packet by which a tap proves that it sees the wire: exact to the byte, or none."""

    token: str
    start: bool

    def __str__(self) -> str:
        return f"tap marker, {'start' if self.start else 'end'} of {self.token}"


@dataclass(frozen=True, slots=True)
class Ethernet:
    source: str
    target: str
    vlans: tuple[int, ...]
    ethertype: int
    """The innermost one; below 0x600 it is a length (IEEE 802.3, as spanning tree uses it)."""

    def __str__(self) -> str:
        kind = "802.3" if self.ethertype < 0x600 else f"ethertype 0x{self.ethertype:04x}"
        return f"{kind} {self.source} > {self.target}"


@dataclass(frozen=True, slots=True)
class Frame:
    time_ns: int
    """Nanoseconds since the epoch, by the kernel's clock at the tap."""
    length: int
    """Bytes on the wire, of which ``data`` holds the first."""
    data: bytes
    ethernet: Ethernet | None
    body: Ip | Arp | Marker | Unreadable | None
    trailer: int = 0
    """Bytes after the end of the packet, beyond Ethernet's own padding: room for contraband."""

    def __str__(self) -> str:
        text = str(self.ethernet) if self.body is None else str(self.body)
        if isinstance(self.body, Unreadable) and self.ethernet:
            text = f"{self.ethernet}: {text}"
        if self.ethernet and self.ethernet.vlans:
            text = "".join(f"vlan {vlan}, " for vlan in self.ethernet.vlans) + text
        trailer = f", {self.trailer} bytes after its end" if self.trailer else ""
        return f"{text}, length {self.length}{trailer}"


def decode(data: bytes, length: int, time_ns: int = 0, *, raw: bool = False) -> Frame:
    """Decode the first bytes of a frame of ``length`` bytes; ``raw`` for one of a tun device."""
    if raw:
        version = data[0] >> 4 if data else 0
        ethertype = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(version, ETHERTYPE_MARKER)
        body, trailer = _network(ethertype, data, length)
        if body is None:
            body = Unreadable(f"IP version {version}")
        return Frame(time_ns, length, data, None, body, trailer)
    if len(data) < 14:
        return Frame(time_ns, length, data, None, Unreadable("cut in the Ethernet header"))
    ethertype, start = int.from_bytes(data[12:14]), 14
    vlans: tuple[int, ...] = ()
    while ethertype in (ETHERTYPE_VLAN, ETHERTYPE_QINQ) and len(data) >= start + 4:
        tag, ethertype = struct.unpack_from("!HH", data, start)
        vlans += (tag & 0xFFF,)
        start += 4
    ethernet = Ethernet(_mac(data[6:12]), _mac(data[:6]), vlans, ethertype)
    if ethertype in (ETHERTYPE_VLAN, ETHERTYPE_QINQ):
        return Frame(time_ns, length, data, ethernet, Unreadable("cut in a VLAN tag"))
    body, trailer = _network(ethertype, data[start:], length - start)
    if length <= ETHERNET_MINIMUM:
        trailer = 0
    return Frame(time_ns, length, data, ethernet, body, trailer)


def marker(token: str, *, start: bool, mac: bytes = b"") -> bytes:
    """The frame of a marker, from a card to itself, so that no bridge carries it on.

    Without ``mac``, for a tun device. ``token`` is hexadecimal, of TOKEN_BYTES bytes.
    """
    payload = _MARKER + bytes.fromhex(token) + bytes([start])
    return mac + mac + ETHERTYPE_MARKER.to_bytes(2) + payload if mac else payload


def _network(
    ethertype: int, data: bytes, length: int
) -> tuple[Ip | Arp | Marker | Unreadable | None, int]:
    """The packet in a frame, and how many bytes follow its end."""
    if ethertype == ETHERTYPE_IPV4:
        return _ipv4(data, length)
    if ethertype == ETHERTYPE_IPV6:
        return _ipv6(data, length)
    if ethertype == ETHERTYPE_ARP:
        return _arp(data), max(0, length - 28)
    if ethertype == ETHERTYPE_MARKER:
        return _marker(data, length), 0
    return None, 0


def _ipv4(data: bytes, length: int) -> tuple[Ip | Unreadable, int]:
    if len(data) < 20:
        return Unreadable("cut in the IPv4 header"), 0
    header, total = (data[0] & 0xF) * 4, int.from_bytes(data[2:4])
    if data[0] >> 4 != 4 or header < 20:
        return Unreadable("not an IPv4 header"), 0
    total = total or length  # zero: larger than 64 KiB, BIG TCP
    place = int.from_bytes(data[6:8])
    fragment = (place & 0x1FFF) * 8 if place & 0x3FFF else None  # offset, or more to come
    body: Tcp | Udp | Icmp | Unreadable | None
    if total > length or total < header:
        body = Unreadable(f"claims {total} bytes, has {length}")
    elif fragment:
        body = None  # the ports were in the first one
    else:
        body = _transport(data[9], data[header:total])
    source, target = inet_ntop(AF_INET, data[12:16]), inet_ntop(AF_INET, data[16:20])
    options = ("options",) if header > 20 else ()
    packet = Ip(4, source, target, data[8], data[9], options, fragment, body)
    return packet, max(0, length - total)


def _ipv6(data: bytes, length: int) -> tuple[Ip | Unreadable, int]:
    if len(data) < 40:
        return Unreadable("cut in the IPv6 header"), 0
    if data[0] >> 4 != 6:
        return Unreadable("not an IPv6 header"), 0
    claimed = int.from_bytes(data[4:6])
    total = claimed + 40 if claimed else length  # zero: a jumbogram, BIG TCP
    protocol, start = data[6], 40
    extensions: tuple[str, ...] = ()
    fragment: int | None = None
    body: Tcp | Udp | Icmp | Unreadable | None = None
    if total > length:
        body = Unreadable(f"claims {total} bytes, has {length}")
    else:
        while protocol in EXTENSIONS and not fragment:
            extensions += (EXTENSIONS[protocol],)
            if len(data) < start + 8:
                body = Unreadable(f"cut in the {EXTENSIONS[protocol]} header")
                break
            if protocol == 44:
                fragment = int.from_bytes(data[start + 2 : start + 4]) & 0xFFF8
                size = 8
            elif protocol == 51:
                size = (data[start + 1] + 2) * 4  # RFC 4302 counts in words
            else:
                size = (data[start + 1] + 1) * 8
            protocol, start = data[start], start + size
        else:
            if not fragment:
                body = _transport(protocol, data[start:total])
    source, target = inet_ntop(AF_INET6, data[8:24]), inet_ntop(AF_INET6, data[24:40])
    packet = Ip(6, source, target, data[7], protocol, extensions, fragment, body)
    return packet, max(0, length - total)


def _transport(protocol: int, data: bytes) -> Tcp | Udp | Icmp | Unreadable | None:
    match protocol:
        case 6:
            if len(data) < 20:
                return Unreadable("cut in the TCP header")
            if data[12] >> 4 < 5:
                return Unreadable("not a TCP header")
            source, target = struct.unpack_from("!HH", data)
            flags = "".join(letter for bit, letter in enumerate("FSRP.UEW") if data[13] >> bit & 1)
            question = ""
            if 53 in (source, target):
                question = _question(data[(data[12] >> 4) * 4 + 2 :])  # after the length
            return Tcp(source, target, flags, question)
        case 17:
            if len(data) < 8:
                return Unreadable("cut in the UDP header")
            source, target = struct.unpack_from("!HH", data)
            asked = source in DNS_PORTS or target in DNS_PORTS
            return Udp(source, target, _question(data[8:]) if asked else "")
        case 1 | 58:
            if len(data) < 4:
                return Unreadable("cut in the ICMP header")
            about = ""
            if protocol == 58 and data[0] in (135, 136) and len(data) >= 24:
                about = inet_ntop(AF_INET6, data[8:24])
            return Icmp(4 if protocol == 1 else 6, data[0], data[1], about)
    return None


def _arp(data: bytes) -> Arp | Unreadable:
    if len(data) < 28:
        return Unreadable("cut in the ARP packet")
    if data[:6] != b"\0\x01\x08\0\x06\x04":
        return Unreadable("ARP of something other than IPv4 on Ethernet")
    sender, target = inet_ntop(AF_INET, data[14:18]), inet_ntop(AF_INET, data[24:28])
    return Arp(int.from_bytes(data[6:8]), _mac(data[8:14]), sender, target)


def _marker(data: bytes, length: int) -> Marker | None:
    end = len(_MARKER) + TOKEN_BYTES
    if length != end + 1 or data[: len(_MARKER)] != _MARKER or data[end:] not in (b"\0", b"\1"):
        return None
    return Marker(data[len(_MARKER) : end].hex(), data[end] == 1)


def _question(data: bytes) -> str:
    """The first question of a DNS message (RFC 1035 4.1.2), for people."""
    if len(data) < 12 or not int.from_bytes(data[4:6]):
        return ""
    labels, start = [], 12
    while start < len(data) and 0 < (size := data[start]) < 64:
        label = data[start + 1 : start + 1 + size]
        labels.append("".join(chr(c) if 33 <= c < 127 else f"\\{c:03}" for c in label))
        start += 1 + size
    if start + 3 > len(data):
        return f"? {'.'.join(labels)}…"
    kind = int.from_bytes(data[start + 1 : start + 3])
    return f"{DNS_TYPES.get(kind, f'TYPE{kind}')}? {'.'.join(labels) or '.'}"


def _mac(data: bytes) -> str:
    return data.hex(":")


def _comma(text: str) -> str:
    return f", {text}" if text else ""
