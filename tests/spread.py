"""Who runs which tests when several processes share them: ``pytest -n 2``, with pytest-xdist.

A lab takes seconds to boot and is kept for a process's whole session, so tests that share one keep
together: root's, a user's, and those of each directory with labs of its own. Labs do not see each
other. Of all others a file keeps together. A process that has nothing to do gets the next group.
"""

from __future__ import annotations

import re

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LABS = ("tests/lab/", "tests/containers/", "tests/machines/")
ALONE = "tests/lab/test_kill.py"  # as long as all others of root's lab together
USERS = re.compile(r"\[user[-\]]")  # the fixture lab is the first parameter


def group(nodeid: str) -> str:
    """The name of the tests that this one keeps together with."""
    file = nodeid.partition("::")[0]
    for directory in LABS:
        if file.startswith(directory):
            if USERS.search(nodeid):
                return f"{directory} user"
            return ALONE if file == ALONE else f"{directory} root"
    return file


def order(nodeid: str) -> int:
    """What takes longest begins first, so that all processes end at about the same time."""
    return next((index for index, one in enumerate(LABS) if nodeid.startswith(one)), len(LABS))


class Spread(LoadScopeScheduling):  # type: ignore[misc]  # it comes without types
    """Gives out the groups in the order of collection."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False  # which would begin with the most tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
