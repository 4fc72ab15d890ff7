"""Questions to a resolver, and addresses in its answers. Pure. Sources: RFC 1035, RFC 3596."""

from __future__ import annotations

import struct
from base64 import b32encode
from hashlib import sha3_256
from ipaddress import IPv4Address, IPv6Address, ip_address

A, AAAA = 1, 28
INTERNET = 1
RECURSION_WANTED = 0x0100


def onion(key: bytes) -> str:
    """The name of a service with this public key (rend-spec-v3, "Encoding onion addresses").

    Of a key that nobody has, Tor gives it an address of its own without a packet, others do not.
    """
    check = sha3_256(b".onion checksum" + key + b"\3").digest()[:2]
    return b32encode(key + check + b"\3").decode().lower() + ".onion"


def question(number: int, name: str, kind: int) -> bytes:
    """A message that asks for the addresses of ``name``; ``number`` is for the answer."""
    labels = b"".join(bytes((len(part),)) + part for part in name.encode().split(b"."))
    header = struct.pack("!6H", number, RECURSION_WANTED, 1, 0, 0, 0)
    return header + labels + b"\0" + struct.pack("!HH", kind, INTERNET)


def answers(message: bytes, number: int, kind: int) -> list[IPv4Address | IPv6Address] | None:
    """The addresses of this kind, of none at all for a failure; None if it is no answer to that.

    Every length in it is somebody else's word: what does not fit is no answer.
    """
    try:
        told, _, questions, count = struct.unpack_from("!4H", message)
        place = 12
        for _ in range(questions):
            place = _after_name(message, place) + 4
        found = []
        for _ in range(count):
            place = _after_name(message, place)
            of, _, _, length = struct.unpack_from("!HHIH", message, place)
            data = message[place + 10 : place + 10 + length]
            place += 10 + length
            if of == kind:
                found.append(ip_address(data))
    except (struct.error, IndexError, ValueError):
        return None
    return found if told == number else None


def _after_name(message: bytes, place: int) -> int:
    """Where a name ends that begins at ``place``: with an empty label, or a reference."""
    while (length := message[place]) < 0xC0:
        place += 1 + length
        if length == 0:
            return place
    return place + 2
