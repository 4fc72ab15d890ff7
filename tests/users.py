"""Unprivileged users for tests, with a home of their own."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from harness import ROOT

USER, NOBODY = 54321, 65534

# What ttp run --strict hides: a checkout that is below one of these (`mktemp -d`) is not there.
HIDDEN = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run")))


def is_hidden() -> bool:
    """Whether a strict command sees nothing of this checkout."""
    return any(ROOT.is_relative_to(hidden) for hidden in HIDDEN)


def place_seen() -> Path:
    """A directory of ours that a strict command sees."""
    if not is_hidden():
        return ROOT
    return Path("/var/lib") if os.geteuid() == 0 else Path.home()


@cache
def scripts_seen() -> Path:
    """The directory of the tests' own programs, where a strict command sees it."""
    if not is_hidden():
        return ROOT / "tests"
    made = Path(tempfile.mkdtemp(prefix=".ttp-tests-", dir=place_seen()))
    atexit.register(shutil.rmtree, made)
    for script in (ROOT / "tests").glob("*.py"):
        shutil.copy(script, made)
    made.chmod(0o755)
    return made


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


def prefix_of(uid: int, home: Path, *groups: int) -> list[str]:
    """The beginning of a command that runs the rest as ``uid``, who is in ``groups`` as well."""
    user = "+".join(map(str, (uid, *groups)))
    return [sys.executable, str(ROOT / "tests" / "harness.py"), user, str(home)]


def lacking(prefix: list[str], script: str) -> list[str]:
    """The beginning of a command on a machine that lacks something: the shell ``script`` takes it
    away, as root of user and mount namespaces of its own; the command is the user again.
    """
    own = ("unshare", "--user", "--map-current-user", "--keep-caps", "--mount")
    without = "setpriv --inh-caps=-all --ambient-caps=-all"
    return [*prefix, *own, "sh", "-ec", f'{script}; exec {without} "$@"', "sh"]
