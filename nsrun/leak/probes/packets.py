"""Bytes of packets, headers and checksums included (RFC 791, 8200, 768, 9293, 792, 4443). Pure."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

ICMP, IGMP, TCP, UDP, ICMP6 = 1, 2, 6, 17, 58
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
BROADCAST_MAC = b"\xff" * 6


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(
    source: str,
    target: str,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    fragment: int = 0,
    ttl: int = 64,
    identification: int = 7,
) -> bytes:
    """``fragment`` is the field with its flags: 0x2000 more fragments, else an offset in 8 bytes.

    ``options`` are padded to a multiple of four bytes.
    """
    options += b"\0" * (-len(options) % 4)
    words = 5 + len(options) // 4
    head = struct.pack(
        ">BBHHHBBH4s4s",
        0x40 | words,
        0,
        words * 4 + len(payload),
        identification,
        fragment,
        ttl,
        protocol,
        0,
        IPv4Address(source).packed,
        IPv4Address(target).packed,
    )
    head += options
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def ipv6(source: str, target: str, next_header: int, payload: bytes, *, hops: int = 64) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), next_header, hops)
    return head + IPv6Address(source).packed + IPv6Address(target).packed + payload


def extension(next_header: int, kind: int, body: bytes = b"") -> bytes:
    """An IPv6 extension header of at least eight bytes; ``kind`` FRAGMENT is a whole packet."""
    if kind == FRAGMENT:
        return struct.pack(">BBHI", next_header, 0, 0, 7)
    if not body:  # routing: type 0 (deprecated by RFC 5095), no segments left; options: PadN
        body = b"\0" * 6 if kind == ROUTING else b"\x01\x04\0\0\0\0"
    body += b"\0" * (-(len(body) + 2) % 8)
    return bytes((next_header, (len(body) + 2) // 8 - 1)) + body


def udp(source: str, target: str, source_port: int, target_port: int, payload: bytes) -> bytes:
    head = struct.pack(">HHHH", source_port, target_port, 8 + len(payload), 0)
    total = checksum(_pseudo(source, target, UDP, len(head) + len(payload)) + head + payload)
    return head[:6] + struct.pack(">H", total or 0xFFFF) + payload


def tcp(
    source: str,
    target: str,
    source_port: int,
    target_port: int,
    flags: int,
    payload: bytes = b"",
    *,
    options: bytes = b"",
) -> bytes:
    options += b"\0" * (-len(options) % 4)
    offset = (5 + len(options) // 4) << 4
    ports = (source_port, target_port, 0x11223344, 0x55667788, offset, flags, 4096, 0, 0)
    head = struct.pack(">HHIIBBHHH", *ports) + options
    total = checksum(_pseudo(source, target, TCP, len(head) + len(payload)) + head + payload)
    return head[:16] + struct.pack(">H", total) + head[18:] + payload


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """``rest`` is what follows the checksum: four bytes of header, then the body."""
    head = struct.pack(">BBH", kind, code, 0)
    return struct.pack(">BBH", kind, code, checksum(head + rest)) + rest


def icmp6(source: str, target: str, kind: int, code: int, rest: bytes) -> bytes:
    head = struct.pack(">BBH", kind, code, 0)
    pseudo = _pseudo(source, target, ICMP6, 4 + len(rest))
    return struct.pack(">BBH", kind, code, checksum(pseudo + head + rest)) + rest


def ethernet(source: bytes, target: bytes, ethertype: int, payload: bytes) -> bytes:
    return target + source + struct.pack(">H", ethertype) + payload


def arp(operation: int, mac: bytes, sender: str, target: str) -> bytes:
    """A request (1) or an answer (2) for IPv4 over Ethernet (RFC 826)."""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation)
    return head + mac + IPv4Address(sender).packed + b"\0" * 6 + IPv4Address(target).packed


def _pseudo(source: str, target: str, protocol: int, length: int) -> bytes:
    if ":" in source:
        addresses = IPv6Address(source).packed + IPv6Address(target).packed
        return addresses + struct.pack(">II", length, protocol)
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    return addresses + struct.pack(">BBH", 0, protocol, length)
