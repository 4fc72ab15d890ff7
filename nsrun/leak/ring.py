"""A ring of packets shared with the kernel: packet(7), TPACKET_V3 in packet_mmap.rst.

The kernel writes each frame of one interface, both ways, into blocks of memory that it hands over
when they are full or RETIRE_MS old. No system call per packet, and what found no room is counted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator

SOL_PACKET = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION = 5, 6, 10
SO_ATTACH_FILTER = 26
ETH_P_ALL = 3
TPACKET_V3 = 2

# linux/filter.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ, BPF_RET, SKF_AD_OFF + SKF_AD_IFINDEX
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INTERFACE_INDEX = 0xFFFFF000 + 8

BLOCK_BYTES, BLOCKS = 1 << 18, 64  # 16 MiB: about 50,000 frames of 256 bytes
RETIRE_MS = 10

_BLOCK = struct.Struct("=8xIII")  # status, packets, offset of the first (after version, priv)
_PACKET = struct.Struct("=IIIIIIHH4xIH")  # struct tpacket3_hdr as far as tp_vlan_tpid
_STATUS_KERNEL, _STATUS_USER = 0, 1
_VLAN_VALID, _VLAN_TPID_VALID = 1 << 4, 1 << 6

Packet = tuple[int, int, int, bytes]
"""Seconds, nanoseconds, bytes on the wire, the first of them."""


class Ring:
    """Frames of one interface, from the moment this is made. Raises OSError.

    An interface may go down and up again: not one frame is missed. A socket bound to it would be
    taken off while it is down and put back too late, after the kernel has greeted the neighbours.
    So this one listens on all, and its filter selects.
    """

    def __init__(self, interface: str, snap_length: int) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as it:
            it.bind((interface, 0))
            _, _, _, self.hardware_type, self.mac = it.getsockname()
        self._index = socket.if_nametoindex(interface)
        # protocol 0: nothing may enter before ring and filter are in place
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            self.socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
            frame = 2048  # V3 packs frames of any size; the kernel still checks the product
            count = BLOCK_BYTES // frame * BLOCKS
            request = struct.pack("=7I", BLOCK_BYTES, BLOCKS, frame, count, RETIRE_MS, 0, 0)
            self.socket.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
            self._memory = mmap.mmap(self.socket.fileno(), BLOCK_BYTES * BLOCKS)
            self._filter(
                (_LOAD, 0, 0, _INTERFACE_INDEX),
                (_JUMP_EQUAL, 0, 1, self._index),
                (_RETURN, 0, 0, snap_length),
                (_RETURN, 0, 0, 0),
            )
            _bind_to_all(self.socket)
        except BaseException:
            self.socket.close()
            raise
        self._next = 0
        self._taken = self._offered = self.dropped = 0

    def blocks(self) -> Iterator[list[Packet]]:
        """The packets that the kernel has handed over by now, a block at a time."""
        while True:
            base = self._next * BLOCK_BYTES
            status, count, first = _BLOCK.unpack_from(self._memory, base)
            if not status & _STATUS_USER:
                return
            yield self._packets(base + first, count)
            struct.pack_into("=I", self._memory, base + 8, _STATUS_KERNEL)
            self._next = (self._next + 1) % BLOCKS
            self._taken += count

    def let_nothing_in(self) -> None:
        """Refuse every further packet, so that the counts come to rest."""
        self._filter((_RETURN, 0, 0, 0))

    def offered(self) -> int:
        """How many packets the kernel has counted so far."""
        raw = self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 12)
        offered, dropped, _ = struct.unpack("=III", raw)  # reading resets them
        self._offered += offered
        self.dropped += dropped
        return self._offered

    def handed_over(self, count: int) -> bool:
        """Whether the first ``count`` packets were taken, or counted as dropped."""
        return self._taken + self.dropped >= count

    def empty(self) -> bool:
        """Whether every packet that the kernel counted was taken, or counted as dropped."""
        return self.handed_over(self.offered())

    def interface(self) -> str:
        """The present name of the interface; empty once it was removed from this namespace."""
        try:
            return socket.if_indextoname(self._index)
        except OSError:
            return ""

    def _filter(self, *program: tuple[int, int, int, int]) -> None:
        """Attach a classic BPF program: it returns how many bytes of a packet to keep."""
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *op) for op in program))
        fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)

    def _packets(self, place: int, count: int) -> list[Packet]:
        memory, found = self._memory, []
        for _ in range(count):
            step, seconds, nanoseconds, stored, length, status, mac, _, tci, tpid = (
                _PACKET.unpack_from(memory, place)
            )
            data = memory[place + mac : place + mac + stored]
            if status & _VLAN_VALID:  # the card, or veth, took the tag out of the frame
                kind = tpid if status & _VLAN_TPID_VALID else 0x8100
                data = data[:12] + struct.pack("!HH", kind, tci) + data[12:]
                length += 4
            found.append((seconds, nanoseconds, length, data))
            place += step
        return found


def _bind_to_all(it: socket.socket) -> None:
    """bind(2) to interface 0, which is all of them; Python's own insists on a name."""
    address = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(ETH_P_ALL), 0, 0, 0, 0)
    if ctypes.CDLL(None, use_errno=True).bind(it.fileno(), address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
