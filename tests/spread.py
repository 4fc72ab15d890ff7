"""Who runs which tests when several processes share them: ``pytest -n 4``, with pytest-xdist.

Most tests wait for Tor or for a deadline, so there are more processes than processors. A lab takes
seconds to boot, a machine more, and each is kept for a process's whole session. So tests are given
out by file and by what they need, and a process goes on with those that need what it has. When
there are no more, it helps where most are left. Labs do not see each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

LABS = ("tests/machines/", "tests/lab/", "tests/containers/")
#: Of each directory, what takes longest.
LONG = tuple(f"test_{one}.py" for one in ("kill", "interrupt", "leaktest", "example", "host"))
USERS = re.compile(r"\[user[-\]]")  # the fixture lab is the first parameter
SUITES = re.compile(r"[\[-](trixie|sid)[-\]]")  # of the fixture engine: a machine with Docker


def place(nodeid: str) -> str:
    """What is booted for a test, and kept for the next one; empty: nothing."""
    for directory in LABS:
        if nodeid.startswith(directory):
            if suite := SUITES.search(nodeid):
                return f"{directory} docker {suite[1]}"
            return f"{directory} {'user' if USERS.search(nodeid) else 'root'}"
    return ""


def group(nodeid: str) -> str:
    """The name of the tests that this one keeps together with."""
    return f"{place(nodeid)} {nodeid.partition('::')[0]}"


def order(nodeid: str) -> tuple[int, int]:
    """What takes longest begins first, so that all processes end at about the same time."""
    where = next((index for index, one in enumerate(LABS) if nodeid.startswith(one)), len(LABS))
    name = nodeid.partition("::")[0].rpartition("/")[2]
    return where, LONG.index(name) if name in LONG else len(LONG)


def choice(here: str, taken: Iterable[str], queue: Mapping[str, Iterable[str]]) -> str:
    """The group of ``queue`` for a process that is at a place, while others are at those ``taken``.

    There, if any is left; else where nobody is, or else where most is left. What needs no place
    comes last, and fills the gaps.
    """
    places = {name: place(next(iter(tests))) for name, tests in queue.items()}
    left = Counter(places.values())
    if not here or here not in left:
        here = max(left, key=lambda one: (one != "", one not in taken, left[one]))
    return next(name for name, one in places.items() if one == here)


class Spread(LoadScopeScheduling):  # type: ignore[misc]  # it comes without types
    """Gives out the groups, each to a process that has what its tests need, if there is one."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False  # which would begin with the most tests
        super().__init__(config, log)
        self.at: dict[WorkerController, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        chosen = choice(self.at.get(node, ""), self.at.values(), self.workqueue)
        self.at[node] = place(next(iter(self.workqueue[chosen])))
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)
