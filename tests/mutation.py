"""Take away or weaken each guard in turn: some test must turn red, or the guard is not needed.

    mutation.py [--only PATTERN] [--sample COUNT --seed N] [--jobs N] [--report FILE] [--list]

For each mutant (mutants.py) the tests that should notice are run in a copy of the checkout, until
one fails; first of all the one that did the last time, as docs/mutation.md says. A mutant that
survives them is reported, and the exit code is 1. The control: without a mutant all of these
tests must pass (exit code 2 if not).

It needs root. What a mutant does not hold is held by namespaces around it: the tests run in
network, mount and process namespaces of their own, which end with them.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mutants import Mutant, mutants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "mutation.md"
SECONDS = 400.0  # for one selection of tests
MOST_BY_CHANCE = 3  # tests that fail once, on a machine that is busy

# A host of its own for one run of tests. Else root's commands could, with one guard less, reach
# this machine's network, or its kernel's parameters; but a strict one needs a /proc without covers.
HOST = """
mkdir -p /run/ttp
mount -t tmpfs -o mode=755 none /run/ttp
for own in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=1777 none $own; done
mkdir -p "$1"
mount --no-canonicalize --bind . "$1"  # the checkout, if it was in one of these
cd "$0"
shift
hostname machine  # not that of a strict command
ip link set lo up
ip link add eth0 type veth peer name eth1  # a host has a link
COVER
"$@"
exit "$?"
"""
COVER = "mount --bind -r /proc/sys/kernel /proc/sys/kernel"
APART = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts")


@dataclass(frozen=True)
class Outcome:
    """``by`` is the test that failed; empty if none did."""

    mutant: Mutant
    by: str
    seconds: float


class Copy:
    """A copy of the checkout with an environment of its own, which shares installed packages."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT, self.root, ignore=ignore)
        venv = self.root / ".venv"
        subprocess.run((sys.executable, "-m", "venv", "--without-pip", venv), check=True)
        (packages,) = venv.glob("lib/python3*/site-packages")
        # as a path, so that no .pth file in it is read: one leads to the checkout itself
        installed = Path(pytest.__file__).parent.parent
        (packages / "mutation.pth").write_text(f"{self.root}\n{installed}\n")
        shutil.copy2(ROOT / "nsrun" / "ttp", venv / "bin" / "ttp")

    def first_red(self, tests: Sequence[str]) -> str:
        """The first test that fails; empty if none does."""
        python = str(self.root / ".venv" / "bin" / "python3")
        options = ("-x", "-q", "--no-header", "-p", "no:cacheprovider")
        script = HOST.replace("COVER", "" if any("strict" in one for one in tests) else COVER)
        there = (*APART, "sh", "-ec", script, str(self.root), str(ROOT))
        inside = (*there, python, "-m", "pytest", *options, *tests)
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CI": ""}
        try:
            done = subprocess.run(
                inside,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return "(the tests did not end)"
        if done.returncode == 0:
            return ""
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if found is None and done.returncode == 128 + signal.SIGKILL:
            return "(the tests were killed)"  # an init that is none ends all it can see
        if found is None:
            raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr}")
        return found[1]

    def noticed(self, tests: Sequence[str]) -> str:
        """The same, but for a test that does not fail a second time: then for another one."""
        by_chance: list[str] = []
        while red := self.first_red((*tests, *(f"--deselect={one}" for one in by_chance))):
            if len(by_chance) == MOST_BY_CHANCE or self.first_red((red,)):
                break
            by_chance.append(red)
        return red

    @contextmanager
    def patched(self, mutant: Mutant) -> Iterator[None]:
        kept = {name: (self.root / name).read_text() for name in mutant.patch}
        try:
            for name, text in mutant.patch.items():
                (self.root / name).write_text(kept[name] + text)
            yield
        finally:
            for name, text in kept.items():
                (self.root / name).write_text(text)

    def try_out(self, mutant: Mutant, last: str) -> Outcome:
        """``last`` is the test that noticed it the last time, if it is known."""
        begin = time.monotonic()
        with self.patched(mutant):
            by = (self.first_red((last,)) if last else "") or self.noticed(mutant.killers)
        return Outcome(mutant, by, time.monotonic() - begin)


@contextmanager
def pool(count: int) -> Iterator[Callable[[Callable[[Copy], Any]], Future[Any]]]:
    """So many copies, and what runs something in the next that is free."""
    free: queue.Queue[Copy] = queue.Queue()
    with ExitStack() as stack:
        for _ in range(count):
            # not in /tmp, of which each run of tests has its own
            made = tempfile.TemporaryDirectory(prefix=".mutation-", dir=ROOT)
            name = stack.enter_context(made)
            Path(name).chmod(0o755)  # a user's tests are in it, too
            free.put(Copy(Path(name)))
        workers = ThreadPoolExecutor(count)
        stack.callback(workers.shutdown, cancel_futures=True)

        def use(act: Callable[[Copy], Any]) -> Any:
            copy = free.get()
            try:
                return act(copy)
            finally:
                free.put(copy)

        yield lambda act: workers.submit(use, act)


def known() -> dict[str, str]:
    """Of the last report: which test noticed which mutant."""
    rows = REPORT.read_text().splitlines() if REPORT.exists() else []
    cells = [row.strip("| ").split(" | ") for row in rows if row.startswith("| ") and "`" in row]
    found = {cell[0].strip("`"): cell[1].strip("`") for cell in cells if len(cell) == 2}
    return {name: by for name, by in found.items() if by != "**survived**"}


def report(found: dict[str, str]) -> str:
    """The table; ``found`` is who noticed which mutant, empty if nobody did."""
    rows = "".join(
        f"| `{name}` | {f'`{by}`' if by else '**survived**'} |\n" for name, by in found.items()
    )
    return f"""# Mutation

Each guard is taken away or weakened in turn, in a copy of the checkout, by `tests/mutation.py`,
which also writes this table. {sum(map(bool, found.values()))} of {len(found)} were noticed by a
test: a mutant that survives is a defect of the tests, or a guard that is not needed.
`make test` tries four of them, `make torture` all, in a quarter of an hour;
`.venv/bin/python tests/mutation.py --report docs/mutation.md`, as root, writes the table.

| taken away or weakened | noticed by |
|---|---|
{rows}"""


def by_lot(seed: int, mutant: Mutant) -> float:
    """The same for a mutant whatever others there are: a new guard is not to change the sample."""
    return random.Random(f"{seed} {mutant.name}").random()  # noqa: S311


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutation", description="take away each guard in turn")
    parser.add_argument("--only", default="*", help="those whose name matches")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="so many at once")
    parser.add_argument("--report", type=Path, help="write the table to this file")
    parser.add_argument("--list", action="store_true", help="list them, and do nothing")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    chosen = [one for one in mutants() if fnmatch.fnmatchcase(one.name, wanted.only)]
    if wanted.sample:
        chosen = sorted(chosen, key=lambda one: by_lot(wanted.seed, one))[: wanted.sample]
    if wanted.list:
        print("\n".join(one.name for one in chosen))
        return 0
    last = known()
    # first the tests that did it the last time; where there is none, all that may
    again = {one.name: last[one.name] for one in chosen if "::" in last.get(one.name, "")}
    sound = {one.killers for one in chosen if one.name not in again}
    if again:
        sound.add(tuple(dict.fromkeys(again.values())))
    outcomes = []
    with pool(min(wanted.jobs, len(chosen))) as submit:
        for future in [submit(lambda copy, tests=tests: copy.noticed(tests)) for tests in sound]:  # type: ignore[misc]
            if red := future.result():
                print(f"without a mutant already red: {red}", flush=True)
                return 2
        print(f"without a mutant all is well; {len(chosen)} to try", flush=True)
        for future in [
            submit(lambda copy, one=one: copy.try_out(one, again.get(one.name, "")))  # type: ignore[misc]
            for one in chosen
        ]:
            done = future.result()
            outcomes.append(done)
            line = f"{done.seconds:5.0f} s  {done.mutant.name:<60} {done.by or 'SURVIVED'}"
            print(line, flush=True)
    survivors = [one for one in outcomes if not one.by]
    print(f"{len(outcomes)} mutants, {len(survivors)} survived")
    if wanted.report:
        found = last | {one.mutant.name: one.by for one in outcomes}  # those not tried as before
        names = [one.name for one in mutants()]
        wanted.report.write_text(report({name: found[name] for name in names if name in found}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
