"""A host behind Tor that sleeps, wakes up elsewhere, or takes another link, with its wire watched.

A machine of these tests shares its kernel, and so cannot be suspended. But all that a suspend does
to it can be done: nothing of it runs, its link is down, and meanwhile the others forget it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from host_machine import (
    ELSEWHERE,
    SHOUT,
    START,
    all_the_time,
    as_seen,
    contained,
    state_of,
    to,
    watched,
)
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Udp
from town import eventually

SHOUTING = ("python3", "-c", SHOUT, topology.WEB, topology.WEB6, "300")
WEBS = (topology.WEB, topology.WEB6)
BACK = 30.0  # seconds until Tor works again


def network(link: str, address: str, address6: str) -> str:
    """Commands by which ``link`` alone is in the network of the lab, as a lease would tell."""
    return f"""
        ip address flush dev eth0 scope global
        ip link set {link} up
        ip address add {address}/24 dev {link}
        ip address add {address6}/64 dev {link} nodad
        ip route replace default via {topology.ROUTER} dev {link}
        ip route replace default via {topology.ROUTER6} dev {link}
    """


def forget(machine: Machine) -> None:
    """What the router and the relays know of its connections is gone, as after a while."""
    for place, words in (
        ("router", ("conntrack", "--flush")),
        ("inet", ("ss", "--kill", "--tcp", "dst", topology.WAN)),
        ("inet", ("ss", "--kill", "--tcp", "dst", f"[{topology.WAN6}]")),
    ):
        done = machine.lab.do(*machine.lab.inside_argv(place, *words))
        assert done.returncode == 0, done.stderr


def sleep(machine: Machine) -> None:
    """To be woken up by whom it knows no more."""
    with machine.asleep():
        forget(machine)
        time.sleep(1)  # it is asleep


def works(machine: Machine) -> bool:
    return as_seen(machine, "-4", "--max-time", "5").get("IsTor") is True


@contextmanager
def restored(machine: Machine) -> Iterator[None]:
    """Back in the network of before, whatever the block does to its links."""
    try:
        yield
    finally:
        again = f"ip address replace {topology.HOST_LINK}/64 dev eth0 nodad"
        home = network("eth0", topology.HOST, topology.HOST6)
        machine.run("sh", "-ec", home + again, check=True)


@pytest.mark.promise("P1", "P2", "P3", "P4")
def test_a_host_that_sleeps_and_wakes_up_elsewhere_is_behind_tor(host: Machine) -> None:
    """In the same network, then in one with another address and another resolver."""
    host.run(*START, "--watchdog", check=True)
    other = f"resolvectl dns eth0 {topology.RESOLVER}; resolvectl domain eth0 '~.'"
    elsewhere = network("eth0", *ELSEWHERE) + other
    with all_the_time(host, *SHOUTING, user="alice"):
        with watched(host) as same:
            sleep(host)
            eventually(lambda: works(host), "Tor, in the same network", BACK)
        with restored(host), watched(host) as moved:
            sleep(host)
            host.run("sh", "-ec", elsewhere, check=True)
            eventually(lambda: works(host), "Tor, in another network", BACK)
            host.run("resolvectl", "revert", "eth0", check=True)
        contained(host, same[0])
        contained(host, moved[0], moved=ELSEWHERE)
        assert state_of(host) == "up"
        assert "the host has moved" in host.journal(session.WATCHDOG)
        host.run("ttp", "stop", check=True)
        with watched(host) as control:
            sleep(host)
            time.sleep(1)  # it is awake
    assert to(control[0], Udp, *WEBS)


PLUG = """set -e
ip link add m2 type veth peer name m3
ip link set m2 addrgenmode none master switch up
ip link set m3 netns $0
"""


@pytest.mark.promise("P1", "P2", "P3", "P4")
def test_a_host_that_takes_another_link_is_behind_tor(host: Machine) -> None:
    """From Wi-Fi to a cable, as it were: another interface, another address, the other one down."""
    host.run(*START, "--watchdog", check=True)
    plug = host.lab.inside_argv("host", "sh", "-c", PLUG, str(host.leader))
    cable = "ip link set m3 name eth1 addrgenmode none\n" + network("eth1", *ELSEWHERE)
    with restored(host), all_the_time(host, *SHOUTING, user="alice"), watched(host) as seen:
        plugged = host.lab.do(*plug)
        assert plugged.returncode == 0, plugged.stderr
        try:
            host.run("sh", "-ec", cable + "ip link set eth0 down", check=True)
            eventually(lambda: works(host), "Tor, by another link", BACK)
        finally:
            host.run("ip", "link", "del", "eth1", check=True)
    contained(host, seen[0], moved=ELSEWHERE)
    assert state_of(host) == "up"
