"""Tests shared among processes: what keeps together, and who notices that the host was changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT
from spread import group, order


def test_all_tests_of_a_lab_keep_together() -> None:
    """Root's lab and a user's are two; whoever is named elsewhere in a test's parameters."""
    root = group("tests/lab/test_run.py::test_exit[root-user-42]")
    user = group("tests/lab/test_run.py::test_exit[user-root-42]")
    assert root != user
    assert root == group("tests/lab/test_shared.py::test_member[--strict-id-root]")
    assert root == group("tests/lab/test_mutation.py::test_a_guard")
    assert user == group("tests/lab/test_many.py::test_many[user]")
    assert group("tests/containers/test_a.py::test_a") == group("tests/containers/test_b.py::test")


def test_others_keep_together_by_file_and_begin_later() -> None:
    """In the order of their file, as without processes."""
    first, second = "tests/unit/test_paths.py::test_a[user]", "tests/unit/test_paths.py::test_b"
    assert group(first) == group(second) == "tests/unit/test_paths.py"
    assert order("tests/lab/test_run.py::test_a") < order("tests/containers/x.py::y") < order(first)


def run(directory: Path, *options: str) -> str:
    """What pytest says of the tests in a directory, by our rules, on a host of their own."""
    apart = ("unshare", "--user", "--map-current-user", "--keep-caps", "--net")
    rules = ("-p", "conftest", "--rootdir", str(directory), "--basetemp", f"{directory}.tmp")
    done = subprocess.run(
        [*apart, sys.executable, "-Bm", "pytest", *rules, *options, str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.promise("P8")
@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_change_of_the_host_fails_the_run(tmp_path: Path, processes: str) -> None:
    """Though every test passes."""
    change = "import subprocess\ndef test_it(): subprocess.run(('ip', 'link', 'set', 'lo', 'up'))\n"
    (tmp_path / "test_change.py").write_text(change)
    said = run(tmp_path, "-n", processes)
    assert "the tests changed the host" in said
    assert "+1: lo: <LOOPBACK,UP" in said
    assert "1 passed" in said


def test_what_failed_in_one_of_several_processes_can_be_run_again(tmp_path: Path) -> None:
    """Alone, as ``make test`` does."""
    for name, assertion in (("good", "True"), ("bad", "False")):
        (tmp_path / f"test_{name}.py").write_text(f"def test_it(): assert {assertion}\n")
    assert "1 failed, 1 passed" in run(tmp_path, "-n", "2")
    again = run(tmp_path, "--last-failed", "--last-failed-no-failures", "none")
    assert "1 failed" in again
    assert "passed" not in again
