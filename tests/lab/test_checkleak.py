"""``ttp check-leak``: what a user of a live machine runs, from inside a workload."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from lab_helpers import ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.inside import CHECKS
from nsrun.leak.verdict import Value, as_text, judge

pytestmark = pytest.mark.lab

# The same checks where no guard is, with nothing between them and the simulated host's network
UNGUARDED = """
import dataclasses, io, json, sys
from nsrun.leak import inside, machine
sys.stdin = io.StringIO(json.dumps(dataclasses.asdict(machine.look())))
inside.main()
"""
NAMES = {check.name for check in CHECKS}


def values(checks: list[dict[str, Any]]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in checks}


@pytest.mark.promise("P1", "P2", "P3", "P5", "P6", "P10", "P11", "P12")
def test_every_check_is_contained_and_no_wire_saw_it(lab: Lab) -> None:
    """Sites and names are asked for through Tor, all else is refused, and none of it is seen."""
    ours = (topology.GATEWAY, topology.GATEWAY6)
    with lab.tap("router", f"gw-{lab.name}") as uplink, lab.tap("router", "p-host") as host:
        done = lab.do(TTP, "check-leak", "--gateway", lab.name, "--json")
        verdicts = [
            judge("uplink", uplink.stop(), lab.rules(*ours), expect_some=True),
            judge("host", host.stop(), [lab.neighbours()]),
        ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert values(found["checks"]) == dict.fromkeys(NAMES, "contained")
    assert found["value"] == "contained"
    seen = next(one["found"] for one in found["checks"] if one["name"] == "is-tor")
    assert seen.split()[-1] in lab.exits()


@pytest.mark.promise("P12")
def test_without_the_guard_every_check_is_a_leak(lab: Lab) -> None:
    """The control: the same checks on the simulated host, as root and without ttp."""
    command = lab.inside("host", sys.executable, "-P", "-c", UNGUARDED)
    done = lab.do(*command[len(lab.prefix) :])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert values(found) == dict.fromkeys(NAMES, "leak"), done.stderr


def test_it_checks_the_workload_that_it_is_started_in(lab: Lab) -> None:
    """Where other commands of ttp are refused."""
    done = lab.run(TTP, "check-leak", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "IsTor true, seen as " in done.stdout
    assert ORACLE in done.stdout
    assert "UDP 169.254.169.254: contained, refused by the gateway" in done.stdout
    assert "Not seen from inside: the wires." in done.stdout


def test_inside_a_workload_no_other_gateway_can_be_checked(lab: Lab) -> None:
    """It would be another one than is asked for."""
    done = lab.run(TTP, "check-leak", "--gateway", "other")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "ttp: cannot check the gateway other: this process is in a workload"
    )


def test_a_gateway_that_is_not_there_is_named(lab: Lab) -> None:
    """Nothing is reported then, least of all that all is well."""
    done = lab.do(TTP, "check-leak", "--gateway", "nowhere")
    assert done.returncode == 1
    assert "contained" not in done.stdout
    assert "nowhere" in done.stderr
