"""Access lists on the sockets of name services: what they close, and that nothing remains."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsrun.host import doors

ALICE, BOB = 54001, 54002


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hosts: files resolve [!UNAVAIL=return] dns # wins\n", []),
        ("passwd: files sss\nhosts:\tfiles mdns4_minimal [NOTFOUND=return] dns myhostname\n", []),
        ("hosts: files mdns6 wins [SUCCESS=merge] ldap\n", ["wins", "ldap"]),
        ("", []),
    ],
)
def test_name_services_that_nobody_knows_are_named(text: str, found: list[str]) -> None:
    """By nsswitch.conf: whom they ask, and how, cannot be closed."""
    assert doors.strangers(text) == found


def reaches(path: Path, uid: int) -> bool:
    """Whether a user can connect to a socket there."""
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setresgid(*[int(sys.argv[2])] * 3)\n"
        "os.setresuid(*[int(sys.argv[2])] * 3)\n"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    command = ("python3", "-c", code, str(path), str(uid))
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a service, with a socket and a file that all may use."""
    # below no directory that is closed to others
    directory = Path("/dev/shm") / f"ttp-doors-{os.getpid()}"
    directory.mkdir()
    with listening(directory / "socket"):
        (directory / "resolv.conf").write_text("")
        yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def listening(path: Path) -> socket.socket:
    made = socket.create_server(str(path), family=socket.AF_UNIX)
    path.chmod(0o666)
    return made


@pytest.mark.root
@pytest.mark.promise("P2", "P6", "P8")
def test_a_service_is_closed_to_some_and_after_a_restart_as_well(service: Path) -> None:
    """They may read beside it; once free, no list is left, on what was made meanwhile neither."""
    before = service / "socket"
    assert reaches(before, ALICE)
    doors.bar([str(service), "/nowhere"], (ALICE,))
    doors.bar([str(service)], (ALICE,))  # again, as after a start that was killed
    new = service / "anew"
    with listening(new):
        (service / "late.conf").write_text("")
        for path in (before, new):
            assert not reaches(path, ALICE)
            assert reaches(path, BOB)
        read = ("setpriv", f"--reuid={ALICE}", "--clear-groups", "cat", str(service / "late.conf"))
        assert subprocess.run(read).returncode == 0
        doors.free([str(service), "/nowhere"], (ALICE,))
        doors.free([str(service)], (ALICE,))
        assert reaches(before, ALICE)
        assert reaches(new, ALICE)
    assert [os.listxattr(path) for path in (service, *service.iterdir())] == [[]] * 5
    assert before.stat().st_mode & 0o777 == 0o666


@pytest.mark.root
@pytest.mark.promise("P8")
def test_entries_of_others_stay(service: Path) -> None:
    """Of a list that was there before, only what was added is taken away."""
    others: doors.Entries = {
        (doors.USER_OBJ, doors.NO_ID): 7,
        (doors.USER, BOB): 4,
        (doors.GROUP_OBJ, doors.NO_ID): 5,
        (doors.MASK, doors.NO_ID): 7,
        (doors.OTHER, doors.NO_ID): 1,
    }
    path = service / "socket"
    doors._write(service, doors.DEFAULT, others)
    doors._write(path, doors.ACCESS, others)
    doors.bar([str(service)], (ALICE,))
    assert not reaches(path, BOB)
    doors.free([str(service)], (ALICE,))
    assert doors._read(service, doors.DEFAULT) == others
    assert doors._read(path, doors.ACCESS) == others


@pytest.mark.root
@pytest.mark.promise("P8")
def test_what_a_link_leads_to_stays_as_it_is(service: Path, tmp_path: Path) -> None:
    """Who may write to the directory, as its service may, leads nobody elsewhere."""
    with listening(tmp_path / "elsewhere"):
        (service / "link").symlink_to(tmp_path / "elsewhere")
        doors.bar([str(service)], (ALICE,))
        doors.free([str(service)], (ALICE,))
        doors.bar([str(service)], (ALICE,))
        assert os.listxattr(tmp_path / "elsewhere") == []
        assert not reaches(service / "socket", ALICE)


@pytest.mark.root
@pytest.mark.promise("P4", "P8")
def test_where_there_are_no_lists_nobody_is_closed_out_and_all_is_taken_back() -> None:
    """The start fails, and what takes it back does not, so that it can open again."""
    without = ("/proc/sys/net/ipv4/conf/lo",)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
        doors.bar(without, (ALICE,))
    doors.free(without, (ALICE,))
