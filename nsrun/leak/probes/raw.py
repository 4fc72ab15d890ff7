"""Packets of a program's own making: any protocol, flag, option and source address.

They need CAP_NET_RAW in the workload's network namespace, which no workload has: the battery gives
it to the prober, so that what holds them is the gateway and nothing on the sender's side.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from nsrun.leak.probes import Control, Expect, Needs, Outcome, Probe, Shot, packets
from nsrun.leak.probes.packets import (
    ACK,
    BROADCAST_MAC,
    DESTINATION,
    FIN,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP,
    ICMP6,
    IGMP,
    PSH,
    ROUTING,
    RST,
    SYN,
    TCP,
    UDP,
    URG,
)

if TYPE_CHECKING:
    from nsrun.leak.probes import Send

ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
ETHERTYPE_VLAN, ETHERTYPE_LLDP = 0x8100, 0x88CC
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
IPV6_HDRINCL = 36


def _send4(packet: bytes, target: str) -> Outcome:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as link:
        link.sendto(packet, (target, 0))
    return Outcome.SILENT


def _send6(packet: bytes, target: str) -> Outcome:
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as link:
        link.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        link.sendto(packet, (target, 0, 0, socket.if_nametoindex("eth0")))
    return Outcome.SILENT


def _frame(shot: Shot, ethertype: int, payload: bytes, **how: bytes | bool) -> Outcome:
    """One Ethernet frame, past every rule on its way out (packet(7))."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
        link.bind((shot.world.interface, 0))
        own = link.getsockname()[4]
        if how.get("bypass"):
            link.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        source, target = bytes(how.get("source", own)), bytes(how.get("target", own))
        link.send(packets.ethernet(source, target, ethertype, payload))
    return Outcome.SILENT


def _protocol(number: int) -> Send:
    return lambda shot: _send4(
        packets.ipv4(shot.world.own, shot.site, number, shot.token), shot.site
    )


def _every_protocol(shot: Shot) -> Outcome:
    for number in range(256):
        _send4(packets.ipv4(shot.world.own, shot.site, number, shot.token), shot.site)
    return Outcome.SILENT


def _flags(flags: int) -> Send:
    def send(shot: Shot) -> Outcome:
        segment = packets.tcp(shot.world.own, shot.site, 40000, 443, flags, shot.token)
        return _send4(packets.ipv4(shot.world.own, shot.site, TCP, segment), shot.site)

    return send


def _flags6(flags: int) -> Send:
    def send(shot: Shot) -> Outcome:
        segment = packets.tcp(shot.world.own6, shot.site6, 40000, 443, flags, shot.token)
        return _send6(packets.ipv6(shot.world.own6, shot.site6, TCP, segment), shot.site6)

    return send


def _fragments(*cuts: int) -> Send:
    """A UDP datagram cut at these offsets, in bytes; pieces overlap if they are not in order.

    As frames: the sender's own kernel would put the pieces together, and drop odd ones.
    """

    def send(shot: Shot) -> Outcome:
        own, site = shot.world.own, shot.site
        whole = packets.udp(own, site, 40000, 7, shot.token * 4)
        for begin, end in zip((0, *cuts), (*cuts, len(whole)), strict=True):
            more = 0x2000 if end < len(whole) else 0
            piece = whole[min(begin, end) : max(begin, end)]
            field = more | min(begin, end) // 8
            _frame(shot, ETHERTYPE_IPV4, packets.ipv4(own, site, UDP, piece, fragment=field))
        return Outcome.SILENT

    return send


def _options(options: bytes) -> Send:
    def send(shot: Shot) -> Outcome:
        own, site = shot.world.own, shot.site
        datagram = packets.udp(own, site, 40000, 7, shot.token)
        return _frame(shot, ETHERTYPE_IPV4, packets.ipv4(own, site, UDP, datagram, options=options))

    return send


def _extension(kind: int) -> Send:
    def send(shot: Shot) -> Outcome:
        own, site = shot.world.own6, shot.site6
        datagram = packets.udp(own, site, 40000, 7, shot.token)
        header = packets.extension(UDP, kind)
        return _send6(packets.ipv6(own, site, kind, header + datagram), site)

    return send


def _icmp(kind: int, code: int = 0, to: str = "") -> Send:
    def send(shot: Shot) -> Outcome:
        target = getattr(shot.world, to) if to else shot.site
        message = packets.icmp(kind, code, b"\0\1\0\1" + shot.token)
        return _send4(packets.ipv4(shot.world.own, target, ICMP, message), target)

    return send


def _icmp6(kind: int, to: str = "", hops: int = 255) -> Send:
    def send(shot: Shot) -> Outcome:
        own, target = shot.world.own6, to or shot.site6
        message = packets.icmp6(own, target, kind, 0, b"\0\1\0\1" + shot.token)
        return _send6(packets.ipv6(own, target, ICMP6, message, hops=hops), target)

    return send


def _echo(to: str) -> Send:
    """An echo request that is answered, if anybody answers."""

    def send(shot: Shot) -> Outcome:
        target = getattr(shot.world, to)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, ICMP) as link:
            link.settimeout(shot.seconds)
            link.sendto(packets.icmp(8, 0, b"\0\7\0\7" + shot.token), (target, 0))
            while True:
                answer = link.recv(2048)
                if answer[20] == 0 and shot.token in answer:
                    return Outcome.ANSWERED
                if answer[20] == 3 and shot.token in answer:
                    return Outcome.REFUSED

    return send


def _spoofed(source: str) -> Send:
    """A datagram from an address that is not ours, as a frame: no rule of ours has seen it."""

    def send(shot: Shot) -> Outcome:
        address = getattr(shot.world, source, source)
        if ":" in address:
            datagram = packets.udp(address, shot.site6, 40000, 7, shot.token)
            return _frame(shot, ETHERTYPE_IPV6, packets.ipv6(address, shot.site6, UDP, datagram))
        datagram = packets.udp(address, shot.site, 40000, 7, shot.token)
        return _frame(shot, ETHERTYPE_IPV4, packets.ipv4(address, shot.site, UDP, datagram))

    return send


def _datagram_frame(shot: Shot, **how: bytes | bool) -> Outcome:
    own, site = shot.world.own, shot.site
    datagram = packets.udp(own, site, 40000, 7, shot.token)
    return _frame(shot, ETHERTYPE_IPV4, packets.ipv4(own, site, UDP, datagram), **how)


def _vlan(shot: Shot) -> Outcome:
    own, site = shot.world.own, shot.site
    datagram = packets.udp(own, site, 40000, 7, shot.token)
    inner = struct.pack(">HH", 7, ETHERTYPE_IPV4) + packets.ipv4(own, site, UDP, datagram)
    return _frame(shot, ETHERTYPE_VLAN, inner)


def _ask_arp(target: str) -> Send:
    """Who has this address? It tells the truth about us: who hears it, believes it (RFC 826)."""

    def send(shot: Shot) -> Outcome:
        own, other = shot.world.own, getattr(shot.world, target)
        body = packets.arp(1, _mac(shot.world.interface), own, other)
        return _frame(shot, ETHERTYPE_ARP, body + shot.token, target=BROADCAST_MAC)

    return send


def _claim_by_arp(shot: Shot) -> Outcome:
    gateway = shot.world.gateway
    body = packets.arp(2, b"\2\0\0\0\0\7", gateway, gateway)
    return _frame(shot, ETHERTYPE_ARP, body + shot.token, target=BROADCAST_MAC)


def _mac(interface: str) -> bytes:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
        link.bind((interface, 0))
        return bytes(link.getsockname()[4])


def _raw(
    name: str, title: str, send: Send, *promises: str, control: Control = Control.WIRE
) -> Probe:
    return Probe(name, title, promises or ("P3",), Expect.NOWHERE, send, Needs.NET_RAW, control)


LSRR = b"\x83\x07\x04\x0b\xc8\0\x50"  # loose source route by one address (RFC 791, 3.1)
RECORD_ROUTE = b"\x07\x07\x04\0\0\0\0"
TIMESTAMP = b"\x44\x08\x05\0\0\0\0\0"

PROBES = (
    *(_raw(f"tcp-{name}", f"TCP, first segment {title}", _flags(flags)) for name, title, flags in (
        ("fin", "FIN", FIN), ("fin-ack", "FIN ACK", FIN | ACK), ("rst", "RST", RST),
        ("rst-ack", "RST ACK", RST | ACK), ("ack", "ACK", ACK), ("psh-ack", "PSH ACK", PSH | ACK),
        ("null", "without flags", 0), ("xmas", "FIN PSH URG", FIN | PSH | URG),
        ("syn-ack", "SYN ACK", SYN | ACK), ("syn-fin", "SYN FIN", SYN | FIN),
        ("syn-rst", "SYN RST", SYN | RST),
    )),
    _raw("tcp-ack6", "TCP over IPv6, first segment ACK", _flags6(PSH | ACK)),
    _raw("tcp-fin6", "TCP over IPv6, first segment FIN", _flags6(FIN | ACK)),
    *(_raw(f"ip-{name}", f"IP protocol {name}", _protocol(number)) for name, number in (
        ("igmp", IGMP), ("ipip", 4), ("egp", 8), ("dccp", 33), ("6in4", 41), ("gre", 47),
        ("esp", 50), ("ah", 51), ("ospf", 89), ("pim", 103), ("vrrp", 112), ("l2tp", 115),
        ("sctp", 132), ("udplite", 136), ("mptcp", 252),
    )),
    _raw("ip-all", "all 256 IP protocols", _every_protocol),
    _raw("ip-fragments", "fragments", _fragments(24)),
    _raw("ip-tiny-fragments", "fragments of eight bytes", _fragments(8, 16, 24, 32)),
    _raw("ip-overlap", "overlapping fragments", _fragments(32, 16)),
    _raw("ip-source-route", "a source route", _options(LSRR)),
    _raw("ip-record-route", "a record of the route", _options(RECORD_ROUTE)),
    _raw("ip-timestamp", "an IP timestamp", _options(TIMESTAMP)),
    _raw("ip6-hop-by-hop", "IPv6 hop-by-hop options", _extension(HOP_BY_HOP)),
    _raw("ip6-routing", "an IPv6 routing header", _extension(ROUTING)),
    _raw("ip6-fragment", "an IPv6 fragment header", _extension(FRAGMENT)),
    _raw("ip6-destination", "IPv6 destination options", _extension(DESTINATION)),
    _raw("icmp-echo", "ping", _icmp(8)),
    _raw("icmp-timestamp", "ICMP timestamp request", _icmp(13)),
    _raw("icmp-mask", "ICMP address mask request", _icmp(17)),
    _raw("icmp-redirect", "ICMP redirect", _icmp(5)),
    _raw("icmp-unreachable", "ICMP unreachable", _icmp(3, 4)),
    _raw("icmp-lan", "ping to the LAN", _icmp(8, to="lan_web"), "P3", "P5"),
    _raw("icmp-gateway", "ping to the gateway", _echo("gateway"), "P5", control=Control.GATEWAY),
    _raw("icmp-uplink", "ping to the gateway's uplink", _echo("uplink"), "P5",
         control=Control.GATEWAY),
    _raw("icmp6-echo", "ping over IPv6", _icmp6(128)),
    _raw("icmp6-solicit", "router solicitation", _icmp6(133, "ff02::2")),
    _raw("icmp6-advert", "router advertisement", _icmp6(134, "ff02::1")),
    _raw("icmp6-neighbour", "neighbour solicitation", _icmp6(135, "ff02::1")),
    _raw("icmp6-redirect", "IPv6 redirect", _icmp6(137)),
    _raw("icmp6-mld", "multicast listener report", _icmp6(143, "ff02::16", 1)),
    _raw("frame-udp", "UDP as a frame", _datagram_frame),
    _raw("frame-bypass", "a frame past the queue", lambda s: _datagram_frame(s, bypass=True)),
    _raw("frame-broadcast", "IP in a broadcast frame",
         lambda s: _datagram_frame(s, target=BROADCAST_MAC)),
    _raw("frame-mac", "a foreign source MAC", lambda s: _datagram_frame(s, source=b"\2\0\0\0\7\7")),
    _raw("frame-vlan", "a VLAN tag", _vlan),
    _raw("frame-lldp", "LLDP", lambda s: _frame(s, ETHERTYPE_LLDP, s.token * 4)),
    _raw("frame-unknown", "an unknown ethertype", lambda s: _frame(s, 0x9999, s.token * 4)),
    _raw("arp-router", "ARP for the router", _ask_arp("router"), "P5"),
    _raw("arp-uplink", "ARP for the gateway's uplink address", _ask_arp("uplink"), "P5"),
    _raw("arp-claim", "ARP that claims the gateway's address", _claim_by_arp, "P5"),
    _raw("spoof-neighbour", "another workload's address", _spoofed("neighbour"), "P5", "P7"),
    _raw("spoof-neighbour6", "another workload's IPv6 address", _spoofed("neighbour6"), "P5", "P7"),
    _raw("spoof-host", "the host's address", _spoofed("host"), "P5"),
    _raw("spoof-gateway", "the gateway's address", _spoofed("gateway"), "P5"),
    _raw("spoof-public", "a public address", _spoofed("93.184.216.34"), "P5"),
    _raw("spoof-loopback", "a loopback address", _spoofed("127.0.0.1"), "P5"),
)  # fmt: skip
