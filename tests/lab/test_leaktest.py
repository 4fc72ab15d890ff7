"""``ttp leaktest``: the battery is contained, and finds out every gateway that leaks."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from lab_helpers import TTP, Lab
from nsrun.lab import topology
from nsrun.leak import pcap
from nsrun.leak.broken import CARELESS, CONFUSED, DEFECTS, Careless, Confused, Defect
from nsrun.leak.probes.table import PROBES

pytestmark = pytest.mark.lab


def leaktest(lab: Lab, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = lab.do(TTP, "leaktest", "--lab", lab.name, "--json", *arguments, seconds=240)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.promise("P1", "P2", "P3", "P5", "P6", "P10", "P12")
def test_every_probe_is_contained_and_its_control_seen(lab: Lab) -> None:
    """More than 170 ways around, none of which leads out, each of which does without the guard."""
    code, found = leaktest(lab)
    doubtful = [probe for probe in found["probes"] if probe["value"] != "contained"]
    assert not doubtful
    assert found["value"] == "contained"
    assert code == 0
    assert {probe["name"] for probe in found["probes"]} == {probe.name for probe in PROBES}
    assert all(probe["control"] for probe in found["probes"])
    assert {wire["wire"] for wire in found["wires"]} == {"gateway", "host", "lan"}


def test_what_can_be_tried_is_listed(lab: Lab) -> None:
    """As JSON too, of the probes that are asked for, and of every defect."""
    code, found = leaktest(lab, "--list", "udp*")
    assert code == 0
    named = {probe["name"]: probe["promises"] for probe in found["probes"]}
    assert named == {one.name: list(one.promises) for one in PROBES if one.name.startswith("udp")}
    every = (*DEFECTS, *CARELESS, CONFUSED)
    assert found["defects"] == [{"name": one.name, "title": one.title} for one in every]


def test_it_tells_no_lie_that_outlives_it(lab: Lab) -> None:
    """Its ARP is believed on the lab's LAN: gateway, router and host still find each other."""
    assert leaktest(lab, "arp-*", "frame-mac")[0] == 0
    tor: Any = lab.gateway()["tor"]
    gateway = ("nsenter", f"--net=/proc/{tor['pid']}/ns/net")
    fetch = ("curl", "-sS", f"http://{topology.WEB}/ip")
    assert lab.do(*lab.inside_argv("host", *fetch)).returncode == 0
    for place, enter, known in (
        ("host", (), topology.ROUTER),
        ("host", gateway, topology.ROUTER),
        ("router", (), topology.HOST),
    ):
        show = lab.inside_argv(place, *enter, "ip", "-j", "-4", "neighbour")
        macs = {one["dst"]: one.get("lladdr") for one in json.loads(lab.do(*show).stdout)}
        assert macs[known], "control: it has been looked for"
        assert "02:00:00:00:00:07" not in macs.values(), (place, macs)


@pytest.mark.promise("P12")
@pytest.mark.parametrize(
    "defect", [*DEFECTS, *CARELESS, CONFUSED], ids=lambda defect: str(defect.name)
)
def test_a_gateway_that_leaks_is_found_out(lab: Lab, defect: Defect | Careless | Confused) -> None:
    """Each defect, of the gateway or of how a command enters, is one that programs have or had."""
    assert defect.caught
    code, found = leaktest(lab, "--defect", defect.name, *defect.caught)
    values = {probe["name"]: probe["value"] for probe in found["probes"]}
    assert {name: values[name] for name in defect.caught} == dict.fromkeys(defect.caught, "leak")
    assert code == 1


def test_evidence_is_written_for_people_and_for_ci(lab: Lab) -> None:
    """The packets as a pcap, the results as JUnit XML."""
    junit, evidence = lab.home / "junit.xml", lab.home / "leaks.pcap"
    files = ("--junit", str(junit), "--pcap", str(evidence))
    code, _ = leaktest(lab, "--defect", "no-last-rule", "udp", "tcp", *files)
    assert code == 1
    suite = ElementTree.fromstring(junit.read_text())  # noqa: S314  our own
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert "udp" in failed
    assert "tcp" not in failed
    frames, flaw = pcap.load(evidence.read_bytes())
    assert frames
    assert not flaw


def test_a_probe_that_is_not_there_is_refused(lab: Lab) -> None:
    """And nothing is tested instead."""
    done = lab.do(TTP, "leaktest", "--lab", lab.name, "no-such-probe")
    assert done.returncode == 2
    assert "no-such-probe" in done.stderr


@pytest.mark.promise("P3", "P4", "P5", "P12")
def test_no_random_packet_gets_out(lab: Lab) -> None:
    """100,000 of them, the same each time; the gateway works as before, and the control leaks."""
    code, found = leaktest(lab, "--fuzz", "100000", "--seed", "20140330")
    assert found["value"] == "contained", found
    assert code == 0
    assert found["sent"] > 99_000
    assert found["control"] > 50
    assert {wire["wire"] for wire in found["wires"]} == {"gateway", "host", "lan"}


@pytest.mark.torture
@pytest.mark.promise("P3", "P4", "P5")
@pytest.mark.parametrize("seed", range(10))
def test_no_random_packet_of_any_seed_gets_out(lab: Lab, seed: int) -> None:
    """A million more."""
    code, found = leaktest(lab, "--fuzz", "100000", "--seed", str(seed))
    assert (code, found["value"]) == (0, "contained"), found
