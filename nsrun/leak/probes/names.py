"""DNS in all its forms: by which server, protocol, type of question and socket of a daemon."""

from __future__ import annotations

import socket
import struct
import time

from nsrun.leak.probes import (
    Expect,
    Outcome,
    Probe,
    Shot,
    datagram,
    question,
    stream,
    unconnected,
)

A, PTR, MX, TXT, AAAA, SRV, HTTPS, ANY = 1, 12, 15, 16, 28, 33, 65, 255
CHAOS = 3


def _ask(shot: Shot, server: str, qtype: int = A, qclass: int = 1) -> Outcome:
    return datagram(shot, server, 53, question(shot, qtype, qclass))


def _libc(shot: Shot) -> Outcome:
    """Whatever nsswitch.conf says: files, DNS, or a daemon behind a socket."""
    name = f"{shot.token.decode()}.test"
    until = time.monotonic() + shot.seconds
    while True:
        try:
            found = socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or time.monotonic() > until:
                return Outcome.REFUSED
        else:
            return Outcome.ANSWERED if found else Outcome.REFUSED


def _special(shot: Shot, suffix: str) -> Outcome:
    """A name below one that Tor keeps to itself."""
    return datagram(shot, shot.site, 53, question(shot, suffix=suffix))


def _private_ptr(shot: Shot) -> Outcome:
    """Whose address in the LAN is this? No exit may hear it; the packet's target is the token."""
    labels = ("80", "77", "168", "192", "in-addr", "arpa")
    name = b"".join(bytes((len(label),)) + label.encode() for label in labels) + b"\0"
    query = struct.pack(">6H", shot.number & 0xFFFF, 0x0100, 1, 0, 0, 0) + name
    return datagram(shot, shot.site, 53, query + struct.pack(">2H", PTR, 1))


def _over_tcp(shot: Shot, server: str) -> Outcome:
    query = question(shot)
    return stream(shot, server, 53, struct.pack(">H", len(query)) + query)


def _edns(shot: Shot) -> Outcome:
    """With EDNS: a large buffer, DNSSEC OK and a client subnet (RFC 6891, 7871)."""
    subnet = struct.pack(">HHHBB", 8, 7, 1, 24, 0) + bytes((1, 2, 3))
    options = struct.pack(">BHHIH", 0, 41, 4096, 0x8000, len(subnet)) + subnet
    query = question(shot)
    return datagram(shot, shot.world.resolver, 53, query[:10] + b"\0\1" + query[12:] + options)


def _malformed(shot: Shot) -> Outcome:
    """A question whose name is a pointer to itself."""
    query = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1"
    return datagram(shot, shot.site, 53, query + shot.token)


def _bound(shot: Shot) -> Outcome:
    """From port 53 itself, as a resolver would ask."""
    return datagram(shot, shot.site, 53, question(shot), source_port=5300 + shot.number % 100)


PROBES = (
    Probe("dns-udp", "DNS to a public resolver", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.world.resolver)),
    Probe("dns-udp6", "DNS to a public resolver, IPv6", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.world.resolver6)),
    Probe("dns-site", "DNS to an address that is no resolver", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site)),
    Probe("dns-site6", "DNS to an IPv6 address that is no resolver", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site6)),
    Probe("dns-lan", "DNS to the LAN's resolver", ("P2", "P5"), Expect.TOR,
          lambda shot: _ask(shot, shot.world.lan_resolver)),
    Probe("dns-router", "DNS to the router", ("P2", "P5"), Expect.TOR,
          lambda shot: _ask(shot, shot.world.router)),
    Probe("dns-libc", "names through libc", ("P2", "P6"), Expect.TOR, _libc),
    Probe("dns-aaaa", "DNS, AAAA", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, AAAA)),
    Probe("dns-ptr", "DNS, PTR", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, PTR)),
    Probe("dns-ptr-private", "DNS, PTR of a private address", ("P2",), Expect.TOR, _private_ptr),
    Probe("dns-exit", "a name in .exit", ("P2",), Expect.TOR,
          lambda shot: _special(shot, "exit")),
    Probe("dns-txt", "DNS, TXT", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, TXT)),
    Probe("dns-mx", "DNS, MX", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, MX)),
    Probe("dns-srv", "DNS, SRV", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, SRV)),
    Probe("dns-https", "DNS, HTTPS", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, HTTPS)),
    Probe("dns-any", "DNS, ANY", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, ANY)),
    Probe("dns-chaos", "DNS, class CHAOS", ("P2",), Expect.TOR,
          lambda shot: _ask(shot, shot.site, TXT, CHAOS)),
    Probe("dns-edns", "DNS with a client subnet", ("P2",), Expect.TOR, _edns),
    Probe("dns-malformed", "DNS, malformed", ("P2", "P4"), Expect.NOWHERE, _malformed),
    Probe("dns-source-port", "DNS from a fixed port", ("P2",), Expect.TOR, _bound),
    Probe("dns-tcp", "DNS over TCP to a public resolver", ("P1", "P2"), Expect.TOR,
          lambda shot: _over_tcp(shot, shot.world.resolver)),
    Probe("dns-tcp-lan", "DNS over TCP to the LAN's resolver", ("P2", "P5"), Expect.REFUSED,
          lambda shot: _over_tcp(shot, shot.world.lan_resolver)),
    Probe("dns-tls", "DNS over TLS, its port", ("P1",), Expect.NOWHERE,
          lambda shot: stream(shot, shot.site, 853, shot.token)),
    Probe("dns-quic", "DNS over QUIC, its port", ("P3",), Expect.REFUSED,
          lambda shot: datagram(shot, shot.site, 853, shot.token)),
    Probe("mdns", "multicast DNS", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("224.0.0.251", 5353, question(shot, suffix="local"))),
    Probe("mdns6", "multicast DNS, IPv6", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("ff02::fb", 5353, question(shot, suffix="local"))),
    Probe("llmnr", "LLMNR", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("224.0.0.252", 5355, question(shot))),
    Probe("nbns", "NetBIOS names", ("P3",), Expect.NOWHERE,
          lambda shot: unconnected("255.255.255.255", 137, question(shot))),
)  # fmt: skip
