"""Judge what a tap saw against what its wire may carry. Pure.

A rule names packets that may pass; what no rule names is a leak, whatever it is. ``contained`` is
said only of a wire that was watched from end to end without a loss: anything less is
``inconclusive``, which counts as failure. A leak that was seen stays a leak in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import IPv6Address
from typing import Any, Protocol

from nsrun.leak import pcap
from nsrun.leak.frames import DNS_PORTS, Arp, Frame, Icmp, Ip, Marker, Tcp, Udp

PROMISES = {
    1: "TCP leaves only through Tor's TransPort",
    2: "DNS is answered only by Tor's DNSPort",
    3: "nothing but TCP and DNS leaves the workload's own link",
    5: "a workload reaches nothing of the host, the gateway or other workloads",
}
NAME_PORTS = DNS_PORTS | {853}  # DNS over TLS, over QUIC
SHOWN = 20


class Value(StrEnum):
    CONTAINED = "contained"
    INCONCLUSIVE = "inconclusive"
    LEAK = "leak"


class Rule(Protocol):
    """Packets that a wire may carry."""

    @property
    def name(self) -> str:
        """What these packets are, as in "of 12 packets, 10 <name>"."""

    def covers(self, frame: Frame) -> bool: ...


@dataclass(frozen=True)
class TcpToRelays:
    """TCP between our addresses and the ORPorts of relays and bridges, unadorned.

    No IPv4 options, extension headers, fragments, or bytes after the end: Tor needs none.
    """

    ours: frozenset[str]
    relays: frozenset[tuple[str, int]]
    name: str = "to and from relays"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, extensions=(), fragment=None, body=Tcp() as tcp):
                out = source in self.ours and (target, tcp.target_port) in self.relays
                back = target in self.ours and (source, tcp.source_port) in self.relays
                return (out or back) and _plain(frame)
        return False


@dataclass(frozen=True)
class Neighbours:
    """ARP (RFC 826, 5227) and neighbour discovery (RFC 4861, 4862) among these addresses.

    ``routers`` may look for anybody: somebody far away may still speak to a host that has gone.
    """

    addresses: frozenset[str]
    routers: frozenset[str] = frozenset()
    name: str = "between neighbours"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Arp(operation=1, sender=sender) if sender in self.routers:
                return _plain(frame)
            case Arp(operation=1 | 2, sender=sender, target=target):
                known = sender in self.addresses or sender == "0.0.0.0"  # a probe  # noqa: S104
                return known and target in self.addresses and _plain(frame)
            case Ip(hop_limit=255, extensions=(), fragment=None, body=Icmp() as icmp) as ip:
                return self._discovers(ip, icmp) and _plain(frame)
        return False

    def _discovers(self, ip: Ip, icmp: Icmp) -> bool:
        if icmp.version != 6 or icmp.kind not in (135, 136):
            return False
        if icmp.kind == 135 and ip.source in self.routers:
            return ip.target in (icmp.about, _solicited_node(icmp.about))
        if icmp.about not in self.addresses:
            return False
        receivers = {*self.addresses, "ff02::1", _solicited_node(icmp.about)}
        return (ip.source in self.addresses or ip.source == "::") and ip.target in receivers


@dataclass(frozen=True)
class GroupReports:
    """The groups that a kernel joins with a link, told before it has an address (RFC 3810, 5.2.13).

    Some random time after the link is up, so that they are in a capture or are not. A guard lets
    none out; they are for the wire of a gateway whose guard is known to be missing.
    """

    name: str = "of a new link's groups"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(
                source="::", target="ff02::16", extensions=("hop-by-hop",), body=Icmp() as icmp
            ):
                return (icmp.version, icmp.kind) == (6, 143) and _plain(frame)
        return False


@dataclass(frozen=True)
class Markers:
    """The proofs of taps, each with its secret token, so that nobody else can pass for one."""

    tokens: frozenset[str]
    name: str = "by our own taps"

    def covers(self, frame: Frame) -> bool:
        return isinstance(frame.body, Marker) and frame.body.token in self.tokens and _plain(frame)


@dataclass(frozen=True)
class Leak:
    wire: str
    frame: Frame
    promise: int
    """The promise that this packet most likely breaks: a guess, from the packet alone."""

    @property
    def time(self) -> str:
        """UTC, to the microsecond."""
        seconds, nanoseconds = divmod(self.frame.time_ns, 1_000_000_000)
        return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}.{nanoseconds // 1000:06}"

    @property
    def guards(self) -> tuple[str, ...]:
        """What of a gateway should have stopped it, in order: comments of its rules, a switch."""
        match self.frame.body:
            case Ip(version=version, protocol=6, body=Tcp() | None):
                return (f"P1 TCP goes to Tor, ipv{version}", "P3 other TCP is refused", SWITCH)
            case Ip(version=version, body=Udp(target_port=53)):
                return (f"P2 DNS goes to Tor, ipv{version}", "P3 all else is refused", SWITCH)
            case Ip():
                return ("P3 all else is refused", SWITCH)
        return ("no bridge: a gateway routes IP and nothing else",)


SWITCH = "ip_forward=0"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one wire."""

    wire: str
    value: Value
    judged: int
    """Packets on the wire, the tap's own markers included."""
    allowed: tuple[tuple[str, int], ...]
    """How many packets each rule let pass, by its name."""
    leaks: tuple[Leak, ...]
    reasons: tuple[str, ...]
    """Why the watch proves less than it should."""

    def evidence(self) -> bytes:
        """A pcap of the leaked packets."""
        return pcap.dump(leak.frame for leak in self.leaks)


def judge(
    wire: str,
    capture: pcap.Capture,
    allow: Sequence[Rule],
    *,
    expect_some: bool = False,
    inside: Collection[str] = (),
) -> Verdict:
    """Judge every packet of a capture; the tap's own markers are always allowed.

    With ``expect_some`` a wire on which nothing allowed but markers passed is inconclusive: the
    traffic that should have been judged went elsewhere, or nowhere. ``inside`` are addresses of
    host, gateway and workloads; a leak to or from them is put down to promise 5.
    """
    markers = Markers(frozenset({capture.token}))
    passed: Counter[str] = Counter()
    leaks: list[Leak] = []
    for frame in capture.frames:
        for rule in (*allow, markers):
            if rule.covers(frame):
                passed[rule.name] += 1
                break
        else:
            leaks.append(Leak(wire, frame, _promise(frame, inside)))
    reasons = list(_doubts(capture))
    if expect_some and not any(
        passed[rule.name] for rule in allow if not isinstance(rule, Markers)
    ):
        reasons.append("no allowed packet passed, though some had to")
    value = Value.LEAK if leaks else Value.INCONCLUSIVE if reasons else Value.CONTAINED
    judged = len(capture.frames)
    return Verdict(wire, value, judged, tuple(passed.items()), tuple(leaks), tuple(reasons))


def worst(verdicts: Iterable[Verdict]) -> Value:
    """The value of several wires together; of none at all, inconclusive."""
    order = (Value.LEAK, Value.INCONCLUSIVE, Value.CONTAINED)
    found = {verdict.value for verdict in verdicts}
    return next((value for value in order if value in found), Value.INCONCLUSIVE)


def as_text(verdicts: Sequence[Verdict]) -> str:
    """One line per wire, with what is wrong below it; the last line is the sum."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.wire}: {verdict.value}: {_summary(verdict)}")
        lines += [f"  not proven: {reason}" for reason in verdict.reasons]
        for leak in verdict.leaks[:SHOWN]:
            lines.append(f"  {leak.time}  P{leak.promise}  {leak.frame}")
            lines.append(f"    not stopped by: {'; '.join(leak.guards)}")
        if (hidden := len(verdict.leaks) - SHOWN) > 0:
            lines.append(f"  … and {hidden} more")
        broken = sorted({leak.promise for leak in verdict.leaks})
        lines += [f"  P{number}: {PROMISES[number]}" for number in broken]
    return "\n".join([*lines, f"{worst(verdicts)}: {_count(len(verdicts), 'wire')} watched"])


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The same, complete, of types that JSON knows."""
    return {"verdict": worst(verdicts).value, "wires": [_as_dict(verdict) for verdict in verdicts]}


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "wire": verdict.wire,
        "verdict": verdict.value.value,
        "judged": verdict.judged,
        "allowed": dict(verdict.allowed),
        "reasons": list(verdict.reasons),
        "leaks": [
            {
                "time_ns": leak.frame.time_ns,
                "promise": leak.promise,
                "packet": str(leak.frame),
                "guards": list(leak.guards),
                "bytes": leak.frame.data.hex(),
            }
            for leak in verdict.leaks
        ],
    }


def _doubts(capture: pcap.Capture) -> Iterable[str]:
    yield from capture.trouble
    if not capture.marked(start=True):
        yield "the tap never saw its start marker"
    if not capture.gone and not capture.marked(start=False):
        yield "the tap never saw its end marker"
    if capture.dropped is None:
        yield "the tap did not say how many packets it lost"
    elif capture.dropped:
        yield f"the tap lost {_count(capture.dropped, 'packet')}"


def _plain(frame: Frame) -> bool:
    """Whether a frame hides nothing around its packet."""
    return not frame.trailer and not (frame.ethernet and frame.ethernet.vlans)


def _promise(frame: Frame, inside: Collection[str]) -> int:
    if not isinstance(frame.body, Ip):
        return 3
    ports = frame.body.body
    if isinstance(ports, Tcp | Udp) and NAME_PORTS & {ports.source_port, ports.target_port}:
        return 2
    if frame.body.target in inside or frame.body.source in inside:
        return 5
    return 1 if frame.body.protocol == 6 else 3


def _solicited_node(address: str) -> str:
    """The multicast group that solicitations for ``address`` go to (RFC 4291 2.7.1)."""
    low = int(IPv6Address(address)) & 0xFFFFFF
    return str(IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | low))


def _summary(verdict: Verdict) -> str:
    parts = [f"{number} {name}" for name, number in verdict.allowed]
    if verdict.leaks:
        parts.append(f"{len(verdict.leaks)} that had no business here")
    total = _count(verdict.judged, "packet")
    return f"{total} judged: {', '.join(parts)}" if parts else f"{total} judged"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
