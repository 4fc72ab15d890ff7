"""The battery's own judgement, and the bytes that it sends."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from itertools import islice
from xml.etree import ElementTree

import pytest

from nsrun import ruleset
from nsrun.address import BLOCKS
from nsrun.leak import pcap, results
from nsrun.leak.frames import Frame, decode
from nsrun.leak.probes import (
    PORTS,
    Control,
    Expect,
    Needs,
    Outcome,
    Probe,
    World,
    fuzz,
    marks,
    packets,
)
from nsrun.leak.probes.table import PROBES
from nsrun.leak.results import Made, Result
from nsrun.leak.verdict import Leak, Value, Verdict

UDP = next(probe for probe in PROBES if probe.name == "udp")
DNS = next(probe for probe in PROBES if probe.name == "dns-udp")
LAN = next(probe for probe in PROBES if probe.name == "tcp-lan")
DOOR = next(probe for probe in PROBES if probe.name == "socket-docker")
NUMBER = PROBES.index(UDP) + 1


def frame(payload: bytes) -> Frame:
    datagram = packets.udp("10.64.0.2", "11.77.9.9", 1, 7, payload)
    return seen(packets.ipv4("10.64.0.2", "11.77.9.9", packets.UDP, datagram))


def seen(packet: bytes) -> Frame:
    data = packets.ethernet(b"\2" * 6, b"\2" * 6, 0x0800, packet)
    return decode(data, len(data))


def capture(*frames: Frame) -> pcap.Capture:
    return pcap.Capture(frames, "", 0)


def verdict(*leaks: Frame, reasons: tuple[str, ...] = ()) -> Verdict:
    found = tuple(Leak("gateway", leak, 3) for leak in leaks)
    return Verdict("gateway", Value.LEAK if leaks else Value.CONTAINED, 1, (), found, reasons)


OURS = frame(marks(NUMBER)[0])
SEEN = {"gateway": ({UDP.name: Made(Outcome.ANSWERED)}, capture(OURS))}
BLIND = {"gateway": ({UDP.name: Made(Outcome.SILENT)}, capture())}


def one(probe: Probe, made: Made, *verdicts: Verdict, controls: results.Controls = SEEN) -> Result:
    (found,) = results.assess([probe], {probe.name: made}, verdicts, controls)
    return found


def test_refused_and_seen_without_the_guard_is_contained() -> None:
    """The only way to be contained."""
    found = one(UDP, Made(Outcome.REFUSED), verdict())
    assert (found.value, found.control) == (Value.CONTAINED, "gateway")


@pytest.mark.parametrize(
    ("made", "found", "controls", "reason"),
    [
        (Outcome.REFUSED, verdict(), BLIND, "not seen either"),
        (Outcome.REFUSED, verdict(reasons=("the tap lost 3 packets",)), SEEN, "lost 3 packets"),
        (Outcome.SILENT, verdict(), SEEN, "refused at once"),
    ],
)
def test_what_proves_nothing_is_inconclusive(
    made: Outcome, found: Verdict, controls: results.Controls, reason: str
) -> None:
    """A control that was not seen, a tap that lost packets, a refusal that was not fast."""
    result = one(UDP, Made(made), found, controls=controls)
    assert result.value is Value.INCONCLUSIVE
    assert reason in result.reason


def test_a_packet_of_the_probe_on_a_wire_is_its_leak() -> None:
    """Whatever the sender noticed, and although the control was not seen."""
    result = one(UDP, Made(Outcome.REFUSED), verdict(OURS), controls=BLIND)
    assert result.value is Value.LEAK
    assert result.evidence


def test_an_answer_where_nobody_may_answer_is_a_leak() -> None:
    """Also when no wire carried it: a door inside the machine."""
    assert one(UDP, Made(Outcome.ANSWERED), verdict()).value is Value.LEAK
    assert one(DOOR, Made(Outcome.ANSWERED), verdict()).value is Value.LEAK


def test_what_must_work_through_tor_must_work() -> None:
    """A battery in which nothing works would be contained for the wrong reason."""
    seen = {
        "gateway": (
            {DNS.name: Made(Outcome.ANSWERED)},
            capture(frame(marks(PROBES.index(DNS) + 1)[0])),
        )
    }
    result = one(DNS, Made(Outcome.SILENT), verdict(), controls=seen)
    assert result.value is Value.INCONCLUSIVE
    assert one(DNS, Made(Outcome.ANSWERED), verdict(), controls=seen).value is Value.CONTAINED


def test_packets_of_nobody_are_a_leak_of_their_own() -> None:
    """What no probe sent is the more alarming."""
    found = results.assess([UDP], {"udp": Made(Outcome.REFUSED)}, [verdict(frame(b"?"))], SEEN)
    assert [result.value for result in found] == [Value.CONTAINED, Value.LEAK]
    assert results.worst(found) is Value.LEAK


def test_the_first_packet_of_a_connection_is_enough() -> None:
    """Where probes share an address its port tells: no control waits for an answer."""
    number = PROBES.index(LAN) + 1
    for port, expected in ((PORTS + number, "gateway"), (PORTS, "")):
        ends = ("192.168.77.51", "192.168.77.80", port, 80)
        syn = seen(packets.ipv4(*ends[:2], packets.TCP, packets.tcp(*ends, packets.SYN)))
        controls = {"gateway": ({LAN.name: Made(Outcome.SILENT)}, capture(syn))}
        found = one(LAN, Made(Outcome.REFUSED), verdict(), controls=controls)
        assert found.control == expected


def test_a_connection_is_its_probes_from_its_first_packet() -> None:
    """A SYN carries no token; that of the same connection is found by its ports."""
    ends = ("10.64.0.2", "192.168.77.80", 40000, 80)
    segments = (
        packets.tcp(*ends, flags, data) for flags, data in ((2, b""), (24, marks(NUMBER)[0]))
    )
    connection = [seen(packets.ipv4(*ends[:2], packets.TCP, segment)) for segment in segments]
    (found,) = results.assess([UDP], {"udp": Made(Outcome.SILENT)}, [verdict(*connection)], SEEN)
    assert len(found.evidence) == 2


def test_a_doors_control_is_an_answer_where_it_stands_open() -> None:
    """On the host for sockets; seeing packets there proves nothing about a door."""
    answered = {"host": ({DOOR.name: Made(Outcome.ANSWERED)}, capture())}
    refused = {"host": ({DOOR.name: Made(Outcome.REFUSED)}, capture())}
    made = Made(Outcome.REFUSED)
    assert one(DOOR, made, verdict(), controls=answered).value is Value.CONTAINED
    assert one(DOOR, made, verdict(), controls=refused).value is Value.INCONCLUSIVE


def test_nothing_tested_is_inconclusive() -> None:
    """No news is no good news."""
    assert results.worst([]) is Value.INCONCLUSIVE


def test_reports_carry_every_result() -> None:
    """JSON for programs, JUnit for CI: a leak is a failure, what is not proven an error."""
    leak = one(UDP, Made(Outcome.ANSWERED), verdict())
    doubt = replace(one(UDP, Made(Outcome.REFUSED), verdict(), controls=BLIND), name="other")
    found = json.loads(results.as_json([leak, doubt], [verdict()]))
    assert found["value"] == "leak"
    assert [probe["name"] for probe in found["probes"]] == ["udp", "other"]
    suite = ElementTree.fromstring(results.as_junit([leak, doubt]))  # noqa: S314  our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "1")


def test_probes_are_many_distinct_and_each_names_its_promise() -> None:
    """80 vectors were asked for."""
    assert len({probe.name for probe in PROBES}) == len(PROBES) >= 80
    assert all(probe.promises for probe in PROBES)
    raw = [probe for probe in PROBES if probe.needs is Needs.NET_RAW]
    assert all(probe.expect is Expect.NOWHERE for probe in raw)
    assert {probe.control for probe in PROBES} == set(Control)


def test_checksums_are_those_of_the_standards() -> None:
    """RFC 1071's example, and packets that verify to zero over their pseudo headers."""
    assert packets.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    header = packets.ipv4("192.0.2.1", "198.51.100.2", 17, b"x" * 9)[:20]
    assert packets.checksum(header) == 0


@pytest.mark.parametrize("payload", [b"", b"odd", b"even"])
def test_packets_decode_to_what_they_were_made_of(payload: bytes) -> None:
    """By the judge's own decoder, which was written against captures."""
    segment = packets.tcp(
        "192.0.2.1", "198.51.100.2", 40000, 443, packets.SYN | packets.ACK, payload
    )
    packet = packets.ipv4("192.0.2.1", "198.51.100.2", packets.TCP, segment)
    decoded = str(seen(packet))
    assert "192.0.2.1.40000 > 198.51.100.2.443" in decoded
    assert "[S.]" in decoded


def test_the_seed_makes_the_packets() -> None:
    """What was found can be found again; another seed makes others."""
    names = [one.name for one in fields(World) if one.default is MISSING]
    world = World(**{name: "fd00::1" if name.endswith("6") else "10.0.0.1" for name in names})  # type: ignore[arg-type]  # they are all texts
    first, again, other = (
        list(islice(fuzz.frames(world, b"\2" * 6, seed), 500)) for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    assert len({frame[12:14] for frame in first}) > 10


@pytest.mark.parametrize("name", ["udp", "tcp", "dns-udp"])
def test_a_leak_names_the_rules_that_should_have_stopped_it(name: str) -> None:
    """By the comments that a gateway's ruleset really has."""
    policy = ruleset.gateway_policy(BLOCKS[0], 0)
    text = ruleset.render(policy, ruleset.FromInterface("w", "uplink"))
    port, protocol = {"udp": (7, 17), "tcp": (80, 6), "dns-udp": (53, 17)}[name]
    ends = ("10.64.0.2", "11.77.0.1")
    body = packets.tcp(*ends, 1, port, 2) if protocol == 6 else packets.udp(*ends, 1, port, b"")
    guards = Leak("gateway", seen(packets.ipv4(*ends, protocol, body)), 3).guards
    assert guards[-1] == "ip_forward=0"
    assert all(f'comment "{guard}"' in text for guard in guards[:-1])
