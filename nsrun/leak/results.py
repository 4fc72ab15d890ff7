"""From what was made and seen to what is said of each probe. Pure.

contained     it got nowhere, and the wires and the control prove that it would have been seen
leak          it was on a wire that may not carry it, or it was answered where nobody may answer
inconclusive  its control was not seen, a wire was not watched, or what should work did not: red
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from xml.etree import ElementTree

from nsrun.leak import pcap
from nsrun.leak.frames import Frame, Ip, Tcp, Udp
from nsrun.leak.probes import PORTS, Control, Expect, Outcome, Probe, marks
from nsrun.leak.probes.table import PROBES
from nsrun.leak.verdict import Leak, Value, Verdict


@dataclass(frozen=True)
class Made:
    """What the sender of a probe noticed."""

    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Result:
    """What is said of one probe. ``control`` is where its control was seen, or empty.

    ``guards`` are what of a gateway should have stopped it.
    """

    name: str
    title: str
    promises: tuple[str, ...]
    value: Value
    outcome: Outcome
    control: str
    reason: str = ""
    evidence: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()


Controls = Mapping[str, tuple[Mapping[str, Made], pcap.Capture]]


def assess(
    probes: Sequence[Probe],
    made: Mapping[str, Made],
    verdicts: Sequence[Verdict],
    controls: Controls,
) -> list[Result]:
    """One result for each of ``probes``; leaks that are no probe's make one more, by itself."""
    leaks = [leak for verdict in verdicts for leak in verdict.leaks]
    unwatched = [f"{v.wire}: {reason}" for v in verdicts for reason in v.reasons]
    results: list[Result] = []
    explained: set[int] = set()
    for probe in probes:
        mine = _of(probe, leaks)
        explained |= set(mine)
        own = tuple(_told(leaks[i]) for i in mine)
        control = seen_in_control(probe, controls)
        value, reason = _judge(probe, made[probe.name], own, control, unwatched)
        outcome = made[probe.name].outcome
        known = (probe.name, probe.title, probe.promises)
        guards = leaks[mine[0]].guards if mine else ()
        results.append(Result(*known, value, outcome, control, reason, own, guards))
    strangers = [leak for i, leak in enumerate(leaks) if i not in explained]
    return [*results, *([_strangers(strangers)] if strangers else [])]


def _told(leak: Leak) -> str:
    return f"{leak.time} {leak.wire}: {leak.frame}"


def _of(probe: Probe, leaks: Sequence[Leak]) -> list[int]:
    """Which of ``leaks`` are this probe's: those that carry its marks, and the rest of their flows.

    A connection's first packets carry nothing that the program chose.
    """
    marked = {i for i, leak in enumerate(leaks) if seen(probe, leak.frame)}
    flows = {_flow(leaks[i].frame) for i in marked} - {None}
    return [i for i, leak in enumerate(leaks) if i in marked or _flow(leak.frame) in flows]


def _flow(frame: Frame) -> frozenset[tuple[str, int]] | None:
    """Both ends of a TCP connection or UDP exchange; None for what has no ports."""
    match frame.body:
        case Ip(source=source, target=target, body=Tcp() | Udp() as ports):
            return frozenset({(source, ports.source_port), (target, ports.target_port)})
    return None


def seen(probe: Probe, frame: Frame) -> bool:
    """Whether a frame is of this probe, by what every packet of it carries.

    A router that masquerades leaves a port as it is, unless somebody else has it.
    """
    number = PROBES.index(probe) + 1
    match frame.body:
        case Ip(body=Tcp(source_port=port)) if port == PORTS + number:
            return True
    return any(mark in frame.data for mark in marks(number))


def seen_in_control(probe: Probe, controls: Controls) -> str:
    """Where the same probe got through without the guard."""
    for place, (made, capture) in controls.items():
        if probe.name not in made:
            continue
        if probe.control is Control.WIRE:
            if any(seen(probe, frame) for frame in capture.frames):
                return place
        elif probe.control.value == place and made[probe.name].outcome is Outcome.ANSWERED:
            return place
    return ""


def _judge(
    probe: Probe, made: Made, leaks: Sequence[str], control: str, unwatched: Sequence[str]
) -> tuple[Value, str]:
    if leaks:
        return Value.LEAK, f"{len(leaks)} packets in clear"
    answered = made.outcome is Outcome.ANSWERED
    if answered and (probe.expect is Expect.REFUSED or probe.control is not Control.WIRE):
        return Value.LEAK, made.why or "it was answered"
    if not control:
        return Value.INCONCLUSIVE, "without the guard it was not seen either"
    if unwatched:
        return Value.INCONCLUSIVE, unwatched[0]
    if probe.expect is Expect.TOR and not answered:
        return (
            Value.INCONCLUSIVE,
            f"it should have been answered through Tor: {made.why or made.outcome}",
        )
    if probe.expect is Expect.REFUSED and made.outcome is Outcome.SILENT:
        return Value.INCONCLUSIVE, made.why or "it should have been refused at once, and was not"
    return Value.CONTAINED, ""


def _strangers(leaks: Sequence[Leak]) -> Result:
    evidence = tuple(_told(leak) for leak in leaks)
    reason = f"{len(leaks)} packets that no probe accounts for"
    promises = tuple(sorted({f"P{leak.promise}" for leak in leaks}))
    return Result(
        "unknown", "other packets", promises, Value.LEAK, Outcome.SILENT, "", reason, evidence
    )


def worst(results: Sequence[Result]) -> Value:
    """Of all: a leak before what is inconclusive; contained only if every one is."""
    values = {result.value for result in results}
    for value in (Value.LEAK, Value.INCONCLUSIVE):
        if value in values:
            return value
    return Value.CONTAINED if values else Value.INCONCLUSIVE


def evidence(verdicts: Sequence[Verdict]) -> bytes:
    """A pcap of every packet that leaked, in order of time."""
    leaks = [leak.frame for verdict in verdicts for leak in verdict.leaks]
    return pcap.dump(sorted(leaks, key=lambda frame: frame.time_ns))


def as_json(results: Sequence[Result], verdicts: Sequence[Verdict]) -> str:
    wires = [
        {"wire": v.wire, "value": v.value, "packets": v.judged, "reasons": v.reasons}
        for v in verdicts
    ]
    found = {"value": worst(results), "probes": [asdict(r) for r in results], "wires": wires}
    return json.dumps(found, indent=2)


def as_junit(results: Sequence[Result]) -> str:
    """JUnit XML, as CI systems read it: a leak is a failure, what is inconclusive an error."""
    counts = {value: sum(r.value is value for r in results) for value in Value}
    suite = ElementTree.Element(
        "testsuite",
        name="ttp leaktest",
        tests=str(len(results)),
        failures=str(counts[Value.LEAK]),
        errors=str(counts[Value.INCONCLUSIVE]),
    )
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", classname="leaktest", name=result.name)
        if result.value is not Value.CONTAINED:
            kind = "failure" if result.value is Value.LEAK else "error"
            problem = ElementTree.SubElement(case, kind, message=result.reason)
            guards = [f"not stopped by: {guard}" for guard in result.guards]
            problem.text = "\n".join([*result.evidence, *guards])
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
