"""``ttp doctor`` in the lab: gateways and labs that run, and a wire on which nothing may stir."""

from __future__ import annotations

import json

import pytest

from lab_helpers import TTP, Lab
from nsrun.leak.verdict import Value, as_text, judge

pytestmark = pytest.mark.lab


@pytest.mark.promise("P11")
def test_doctor_sends_no_packet(lab: Lab) -> None:
    """It brings pasta and slirp4netns up on the simulated host, whose wire stays silent."""
    with lab.tap("router", "p-host") as wire:
        done = lab.do(*lab.inside_argv("host", TTP, "doctor", "--json"))
        verdict = judge("host", wire.stop(), [lab.neighbours()])
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert {checks[kind]["state"] for kind in ("pasta", "slirp4netns")} == {"ok"}, done.stdout
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    with lab.tap("router", "p-host") as wire:  # the control: the wire is the host's, and is heard
        lab.do(*lab.inside_argv("host", "curl", "-sS", "http://11.200.0.80/"))
        assert judge("host", wire.stop(), []).value is Value.LEAK


def test_doctor_lists_what_runs(lab: Lab) -> None:
    """The lab and its gateway, with their versions."""
    done = lab.ttp("doctor", "--json")
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert checks[f"gateway {lab.name}"]["found"].endswith(", lab, 0 workloads")
    assert checks[f"lab {lab.name}"]["found"].startswith("tor 0.4.")
