"""Debian 12, with Python 3.11, systemd 252 and nftables 1.0.6: the short life of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from host_machine import START, as_seen, contained, watched
from machine import Machine, debian
from nsrun.lab import topology


@pytest.fixture(scope="module")
def bookworm() -> Iterator[Machine]:
    with debian("bookworm") as made:
        yield made


@pytest.mark.promise("P1", "P2", "P3", "P8")
def test_a_session_on_debian_12(bookworm: Machine) -> None:
    """start, status, check, check-leak, stop: no packet but Tor's, and the machine as before."""
    machine = bookworm
    assert machine.run("nft", "--version").stdout.startswith("nftables v1.0.6")
    machine.run("ttp", "stop")  # which begins the log
    before = machine.state()
    assert as_seen(machine, "-4") == {"IsTor": False, "IP": topology.WAN}
    with watched(machine) as seen:
        machine.run(*START, "--watchdog", check=True)
        assert machine.run("ttp", "status", check=True).stdout.startswith("state      up\n")
        machine.run("ttp", "check", check=True)
        leaks = machine.run("ttp", "check-leak")
        assert leaks.returncode == 0, leaks.stdout + leaks.stderr
        for family in ("-4", "-6"):
            assert as_seen(machine, family)["IsTor"] is True
        machine.run("ttp", "stop", check=True)
    contained(machine, seen[0])
    assert machine.changes(before) == ""
    assert as_seen(machine, "-4") == {"IsTor": False, "IP": topology.WAN}
