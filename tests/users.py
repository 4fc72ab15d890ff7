"""Unprivileged users for tests, with a home of their own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import ROOT

USER, NOBODY = 54321, 65534


@contextmanager
def home_of(uid: int) -> Iterator[Path]:
    """A fresh home directory, with ``run`` in it to be XDG_RUNTIME_DIR; gone at the end."""
    # not below tmp_path, which is closed to others; short, as sockets are made in it
    with tempfile.TemporaryDirectory(prefix="ttp-test-") as name:
        home = Path(name)
        (home / "run").mkdir(mode=0o700)
        if os.geteuid() == 0:
            for directory in (home, home / "run"):
                os.chown(directory, uid, uid)
        yield home


def prefix_of(uid: int, home: Path) -> list[str]:
    """The beginning of a command that runs the rest as ``uid``."""
    return [sys.executable, str(ROOT / "tests" / "harness.py"), str(uid), str(home)]
