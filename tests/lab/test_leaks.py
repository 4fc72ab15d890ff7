"""What leaves: every packet on every wire outside the workload's own link is judged.

    workload ══ gateway ─uplink═══gw-NAME─┐
                                          ├ router ── internet with Tor in it
    host ─eth0════════════════════p-host──┤
                                 LAN ─────┘

The gateway sits on the LAN beside the host, so the host's wire must stay silent and the
gateway's may carry TCP to relays only. Each probe is also sent by the host without ttp: then
the same taps must see it.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from harness import ROOT
from lab_helpers import ORACLE, PLAIN_ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from probe import PROBES, TOKEN

pytestmark = pytest.mark.lab

PYTHON = "/usr/bin/python3"
CURL = ("curl", "-sS", "--max-time", "20")
PROBE = str(ROOT / "tests" / "probe.py")
NOT_FROM_HOST = {"host-tcp"}  # to itself: no wire carries it


@pytest.mark.promise("P1", "P2", "P3", "P5", "P12")
def test_no_probe_is_on_any_wire(lab: Lab) -> None:
    """All probes from one workload, traffic through Tor around them; nothing else on any wire."""
    gateway = (topology.GATEWAY, topology.GATEWAY6)
    with lab.tap("router", f"gw-{lab.name}") as uplink, lab.tap("router", "p-host") as host:
        assert lab.run(*CURL, ORACLE).returncode == 0
        sent = lab.run(PYTHON, PROBE)
        assert lab.run(*CURL, ORACLE).returncode == 0
        verdicts = [
            judge("uplink", uplink.stop(), lab.rules(*gateway), expect_some=True),
            judge("host", host.stop(), [lab.neighbours()]),
        ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    results = json.loads(sent.stdout)
    assert set(results) == set(PROBES)
    for name in ("lan-tcp", "metadata", "host-tcp"):
        assert "Refused" in results[name], results


@pytest.mark.promise("P12")
@pytest.mark.parametrize("name", sorted(set(PROBES) - NOT_FROM_HOST))
def test_control_without_ttp_it_is_on_the_wire(lab: Lab, name: str) -> None:
    """The taps can see what they must not see."""
    with lab.tap("router", "p-host") as host:
        subprocess.run(
            lab.inside("host", PYTHON, PROBE, name), capture_output=True, timeout=30, check=True
        )
        verdict = judge("host", host.stop(), [])
    assert verdict.value is Value.LEAK, as_text([verdict])
    assert any(TOKEN in leak.frame.data for leak in verdict.leaks)


@pytest.mark.promise("P3", "P4")
@pytest.mark.parametrize("uplink", ["pasta", "slirp4netns", "veth"])
def test_the_hosts_wire_carries_tcp_to_relays_only(lab: Lab, uplink: str) -> None:
    """A gateway on the simulated host itself, behind each uplink that a real machine would use."""
    if uplink == "veth" and lab.who == "user":
        return  # the kernel lets only root link a namespace to the host's; see test_uplink.py
    with lab.tap("router", "p-host") as host, lab.other_gateway(uplink) as name:
        web = lab.do(*lab.inside_argv("host", TTP, "run", "-g", name, "--", *CURL, PLAIN_ORACLE))
        assert web.returncode == 0, web.stderr
        assert json.loads(web.stdout)["IsTor"] is True
        sent = lab.do(*lab.inside_argv("host", TTP, "run", "-g", name, "--", PYTHON, PROBE))
        assert set(json.loads(sent.stdout)) == set(PROBES)
        own = (topology.HOST, topology.HOST6)
        verdict = judge("host", host.stop(), lab.rules(*own), expect_some=True)
    assert verdict.value is Value.CONTAINED, as_text([verdict])
