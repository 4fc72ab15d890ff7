"""A lab for the tests that need real Tor: one of root's and one of an unprivileged user's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab_helpers import Lab
from users import USER, home_of, prefix_of


@pytest.fixture(scope="session", params=[pytest.param("root", marks=pytest.mark.root), "user"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab with its gateway, as root and as a user: inside all is real, outside nothing stirs."""
    name = f"t{os.getpid() % 100000}"
    with home_of(USER) as home:
        if request.param == "user":
            prefix = tuple(prefix_of(USER, home))
        else:
            prefix = tuple(request.getfixturevalue("as_root"))
        made = Lab(name, request.param, prefix, home)
        up = made.ttp("lab", "up", name)
        assert up.returncode == 0, up.stderr
        try:
            yield made
        finally:
            down = made.ttp("lab", "down", name)
            assert down.returncode == 0, down.stderr
