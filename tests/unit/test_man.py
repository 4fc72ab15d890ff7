"""Man pages, as .ci/man.py writes them for an installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from harness import ROOT, SBIN
from nsrun.cli.commands import app


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    written(directory)
    return directory


def written(directory: Path) -> None:
    """As for a package: the date is given."""
    subprocess.run(
        (sys.executable, ".ci/man.py", directory),
        cwd=ROOT,
        env=os.environ | {"SOURCE_DATE_EPOCH": "86400"},
        timeout=30,
        check=True,
    )


def shown(page: Path) -> str:
    """As man(1) shows it, without bold."""
    command = ("mandoc", "-T", "ascii", "-O", "width=1000", page)
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return re.sub(".\b", "", done.stdout)


def test_every_command_has_a_page_with_its_options(pages: Path) -> None:
    """And those of a group stand in the group's; the program's page names all pages."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {page.name for page in pages.iterdir()} == {
        "ttp.1",
        *(f"ttp-{name}.1" for name in commands),
    }
    for name in commands:
        assert f"ttp-{name}(1)" in shown(pages / "ttp.1")
    of_run, of_docker = shown(pages / "ttp-run.1"), shown(pages / "ttp-docker.1")
    assert "-g, --gateway <str>\n" in of_run
    assert "ttp docker driver install [OPTIONS]\n" in of_docker
    assert "Put a running container behind Tor" in of_docker


def test_they_are_well_formed_and_the_same_each_time(pages: Path, tmp_path: Path) -> None:
    """mandoc finds nothing, and would; the date is that which was given."""
    environment = os.environ | {"PATH": os.environ["PATH"] + SBIN}
    lint = ("mandoc", "-T", "lint", "-W", "warning")
    found = subprocess.run(
        (*lint, *pages.iterdir()), capture_output=True, text=True, env=environment, timeout=30
    )
    assert (found.returncode, found.stdout) == (0, "")
    wrong = subprocess.run(lint, input=".XX\n", capture_output=True, text=True, timeout=10)
    assert wrong.returncode != 0
    written(tmp_path)
    for page in pages.iterdir():
        assert (tmp_path / page.name).read_bytes() == page.read_bytes()
        assert " 1 1970-01-02 " in page.read_text().splitlines()[0]
