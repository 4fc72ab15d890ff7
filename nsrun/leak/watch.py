"""Judge a test: the wires outside of its workloads' links, and what these sent on their own.

The wires prove ttp: nothing may be there that is not Tor's. The attempts judge the program: what
it sent on its own link and Tor would not have carried, see ``nsrun/leak/attempts.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_network
from pathlib import Path

from nsrun.address import AddressBlock
from nsrun.errors import UsageError
from nsrun.lab import topology
from nsrun.leak import pcap
from nsrun.leak.attempts import Allowed, Attempt, block_of, examine, sent
from nsrun.leak.bench import Bench, ask
from nsrun.leak.capture import Tap, tap
from nsrun.leak.frames import PROTOCOLS, Frame, Ip
from nsrun.leak.torified import Record, Torified, program
from nsrun.leak.verdict import Value, Verdict, as_text, judge, worst

SHOWN = 20  # attempts of one command


@dataclass
class Wires:
    """Taps on every wire of a lab but the internet's, from when it was made to ``judge()``."""

    bench: Bench
    taps: dict[str, Tap]

    def judge(self) -> Sequence[Verdict]:
        """Stop to watch, and judge; the same again, when asked again."""
        return self._verdicts

    @cached_property
    def _verdicts(self) -> list[Verdict]:
        allowed = self.bench.allowed()
        inside = (topology.HOST, topology.HOST6, topology.GATEWAY, topology.GATEWAY6)
        return [
            judge(wire, one.stop(), allowed.get(wire, ()), inside=inside)
            for wire, one in self.taps.items()
        ]


@contextmanager
def watch(bench: Bench) -> Iterator[Wires]:
    """Watch every wire of the lab. Raises NsrunError when one cannot be."""
    with ExitStack() as stack:
        yield Wires(
            bench,
            {
                wire: stack.enter_context(
                    tap(interface, bench.files / f"{wire}.pcap", bench.inside(netns))
                )
                for wire, (netns, interface) in bench.lab.wires.items()
                if wire != "internet"
            },
        )


@dataclass(frozen=True)
class Sent:
    """What one command sent, judged."""

    record: Record
    attempts: tuple[Attempt, ...]
    fit: tuple[tuple[str, int], ...]
    """How many packets were fit for Tor, or allowed by the test, by their kind."""
    flaw: str

    @property
    def value(self) -> Value:
        if self.attempts:
            return Value.LEAK
        return Value.INCONCLUSIVE if self.flaw else Value.CONTAINED


def addresses(gateway: str) -> AddressBlock:
    """Those inside a gateway that is up. Raises NsrunError."""
    known = ask(program(), "gateway", "inspect", gateway)
    return block_of(known["address"][0])


@dataclass
class Leaks:
    """The judge of one test."""

    torified: Torified
    block: AddressBlock
    wires: Wires
    evidence: Path
    """Directory for packets that should not be; made when there are any."""
    allowed: list[Allowed] = field(default_factory=list)

    def allow(self, address: str = "", *, port: int | None = None, protocol: str = "") -> None:
        """Let the test's program send to this address or network, port, IP protocol, or all three.

        The wires are judged as before: what is allowed is the attempt. Raises UsageError.
        """
        if not address and port is None and not protocol:
            raise UsageError("allow packets", "neither address, port nor protocol was given")
        known = {*PROTOCOLS.values(), *map(str, range(256))}
        if protocol and protocol not in known:
            raise UsageError("allow packets", f"{protocol!r} is no IP protocol", "such as udp")
        try:
            network = ip_network(address) if address else None
        except ValueError as error:
            raise UsageError("allow packets", error, "an address, or a network") from None
        self.allowed.append(Allowed(network, port, protocol))

    @property
    def attempts(self) -> list[Attempt]:
        """What was sent up to now that would have been a leak, and is not allowed."""
        return [attempt for one in self._sent() for attempt in one.attempts]

    def verdict(self) -> tuple[Value, str]:
        """Judge wires and attempts, and say why; packets that should not be go into files."""
        verdicts, found = self.wires.judge(), self._sent()
        values = [worst(verdicts), *(one.value for one in found)]
        lines = [line for one in found if one.value is not Value.CONTAINED for line in _told(one)]
        if worst(verdicts) is not Value.CONTAINED:
            lines += ["on the wires, a defect of ttp or of the lab:", as_text(verdicts)]
        if not found:
            values.append(Value.INCONCLUSIVE)
            lines.append("not proven: no command was run behind Tor, so nothing was judged")
        lines += [f"evidence: {file}" for file in self._write(verdicts, found)]
        order = (Value.LEAK, Value.INCONCLUSIVE, Value.CONTAINED)
        value = next(one for one in order if one in values)
        return value, "\n".join([f"{value}: {_sum(found, verdicts)}", *lines])

    def _sent(self) -> list[Sent]:
        return [self._examine(record) for record in self.torified.records]

    def _examine(self, record: Record) -> Sent:
        try:
            frames, flaw = pcap.load(record.file.read_bytes())
        except OSError as error:
            return Sent(record, (), (), f"its record cannot be read: {error.strerror}")
        attempts, fit = [], Counter[str]()
        for frame in frames:
            if not sent(frame, self.block):
                continue
            attempt = examine(frame, self.block)
            if attempt and not any(rule.covers(frame) for rule in self.allowed):
                attempts.append(attempt)
            else:
                fit["allowed by the test" if attempt else _kind(frame)] += 1
        return Sent(record, tuple(attempts), tuple(fit.items()), record.flaw or flaw)

    def _write(self, verdicts: Sequence[Verdict], found: Sequence[Sent]) -> Iterator[Path]:
        contents = {f"wire-{v.wire}.pcap": v.evidence() for v in verdicts if v.leaks}
        if frames := [attempt.frame for one in found for attempt in one.attempts]:
            contents["attempts.pcap"] = pcap.dump(frames)
        for name, content in contents.items():
            self.evidence.mkdir(parents=True, exist_ok=True)
            file = self.evidence / name
            file.write_bytes(content)
            yield file


def _told(one: Sent) -> Iterator[str]:
    """As a diff: + is a packet that should not be there, the rest is counted."""
    yield f"sent by {one.record.command}"
    for kind, count in one.fit:
        yield f"    {count} {kind}"
    for attempt in one.attempts[:SHOWN]:
        yield f"  + {attempt.time}  {attempt.frame}"
        yield f"      leak: {attempt.why}"
        yield f"      stopped here by: {attempt.guard}"
    if (hidden := len(one.attempts) - SHOWN) > 0:
        yield f"  + … and {hidden} more"
    if one.flaw:
        yield f"    not proven: {one.flaw}"


def _kind(frame: Frame) -> str:
    if not isinstance(frame.body, Ip):
        return "others"
    kinds = {6: "TCP to public addresses", 17: "DNS to the resolver"}
    return kinds.get(frame.body.protocol, "by the kernel itself")


def _sum(found: Sequence[Sent], verdicts: Sequence[Verdict]) -> str:
    attempts = sum(len(one.attempts) for one in found)
    leaked = sum(len(one.leaks) for one in verdicts)
    return (
        f"{attempts} packets would have leaked without ttp, {leaked} leaked; "
        f"{len(found)} commands, {sum(one.judged for one in verdicts)} packets on "
        f"{len(verdicts)} wires"
    )
