"""A tap: a process that records every frame on a wire and proves that it could see.

    python -m nsrun.leak.capture [--wait SECONDS] INTERFACE=FILE...

runs in whatever network namespace it is started in (CAP_NET_RAW there is enough), prints one JSON
line when every wire is watched, another when it ends, and ends at SIGTERM, SIGINT or the end of
its standard input; so it never outlives who started it. ``tap()`` does all that from Python.

The proof: at the start and at the end it sends a marker, from a second socket, because a packet
socket is not shown what it sent itself, and waits until it sees it leave. The tap sees what
arrives on an interface before netfilter does, and what leaves after it. It does not see frames
that a sender *on that same interface* sent with PACKET_QDISC_BYPASS: put it on the other end.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsrun.errors import NsrunError
from nsrun.leak import frames, pcap
from nsrun.leak.ring import Ring

DEADLINE = 5.0
"""Seconds for a marker to be seen, and for the last packets to come out of the ring."""
RESEND = 0.2
"""Seconds after which a marker is sent again: a link without carrier loses it silently."""
POLL = 0.005
"""Seconds between two looks for an interface that is not there yet."""

# linux/if_arp.h: what sends and receives Ethernet headers, and what bare IP packets
_LINKTYPES = {
    1: pcap.LINKTYPE_ETHERNET,
    772: pcap.LINKTYPE_ETHERNET,  # lo
    65534: pcap.LINKTYPE_RAW,  # tun
}


class Tap:
    """A tap in another process; made by ``tap()``."""

    def __init__(self, interface: str, file: Path, command: Sequence[str]) -> None:
        self.interface, self.file = interface, file
        self.token = ""
        package = str(Path(__file__).parents[2])
        search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        try:
            self.process = subprocess.Popen(
                [*command, f"{interface}={file}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": search},
            )
        except OSError as error:
            raise NsrunError(f"watch {interface}", error) from error

    def await_ready(self, seconds: float) -> None:
        """Wait until the tap has seen its first marker. Raises NsrunError if it never does."""
        assert self.process.stdout is not None
        line = b""
        if select.select([self.process.stdout], [], [], seconds)[0]:
            line = self.process.stdout.readline()
        answer = _report(line)
        if not answer.get("ready"):
            errors = self.kill()
            cause = answer.get("cause") or errors or f"the tap was not ready in {seconds:g} s"
            hint = "a tap needs CAP_NET_RAW, and an interface whose both ends are up"
            raise NsrunError(f"watch {self.interface}", cause, hint)
        self.token = answer["tokens"][self.interface]

    def stop(self) -> pcap.Capture:
        """End the tap and return all it saw; of a tap that died, what it had written."""
        try:
            output, errors = self.process.communicate(timeout=3 * DEADLINE)
        except subprocess.TimeoutExpired:
            output, errors = b"", self.kill().encode()
        answer = _report(output)
        report = answer.get("wires", {}).get(self.interface)
        try:
            seen, flaw = pcap.load(self.file.read_bytes())
        except OSError as error:
            seen, flaw = (), f"the capture file cannot be read: {error.strerror}"
        trouble = [flaw] if flaw else []
        if report is None:
            cause = answer.get("cause") or errors.decode(errors="replace").strip()
            trouble.append(f"the tap died: {cause or f'status {self.process.returncode}'}")
            return pcap.Capture(seen, self.token, None, trouble=tuple(trouble))
        trouble += report["trouble"]
        if report["seen"] != len(seen):
            trouble.append(f"the tap saw {report['seen']} packets, its file has {len(seen)}")
        return pcap.Capture(seen, self.token, report["dropped"], report["gone"], tuple(trouble))

    def kill(self) -> str:
        """End the tap by force; returns what it wrote to standard error."""
        self.process.kill()
        return self.process.communicate()[1].decode(errors="replace").strip()


@contextmanager
def tap(interface: str, file: Path, prefix: Sequence[str] = (), wait: float = 0.0) -> Iterator[Tap]:
    """Watch ``interface`` of the namespace into which the command ``prefix`` leads.

    Frames go to ``file``. The body runs once the tap is proven to see, and ends it with
    ``stop()``. The interface may come, or come up, ``wait`` seconds late; it is then watched from
    a few milliseconds after it was made. Raises NsrunError when it cannot be watched.
    """
    program = [sys.executable, "-P", "-m", "nsrun.leak.capture", "--wait", str(wait)]
    it = Tap(interface, file, [*prefix, *program])
    try:
        it.await_ready(wait + 2 * DEADLINE)
        yield it
    finally:
        if it.process.poll() is None:
            it.kill()


class _Wire:
    """One watched interface, within the process of the tap."""

    def __init__(self, interface: str, file: str) -> None:
        self.interface = interface
        self.token = secrets.token_hex(frames.TOKEN_BYTES)
        self.ring = Ring(interface, pcap.SNAP_LENGTH)
        linktype = _LINKTYPES.get(self.ring.hardware_type)
        if linktype is None:
            cause = f"frames of link type {self.ring.hardware_type} are not decoded here"
            raise NsrunError(f"watch {interface}", cause)
        self._mac = self.ring.mac if linktype == pcap.LINKTYPE_ETHERNET else b""
        self._awaited = b""
        self._trouble: list[str] = []
        self._seen = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(file, flags, 0o600), "wb", buffering=0)
        self._file.write(pcap.header(linktype))

    def pump(self) -> None:
        """Write what has arrived. Raises OSError when the file cannot be written."""
        for block in self.ring.blocks():
            if any(data == self._awaited for _, _, _, data in block):
                self._awaited = b""
            self._file.write(pcap.records(block))
            self._seen += len(block)

    def start(self, late: float) -> None:
        """Prove that the tap sees; the interface may be down until the time ``late``."""
        self._mark(start=True, late=late)

    def finish(self) -> dict[str, Any]:
        """Prove that the tap still sees, empty the ring, and say what the record is worth."""
        cause = ""
        try:
            if self.ring.interface():
                self._mark(start=False)
        except NsrunError as error:
            cause = str(error)
        gone = not self.ring.interface()
        if cause and not gone:
            self._trouble.append(cause)
        self.ring.let_nothing_in()
        if not self._until(self.ring.empty, DEADLINE):
            self._trouble.append("packets that the kernel had counted did not arrive")
        self._file.close()
        return {
            "seen": self._seen,
            "dropped": self.ring.dropped,
            "gone": gone,
            "end_marker": not cause and not gone,
            "trouble": self._trouble,
        }

    def _mark(self, *, start: bool, late: float = 0.0) -> None:
        """Send a marker until it is seen. Raises NsrunError if it is not."""
        doing = f"prove at the {'start' if start else 'end'} that {self.interface} is watched"
        deadline = max(late, time.monotonic() + DEADLINE)
        marker = self._awaited = frames.marker(self.token, start=start, mac=self._mac)
        while time.monotonic() < deadline:
            try:
                with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
                    sender.sendto(marker, (self.ring.interface(), frames.ETHERTYPE_MARKER))
            except OSError as error:
                # a full queue, or a carrier just lost: what counts is whether it is seen
                if error.errno != errno.ENOBUFS and time.monotonic() >= late:
                    raise NsrunError(doing, error.strerror) from error
            if self._until(lambda: not self._awaited, RESEND):
                return
        raise NsrunError(doing, f"its marker did not leave within {DEADLINE:g} s: no carrier?")

    def _until(self, state: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            self.pump()
            if state():
                return True
            if time.monotonic() >= deadline:
                return False
            select.select([self.ring.socket], [], [], POLL)


def _open(interface: str, file: str, late: float) -> _Wire:
    while True:
        try:
            return _Wire(interface, file)
        except OSError as error:
            if error.errno != errno.ENODEV or time.monotonic() >= late:
                cause = error.strerror or str(error)
                raise NsrunError(f"watch {interface}", cause) from error
        select.select([], [], [], POLL)


def _watch(wires: Sequence[_Wire]) -> None:
    """Record until a signal, or the end of standard input."""
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    _say({"ready": True, "tokens": {wire.interface: wire.token for wire in wires}})
    sources = [told, sys.stdin.buffer, *(wire.ring.socket for wire in wires)]
    while True:
        awake = select.select(sources, [], [])[0]
        for wire in wires:
            wire.pump()
        if told in awake or (sys.stdin.buffer in awake and not os.read(0, 4096)):
            return


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _report(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="nsrun.leak.capture", description="watch interfaces")
    parser.add_argument("wires", nargs="+", metavar="INTERFACE=FILE")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args()
    late = time.monotonic() + arguments.wait
    try:
        pairs = [pair.partition("=") for pair in arguments.wires]
        wires = [_open(interface, file, late) for interface, _, file in pairs]
        for wire in wires:
            wire.start(late)
        _watch(wires)
        _say({"wires": {wire.interface: wire.finish() for wire in wires}})
    except (NsrunError, OSError) as error:
        _say({"ready": False, "cause": getattr(error, "cause", None) or str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
