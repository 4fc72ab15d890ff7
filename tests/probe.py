"""Sends what must not get out, and says what became of each. Runs anywhere: standard library only.

    probe.py NAME...                one JSON object: for each name "sent", or why it was refused
    probe.py --for SECONDS [HERTZ]  strays of every kind, without waiting for an answer

Every packet carries the token, so that it is found on any wire; a TCP segment cannot, but its
destination is no relay's.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import time
from contextlib import suppress

TOKEN = b"ttp-probe-7c1f"
SITE, SITE6 = "11.200.0.80", "2600:11c8::80"  # the lab's web server, which echoes UDP as well
RESOLVER, LAN_RESOLVER = "11.200.0.53", "192.168.77.53"
LAN_WEB, METADATA = "192.168.77.80", "169.254.169.254"
HOST, HOST6 = "192.168.77.10", "2001:db8:77::10"


def datagram(host: str, port: int, payload: bytes = TOKEN) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        udp.settimeout(1)
        udp.sendto(payload, (host, port))
        with suppress(TimeoutError):  # sent, and no answer: the wires tell the rest
            udp.recv(100)


def query(resolver: str) -> None:
    name = b"\x0e" + TOKEN + b"\x04test\0"
    datagram(resolver, 53, struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + name + b"\0\1\0\1")


def stream(host: str, port: int) -> None:
    with socket.create_connection((host, port), 3) as tcp:
        tcp.sendall(b"GET / HTTP/1.0\r\nX-Probe: " + TOKEN + b"\r\n\r\n")
        tcp.recv(100)


def echo_request(host: str) -> None:
    kind = (socket.SOCK_DGRAM, socket.SOCK_RAW)
    family, protocol = socket.AF_INET, socket.IPPROTO_ICMP
    for index, one in enumerate(kind):
        try:
            with socket.socket(family, one, protocol) as icmp:
                header = struct.pack(">BBHHH", 8, 0, 0, 1, 1)
                words = struct.unpack(">4H7H", header + TOKEN)
                total = sum(words)
                total = (total & 0xFFFF) + (total >> 16)
                header = struct.pack(">BBHHH", 8, 0, ~total & 0xFFFF, 1, 1)
                icmp.sendto(header + TOKEN, (host, 0))
                return
        except PermissionError:
            if index:
                raise


def raw(protocol: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as packets:
        packets.sendto(TOKEN, (SITE, 0))


PROBES = {
    "udp": lambda: datagram(SITE, 7),
    "udp6": lambda: datagram(SITE6, 7),
    "quic": lambda: datagram(SITE, 443),
    "quic6": lambda: datagram(SITE6, 443),
    "ntp": lambda: datagram(SITE, 123),
    "stun": lambda: datagram(SITE, 3478),
    "ping": lambda: echo_request(SITE),
    "gre": lambda: raw(47),
    "lan-tcp": lambda: stream(LAN_WEB, 80),
    "lan-udp": lambda: datagram(LAN_WEB, 9),
    "lan-dns": lambda: query(LAN_RESOLVER),
    "foreign-dns": lambda: query(RESOLVER),
    "metadata": lambda: stream(METADATA, 80),
    "host-tcp": lambda: stream(HOST, 22),
    "mdns": lambda: datagram("224.0.0.251", 5353),
    "mdns6": lambda: datagram("ff02::fb", 5353),
    "broadcast": lambda: datagram("255.255.255.255", 67),
}


DATAGRAMS = ((SITE, 7), (SITE6, 443), (LAN_WEB, 9), (HOST6, 9), ("224.0.0.251", 5353), (SITE, 123))
STREAMS = ((SITE, 80), (SITE6, 80), (LAN_WEB, 80), (METADATA, 80))


def strays(streams: bool = True) -> int:
    """One packet of every kind, without waiting; returns how many the kernel took."""
    taken = 0
    for host, port in (*DATAGRAMS, (RESOLVER, 53), *(STREAMS if streams else ())):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = socket.SOCK_STREAM if port == 80 else socket.SOCK_DGRAM
        with suppress(OSError), socket.socket(family, kind) as packets:
            packets.setblocking(False)
            if kind == socket.SOCK_DGRAM:
                packets.sendto(TOKEN, (host, port))
                taken += 1
            else:
                taken += packets.connect_ex((host, port)) == errno.EINPROGRESS
    for protocol in (socket.IPPROTO_ICMP, 47):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as packets:
            packets.setblocking(False)
            packets.sendto(struct.pack(">BBHHH", 8, 0, 0, 1, 1) + TOKEN, (SITE, 0))
            taken += 1
    return taken


def pester(seconds: float, hertz: float = 50) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        strays()
        time.sleep(1 / hertz)


def main(names: list[str]) -> None:
    if names[:1] == ["--for"]:
        pester(*map(float, names[1:]))
        return
    results = {}
    for name in names or list(PROBES):
        try:
            PROBES[name]()
            results[name] = "sent"
        except OSError as error:
            results[name] = f"{type(error).__name__}: {error.strerror}"
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
