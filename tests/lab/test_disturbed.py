"""Faults at random moments under traffic: closed each time, whole again where that is promised.

    workloads ══ gateway ─uplink═ pasta ── host ──p-host══ router ── internet with Tor in it
    that send strays            ▲               ▲            ╚═ LAN, the lab's own gateway
    of every kind               faults          taps, on all of its wires

A run is drawn from its seed: which faults, how many at once, when, and for how long. All the while
the wires may carry TCP to relays only. After each round the gateway must work again: by itself
where docs/theory-of-operation.md promises that (section 7), else once it is started again.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from disturbances import OTHER_ADDRESS, STRAYS, disturb, on_host
from kill_place import eventually
from lab_helpers import Lab
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from probe import TOKEN

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SEEDS = range(10)
ROUNDS = 25  # of one seed: with one to four faults in each, at least 500 in all
OURS = (topology.HOST, OTHER_ADDRESS, topology.GATEWAY, topology.GATEWAY6)


def holds(lab: Lab, seed: int, rounds: int) -> int:
    """Returns how many faults there were."""
    before = inventory(lab)
    wires = {name: place for name, place in topology.wires(lab.name).items() if name != "internet"}
    with on_host(lab, seed) as scene:
        with ExitStack() as stack:
            taps = {name: stack.enter_context(lab.tap(*place)) for name, place in wires.items()}
            try:
                scene.start()
                count = disturb(scene, rounds)
            finally:
                scene.stop()
            rules = lab.rules(*OURS)  # for all: a bridge that forgot where a port is floods
            verdicts = [
                judge(name, tap.stop(), rules, expect_some=name == "host")
                for name, tap in taps.items()
            ]
        story = f"seed {seed}\n{scene.story}"
        assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, (
            f"{story}\n{as_text(verdicts)}"
        )
    with suppress(AssertionError):  # it is told below what is other
        eventually(lambda: inventory(lab) == before, "all to be as before")
    assert inventory(lab) == before, story
    return count


def inventory(lab: Lab) -> list[str]:
    """What a gateway could leave on the host."""
    looks = (
        ("ip", "-br", "link"),
        ("sh", "-c", "ip -o address | sort"),
        ("ip", "-4", "route"),
        ("nft", "list", "tables"),
        ("cat", "/proc/mounts"),
        ("cat", "/etc/resolv.conf"),
        ("sh", "-c", f"ls -d $TTP_RUNTIME_DIR/gateways/{lab.name}*"),
    )
    return [lab.do(*lab.inside_argv("host", *command)).stdout for command in looks]


@pytest.mark.promise("P4", "P8")
def test_faults_under_traffic(lab: Lab) -> None:
    """A few; the seed is always the same, so that what fails can be looked into."""
    rounds = 6 if lab.who == "root" else 2
    assert holds(lab, 4, rounds) >= rounds


@pytest.mark.torture
@pytest.mark.promise("P4", "P8")
@pytest.mark.parametrize("seed", SEEDS)
def test_faults_under_traffic_for_long(lab: Lab, seed: int) -> None:
    """Five hundred and more."""
    if lab.who == "root":
        assert holds(lab, seed, ROUNDS) >= 50


@pytest.mark.promise("P12")
def test_control_without_ttp_the_same_traffic_is_seen(lab: Lab) -> None:
    """On the same wire, from the same host."""
    with on_host(lab, 0), lab.tap("router", "p-host") as tap:
        lab.do(*lab.inside_argv("host", *STRAYS[:-2], "1"))
        verdict = judge("host", tap.stop(), lab.rules(*OURS))
    assert verdict.value is Value.LEAK
    assert sum(TOKEN in leak.frame.data for leak in verdict.leaks) > 50
