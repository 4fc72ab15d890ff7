"""A lab for the tests that need real Tor: one of root's and one of an unprivileged user's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_helpers import TTP, Lab
from nsrun import paths
from users import USER, home_of, prefix_of


@contextmanager
def kept_bake(home: Path) -> Iterator[None]:
    """Give the block the bake that an earlier one made in a home of this user's, and keep a newer
    one, as root's is kept: it takes ten seconds, and on a machine that is busy a minute.
    """
    there, kept = home / ".cache/ttp", Path(paths.cache(), "users")
    paths.private_directory(paths.cache())
    kept.mkdir(exist_ok=True)
    there.mkdir(parents=True)
    for bake in kept.glob("lab-*.tar.gz"):
        shutil.copy2(bake, there)
    if os.geteuid() == 0:
        for path in (there.parent, there, *there.iterdir()):
            os.chown(path, USER, USER)
    yield
    for bake in there.glob("lab-*.tar.gz"):
        made = kept / bake.name
        if not made.exists() or made.stat().st_mtime < bake.stat().st_mtime:
            part = made.with_suffix(f".{os.getpid()}")
            shutil.copy2(bake, part)
            part.rename(made)


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
        with kept_bake(home):
            up = made.do(TTP, "lab", "up", name, seconds=100)  # the first one bakes
        assert up.returncode == 0, up.stderr
        try:
            yield made
        finally:
            down = made.ttp("lab", "down", name)
            assert down.returncode == 0, down.stderr
