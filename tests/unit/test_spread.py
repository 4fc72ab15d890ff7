"""Tests shared among processes: what keeps together, and who notices that the host was changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT
from spread import choice, group, order, place

ROOTS, USERS = "tests/lab/test_a.py::test_a[root]", "tests/lab/test_a.py::test_a[user]"
ENGINES = "tests/machines/test_b.py::test_b[held-trixie]"


def test_a_place_is_what_is_booted() -> None:
    """Root's lab and a user's are two; whoever is named elsewhere in a test's parameters."""
    root = place("tests/lab/test_run.py::test_exit[root-user-42]")
    user = place("tests/lab/test_run.py::test_exit[user-root-42]")
    assert root != user
    assert root == place("tests/lab/test_shared.py::test_member[--strict-id-root]")
    assert root == place("tests/lab/test_mutation.py::test_a_guard")
    assert user == place("tests/lab/test_many.py::test_many[user]")
    plain = place("tests/machines/test_b.py::test_b")
    assert len({root, user, plain, place(ENGINES), place(ENGINES.replace("trixie", "sid"))}) == 5
    assert place("tests/unit/test_paths.py::test_a[user]") == ""


def test_tests_keep_together_by_file_and_place() -> None:
    """In the order of their file, as without processes; what takes long begins."""
    assert group(ROOTS) == group(ROOTS.replace("[root]", "_too"))
    assert len({group(ROOTS), group(USERS), group(ROOTS.replace("_a.py", "_b.py"))}) == 3
    unit = "tests/unit/test_paths.py::test_a"
    assert group(unit) == group(f"{unit}[user]") != group(unit.replace("paths", "a"))
    kill = "tests/lab/test_kill.py::test_a[user]"
    assert order(ENGINES) < order(kill) < order(ROOTS) < order("tests/containers/x.py::y")
    assert order("tests/containers/x.py::y") < order(unit)


def test_a_process_stays_where_it_is_and_then_helps_others() -> None:
    """First where nobody is, then where most is left; what needs no place fills the gaps."""
    queue = {
        "unit": ["tests/unit/test_paths.py::test_a"],
        "root a": [ROOTS],
        "user a": [USERS],
        "user b": [USERS],
        "engine": [ENGINES],
    }
    root, user, engine = place(ROOTS), place(USERS), place(ENGINES)
    assert choice("", [], queue) == "user a"
    assert choice(root, [user, user], queue) == "root a"
    assert choice("elsewhere", [user, root], queue) == "engine"
    assert choice("elsewhere", [user, root, engine], queue) == "user a"
    assert choice(user, [user], {"unit": queue["unit"], "root a": [ROOTS]}) == "root a"
    assert choice(user, [user], {"unit": queue["unit"]}) == "unit"
    assert choice("", [""], queue) == "user a"


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
