"""Services of .onion by Tor, and all else as before: `ttp start --onion-only`.

Nobody's resolver is changed. A name of .onion must be on no wire but Tor's, whoever is asked for
it; any other is asked of whom it always was.
"""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from host_machine import (
    CUT,
    START,
    as_seen,
    idle,
    is_closed,
    is_killed,
    speak,
    state_of,
    to,
    watched,
)
from machine import Machine
from nsrun.lab import topology
from nsrun.leak.frames import Tcp
from nsrun.leak.pcap import Capture
from town import eventually

ONLY = "--onion-only"
NOBODYS = f"{'a' * 55}d.onion"
DIG = ("dig", "+tries=1", "+time=2")
READ = (
    "import sys, urllib.request as u; print(u.urlopen(f'http://{sys.argv[1]}/', timeout=40).read())"
)


def ask(machine: Machine, name: str, user: str = "alice") -> None:
    """By libc and systemd-resolved, by its stub, by another resolver; each by UDP and by TCP."""
    machine.run("getent", "ahosts", name, user=user)
    for resolver in ("127.0.0.53", topology.RESOLVER, topology.RESOLVER6):
        for options in ((), ("+tcp",)):
            machine.run(*DIG, *options, f"@{resolver}", name, user=user)


def questions(capture: Capture, end: bytes) -> int:
    """Frames in which a label ``end`` is the last of a name, by UDP or TCP, in any case."""
    label = bytes([len(end)]) + re.escape(end) + b"\0"
    return sum(bool(re.search(label, one.data, re.IGNORECASE)) for one in capture.frames)


@pytest.mark.promise("P1", "P2", "P8", "P9", "P12")
def test_only_onion_goes_to_tor(host: Machine) -> None:
    """A service is reached by its name; of no such name is there a question on the wire."""
    with watched(host) as control:
        ask(host, NOBODYS)
    assert questions(control[0], b"onion") >= 5
    resolv_conf = host.run("cat", "/etc/resolv.conf").stdout
    up = host.run(*START, ONLY)
    assert up.returncode == 0, up.stderr
    assert "caught     .onion\n" in host.run("ttp", "status").stdout
    assert host.run("cat", "/etc/resolv.conf").stdout == resolv_conf
    with watched(host) as seen:
        for name in (NOBODYS, f"www.{NOBODYS}", NOBODYS.upper()):
            ask(host, name)
        ask(host, NOBODYS, user="bob")
        assert host.run("getent", "ahostsv4", NOBODYS).stdout.startswith("10.")
        assert host.run("ttp", "check", check=True).stdout.startswith("up: seen as")
        onion = host.lab.status()["onion"]
        page = host.run("python3", "-c", READ, str(onion), user="alice")
        assert "not an exit of the lab" in page.stdout, page.stderr
    assert not questions(seen[0], b"onion")
    assert not to(seen[0], Tcp, topology.WEB, topology.WEB6)  # nor was it asked in clear
    with watched(host) as clear:
        for family in ("-4", "-6"):
            assert as_seen(host, family)["IsTor"] is False
        ask(host, "other.test")
    assert questions(clear[0], b"test") >= 5
    for verb in ("check-leak", "bypass"):
        done = host.run("ttp", verb, *(("true",) if verb == "bypass" else ()))
        assert done.returncode == 2, done.stderr


@pytest.mark.promise("P4", "P9")
def test_at_stop_connections_to_onion_end_and_no_others(host: Machine) -> None:
    """By the address that Tor gave to the name."""
    host.run(*START, ONLY, check=True)
    onion = str(host.lab.status()["onion"])
    with (
        idle(host, onion) as (theirs, heard),
        idle(host, topology.WEB) as (clear, heard_clear),
    ):
        host.run("ttp", "stop", check=True)
        assert speak(theirs, heard) == CUT
        assert speak(clear, heard_clear) == "sent\n"


@pytest.mark.promise("P2", "P4", "P8")
def test_killed_between_names_of_onion_do_not_leave(host: Machine) -> None:
    """kill -9 before what changes the rules: all else goes on, and stop takes it back. Each step is
    one of those before which somebody is killed in test_host.py."""

    def leaves() -> bool:
        with watched(host) as seen:
            host.run(*DIG, f"@{topology.RESOLVER}", NOBODYS, user="alice")
        assert not is_closed(host)
        return bool(questions(seen[0], b"onion"))

    assert is_killed(host, "CloseHost", *START[1:], ONLY)
    assert leaves()  # the control
    for step in ("MakeDirectory", "TorifyHost"):
        assert is_killed(host, step, *START[1:], ONLY)
        assert not leaves(), step
    host.run(*START, ONLY, check=True)
    for step in ("CutHost", "StopUnit", "OpenHost"):
        assert is_killed(host, step, "stop")
        assert not leaves(), step


@pytest.mark.promise("P2", "P4")
def test_the_watchdog_closes_onion_alone(host: Machine) -> None:
    """When rules were changed; all else is left alone, as before."""
    host.run(*START, ONLY, "--watchdog", check=True)
    host.run("nft", "flush", "chain", "inet", "ttp", "output_names", check=True)
    eventually(lambda: state_of(host) == "locked", "the watchdog to close", 2)
    with watched(host) as seen:
        ask(host, NOBODYS)
        assert not is_closed(host)
    assert not questions(seen[0], b"onion")


@pytest.mark.promise("P2")
def test_a_resolver_that_asks_by_tls_is_refused(host: Machine) -> None:
    """No rule can see what it asks: exit code 2, and nothing is changed."""
    drop_in = "/run/systemd/resolved.conf.d/tls.conf"
    text = "[Resolve]\nDNSOverTLS=opportunistic\n"
    with ExitStack() as stack:
        restart = ("systemctl", "restart", "systemd-resolved.service")
        remove = f"rm {drop_in}; rmdir --ignore-fail-on-non-empty $(dirname {drop_in})"
        stack.callback(host.run, *restart, check=True)
        stack.callback(host.run, "sh", "-c", remove, check=True)
        host.run("sh", "-c", f"install -D -m 644 /dev/stdin {drop_in}", text=text, check=True)
        host.run(*restart, check=True)
        done = host.run(*START, ONLY)
    assert done.returncode == 2, done.stdout
    assert "asks by TLS" in done.stderr
