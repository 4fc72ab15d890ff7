"""TCP and UDP as an ordinary program sends them: where to, by which port, with which socket."""

from __future__ import annotations

import socket
import struct

from nsrun.leak.probes import (
    SECONDS,
    Control,
    Expect,
    Needs,
    Outcome,
    Probe,
    Send,
    Shot,
    datagram,
    request,
    stream,
    unconnected,
)

STUN = struct.pack(">HHI", 1, 0, 0x2112A442)  # a binding request (RFC 8489), less its identifier
QUIC = b"\xc3\0\0\0\x01\x08"  # the beginning of an Initial packet (RFC 9000, 17.2.2)
IPPROTO_MPTCP, IPPROTO_UDPLITE = 262, 136
MSG_FASTOPEN = 0x20000000
IP_PKTINFO = 8


def _web(host: str, shot: Shot, port: int = 80) -> Outcome:
    return stream(shot, host, port, request(shot))


def _fast_open(shot: Shot) -> Outcome:
    """Data in the SYN (RFC 7413), by a call that connects and sends at once."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        # a timeout of Python's would make the socket, and so the call, non-blocking
        seconds = struct.pack("ll", int(shot.seconds), 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            tcp.setsockopt(socket.SOL_SOCKET, option, seconds)
        tcp.sendto(request(shot), MSG_FASTOPEN, (shot.site, 80))
        return Outcome.ANSWERED if tcp.recv(2048) else Outcome.REFUSED


def _multipath(shot: Shot) -> Outcome:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as tcp:
        tcp.settimeout(shot.seconds)
        tcp.connect((shot.site, 80))
        tcp.sendall(request(shot))
        return Outcome.ANSWERED if tcp.recv(2048) else Outcome.REFUSED


def _bound_to_device(shot: Shot) -> Outcome:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(shot.seconds)
        name = shot.world.interface.encode()
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
        udp.connect((shot.site, 7))
        udp.send(shot.token)
        udp.recv(100)
    return Outcome.ANSWERED


def _chosen_source(shot: Shot) -> Outcome:
    """The source address chosen per packet (IP_PKTINFO, ip(7)): our own, on any interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        info = struct.pack("I4s4s", 0, socket.inet_aton(shot.world.own), b"\0" * 4)
        udp.sendmsg([shot.token], [(socket.SOL_IP, IP_PKTINFO, info)], 0, (shot.site, 7))
        udp.recv(100)
    return Outcome.ANSWERED


def _low_ttl(shot: Shot) -> Outcome:
    """As traceroute does: who answers that it died tells who is on the way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(shot.seconds)
        udp.setsockopt(socket.SOL_IP, socket.IP_TTL, 2)
        udp.connect((shot.site, 33434))
        udp.send(shot.token)
        udp.recv(100)
    return Outcome.ANSWERED


def _lite(shot: Shot) -> Outcome:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, IPPROTO_UDPLITE) as udp:
        udp.settimeout(shot.seconds)
        udp.connect((shot.site, 7))
        udp.send(shot.token)
        udp.recv(100)
    return Outcome.ANSWERED


def _join(shot: Shot) -> Outcome:
    """Join a group, which the kernel tells the neighbours by IGMP, and speak to it."""
    group = socket.inet_aton("239.255.77.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        udp.setsockopt(
            socket.SOL_IP, socket.IP_ADD_MEMBERSHIP, group + socket.inet_aton(shot.world.own)
        )
        udp.sendto(shot.token, ("239.255.77.1", 7777))
        udp.recv(100)
    return Outcome.ANSWERED


def _join6(shot: Shot) -> Outcome:
    index = socket.if_nametoindex(shot.world.interface)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        group = socket.inet_pton(socket.AF_INET6, "ff15::77")
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("I", index))
        udp.sendto(shot.token, ("ff15::77", 7777, 0, index))
        udp.recv(100)
    return Outcome.ANSWERED


def _many_ports(shot: Shot) -> Outcome:
    """Every 97th port from 1 to 65535, but DNS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setblocking(False)
        for port in range(1, 65536, 97):
            if port != 53:
                try:
                    udp.sendto(shot.token, (shot.site, port))
                except OSError:
                    continue  # the answer to an earlier one
    return Outcome.SILENT


def _udp(port: int, payload: bytes = b"") -> Send:
    return lambda shot: datagram(shot, shot.site, port, payload + shot.token)


def _udp6(port: int, payload: bytes = b"") -> Send:
    return lambda shot: datagram(shot, shot.site6, port, payload + shot.token)


TCP = (
    Probe("tcp", "TCP to a web server", ("P1",), Expect.TOR, lambda shot: _web(shot.site, shot)),
    Probe("tcp6", "TCP over IPv6", ("P1",), Expect.TOR, lambda shot: _web(shot.site6, shot)),
    Probe("tcp-mapped", "TCP to an IPv4-mapped IPv6 address", ("P1",), Expect.TOR,
          lambda shot: _web(f"::ffff:{shot.site}", shot)),
    Probe("tcp-fast-open", "TCP with data in the SYN", ("P1",), Expect.TOR, _fast_open),
    Probe("tcp-multipath", "multipath TCP", ("P1",), Expect.TOR, _multipath),
    Probe("tcp-smtp", "TCP to port 25", ("P1",), Expect.NOWHERE,
          lambda shot: stream(shot, shot.site, 25, shot.token)),
    Probe("tcp-nbss", "TCP to port 139", ("P1",), Expect.NOWHERE,
          lambda shot: stream(shot, shot.site, 139, shot.token)),
    Probe("tcp-lan", "TCP to the LAN", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, shot.world.lan_web, 80, request(shot))),
    Probe("tcp-lan6", "TCP to the LAN, IPv6", ("P1",), Expect.NOWHERE,
          lambda shot: stream(shot, shot.world.lan_web6, 80, request(shot))),
    Probe("tcp-metadata", "TCP to the cloud's metadata service", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, shot.world.metadata, 80, request(shot))),
    Probe("tcp-router", "TCP to the router", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, shot.world.router, 22, request(shot))),
    Probe("tcp-cgnat", "TCP to a carrier's NAT (100.64/10)", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, "100.64.0.1", 80, request(shot))),
    Probe("tcp-ula", "TCP to a unique local address", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, "fd12:3456::1", 80, request(shot))),
    Probe("tcp-nat64", "TCP by NAT64's prefix", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, "64:ff9b::c0a8:4d50", 80, request(shot))),
    Probe("tcp-class-e", "TCP to a reserved address", ("P5",), Expect.REFUSED,
          lambda shot: stream(shot, "240.0.0.1", 80, request(shot))),
)  # fmt: skip

UDP = (
    Probe("udp", "UDP", ("P3",), Expect.REFUSED, _udp(7)),
    Probe("udp6", "UDP over IPv6", ("P3",), Expect.REFUSED, _udp6(7)),
    Probe("udp-quic", "QUIC", ("P3",), Expect.REFUSED, _udp(443, QUIC)),
    Probe("udp-quic6", "QUIC over IPv6", ("P3",), Expect.REFUSED, _udp6(443, QUIC)),
    Probe("udp-stun", "STUN, as WebRTC asks", ("P3",), Expect.REFUSED, _udp(3478, STUN)),
    Probe("udp-stun6", "STUN over IPv6", ("P3",), Expect.REFUSED, _udp6(3478, STUN)),
    Probe("udp-turn", "TURN, another port", ("P3",), Expect.REFUSED, _udp(19302, STUN)),
    Probe("udp-ntp", "NTP", ("P3",), Expect.REFUSED, _udp(123, b"\x23" + b"\0" * 47)),
    Probe("udp-ptp", "PTP", ("P3",), Expect.REFUSED, _udp(319)),
    Probe("udp-wireguard", "WireGuard", ("P3",), Expect.REFUSED, _udp(51820, b"\1\0\0\0")),
    Probe("udp-ike", "IKE", ("P3",), Expect.REFUSED, _udp(500)),
    Probe("udp-openvpn", "OpenVPN", ("P3",), Expect.REFUSED, _udp(1194, b"\x38")),
    Probe("udp-dht", "BitTorrent's DHT", ("P3",), Expect.REFUSED, _udp(6881, b"d1:ad2:id20:")),
    Probe("udp-sip", "SIP", ("P3",), Expect.REFUSED, _udp(5060, b"OPTIONS sip:a SIP/2.0\r\n")),
    Probe("udp-large", "UDP in fragments", ("P3",), Expect.REFUSED,
          lambda shot: datagram(shot, shot.site, 7, shot.token * 4000)),
    Probe("udp-large-dns", "UDP in fragments, to port 53", ("P2", "P3"), Expect.NOWHERE,
          lambda shot: datagram(shot, shot.site, 53, shot.token * 4000)),
    Probe("udp-ports", "UDP to many ports", ("P3",), Expect.NOWHERE, _many_ports),
    Probe("udp-low-ttl", "UDP with a low TTL", ("P3",), Expect.REFUSED, _low_ttl),
    Probe("udp-lite", "UDP-Lite", ("P3",), Expect.REFUSED, _lite),
    Probe("udp-device", "UDP bound to a device", ("P3",), Expect.REFUSED, _bound_to_device),
    Probe("udp-pktinfo", "UDP with a chosen source", ("P3",), Expect.NOWHERE, _chosen_source),
    Probe("udp-lan", "UDP to the LAN", ("P3", "P5"), Expect.REFUSED,
          lambda shot: datagram(shot, shot.world.lan_web, 9, shot.token)),
    Probe("udp-router", "UDP to the router", ("P3", "P5"), Expect.REFUSED,
          lambda shot: datagram(shot, shot.world.router, 1900, shot.token)),
    Probe("udp-broadcast", "broadcast", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("255.255.255.255", 9, shot.token)),
    Probe("udp-dhcp", "DHCP discover", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("255.255.255.255", 67, b"\1\1\6\0" + shot.token)),
    Probe("udp-dhcp6", "DHCPv6 solicit", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("ff02::1:2", 547, b"\1\0\0\7" + shot.token)),
    Probe("udp-ssdp", "SSDP", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("239.255.255.250", 1900, b"M-SEARCH * HTTP/1.1" + shot.token)),
    Probe("udp-discovery", "WS-Discovery", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("239.255.255.250", 3702, shot.token)),
    Probe("udp-all-hosts", "multicast to all hosts", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("224.0.0.1", 9, shot.token)),
    Probe("udp-all-nodes", "multicast to all nodes, IPv6", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("ff02::1", 9, shot.token)),
    Probe("udp-join", "joining a group", ("P3",), Expect.NOWHERE, _join),
    Probe("udp-join6", "joining a group, IPv6", ("P3",), Expect.NOWHERE, _join6),
)  # fmt: skip

TOGETHER = (
    Probe("identity", "two workloads with one identity", ("P7",), Expect.REFUSED,
          lambda shot: _web(shot.site, shot), Needs.TWO, Control.IDENTITY),
)  # fmt: skip

PROBES = (*TCP, *UDP, *TOGETHER)
