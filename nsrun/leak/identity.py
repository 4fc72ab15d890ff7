"""Whether Tor takes two workloads for one: by the addresses and the circuits of their streams (P7).

The guard is that each has an address of its own. It is taken away by what renews an identity: an
element of the gateway's map, with the same one for both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from nsrun import ruleset
from nsrun.errors import NsrunError
from nsrun.leak.attempts import block_of
from nsrun.leak.bench import Bench, make, program
from nsrun.leak.probes import Outcome, Probe, Shot, World
from nsrun.leak.probes.table import PROBES
from nsrun.leak.results import Made

SECONDS = 20.0  # for Tor to say what it did


def pair(
    bench: Bench,
    world: World,
    workloads: Sequence[Sequence[str]],
    gateway: Sequence[str],
    probe: Probe,
    *,
    confused: bool = False,
) -> Made:
    """Make ``probe`` in both ``workloads``: answered if Tor saw one client, or one circuit of two.

    Workloads and ``gateway`` are given by the prefixes that lead into their networks. With
    ``confused`` the guard is gone. Raises NsrunError.
    """
    taken = _taken_for_one(gateway, world) if confused else nullcontext()
    with taken, _streams(bench, world.control) as streams:
        answers = [make(prefix, world, [probe])[probe.name] for prefix in workloads]
        used = streams()
    if silent := [one for one in answers if one.outcome is not Outcome.ANSWERED]:
        return Made(Outcome.SILENT, f"not answered through Tor: {silent[0].why or 'silence'}")
    circuits: dict[str, set[str]] = {}
    site = Shot(world, PROBES.index(probe) + 1).site
    for who, where, circuit in used:
        if where == f"{site}:80":
            circuits.setdefault(who, set()).add(circuit)
    apart = len(circuits) == len(workloads) and not set.intersection(*circuits.values())
    if apart:
        return Made(Outcome.REFUSED)
    return Made(Outcome.ANSWERED, "to Tor both are one, or use one circuit")


@contextmanager
def _taken_for_one(gateway: Sequence[str], world: World) -> Iterator[None]:
    both, shared = (world.own, world.neighbour), str(block_of(world.gateway).identities[-2])
    program(*gateway, "nft", "".join(ruleset.set_identity(one, shared, None) for one in both))
    try:
        yield
    finally:
        program(*gateway, "nft", "".join(ruleset.drop_identity(one, shared) for one in both))


@contextmanager
def _streams(bench: Bench, control: str) -> Iterator[Callable[[], list[tuple[str, str, str]]]]:
    watch = (sys.executable, "-P", "-m", "nsrun.leak.circuits", control)
    with subprocess.Popen(
        [*bench.inside("host"), *watch], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        try:
            if watcher.stdout.readline() != "ready\n":
                raise NsrunError("watch Tor's streams", "its control socket did not answer")
            yield lambda: json.loads(watcher.communicate("", timeout=SECONDS)[0])
        finally:
            watcher.kill()
