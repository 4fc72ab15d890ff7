"""Commands that would leave their work to a process outside: whoever runs one is told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_helpers import TTP, Lab
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.promise("P6")]


@pytest.fixture
def program(lab: Lab) -> Iterator[str]:
    """A program by the name of a browser; it waits for as long as it is told."""
    path = lab.home / "firefox"
    shutil.copy("/bin/sleep", path)
    path.chmod(0o755)
    yield str(path)
    path.unlink()


@contextmanager
def running(lab: Lab, *argv: str) -> Iterator[int]:
    """A process of the lab's user, outside; its number."""
    with subprocess.Popen(lab.command(*argv)) as process:
        try:
            name = Path(argv[0]).name[:15]
            comm = Path(f"/proc/{process.pid}/comm")
            eventually(lambda: comm.read_text().strip() == name, f"{name} to run")
            yield process.pid
        finally:
            process.kill()


def test_a_browser_that_runs_outside_is_named(lab: Lab, program: str) -> None:
    """With its process and what to do; the command runs all the same, with its own exit code."""
    with running(lab, program, "60") as pid:
        done = lab.run(program, "0")
        line, hint = done.stderr.splitlines()
        assert f"ttp: firefox may leave the work to firefox (process {pid})" in line
        assert "--no-remote" in hint
        assert done.returncode == 0
        other = lab.run(program, "--no-remote", "0")
        assert "process" not in other.stderr
    assert lab.run(program, "0").stderr == ""


def test_a_browser_behind_tor_is_not_worth_a_warning(lab: Lab, program: str) -> None:
    """What runs in a workload of this gateway may well be handed to."""
    argv = lab.command(TTP, "run", "-g", lab.name, "--name", "browser", "--", program, "60")
    with subprocess.Popen(argv) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            eventually(lambda: comm.read_text().strip() == "firefox", "the browser to run", 20)
            assert lab.run(program, "0").stderr == ""
        finally:
            process.kill()


def test_other_commands_are_not_looked_at(lab: Lab, program: str) -> None:
    """A name says nothing as an argument, and another user's process is none of ours."""
    with running(lab, program, "60"):
        assert lab.run("echo", "firefox").stderr == ""
        if lab.who == "root":
            done = lab.run("firefox", options=["--user", "nobody"])
            assert "leave the work" not in done.stderr
