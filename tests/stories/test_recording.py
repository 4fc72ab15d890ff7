"""The recorder of a link: what it writes, and what becomes of it when it cannot.

app ─eth0══w2─┐     recorder on w2
              ├─ gateway ─uplink══eth0─ world
bob ─eth0══w3─┘
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsrun.errors import NsrunError
from nsrun.gateway.recording import Recording
from nsrun.leak import pcap
from nsrun.leak.record import BEGUN, DONE
from nsrun.netns import Namespace
from nsrun.steps import StartRecorder
from town import SITE4, Town

pytestmark = pytest.mark.root  # or root of a user namespace

F_ADD_SEALS, F_SEAL_GROW = 1033, 0x4


@contextmanager
def recording(
    town: Town, file: int, link: str = "w2", space: Namespace | None = None
) -> Iterator[tuple[Recording, socket.socket]]:
    ours, recorders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(5)
    with ours, recorders:
        files = {"pcap": file, "report": recorders.fileno()}
        made = Recording(space or town.gateway.space, files, StartRecorder(link, "file"))
        recorders.close()
        assert ours.recv(100) == BEGUN
        yield made, ours


def content(file: int) -> bytes:
    return os.pread(file, 1 << 24, 0)


def recorder() -> int:
    """The process; a child of ours."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    found = [
        int(pid)
        for pid in " ".join([children, *threads]).split()
        if b"nsrun.leak.record" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found[0]


def test_all_of_one_link_up_to_the_question(town: Town) -> None:
    """Both directions, what was refused too, of nobody else; and it goes on after an answer."""
    file = os.memfd_create("capture")
    with recording(town, file) as (made, report):
        for actor in (town.app, town.bob):
            with actor.connect(SITE4, 443) as connection:
                connection.recv(100)
            actor.send(SITE4, 9, actor.name.encode() * 9).close()
        report.send(b"?")
        assert report.recv(100) == DONE
        first = content(file)
        town.app.send(SITE4, 9, b"the last word").close()
        made.stop()
        assert report.recv(100) == DONE
        assert report.recv(100) == b""
    assert b"app" * 9 in first
    assert b"hello from a stand-in" in first
    assert b"bob" * 9 not in first
    assert b"the last word" in content(file)[len(first) :]
    seen, flaw = pcap.load(content(file))
    assert seen
    assert not flaw
    os.close(file)


@pytest.mark.promise("P4", "P12")
def test_a_full_disk_is_told_at_once_and_opens_nothing(town: Town) -> None:
    """The file ends with a whole packet. Here it is not the disk that is full, but the file."""
    file = os.memfd_create("capture", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 4096)
    fcntl.fcntl(file, F_ADD_SEALS, F_SEAL_GROW)
    with recording(town, file) as (_, report), town.world_hears() as frames:
        for _ in range(20):
            with town.app.connect(SITE4, 443) as connection:
                assert b"stand-in" in connection.recv(100)
            town.app.send(SITE4, 9, bytes(1000)).close()
        assert b"not permitted" in report.recv(100)  # EPERM, of a sealed file
        assert report.recv(100) == b"", "and it ends"
        with pytest.raises(ConnectionRefusedError):
            town.app.connect("192.168.1.1", 80)
    assert not frames
    seen, flaw = pcap.load(content(file))
    assert seen
    assert not flaw
    os.close(file)


@pytest.mark.promise("P4", "P12")
def test_a_killed_recorder_is_noticed_and_opens_nothing(town: Town) -> None:
    """Without a last word the file is known not to be complete."""
    file = os.memfd_create("capture")
    with recording(town, file) as (made, report), town.world_hears() as frames:
        os.kill(recorder(), signal.SIGKILL)
        assert report.recv(100) == b""
        with town.app.connect(SITE4, 443) as connection:
            assert b"stand-in" in connection.recv(100)
        with pytest.raises(ConnectionRefusedError):
            town.app.connect("192.168.1.1", 80)
        made.stop()
    assert not frames
    os.close(file)


@pytest.mark.promise("P10")
def test_a_recorder_can_do_nothing_but_read_packets(town: Town) -> None:
    """Its file is a user's, and what it reads is anybody's."""
    file = os.memfd_create("capture")
    with recording(town, file) as (made, _):
        status = Path(f"/proc/{recorder()}/status").read_text()
        made.stop()
    lines = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    net_raw = 1 << 13
    assert int(lines["CapEff"], 16) == int(lines["CapBnd"], 16) == net_raw
    assert lines["NoNewPrivs"] == "1"
    os.close(file)


def test_a_link_that_is_not_there_is_not_recorded(town: Town) -> None:
    """An error before there is a command, and no process left."""
    file = os.memfd_create("capture")
    with pytest.raises(NsrunError, match="No such device"), recording(town, file, "w99"):
        pass
    os.close(file)


@pytest.mark.promise("P4", "P8")
def test_a_recorder_ends_with_its_supervisor(town: Town) -> None:
    """kill -9 of that: else it would hold the gateway's namespace, and every link in it."""
    file = os.memfd_create("capture")
    supervisors = Namespace(town.gateway.space.path)
    with recording(town, file, space=supervisors) as (made, report):
        supervisors.close()  # and its thread, which is the recorder's parent
        assert report.recv(100) == b"", "no last word"
        made.stop()
    os.close(file)
