"""What ``make bench`` measures: starts, traffic, and many workloads, beside what others take.

    bench/run.py            print the table
    bench/run.py --write    write it, and its plots, to docs/ as well
    bench/run.py PART…      measure these parts only

Runs as the calling user, in some six minutes, in a lab of its own. What is compared is measured in
turns, round by round, and reported as the median. Root's caches and state are replaced in a private
mount namespace, a user's by XDG variables, so nothing of it stays.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from containers import starts_of_containers
from document import document, machine, plots
from figures import Figure, table
from labs import Lab, kept_apart, lab_up, say
from nsrun import facts
from nsrun.errors import NsrunError
from scale import at_rest, live_workloads, sustained
from starts import boots, cold_starts, warm_starts
from traffic import by_redirect_and_socks, by_uplink

DOCS = Path(__file__).resolve().parents[1] / "docs"

PARTS: dict[str, Callable[[Lab], Iterator[Figure]]] = {
    "commands": warm_starts,
    "sustained": sustained,
    "live": live_workloads,
    "rest": at_rest,
    "uplinks": by_uplink,
    "traffic": by_redirect_and_socks,
    "cold": cold_starts,
    "containers": starts_of_containers,
}


def measure(files: Path, wanted: Sequence[str]) -> Iterator[Figure]:
    name = f"bench{os.getpid()}"
    if not wanted:
        say("lab")
        yield from boots(name)
    with lab_up(name, files) as (lab, booted):
        yield from booted
        for part in wanted or PARTS:
            say(part)
            yield from PARTS[part](lab)


def main(arguments: Sequence[str]) -> int:
    wanted = [argument for argument in arguments if argument != "--write"]
    if set(wanted) - set(PARTS) or (wanted and "--write" in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    os.environ["PATH"] = facts.search_path()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    began, about = time.monotonic(), machine()
    try:
        with tempfile.TemporaryDirectory(prefix="ttp-bench-") as name, kept_apart(Path(name)):
            figures = []
            for figure in measure(Path(name), wanted):
                say(f"{figure.what}: {figure.text}")
                figures.append(figure)
    except NsrunError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    seconds = time.monotonic() - began
    print("\n".join(about), f"in {seconds:.0f} s", "", table(figures), sep="\n", end="")
    if "--write" in arguments:
        drawn = plots(figures)
        (DOCS / "benchmarks.md").write_text(document(about, figures, [*drawn], seconds))
        for name, text in drawn.items():
            (DOCS / f"benchmarks-{name}.svg").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
