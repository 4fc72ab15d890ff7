"""The watchdog of the whole host, as its unit runs it, against what others do to a machine."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from host_machine import SHOUT, START, all_the_time, as_seen, is_closed, state_of, to, watched
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Udp
from nsrun.leak.pcap import Capture
from town import eventually

OPENED = 1.0  # seconds: what is said in docs/whole-host.md
TABLE = "inet ttp"
OPENING = (
    f"delete table {TABLE}",
    "flush ruleset",
    f"add table {TABLE} {{ flags dormant; }}",
    f"insert rule {TABLE} filter_out accept",
    f"flush chain {TABLE} filter_out; add chain {TABLE} filter_out {{ policy accept; }}",
)
CHURN = "until [ -e /run/enough ]; do nft add table inet theirs; nft delete table inet theirs; done"
SHOUTING = ("python3", "-c", SHOUT, topology.WEB, topology.WEB6, "120")
# A link that was down has lost its routes, and what it had of IPv6.
LINK = f"""set -e
ip link set eth0 down; ip link set eth0 up
ip route add default via {topology.ROUTER}
ip address add {topology.HOST6}/64 dev eth0 nodad
ip address add {topology.HOST_LINK}/64 dev eth0 nodad
ip route add default via {topology.ROUTER6}
"""


def listed(machine: Machine) -> str:
    return machine.run("nft", "--stateless", "list", "table", *TABLE.split()).stdout


def seconds_open(capture: Capture) -> float:
    """From the first stray packet to the last; there must be one: so the wire is seen."""
    strays = to(capture, Udp, topology.WEB, topology.WEB6)
    assert strays
    return float(strays[-1].time_ns - strays[0].time_ns) / 1e9


def watchdog(machine: Machine) -> int:
    found = machine.run("systemctl", "show", "-P", "MainPID", session.WATCHDOG, check=True)
    return int(found.stdout)


def is_another(machine: Machine, dead: int) -> bool:
    return watchdog(machine) not in (0, dead)


@pytest.mark.promise("P3", "P4")
def test_whatever_opens_the_rules_they_are_closed_within_a_second(host: Machine) -> None:
    """Once, and again when it is closed already; who connects to the machine is answered."""
    host.run(*START, "--watchdog", check=True)
    closed, before = "", told(host)
    with all_the_time(host, *SHOUTING, user="alice"):
        for change in OPENING:
            with watched(host) as seen:
                host.run("nft", change, check=True)
                eventually(lambda: state_of(host) == "locked", "a lock", 5)
                closed = closed or listed(host)
                time.sleep(OPENED + 0.2)  # what still went out would be seen
            assert listed(host) == closed, change
            assert seconds_open(seen[0]) < OPENED, change
        with watched(host) as after:
            time.sleep(1)  # shouting goes on
    assert not to(after[0], Udp, topology.WEB, topology.WEB6)
    assert told(host) - before == len(OPENING)
    assert "were changed" in host.run("ttp", "logs", check=True).stdout
    assert host.run("ttp", "check").returncode == 2
    assert is_served(host)


def told(machine: Machine) -> int:
    """How often everybody was told, since the boot."""
    journal = ("journalctl", "-b", "-p", "emerg", "-u", session.WATCHDOG, "-o", "cat")
    return machine.run(*journal).stdout.count("were changed")


def is_served(machine: Machine) -> bool:
    """Whether somebody of the LAN who connects to the machine is answered."""
    serve = ("socat", "TCP-LISTEN:2222,reuseaddr,fork", "SYSTEM:echo hello")
    ask = f"head -1 </dev/tcp/{topology.HOST}/2222"
    with all_the_time(machine, *serve):
        machine.run("sh", "-c", "until ss -Hltn sport = 2222 | grep -q .; do sleep 0.05; done")
        done = machine.lab.do(*machine.lab.inside_argv("lan", "timeout", "5", "bash", "-c", ask))
    return done.stdout == "hello\n"


@pytest.mark.promise("P3", "P4")
def test_changes_without_end_to_rules_of_others_do_not_keep_it_from_looking(host: Machine) -> None:
    """Each is an event; ours are looked at all the same, and theirs are nobody's business."""
    host.run(*START, "--watchdog", check=True)
    shouting = all_the_time(host, *SHOUTING, user="alice")
    with shouting, host.start("timeout", "20", "sh", "-c", CHURN) as churn:
        time.sleep(1)  # some hundreds of changes
        assert state_of(host) == "up"
        with watched(host) as seen:
            host.run("nft", "insert", "rule", *TABLE.split(), "filter_out", "accept", check=True)
            eventually(lambda: state_of(host) == "locked", "a lock", 5)
            time.sleep(OPENED + 0.2)  # what still went out would be seen
        host.run("touch", "/run/enough", check=True)
        churn.wait(10)
    host.run("rm", "/run/enough", check=True)
    assert seconds_open(seen[0]) < OPENED


@pytest.mark.promise("P4")
def test_a_watchdog_that_is_killed_opens_nothing_and_comes_back(host: Machine) -> None:
    """With two capabilities and no way to more; what was changed while it was dead is found."""
    host.run(*START, "--watchdog", check=True)
    status = host.path(f"/proc/{watchdog(host)}/status").read_text()
    assert "CapEff:\t0000000000201000\n" in status  # CAP_NET_ADMIN, CAP_SYS_ADMIN
    assert "NoNewPrivs:\t1\n" in status
    assert "Seccomp:\t2\n" in status
    for _ in range(6):  # systemd gives up after five, if it is not told otherwise
        dead = watchdog(host)
        host.run("systemctl", "kill", "--signal=KILL", session.WATCHDOG, check=True)
        assert is_closed(host)
        eventually(partial(is_another, host, dead), "another process")
    host.run("systemctl", "kill", "--signal=KILL", session.WATCHDOG, check=True)
    host.run("nft", "delete", "table", *TABLE.split(), check=True)
    eventually(lambda: state_of(host) == "locked", "a lock")
    assert is_closed(host)
    refused = host.run("ttp", "refresh")
    assert (refused.returncode, "the host is locked" in refused.stderr) == (2, True), refused.stderr
    assert host.run("ttp", "restart", *START[2:], "--bootstrap-timeout", "0").returncode == 1
    assert is_closed(host)  # who repairs what was changed, and fails, has opened nothing
    assert host.run("ttp", "start", *START[2:]).returncode == 0
    assert state_of(host) == "up"


def has(machine: Machine, path: str, text: str) -> bool:
    return machine.run("cat", path).stdout == text


@pytest.mark.promise("P2", "P4")
def test_accidents_are_mended_and_lock_nobody_out(host: Machine) -> None:
    """resolv.conf written over and removed, resolved led elsewhere, a link down and up."""
    host.run(*START, "--watchdog", check=True)
    ours = host.path("/etc/resolv.conf").read_text()
    spoilt = (
        f"echo nameserver {topology.RESOLVER} >/etc/resolv.conf",
        f"rm {session.RESOLV_CONF}",
        f"echo nameserver {topology.RESOLVER} >{session.RESOLV_CONF}",
        "mount --bind /etc/hosts /etc/resolv.conf",
    )

    with watched(host) as seen:
        for change in spoilt:
            host.run("sh", "-c", change, check=True)
            for path in ("/etc/resolv.conf", session.RESOLV_CONF):
                eventually(partial(has, host, path, ours), f"{path} after: {change}", 5)
        led = host.path(session.RESOLVED).read_text()
        host.run("sh", "-c", f"echo '[Resolve]' >{session.RESOLVED}", check=True)
        eventually(partial(has, host, session.RESOLVED, led), "the way of resolved", 5)
        host.run("sh", "-c", LINK, check=True)
        eventually(lambda: as_seen(host, "-4").get("IsTor") is True, "Tor's way out", 30)
    assert state_of(host) == "up"
    assert not to(seen[0], Udp, topology.RESOLVER, topology.RESOLVER6)
    host.run("sh", "-c", "while umount /etc/resolv.conf; do :; done")  # theirs, between ours
    host.run("ttp", "stop", check=True)


# What no event tells: the directory that is watched is another one.
MOVED = "cd /run/systemd && mv resolved.conf.d /run/was-$0 && mkdir resolved.conf.d"


def test_it_looks_as_often_as_it_is_told_to(host: Machine) -> None:
    """Untold, with --interval; the control: one that looks every hour does not find it."""
    assert host.run(*START, "--watchdog").returncode == 0
    for interval in ("0", "0.5", "3601", "nan", "soon"):
        for verb in ("start", "run"):
            done = host.run("ttp", "watchdog", verb, "--interval", interval)
            assert done.returncode == 2, (verb, interval)
    for interval, finds in (("3600", False), ("1", True)):
        host.run("ttp", "watchdog", "start", "--interval", interval, check=True)
        eventually(partial(is_at_rest, host), "its first look")
        host.run("sh", "-c", MOVED, interval, check=True)
        time.sleep(2.5)  # longer than the one, shorter than the other
        assert host.path(session.RESOLVED).exists() is finds, interval
    assert "up already" in host.run(*START, check=True).stdout
    host.run("rm", "-r", "/run/was-3600", "/run/was-1", check=True)


def is_at_rest(machine: Machine) -> bool:
    """Whether it waits: it has had no turn for a while."""
    status = machine.path(f"/proc/{watchdog(machine)}/status")
    before = turns(status)
    time.sleep(0.4)  # a look takes less
    return before > 0 and turns(status) == before


def turns(status: Path) -> int:
    """Voluntary ones; 0 while there is no such process."""
    if not status.exists():
        return 0
    return int(status.read_text().rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
