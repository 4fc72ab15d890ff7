"""The pcap file of a tap (draft-ietf-opsawg-pcap, nanosecond kind), and what it is worth.

Pure: bytes in, bytes out. A file that ends in the middle of a record is read up to there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from nsrun.leak import frames

LINKTYPE_ETHERNET, LINKTYPE_RAW = 1, 101
SNAP_LENGTH = 256  # Ethernet, two VLAN tags, IPv6, extension headers, TCP with options, a DNS name

_HEADER = struct.Struct("<IHHiIII")
_MAGIC = 0xA1B23C4D  # little-endian, nanoseconds
RECORD = struct.Struct("<IIII")  # seconds, nanoseconds, bytes stored, bytes on the wire


@dataclass(frozen=True)
class Capture:
    """What one tap saw of one wire, and what it says of itself."""

    frames: tuple[frames.Frame, ...]
    token: str
    """Of this tap's own markers."""
    dropped: int | None
    """Packets that the kernel could not hand to the tap; None if the tap died untold."""
    gone: bool = False
    """The interface was removed while the tap still watched: the end that needs no marker."""
    trouble: tuple[str, ...] = ()
    """Whatever else makes this capture incomplete, in words."""

    def marked(self, *, start: bool) -> bool:
        """Whether this tap's own marker of the start, or of the end, is among the frames."""
        return any(frame.body == frames.Marker(self.token, start) for frame in self.frames)


def header(linktype: int, snap_length: int = SNAP_LENGTH) -> bytes:
    return _HEADER.pack(_MAGIC, 2, 4, 0, 0, snap_length, linktype)


def records(packets: Iterable[tuple[int, int, int, bytes]]) -> bytes:
    """Seconds, nanoseconds, bytes on the wire and the first of them, as a file has them."""
    parts = []
    for seconds, nanoseconds, length, data in packets:
        parts += [RECORD.pack(seconds, nanoseconds, len(data), length), data]
    return b"".join(parts)


def whole(data: bytes, limit: int) -> int:
    """How many of the first ``limit`` bytes of ``records()`` are whole records."""
    place = 0
    while place + RECORD.size <= limit:
        end = place + RECORD.size + RECORD.unpack_from(data, place)[2]
        if end > limit:
            break
        place = end
    return place


def load(content: bytes) -> tuple[tuple[frames.Frame, ...], str]:
    """The frames of a file that a tap wrote, and what is wrong with it (empty: nothing)."""
    if len(content) < _HEADER.size:
        return (), "the capture file has no header"
    magic, _, _, _, _, _, linktype = _HEADER.unpack_from(content)
    if magic != _MAGIC or linktype not in (LINKTYPE_ETHERNET, LINKTYPE_RAW):
        return (), "the capture file is not one of a tap"
    found, place = [], _HEADER.size
    while place + RECORD.size <= len(content):
        seconds, nanoseconds, stored, length = RECORD.unpack_from(content, place)
        end = place + RECORD.size + stored
        if end > len(content):
            break
        data, place = content[place + RECORD.size : end], end
        time_ns = seconds * 1_000_000_000 + nanoseconds
        found.append(frames.decode(data, length, time_ns, raw=linktype == LINKTYPE_RAW))
    flaw = "" if place == len(content) else "the capture file ends in the middle of a packet"
    return tuple(found), flaw


def dump(selected: Iterable[frames.Frame]) -> bytes:
    """A pcap of frames of one capture, as evidence for wireshark(1) and the like."""
    chosen = tuple(selected)
    raw = bool(chosen) and all(frame.ethernet is None for frame in chosen)
    longest = max((SNAP_LENGTH, *(len(frame.data) for frame in chosen)))
    return header(LINKTYPE_RAW if raw else LINKTYPE_ETHERNET, longest) + records(
        (*divmod(frame.time_ns, 1_000_000_000), frame.length, frame.data) for frame in chosen
    )
