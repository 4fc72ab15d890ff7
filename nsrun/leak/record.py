"""The recorder of ``ttp run --pcap``: everything on one link, into a file that is open already.

    python -m nsrun.leak.record INTERFACE FILE REPORT      the latter two are descriptors

is started in the gateway's network namespace, prints a line when it records, and ends with its
standard input, which is when the link has gone. Unlike a tap (capture.py) it puts nothing of its
own on the link, and keeps whole packets. REPORT is a sequenced-packet socket to ``ttp run``, which
is told BEGUN. A message from there asks whether all is in the file up to now, and is answered by
DONE, as is the end. What is missing from the file is told at once, in words.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
import time
from contextlib import suppress

from nsrun.leak import pcap
from nsrun.leak.ring import RETIRE_MS, Ring

SNAP_LENGTH = 262144  # that of tcpdump: more than a packet of a link can have
BEGUN, DONE = b"begun", b"done"
PATIENCE = 5.0  # seconds for the last packets to come out of the ring


class Recorder:
    """One link, one file, and whom to tell."""

    def __init__(self, interface: str, file: int, report: socket.socket) -> None:
        """From now on nothing is missed. Raises OSError."""
        self._ring, self._file, self._report = Ring(interface, SNAP_LENGTH), file, report
        self._whole = self._told = 0
        self._write(pcap.header(pcap.LINKTYPE_ETHERNET, SNAP_LENGTH))
        self._tell(BEGUN)

    def run(self) -> None:
        """Record until the end of standard input. Raises OSError when the file takes no more."""
        sources = [self._ring.socket, sys.stdin.buffer, self._report]
        while True:
            awake = select.select(sources, [], [])[0]
            self._pump()
            if self._report in awake:
                if self._report.recv(16):
                    self._catch_up()
                    self._tell(DONE)
                else:
                    sources.remove(self._report)  # nobody listens any more
            if sys.stdin.buffer in awake:
                self._catch_up()
                self._tell(DONE)
                return

    def _pump(self) -> None:
        for block in self._ring.blocks():
            self._write(pcap.records(block))

    def _catch_up(self) -> None:
        """Write all that the kernel has counted up to now."""
        wanted, deadline = self._ring.offered(), time.monotonic() + PATIENCE
        while not self._ring.handed_over(wanted) and time.monotonic() < deadline:
            select.select([self._ring.socket], [], [], RETIRE_MS / 1000)
            self._pump()
        if lost := self._ring.dropped - self._told:
            self._told += lost
            self._tell(f"{lost} packets were lost, as they came faster than they were written")

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            if stat.S_ISREG(os.fstat(self._file).st_mode):  # half a packet would look like damage
                written = pcap.whole(data, len(data) - len(left))
                os.ftruncate(self._file, self._whole + written)
            self._tell(str(error.strerror))
            raise
        self._whole += len(data)

    def _tell(self, message: str | bytes) -> None:
        with suppress(OSError):  # whoever ran the command may have gone
            self._report.send(message if isinstance(message, bytes) else message.encode())


def main() -> int:
    interface, file, report = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    try:
        recorder = Recorder(interface, file, socket.socket(fileno=report))
        os.write(1, b"ready\n")
        recorder.run()
    except OSError as error:
        os.write(2, f"{error.strerror or error}\n".encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
