"""By which way Tor's own service is asked, and what is said when that way is none."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from nsrun.host import session
from nsrun.host.oracle import way
from nsrun.host.policy import HostPolicy

TOR, ALICE = 107, 1001


@pytest.mark.promise("P11")
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (HostPolicy(TOR), ("any", "65534", "65534")),
        (HostPolicy(TOR, bypass_groups=(65534,)), ("any", "65533", "65533")),
        (HostPolicy(TOR, gateway_for=("eth1",)), ("any", "65534", "65534")),
        (HostPolicy(TOR, own="users", users=(ALICE,)), ("caught", "1001", "65534")),
        (
            HostPolicy(TOR, own="users", users=(ALICE,), bypass_groups=(65534,)),
            ("caught", "1001", "65533"),
        ),
        (HostPolicy(TOR, own="onion"), ("tor", session.SOCKS)),
        (HostPolicy(TOR, own="none", gateway_for=("eth1",)), ("tor", session.SOCKS)),
    ],
)
def test_who_asks_is_caught_or_sends_no_packet(rules: HostPolicy, expected: tuple[str]) -> None:
    """Nobody whom the rules let past Tor; where they catch none, Tor itself is told."""
    assert way(rules) == expected


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Path]:
    """A socket where somebody answers who is not Tor."""
    path = tmp_path / "socks.sock"
    with socket.create_server(str(path), family=socket.AF_UNIX) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(3)
                connection.sendall(b"HTTP/1.0 200 OK\r\n")

        thread = Thread(target=answer)
        thread.start()
        yield path
        thread.join()


@pytest.mark.root
@pytest.mark.promise("P11", "P12")
def test_another_answer_than_tors_confirms_nothing(stranger: Path, tmp_path: Path) -> None:
    """Nor does none; the process says why, and asks nobody else."""
    for path, why in ((stranger, "another protocol"), (tmp_path / "none", "No such file")):
        command = (sys.executable, "-m", "nsrun.host.oracle", "tor", str(path))
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert why in done.stdout, done.stderr
        assert '"IsTor"' not in done.stdout
