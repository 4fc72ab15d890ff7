"""The examples in compose/: each is started as it says, used, and judged on the wires."""

from __future__ import annotations

from functools import partial

import pytest

from composed import Example, example, host_is_silent
from docker_host import IMAGE
from driver_host import Host, answered, by_tor
from lab_helpers import PLAIN_ORACLE
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]


@pytest.mark.promise("P1", "P7", "P8")
def test_apps(docker: Host) -> None:
    """Two programs, two identities; only Tor's connections are on a wire."""
    lab = docker.lab
    variables = {"IMAGE": IMAGE, "GATEWAY": lab.name, "URL": PLAIN_ORACLE}
    with (
        lab.tap("router", f"gw-{lab.name}") as uplink,
        lab.tap("router", "p-host") as host,
        example(Example(docker.dockerd, "apps", variables)) as apps,
    ):
        for service in ("first", "second"):
            eventually(partial(apps.printed, service), "an answer", 20)
            assert by_tor(apps.printed(service)[0])
        assert len({tuple(one["identity"]) for one in docker.workloads()}) == 2
        verdicts = [
            judge(
                "uplink",
                uplink.stop(),
                lab.rules(topology.GATEWAY, topology.GATEWAY6),
                expect_some=True,
            ),
            judge("host", host.stop(), []),
        ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    assert docker.workloads() == []


@pytest.mark.promise("P1", "P7", "P8")
def test_pair(docker: Host) -> None:
    """A program and its database: one network, one identity, and Tor's connections only."""
    lab = docker.lab
    variables = {"IMAGE": IMAGE, "GATEWAY": lab.name, "URL": PLAIN_ORACLE}
    with (
        lab.tap("router", f"gw-{lab.name}") as uplink,
        host_is_silent(docker.dockerd),
        example(Example(docker.dockerd, "pair", variables)) as pair,
    ):
        eventually(lambda: answered(pair.printed("program")), "an answer", 20)
        asked = pair.run("database", "curl", "-sS", PLAIN_ORACLE)
        assert by_tor(asked.stdout), asked.stderr
        assert len(docker.workloads()) == 1
        verdict = judge(
            "uplink",
            uplink.stop(),
            lab.rules(topology.GATEWAY, topology.GATEWAY6),
            expect_some=True,
        )
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    assert docker.workloads() == []
