"""``python3 -m nsrun.leak.probes WORLD [NAME…]``: make probes, one JSON line for each.

WORLD is a JSON object with the fields of World. A line has the probe's ``name``, its ``outcome``
and ``why``, the error's own words. The order is that of the table.
"""

from __future__ import annotations

import json
import sys

from nsrun.leak.probes import World, attempt
from nsrun.leak.probes.table import PROBES


def main(arguments: list[str]) -> None:
    world, wanted = World(**json.loads(arguments[0])), set(arguments[1:])
    for number, probe in enumerate(PROBES, 1):
        if not wanted or probe.name in wanted:
            outcome, why = attempt(probe, number, world)
            said = {"name": probe.name, "outcome": outcome, "why": why}
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
