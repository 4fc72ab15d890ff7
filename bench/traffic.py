"""What goes through a gateway, and what that costs: by redirect, and by SOCKS on the same Tor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import Figure, ratio
from labs import TTP, Gateway, Lab, cpu_ms, gateway, run

VISITOR = str(Path(__file__).with_name("visitor.py"))
WAYS = ("redirect", "socks")
TURNS = 5
BYTES = 20_000_000
UPLINKS = ("pasta", "slirp4netns")
# what to ask of the visitor; how it is called, its unit, and which way is better
MEASURES = (
    (("rate", "1", str(BYTES)), "1 stream", "MB/s", True),
    (("rate", "8", str(BYTES // 4)), "8 streams", "MB/s", True),
    (("connections", "2"), "connections", "a second", True),
    (("lookups", "2"), "lookups of new names", "a second", True),
    (("first", "20"), "time to first byte", "ms", False),
)


def by_redirect_and_socks(lab: Lab) -> Iterator[Figure]:
    """Everything that the visitor knows, on the lab's own gateway: its uplink costs least."""
    own = gateway(lab.name, run(TTP, "gateway", "inspect", lab.name))
    for measure, label, unit, more_is_better in MEASURES:
        values: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(TURNS):
            for way in WAYS[:: 1 if turn % 2 else -1]:  # neither always comes first
                values[way].append(visit(own, way, *measure)[0])
        ours, theirs = (Figure(f"{label}, by {way}", values[way], unit) for way in WAYS)
        yield from (ours, theirs)
        better, worse = (ours, theirs) if more_is_better else (theirs, ours)
        yield ratio(f"{label}: redirect as good as SOCKS", better, worse, label)


def by_uplink(lab: Lab) -> Iterator[Figure]:
    """Rate and CPU of a download through each uplink, by both ways."""
    own = gateway(lab.name, run(TTP, "gateway", "inspect", lab.name))
    yield from _costs(own, "veth (the lab's)", ())
    for kind in UPLINKS:
        with gateway_up(lab, f"{lab.name}-{kind[:5]}", kind) as other:
            yield from _costs(other, kind, lab.host)


def _costs(through: Gateway, kind: str, prefix: tuple[str, ...]) -> Iterator[Figure]:
    for way in WAYS:
        rates, costs = [], []
        for _ in range(TURNS - 2):
            rate, cost = visit(through, way, "rate", "1", str(BYTES), prefix=prefix)
            rates.append(rate)
            costs.append(cost / (BYTES / 1e6))
        label = f"{kind}, {way}"
        yield Figure(
            f"1 stream through {kind}, by {way}", rates, "MB/s", plot="uplinks", label=label
        )
        yield Figure(f"CPU of Tor and {kind}, by {way}", costs, "ms/MB", plot="cpu", label=label)


def visit(
    through: Gateway, way: str, *measure: str, prefix: tuple[str, ...] = ()
) -> tuple[float, float]:
    """What the visitor found, and ms of CPU that the gateway's Tor and uplink took for it."""
    watched = [pid for pid in (through.tor, through.uplink) if pid]
    before = sum(map(cpu_ms, watched))
    command = (sys.executable, "-I", VISITOR, way, *measure)
    said = run(*prefix, TTP, "run", "--gateway", through.name, "--socks", "--", *command)
    return float(said), sum(map(cpu_ms, watched)) - before


@contextmanager
def gateway_up(lab: Lab, name: str, uplink: str) -> Iterator[Gateway]:
    """A gateway on the lab's simulated host."""
    up = ("gateway", "up", name, "--uplink", uplink, "--torrc", f"{lab.files}/fragment")
    run(*lab.host, TTP, *up)
    try:
        yield gateway(name, run(*lab.host, TTP, "gateway", "inspect", name))
    finally:
        run(*lab.host, TTP, "gateway", "down", name)
