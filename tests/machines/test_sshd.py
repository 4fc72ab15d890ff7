"""Who is logged in by ssh stays so when the host goes behind Tor and back; others can log in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from host_machine import START, as_seen, state_of
from machine import Machine
from nsrun.lab import topology

PORT = "2200"  # of the router's, from the internet
# What a router does for a server at home; the answers find back by themselves.
FORWARD = f"""
nft add table ip published
nft add chain ip published in '{{ type nat hook prerouting priority -100; }}'
nft add rule ip published in iifname wan0 tcp dport {PORT} dnat to {topology.HOST}:22
"""
PLACES = {"lan": (topology.HOST, "22"), "inet": (topology.WAN, PORT)}


@pytest.fixture
def login(host: Machine, tmp_path: Path) -> Iterator[dict[str, tuple[str, ...]]]:
    """What logs bob in, with a shell, from the LAN and from the internet."""
    key = tmp_path / "key"
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key), check=True)
    install = "umask 77; mkdir ~/.ssh; cat >~/.ssh/authorized_keys"
    host.run("sh", "-c", install, user="bob", text=Path(f"{key}.pub").read_text(), check=True)
    router = host.lab.inside_argv("router", "sh", "-ec", FORWARD)
    assert host.lab.do(*router).returncode == 0
    settings = "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=10"
    options = ("-q", "-F", "none", "-i", str(key), *(f"-o{one}" for one in settings))
    yield {
        place: ("ssh", *options, "-p", port, f"bob@{address}", "sh")
        for place, (address, port) in PLACES.items()
    }
    host.lab.do(*host.lab.inside_argv("router", "nft", "delete", "table", "ip", "published"))
    host.run("rm", "-r", "/home/bob/.ssh", check=True)


@contextmanager
def session(machine: Machine, place: str, login: tuple[str, ...]) -> Iterator[Shell]:
    """A shell of bob's that is open for as long as the block runs."""
    command = machine.lab.inside(place, *login)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Shell(process.stdin, process.stdout)
        finally:
            process.stdin.close()
            process.wait(10)


class Shell:
    """Commands are typed one at a time; each is followed by a line with its exit code."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin, self._stdout = stdin, stdout

    def type(self, words: str) -> tuple[str, int]:
        self._stdin.write(f"{words} </dev/null 2>&1; code=$?; echo; echo ended $code\n")
        self._stdin.flush()
        lines = []
        while (line := self._stdout.readline()) and not line.startswith("ended "):
            lines.append(line)
        return "".join(lines), int(line.removeprefix("ended ") or -1)


@pytest.mark.promise("P4", "P9")
@pytest.mark.parametrize("place", PLACES)
def test_a_session_by_ssh_goes_on_and_starts_and_stops_ttp_itself(
    host: Machine, login: dict[str, tuple[str, ...]], place: str
) -> None:
    """The same shell before, between and after; it types the commands; a new one comes between."""
    with session(host, place, login[place]) as shell:
        assert shell.type("id -un") == ("bob\n\n", 0)
        told, code = shell.type(f"sudo {' '.join(START)}")
        assert code == 0, told
        assert "by Tor" in told
        assert as_seen(host, "-4")["IsTor"] is True
        with session(host, place, login[place]) as another:
            assert another.type("id -un") == ("bob\n\n", 0)
            told, code = shell.type(f"sudo ttp restart {' '.join(START[2:])}")
            assert code == 0, told
            told, code = shell.type("sudo ttp stop")
            assert code == 0, told
            assert state_of(host) == "stopped"
            assert another.type("id -un") == ("bob\n\n", 0)
        assert shell.type("id -un") == ("bob\n\n", 0)
