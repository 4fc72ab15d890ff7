"""Packets that nobody thought of: random and mutated ones, the same for the same seed.

    python3 -m nsrun.leak.probes.fuzz WORLD SEED COUNT

sends them as frames from inside a workload's network namespace (CAP_NET_RAW), and prints how many
the kernel took. Most are well-formed enough to get past the first checks; some are cut, stretched
or have bytes flipped. Standard library only.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from random import Random

from nsrun.leak.probes import SITES4, SITES6, World, packets

LONGEST = 1400  # bytes of payload: longer ones are the business of fragments
PORTS = (0, 7, 22, 53, 80, 123, 443, 853, 3478, 5353, 9040, 9050, 9051, 9053, 65535)
EXTENSIONS = (packets.HOP_BY_HOP, packets.ROUTING, packets.FRAGMENT, packets.DESTINATION)
TRANSPORTS = (packets.TCP, packets.UDP, packets.ICMP, packets.ICMP6)
ETHERTYPES = (0x0806, 0x8100, 0x88A8, 0x8863, 0x8864, 0x8847, 0x88CC, 0x88E5, 0x888E)


def frames(world: World, mac: bytes, seed: int) -> Iterator[bytes]:
    """Frames without end."""
    luck = Random(seed)  # noqa: S311  to be repeated, not to be unguessable
    while True:
        match luck.randrange(20):
            case 0:
                ethertype, body = 0x0806, _arp(luck, world)
            case 1:
                ethertype, body = luck.choice((*ETHERTYPES, luck.randrange(65536))), _bytes(luck)
            case 2:
                inner, body = 0x0800, _ipv4(luck, world)
                body = struct.pack(">HH", luck.randrange(65536), inner) + body
                ethertype = luck.choice((0x8100, 0x88A8))
            case number if number < 12:
                ethertype, body = 0x0800, _ipv4(luck, world)
            case _:
                ethertype, body = 0x86DD, _ipv6(luck, world)
        if luck.random() < 0.15:
            body = _mutate(luck, body)
        source = mac if luck.random() < 0.8 else luck.randbytes(6)
        target = luck.choice((mac, mac, mac, mac, packets.BROADCAST_MAC, luck.randbytes(6)))
        yield packets.ethernet(source, target, ethertype, body)[:1514]


def _ipv4(luck: Random, world: World) -> bytes:
    source, target = _source4(luck, world), _target4(luck, world)
    protocol = luck.choice((*TRANSPORTS, luck.randrange(256)))
    return packets.ipv4(
        source,
        target,
        protocol,
        _transport(luck, source, target, protocol),
        options=luck.randbytes(luck.randrange(1, 40)) if luck.random() < 0.1 else b"",
        fragment=luck.randrange(65536) if luck.random() < 0.15 else 0,
        ttl=luck.choice((0, 1, 2, 64, 255)),
        identification=luck.randrange(65536),
    )


def _ipv6(luck: Random, world: World) -> bytes:
    source, target = _source6(luck, world), _target6(luck, world)
    protocol = luck.choice((*TRANSPORTS, luck.randrange(256)))
    body = _transport(luck, source, target, protocol)
    while luck.random() < 0.3:
        kind = luck.choice(EXTENSIONS)
        body = packets.extension(protocol, kind, luck.randbytes(luck.randrange(14))) + body
        protocol = kind
    return packets.ipv6(source, target, protocol, body, hops=luck.choice((0, 1, 64, 255)))


def _transport(luck: Random, source: str, target: str, protocol: int) -> bytes:
    ports = (luck.choice((40000, *PORTS)), luck.choice((luck.randrange(65536), *PORTS)))
    body = _bytes(luck)
    match protocol:
        case packets.TCP:
            options = luck.randbytes(luck.randrange(40)) if luck.random() < 0.2 else b""
            flags = luck.randrange(256)
            return packets.tcp(source, target, *ports, flags, body, options=options)
        case packets.UDP:
            return packets.udp(source, target, *ports, body)
        case packets.ICMP:
            return packets.icmp(luck.randrange(256), luck.randrange(16), b"\0" * 4 + body)
        case packets.ICMP6 if ":" in source:
            rest = b"\0" * 4 + body
            return packets.icmp6(source, target, luck.randrange(256), luck.randrange(8), rest)
    return body


def _source4(luck: Random, world: World) -> str:
    others = (world.neighbour, world.gateway, world.host, world.uplink, "127.0.0.1", "0.0.0.0")  # noqa: S104
    return world.own if luck.random() < 0.7 else luck.choice((*others, _any4(luck)))


def _target4(luck: Random, world: World) -> str:
    site = str(SITES4 + luck.randrange(1000))
    others = (
        *(world.neighbour, world.gateway, world.host, world.uplink, world.lan_web, world.router),
        *(world.lan_resolver, world.metadata, "127.0.0.1", "224.0.0.251", "255.255.255.255"),
    )
    return luck.choice((site, site, site, _any4(luck), *others))


def _source6(luck: Random, world: World) -> str:
    others = (world.neighbour6, world.gateway6, world.host6, world.uplink6, "::1", "::", "fe80::1")
    return world.own6 if luck.random() < 0.7 else luck.choice((*others, _any6(luck)))


def _target6(luck: Random, world: World) -> str:
    site = str(SITES6 + luck.randrange(1000))
    others = (
        *(world.neighbour6, world.gateway6, world.host6, world.uplink6, world.lan_web6),
        *("::1", "ff02::1", "ff02::2", "ff02::fb", "fe80::1", "fd00::1", "64:ff9b::1"),
    )
    return luck.choice((site, site, site, _any6(luck), *others))


def _any4(luck: Random) -> str:
    return str(IPv4Address(luck.randrange(1 << 32)))


def _any6(luck: Random) -> str:
    return str(IPv6Address(luck.randrange(1 << 128)))


def _arp(luck: Random, world: World) -> bytes:
    who = (world.own, world.gateway, world.uplink, world.router, world.neighbour)
    return packets.arp(luck.randrange(1, 10), luck.randbytes(6), luck.choice(who), luck.choice(who))


def _bytes(luck: Random) -> bytes:
    return luck.randbytes(luck.choice((0, 1, 12, 40, luck.randrange(LONGEST))))


def _mutate(luck: Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(luck.randrange(1, 6)):
        if changed:
            changed[luck.randrange(len(changed))] = luck.randrange(256)
    if luck.random() < 0.3:
        del changed[luck.randrange(len(changed) + 1) :]
    return bytes(changed)


def main(arguments: list[str]) -> None:
    world = World(**json.loads(arguments[0]))
    taken = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
        link.bind((world.interface, 0))
        made = frames(world, link.getsockname()[4], int(arguments[1]))
        for _ in range(int(arguments[2])):
            try:
                link.send(next(made))
            except OSError:
                continue  # a full queue, or too short to be a frame
            taken += 1
    sys.stdout.write(json.dumps({"sent": taken}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
