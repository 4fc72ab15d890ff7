"""Some users of a machine behind Tor, and all others as before: `ttp start --only-user`.

Alice is caught; bob and root are not. What she looks up must be on no wire, by whatever way a
program asks: libc and systemd-resolved's own socket, its resolver on loopback, another one.
"""

from __future__ import annotations

import json
import os

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
from nsrun.host.steps import DOORS
from nsrun.lab import topology
from nsrun.leak.frames import Ip, Tcp, Udp
from nsrun.leak.pcap import Capture
from town import eventually

ONLY = ("--only-user", "alice")
ECHO = ("sh", "-c", f"echo word | socat -t1 - UDP:{topology.WEB}:7")
# Each asks for a name of its own, as nobody's cache has it.
WAYS = {
    "libc.test": ("getent", "ahosts", "libc.test"),
    "stub.test": ("dig", "+tries=1", "+time=2", "@127.0.0.53", "stub.test"),
    "tcp.test": ("dig", "+tries=1", "+time=2", "+tcp", "@127.0.0.53", "tcp.test"),
    "lan.test": ("dig", "+tries=1", "+time=2", f"@{topology.RESOLVER}", "lan.test"),
}


def asked(capture: Capture) -> set[str]:
    """Names of WAYS that were asked for on the wire, by UDP."""
    questions = [
        frame.body.body.question
        for frame in capture.frames
        if isinstance(frame.body, Ip) and isinstance(frame.body.body, Udp)
    ]
    return {name for name in WAYS for question in questions if question.endswith(f" {name}")}


def is_barred(machine: Machine) -> bool:
    """Whether there is an access list of ours anywhere."""
    doors = [path for path in map(machine.path, DOORS) if path.exists()]
    return any(os.listxattr(one) for path in doors for one in (path, *path.rglob("*")))


@pytest.mark.promise("P1", "P2", "P3", "P8", "P9", "P12")
def test_only_the_named_user_is_behind_tor(host: Machine) -> None:
    """Her TCP and names go to Tor, all else of hers is refused; bob's and root's are in clear."""
    with watched(host) as control:
        for way in WAYS.values():
            host.run(*way, user="alice")
    assert asked(control[0]) == {*WAYS}
    up = host.run(*START, *ONLY)
    assert up.returncode == 0, up.stderr
    assert is_barred(host)
    assert "caught     alice\n" in host.run("ttp", "status").stdout
    assert json.loads(host.run("ttp", "status", "--json").stdout)["caught"] == "alice"
    for family in ("-4", "-6"):
        assert as_seen(host, family)["IsTor"] is True
        for other in ("bob", "root"):
            assert as_seen(host, family, user=other)["IsTor"] is False
    assert host.run(*ECHO, user="alice").stdout == ""
    assert host.run(*ECHO, user="bob").stdout == "word\n"
    with watched(host) as hers:
        for way in WAYS.values():
            host.run(*way, user="alice")
        host.run("systemctl", "restart", "systemd-resolved.service", check=True)
        host.run(*WAYS["libc.test"], user="alice")
        for verb in ("check", "check-leak"):
            done = host.run("ttp", verb)
            assert done.returncode == 0, done.stdout + done.stderr
    assert not asked(hers[0])
    assert not to(hers[0], Tcp, topology.WEB, topology.WEB6)
    assert not to(hers[0], Udp, topology.RESOLVER, topology.RESOLVER6)
    with watched(host) as his:
        for way in WAYS.values():
            host.run(*way, user="bob")
    assert asked(his[0]) == {*WAYS}
    host.run("ttp", "stop", check=True)
    assert not is_barred(host)


@pytest.mark.promise("P1", "P4", "P9")
def test_at_stop_her_connections_end_and_nobody_elses(host: Machine) -> None:
    """Hers is not in clear afterwards; his was, and goes on."""
    host.run(*START, *ONLY, check=True)
    with (
        idle(host, topology.WEB) as (hers, heard),
        idle(host, topology.WEB6, user="bob") as (his, heard_his),
        watched(host) as seen,
    ):
        host.run("ttp", "stop", check=True)
        assert speak(hers, heard) == CUT
        assert speak(his, heard_his) == "sent\n"
    assert not to(seen[0], Tcp, topology.WEB)
    assert to(seen[0], Tcp, topology.WEB6)


@pytest.mark.promise("P4", "P8")
def test_a_start_or_a_stop_killed_between_is_closed_to_her(host: Machine) -> None:
    """kill -9 before what is of this mode: she has no network, he has, and stop takes it all back.
    Before every other step somebody is killed in test_host.py."""
    for step in ("BarUsers", "MakeDirectory", "TorifyHost"):
        assert is_killed(host, step, *START[1:], *ONLY)
        assert is_closed(host), step
        assert not is_closed(host, user="bob"), step
        host.run("ttp", "stop", check=True)
        assert not is_barred(host)
    host.run(*START, *ONLY, check=True)
    for step in ("CutHost", "FreeUsers", "OpenHost"):
        assert is_killed(host, step, "stop")
        assert is_closed(host), step
        assert not is_closed(host, user="bob"), step
    host.run("ttp", "stop", check=True)
    assert not is_closed(host)
    assert not is_barred(host)


@pytest.mark.promise("P2", "P4")
def test_another_session_follows_without_a_moment_between(host: Machine) -> None:
    """restart, with others caught and with all; and from closed, back to it if it fails."""
    host.run(*START, *ONLY, check=True)
    host.run("ttp", "restart", *START[2:], "--only-user", "bob", check=True)
    assert as_seen(host, "-4")["IsTor"] is False
    assert as_seen(host, "-4", user="bob")["IsTor"] is True
    host.run("ttp", "restart", *START[2:], check=True)
    assert as_seen(host, "-4")["IsTor"] is True
    host.run("ttp", "stop", check=True)
    assert not is_barred(host)
    host.run("ttp", "close", check=True)
    assert host.run("ttp", "start", *ONLY, "--bootstrap-timeout", "0").returncode == 1
    assert is_closed(host, user="bob")
    host.run(*START, *ONLY, check=True)
    assert not is_closed(host, user="bob")
    assert as_seen(host, "-4")["IsTor"] is True
    assert "up already" in host.run(*START, *ONLY, check=True).stdout
    assert host.run(*START).returncode == 2  # it is up with others
    host.run("ttp", "stop", check=True)
    assert not is_barred(host)


@pytest.mark.promise("P4")
def test_the_watchdog_closes_to_her_alone(host: Machine) -> None:
    """When rules were changed; he is left alone, as before."""
    host.run(*START, *ONLY, "--watchdog", check=True)
    host.run("nft", "flush", "ruleset", check=True)
    eventually(lambda: state_of(host) == "locked", "the watchdog to close", 2)
    for _ in range(2):
        assert is_closed(host)
        assert not is_closed(host, user="bob")
        # a start that fails comes back to what it was
        assert host.run(*START, "--bootstrap-timeout", "0").returncode == 1
    host.run("ttp", "stop", check=True)
    assert not is_closed(host)
    assert not is_barred(host)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (("--only-user", "root"), "root's processes serve others"),
        (("--only-user", "debian-tor"), "Tor itself runs"),
        (("--only-user", "nobody-of-that-name"), "there is no user"),
        (("--only-user", "9" * 5000), "there is no user"),
        (("--only-user", ""), "one of them is empty"),
        (("--only-user", "alice", "--allow-root"), "exclude each other"),
        (("--only-user", "alice", "--bypass-user", "bob"), "exclude each other"),
        (("--only-user", "alice", "--onion-only"), "exclude each other"),
        (("--onion-only", "--no-ipv6"), "exclude each other"),
        (("--onion-only", "--bypass-group", "bob"), "exclude each other"),
    ],
)
def test_a_wrong_choice_of_users_changes_nothing(
    host: Machine, wrong: tuple[str, ...], why: str
) -> None:
    """Exit code 2, one line, before the first effect."""
    done = host.run(*START, *wrong)
    assert done.returncode == 2, done.stdout + done.stderr
    assert why in done.stderr
    assert host.run("nft", "list", "tables").stdout == ""


@pytest.mark.promise("P2")
def test_a_name_service_that_cannot_be_closed_is_refused(host: Machine) -> None:
    """One that nsswitch.conf names, and of which nobody knows whom it asks."""
    host.run("cp", "-a", "/etc/nsswitch.conf", "/root/was.conf", check=True)
    try:
        host.run("sed", "-i", "s/^hosts:.*/hosts: files wins dns/", "/etc/nsswitch.conf")
        done = host.run(*START, *ONLY)
        assert done.returncode == 2
        assert "looked up by wins, in clear" in done.stderr
    finally:
        host.run("cp", "-a", "/root/was.conf", "/etc/nsswitch.conf", check=True)
        host.run("rm", "/root/was.conf", check=True)
