"""The guards are needed, and the tests can fail: a few guards taken away, of many.

`make torture` takes away each of them, see mutation.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.root, pytest.mark.timeout(300)]

MUTATION = (sys.executable, str(ROOT / "tests" / "mutation.py"))


def tried(as_root: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((*as_root, *MUTATION, *options), capture_output=True, text=True)


@pytest.mark.promise("P12")
def test_a_guard_less_is_noticed(as_root: list[str]) -> None:
    """Four of all, by the tests that docs/mutation.md names."""
    done = tried(as_root, "--sample", "4", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.promise("P12")
def test_every_guard_less_is_noticed(as_root: list[str], tmp_path: Path) -> None:
    """All of them; the table in docs is the one that results."""
    table = tmp_path / "mutation.md"
    done = tried(as_root, "--report", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived" not in table.read_text().partition("|---")[2]
