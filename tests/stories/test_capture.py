"""A tap sees every frame on its wire, can prove it, and says so when it cannot.

    sender                 watched
    ┌──────────────┐      ┌──────────────┐
    │ out 10.9.0.1 ├──────┤ wire 10.9.0.2│◀── tap
    └──────────────┘      └──────────────┘

``watched`` has no ruleset, no listener and no fixed neighbours: all it does is answer ARP.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsrun.errors import NsrunError
from nsrun.leak.capture import Tap, tap
from nsrun.leak.frames import Arp, Ip, Tcp, Udp
from nsrun.leak.pcap import Capture
from nsrun.leak.ring import BLOCK_BYTES, BLOCKS, SOL_PACKET
from nsrun.leak.verdict import Markers, Neighbours, TcpToRelays, Value, Verdict, judge
from nsrun.netns import Namespace

pytestmark = pytest.mark.root

PACKET_QDISC_BYPASS = 20
ARP = Neighbours(frozenset({"10.9.0.1", "10.9.0.2"}))
RELAY = TcpToRelays(frozenset({"10.9.0.1"}), frozenset({("10.9.0.2", 9001)}))
IPV6_OFF = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
GREETING = Path("/proc/sys/net/ipv4/conf/wire/arp_notify")
ETHERTYPE_TEST = 0x88B6  # IEEE 802, local experimental ethertype 2


@dataclass
class Wire:
    """The two ends, and what may be done at them."""

    sender: Namespace
    watched: Namespace
    file: Path

    @property
    def inside(self) -> list[str]:
        return ["nsenter", f"--net={self.watched.path}"]

    def ip(self, *words: str, at: Namespace | None = None) -> None:
        subprocess.run(["nsenter", f"--net={(at or self.watched).path}", "ip", *words], check=True)

    def watch(self, act: Callable[[Tap], object]) -> Capture:
        """What a tap on the watched end sees while ``act`` is done."""
        with tap("wire", self.file, self.inside) as it:
            act(it)
            return it.stop()

    def seen(self, act: Callable[[], object]) -> tuple[Capture, Verdict]:
        """The same, judged by the rules for ARP and for TCP to 10.9.0.2:9001."""
        capture = self.watch(lambda _: self.sender.call(act))
        return capture, judge("wire", capture, (RELAY, ARP), expect_some=True)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    sender, watched = Namespace(), Namespace()
    it = Wire(sender, watched, tmp_path / "wire.pcap")
    try:
        for end in (sender, watched):
            # or the kernel itself would speak: neighbour discovery, listener reports
            end.call(IPV6_OFF.write_text, "1")
        peer = ("type", "veth", "peer", "name", "wire", "netns", watched.path)
        it.ip("link", "add", "out", *peer, at=sender)
        it.ip("address", "add", "10.9.0.1/24", "dev", "out", at=sender)
        it.ip("address", "add", "10.9.0.2/24", "dev", "wire")
        it.ip("link", "set", "out", "up", at=sender)
        it.ip("link", "set", "wire", "up")
        yield it
    finally:
        sender.close()
        watched.close()


def send_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
        it.sendto(b"x", ("10.9.0.2", 4444))


def connect(port: int) -> None:
    with socket.socket() as it:
        assert it.connect_ex(("10.9.0.2", port))  # refused: nobody listens


def send_frames(*frames: bytes, option: int = 0) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as it:
        it.bind(("out", 0))
        if option:
            it.setsockopt(SOL_PACKET, option, 1)
        for frame in frames:
            it.send(frame)


def ethernet(ethertype: int, payload: bytes) -> bytes:
    return b"\x02" * 6 + b"\x04" + bytes(5) + ethertype.to_bytes(2) + payload


def open_tun(name: str) -> int:
    """Make a tun device that lives as long as the descriptor (tuntap.rst)."""
    iff_tun, iff_no_pi, tunsetiff = 1, 0x1000, 0x400454CA
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, tunsetiff, struct.pack("16sH22x", name.encode(), iff_tun | iff_no_pi))
    return device


def flood(count: int) -> None:
    """Frames numbered from 0."""
    send_frames(*(ethernet(ETHERTYPE_TEST, struct.pack("!I46x", n)) for n in range(count)))


def flooded(capture: Capture) -> list[int]:
    return [
        int.from_bytes(frame.data[14:18])
        for frame in capture.frames
        if frame.ethernet and frame.ethernet.ethertype == ETHERTYPE_TEST
    ]


def test_an_idle_wire_carries_the_markers_and_nothing_else(wire: Wire) -> None:
    """The tap proves itself at both ends; without its file's markers it proves nothing."""
    capture = wire.watch(lambda _: None)
    assert [str(frame.body) for frame in capture.frames] == [
        f"tap marker, start of {capture.token}",
        f"tap marker, end of {capture.token}",
    ]
    assert capture.dropped == 0
    assert judge("wire", capture, ()).value == Value.CONTAINED
    assert judge("wire", capture, (ARP,), expect_some=True).value == Value.INCONCLUSIVE


def test_tcp_to_a_relay_is_contained(wire: Wire) -> None:
    capture, verdict = wire.seen(lambda: connect(9001))
    assert verdict.value == Value.CONTAINED
    segments = [f.body.body for f in capture.frames if isinstance(f.body, Ip)]
    assert [s.flags for s in segments if isinstance(s, Tcp)] == ["S", "R."]
    assert sum(isinstance(frame.body, Arp) for frame in capture.frames) >= 2


def test_tcp_to_anyone_else_is_a_leak(wire: Wire) -> None:
    _, verdict = wire.seen(lambda: connect(9002))
    assert verdict.value == Value.LEAK
    assert {leak.promise for leak in verdict.leaks} == {1}
    assert "10.9.0.2.9002: tcp [S]" in str(verdict.leaks[0].frame)


def test_udp_is_a_leak(wire: Wire) -> None:
    _, verdict = wire.seen(send_udp)
    assert verdict.value == Value.LEAK
    assert isinstance(verdict.leaks[0].frame.body, Ip)
    assert isinstance(verdict.leaks[0].frame.body.body, Udp)


def test_a_foreign_arp_an_ipv6_packet_and_an_unknown_frame_are_leaks(wire: Wire) -> None:
    mac = b"\x04" + bytes(5)
    stranger = b"\0\1\x08\0\6\4\0\1" + mac + bytes([10, 9, 0, 1]) + bytes(6) + bytes([10, 9, 0, 7])
    ipv6 = struct.pack("!IHBB", 6 << 28, 0, 59, 64) + bytes(15) + b"\1" + b"\xff\2" + bytes(14)
    frames = ethernet(0x0806, stranger), ethernet(0x86DD, ipv6), ethernet(ETHERTYPE_TEST, b"?")
    _, verdict = wire.seen(lambda: send_frames(*frames))
    assert [str(leak.frame).partition(",")[0] for leak in verdict.leaks] == [
        "ARP who-has 10.9.0.7 tell 10.9.0.1",
        "IP6 ::1 > ff02::: no-next-header",
        "ethertype 0x88b6 04:00:00:00:00:00 > 02:02:02:02:02:02",
    ]


def test_a_vlan_tag_is_put_back_where_the_kernel_took_it_out(wire: Wire) -> None:
    """Otherwise a packet to a relay, but on another VLAN, would pass."""
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + bytes(
        [10, 9, 0, 1, 10, 9, 0, 2]
    )
    packet += struct.pack("!HHIIBBHHH", 4000, 9001, 1, 0, 0x50, 2, 1000, 0, 0)
    tagged = ethernet(0x8100, struct.pack("!HH", 7, 0x0800) + packet)
    _, verdict = wire.seen(lambda: send_frames(tagged, ethernet(0x0800, packet)))
    assert [str(leak.frame) for leak in verdict.leaks] == [
        "vlan 7, IP 10.9.0.1.4000 > 10.9.0.2.9001: tcp [S], length 58"
    ]


def test_frames_that_bypass_the_sender_s_queue_are_seen_at_the_other_end(wire: Wire) -> None:
    frame = ethernet(ETHERTYPE_TEST, b"bypass")
    capture, verdict = wire.seen(lambda: send_frames(frame, option=PACKET_QDISC_BYPASS))
    assert verdict.value == Value.LEAK
    assert [frame.data[14:] for frame in capture.frames].count(b"bypass") == 1


def test_the_marker_of_another_tap_is_known_by_its_token(wire: Wire) -> None:
    """A tap at the sender's end marks this end too."""
    prefix = ["nsenter", f"--net={wire.sender.path}"]
    with (
        tap("wire", wire.file, wire.inside) as here,
        tap("out", wire.file.with_suffix(".out"), prefix) as there,
    ):
        far, near = there.stop(), here.stop()
    assert judge("wire", near, ()).value == Value.LEAK
    assert judge("wire", near, (Markers(frozenset({there.token})),)).value == Value.CONTAINED
    assert judge("out", far, ()).value == Value.CONTAINED


def test_a_flood_is_seen_to_the_last_frame_or_counted_as_dropped(wire: Wire) -> None:
    capture = wire.watch(lambda _: wire.sender.call(flood, 50_000))
    seen = flooded(capture)
    assert capture.dropped is not None
    assert len(seen) == len(set(seen)) == 50_000 - capture.dropped
    assert seen == sorted(seen)
    assert not capture.trouble


def test_what_a_stalled_tap_loses_is_counted(wire: Wire) -> None:
    """Stopped while more frames come than its ring holds, it owns up to every one it lost."""
    count = BLOCK_BYTES * BLOCKS // 128  # each takes 152 bytes or so of the ring

    def stall(it: Tap) -> None:
        os.kill(it.process.pid, signal.SIGSTOP)
        wire.sender.call(flood, count)
        os.kill(it.process.pid, signal.SIGCONT)

    capture = wire.watch(stall)
    assert capture.dropped
    assert len(flooded(capture)) + capture.dropped >= count
    verdict = judge("wire", capture, ())
    assert f"the tap lost {capture.dropped} packets" in verdict.reasons


def test_a_tap_can_be_stopped_in_the_middle_of_a_flood(wire: Wire) -> None:
    """Its counts come to rest though the wire does not."""
    stop = threading.Event()

    def keep_flooding() -> None:
        while not stop.is_set():
            flood(1000)

    flooder = threading.Thread(target=wire.sender.call, args=(keep_flooding,))
    with tap("wire", wire.file, wire.inside) as it:
        flooder.start()
        try:
            capture = it.stop()
        finally:
            stop.set()
            flooder.join()
    assert not capture.trouble
    assert capture.dropped is not None
    assert capture.marked(start=True)
    assert capture.marked(start=False)


def test_what_passes_on_another_interface_is_not_this_wire_s(wire: Wire) -> None:
    wire.ip("link", "set", "lo", "up")
    capture = wire.watch(lambda _: wire.watched.call(send_udp))  # to itself, through lo
    assert judge("wire", capture, ()).value == Value.CONTAINED
    with tap("lo", wire.file, wire.inside) as it:
        wire.watched.call(send_udp)
        assert judge("lo", it.stop(), ()).value == Value.LEAK  # and there it was


def test_a_killed_tap_is_inconclusive(wire: Wire) -> None:
    def kill(it: Tap) -> None:
        it.process.kill()
        it.process.wait()

    capture = wire.watch(kill)
    verdict = judge("wire", capture, ())
    assert verdict.value == Value.INCONCLUSIVE
    assert capture.marked(start=True)
    assert capture.dropped is None


def test_what_a_killed_tap_had_written_is_still_a_leak(wire: Wire) -> None:
    def leak_then_kill(it: Tap) -> None:
        wire.sender.call(flood, 10)
        deadline = time.monotonic() + 5
        while b"\x88\xb6" not in wire.file.read_bytes():
            assert time.monotonic() < deadline, "the tap did not write what it saw"
        it.process.kill()

    assert judge("wire", wire.watch(leak_then_kill), ()).value == Value.LEAK


def test_a_tap_ended_by_a_signal_reports_like_one_that_was_asked(wire: Wire) -> None:
    def end(it: Tap) -> None:
        it.process.terminate()
        it.process.wait(10)

    assert judge("wire", wire.watch(end), ()).value == Value.CONTAINED


def test_an_interface_that_is_removed_ends_the_watch_properly(wire: Wire) -> None:
    def remove(_: Tap) -> None:
        wire.sender.call(send_udp)
        wire.ip("link", "delete", "wire")

    capture = wire.watch(remove)
    assert capture.gone
    assert not capture.trouble
    assert any(isinstance(frame.body, Ip) for frame in capture.frames)
    assert judge("wire", capture, ()).value == Value.LEAK


def test_an_interface_that_goes_down_and_up_is_watched_throughout(wire: Wire) -> None:
    """Even what the kernel sends to greet it, the moment it is up, is seen."""
    wire.watched.call(GREETING.write_text, "1")

    def flap(_: Tap) -> None:
        wire.ip("link", "set", "wire", "down")
        wire.ip("link", "set", "wire", "up")

    capture = wire.watch(flap)
    assert [str(frame.body) for frame in capture.frames] == [
        f"tap marker, start of {capture.token}",
        "ARP who-has 10.9.0.2 tell 10.9.0.2",
        f"tap marker, end of {capture.token}",
    ]
    assert judge("wire", capture, (ARP,)).value == Value.CONTAINED


def test_a_wire_that_is_down_at_the_end_is_inconclusive(wire: Wire) -> None:
    capture = wire.watch(lambda _: wire.ip("link", "set", "wire", "down"))
    verdict = judge("wire", capture, ())
    assert verdict.value == Value.INCONCLUSIVE
    assert "the tap never saw its end marker" in verdict.reasons
    assert any("Network is down" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("interface", "cause"), [("wire", "Network is down"), ("nosuch", "No such device")]
)
def test_what_cannot_be_watched_is_refused(wire: Wire, interface: str, cause: str) -> None:
    wire.ip("link", "set", "wire", "down")
    with (
        pytest.raises(NsrunError, match=f"cannot watch {interface}: .*{re.escape(cause)}"),
        tap(interface, wire.file, wire.inside),
    ):
        pass


def test_a_wire_whose_other_end_is_down_at_the_start_is_refused(wire: Wire) -> None:
    """Its marker is sent, and never leaves."""
    wire.ip("link", "set", "out", "down", at=wire.sender)
    deadline = time.monotonic() + 5
    show = [*wire.inside, "ip", "link", "show", "wire"]
    while b"state UP" in subprocess.check_output(show):  # told by linkwatch, in its own time
        assert time.monotonic() < deadline, "wire did not lose its carrier"
    with (
        pytest.raises(NsrunError, match="cannot watch wire: its marker did not leave"),
        tap("wire", wire.file, wire.inside),
    ):
        pass


def test_an_interface_is_watched_from_its_very_first_packet_on(wire: Wire) -> None:
    """The tap attaches while it is down, so even what the kernel sends to greet it is seen."""
    wire.ip("link", "set", "wire", "down")
    wire.watched.call(GREETING.write_text, "1")

    def start() -> None:
        deadline = time.monotonic() + 5
        while not wire.file.exists():  # made once the tap is attached
            assert time.monotonic() < deadline, "the tap made no file"
        wire.ip("link", "set", "wire", "up")

    starter = threading.Thread(target=start)
    starter.start()
    with tap("wire", wire.file, wire.inside, wait=10) as it:
        capture = it.stop()
    starter.join()
    assert [str(frame.body) for frame in capture.frames][:2] == [
        "ARP who-has 10.9.0.2 tell 10.9.0.2",
        f"tap marker, start of {capture.token}",
    ]
    assert judge("wire", capture, (ARP,)).value == Value.CONTAINED


def test_bare_ip_packets_of_a_tun_device_are_seen(wire: Wire) -> None:
    """A tun device has no Ethernet header, and its marker is a packet of IP version 0."""
    tun = wire.watched.call(open_tun, "tun0")
    try:
        wire.ip("address", "add", "10.8.0.1/24", "dev", "tun0")
        wire.ip("link", "set", "tun0", "up")
        with tap("tun0", wire.file, wire.inside) as it:
            packet = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 17, 0)
            packet += bytes([10, 8, 0, 2, 10, 8, 0, 1]) + struct.pack("!HHHH", 53, 4000, 8, 0)
            os.write(tun, packet)
            capture = it.stop()
    finally:
        os.close(tun)
    verdict = judge("tun0", capture, ())
    assert not verdict.reasons
    assert "IP 10.8.0.2.53 > 10.8.0.1.4000: udp, length 28" in [
        str(leak.frame) for leak in verdict.leaks
    ]


def test_an_interface_may_come_late(wire: Wire) -> None:
    """The tap waits for it to be made and to be up, and then for its own marker."""

    def make() -> None:
        wire.ip("link", "add", "late", "type", "veth", "peer", "name", "other")
        wire.ip("link", "set", "other", "up")
        wire.ip("link", "set", "late", "up")

    maker = threading.Timer(0.3, make)
    maker.start()
    with tap("late", wire.file, wire.inside, wait=10) as it:
        capture = it.stop()
    maker.join()
    assert judge("late", capture, ()).value == Value.CONTAINED


def test_loopback_can_be_watched(wire: Wire) -> None:
    """Every frame passes twice there, out and in, the marker as well."""
    wire.ip("link", "set", "lo", "up")
    with tap("lo", wire.file, wire.inside) as it:
        capture = it.stop()
    assert judge("lo", capture, ()).value == Value.CONTAINED
    assert len(capture.frames) == 4


def test_several_wires_in_one_process_end_with_their_standard_input(wire: Wire) -> None:
    """Each has its file and its report."""
    ends = ["lo", "wire"]
    wire.ip("link", "set", "lo", "up")
    program = [*wire.inside, sys.executable, "-m", "nsrun.leak.capture"]
    done = subprocess.run(
        [*program, *(f"{end}={wire.file.with_suffix('.' + end)}" for end in ends)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert '"ready": true' in done.stdout.splitlines()[0]
    assert done.stdout.count('"end_marker": true') == 2
    assert all(wire.file.with_suffix("." + end).stat().st_size > 24 for end in ends)
