"""Random packets from inside a workload: none may be on a wire, and the gateway must go on.

The same seed makes the same packets. The control is the beginning of the same sequence behind a
gateway without rules, where some of it must be on the wire.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nsrun.errors import NsrunError
from nsrun.leak.battery import Say, open_scene, scene
from nsrun.leak.bench import Bench, make, program
from nsrun.leak.broken import OPEN
from nsrun.leak.probes import Outcome, World
from nsrun.leak.probes.table import PROBES
from nsrun.leak.verdict import Value, Verdict, judge, worst

CONTROL = 2000  # packets of the control: about one in ten is passed on
ALIVE = [probe for probe in PROBES if probe.name in ("tcp", "dns-udp")]


@dataclass(frozen=True)
class Fuzzed:
    """``sent`` packets of ``seed``, of which ``control`` came through without the guard."""

    seed: int
    sent: int
    control: int
    verdicts: tuple[Verdict, ...]
    reason: str = ""

    @property
    def value(self) -> Value:
        found = worst(self.verdicts)
        return Value.INCONCLUSIVE if found is Value.CONTAINED and self.reason else found


def fuzz(bench: Bench, gateway: str, seed: int, count: int, say: Say) -> Fuzzed:
    """Send ``count`` packets of ``seed``. Raises NsrunError when that cannot be done."""
    with scene(bench, gateway) as here:
        say(f"{count} packets of seed {seed}")
        sent = _send(here.into, here.world, seed, count)
        say("whether the gateway still works")
        made = make(here.run, here.world, ALIVE)
        verdicts = here.judged(expect_some=True)
    dead = [name for name, one in made.items() if one.outcome is not Outcome.ANSWERED]
    with open_scene(bench, OPEN) as (world, into, wire):
        say("the same without a guard")
        _send(into, world, seed, min(count, CONTROL))
        leaks = judge("gateway", wire.stop(), bench.rules()).leaks
    reason = ""
    if not leaks:
        reason = "without the guard no packet was seen either"
    elif dead:
        reason = f"afterwards nothing went through Tor: {' '.join(dead)}"
    return Fuzzed(seed, sent, len(leaks), tuple(verdicts), reason)


def _send(into: Sequence[str], world: World, seed: int, count: int) -> int:
    python = (sys.executable, "-P", "-m", "nsrun.leak.probes.fuzz", json.dumps(asdict(world)))
    done = json.loads(program(*into, *python, str(seed), str(count)))
    if not done["sent"]:
        raise NsrunError("send random packets", "the kernel took none")
    return int(done["sent"])
