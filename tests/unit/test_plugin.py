"""The pytest plugin where it is not used, or cannot be: pytest in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(directory: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(text)
    options = ("-p", "no:cacheprovider", "-W", "error", "--rootdir", str(directory))
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_unused_it_loads_nothing(tmp_path: Path) -> None:
    """It is in every run of pytest, so its price is one small module."""
    text = """
import sys

def test_it():
    assert {m for m in sys.modules if m.startswith("nsrun")} == {"nsrun", "nsrun.pytest_plugin"}
"""
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stdout


def test_its_marker_and_options_are_in_the_help(tmp_path: Path) -> None:
    """Also for --strict-markers."""
    told = "".join(run(tmp_path, "", word).stdout for word in ("--markers", "--help"))
    for word in ("@pytest.mark.no_leaks", "--tor-lab", "--leak-evidence"):
        assert word in told


def test_a_lab_that_cannot_be_had_is_said_in_a_line(tmp_path: Path) -> None:
    """With what to do about it; no test goes on without, and there is no traceback."""
    done = run(tmp_path, "def test_it(torified):\n    pass\n", "--tor-lab", "nosuchlab")
    assert done.returncode == 1
    assert "ttp: cannot find the lab nosuchlab: it is not up\nttp lab up nosuchlab" in done.stdout
    assert "1 error" in done.stdout
    assert "Traceback" not in done.stdout
