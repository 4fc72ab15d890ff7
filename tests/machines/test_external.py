"""A host behind a Tor that somebody else runs: Debian's own service, as its package has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from host_machine import CURL, START, all_the_time, as_seen, is_closed, state_of, to, watched
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Tcp, Udp
from town import eventually

THEIRS = ("ttp", "start", "--external-daemon")
UNIT = "tor@default.service"
TORRC = """
TransPort 127.0.0.1:9041
TransPort [::1]:9041
DNSPort 127.0.0.1:9054
DNSPort [::1]:9054
AutomapHostsOnResolve 1
VirtualAddrNetworkIPv4 10.192.0.0/10
VirtualAddrNetworkIPv6 [fd74:7470:1:1000::]/64
"""


@contextmanager
def tor(machine: Machine, torrc: str) -> Iterator[None]:
    """Debian's service, in the lab's network, with these lines in its torrc."""
    add = "cp /etc/tor/torrc /root/torrc && cat /etc/ttp/lab.torrc - >>/etc/tor/torrc"
    machine.run("sh", "-c", add, text=torrc, check=True)
    try:
        machine.run("systemctl", "start", UNIT, check=True)
        yield
    finally:
        machine.run("ttp", "stop")
        machine.run("systemctl", "stop", UNIT, check=True)
        machine.run("systemctl", "reset-failed", UNIT)
        machine.run("cp", "-p", "/root/torrc", "/etc/tor/torrc", check=True)
        machine.run("rm", "-r", "/root/torrc", "/run/tor", check=True)


def process(machine: Machine) -> str:
    return machine.run("systemctl", "show", "-P", "MainPID", UNIT, check=True).stdout


@pytest.mark.promise("P1", "P2", "P3", "P12")
def test_a_tor_that_somebody_else_runs(host: Machine) -> None:
    """Started, used and left alone: its process is the same from before start to after stop."""
    with tor(host, TORRC):
        pid = process(host)
        with watched(host) as seen:
            up = host.run(*THEIRS, "--tor-uid", "debian-tor")
            assert up.returncode == 0, up.stderr
            assert "by Tor" in up.stdout
            for family in ("-4", "-6"):
                assert as_seen(host, family)["IsTor"] is True
            name = f"{'a' * 55}d.onion"
            found = host.run("getent", "ahostsv4", name, user="alice").stdout.split()
            assert found[0].startswith("10."), found
            assert host.run(*CURL, "-m2", f"http://{found[0]}/", user="alice").returncode != 7
            assert host.run("ttp", "check", check=True).stdout.startswith("up: seen as")
            assert "up already" in host.run(*THEIRS, "--tor-uid", "debian-tor", check=True).stdout
            refused = host.run("ttp", "refresh")
            assert refused.returncode == 2
            assert "its Tor is somebody else's" in refused.stderr
            assert host.run("systemctl", "is-active", session.TOR_UNIT).stdout == "inactive\n"
            own = host.run("ttp", "restart", *START[2:])
            assert (own.returncode, "port 9041" in own.stderr) == (2, True), own.stderr
            assert as_seen(host, "-4")["IsTor"] is True
            host.run("ttp", "stop", check=True)
        assert not to(seen[0], Tcp, topology.WEB, topology.WEB6)
        assert not to(seen[0], Udp, topology.RESOLVER, topology.RESOLVER6)
        assert process(host) == pid
        assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}


def test_a_tor_that_cannot_be_relied_on_changes_nothing(host: Machine) -> None:
    """Nobody there, somebody else's, root's, no Tor at all, or .onion addresses of the LAN's."""
    refused(host, "nothing listens at 127.0.0.1:9041, tcp")
    host.run(*START, check=True)
    taken = host.run("ttp", "restart", *THEIRS[2:])
    assert (taken.returncode, "of ttp's session" in taken.stderr) == (2, True), taken.stderr
    assert as_seen(host, "-4")["IsTor"] is True
    host.run("ttp", "stop", check=True)
    for own in (("--use-bridges", "--bridge", "192.0.2.1:1"), ("--torrc", "/etc/ttp/lab.torrc")):
        refused(host, "has its own", *own)
    assert host.run("ttp", "start", "--tor-uid", "debian-tor").returncode == 2
    with tor(host, TORRC):
        refused(host, "which is not a user of it", "--bypass-user", "debian-tor")
    lan = TORRC.replace("10.192.0.0/10", "10.64.0.0/16")
    with tor(host, lan):
        refused(host, "which is not in 10.192.0.0/10")
        refused(host, "is debian-tor's", "--tor-uid", "alice")
        refused(host, "as root's", "--tor-uid", "0")
        refused(host, "there is no user 'nobody-of-that-name'", "--tor-uid", "nobody-of-that-name")
        refused(host, "127.0.0.1:9055, udp", "--dns-port", "9055")
        with host.start("socat", "UDP-LISTEN:9056,bind=127.0.0.1,fork", "/dev/null") as silent:
            host.run("sh", "-c", "until ss -Hlun sport = 9056 | grep -q .; do sleep 0.05; done")
            refused(host, "is root's", "--dns-port", "9056")
            silent.kill()
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}


def refused(machine: Machine, why: str, *options: str) -> None:
    done = machine.run(*THEIRS, *options)
    assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    assert machine.run("nft", "list", "tables").stdout == ""


ALICES = """
mkdir -m 700 /tmp/alices && cd /tmp/alices
{ cat /etc/ttp/lab.torrc; echo TransPort 127.0.0.1:9041; echo DNSPort 127.0.0.1:9054; } >torrc
exec tor --hush --SocksPort 0 --DataDirectory data -f torrc
"""


@pytest.mark.promise("P3", "P12")
def test_what_follows_from_a_tor_is_said(host: Machine) -> None:
    """Alice's, who logs in: what she sends is let past. Without ::1 no IPv6, and no .onion."""
    with all_the_time(host, "sh", "-c", ALICES, user="alice"):
        host.run("sh", "-c", "until ss -Hltn sport = 9041 | grep -q .; do sleep 0.05; done")
        up = host.run(*THEIRS, "--tor-uid", "alice")
        assert up.returncode == 0, up.stderr
        for words in ("alice logs in", "does not listen on ::1", "gives .onion names no addresses"):
            assert words in up.stderr, words
        assert as_seen(host, "-4", user="alice")["IsTor"] is False
        assert as_seen(host, "-4", user="bob")["IsTor"] is True
        assert "error" in as_seen(host, "-6", "--max-time", "5", user="bob")
        host.run("ttp", "stop", check=True)
    host.run("rm", "-r", "/tmp/alices", check=True)


@pytest.mark.promise("P4")
def test_the_watchdog_closes_when_a_tor_that_is_not_ours_ends(host: Machine) -> None:
    """Nobody gets what was for it; it is not started again; with it back, restart opens."""
    with tor(host, TORRC):
        up = host.run(*THEIRS, "--watchdog")
        assert up.returncode == 0, up.stderr
        host.run("systemctl", "reload", UNIT, check=True)  # the same listeners
        assert host.run("ttp", "check").returncode == 0
        host.run("systemctl", "stop", UNIT, check=True)
        eventually(lambda: state_of(host) == "locked", "the watchdog to close", 3)
        assert is_closed(host)
        assert "no longer listens" in host.run("ttp", "logs", check=True).stdout
        assert host.run("ttp", "restart", *THEIRS[2:]).returncode == 2
        assert is_closed(host)
        host.run("systemctl", "start", UNIT, check=True)
        assert host.run("ttp", "restart", *THEIRS[2:]).returncode == 0
        assert as_seen(host, "-4")["IsTor"] is True
