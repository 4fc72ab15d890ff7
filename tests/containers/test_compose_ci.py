"""compose/ci: a program's tests, which are red as well if it sent what Tor does not carry."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from composed import Example, client, example, host_is_silent
from docker_host import IMAGE, Dockerd
from lab_helpers import PLAIN_ORACLE

pytestmark = [pytest.mark.lab, pytest.mark.root]


@pytest.fixture(scope="module")
def ci(built: Dockerd) -> Iterator[Example]:
    """The gateway is up, and the network of the program and of its tests."""
    variables = {"IMAGE": IMAGE, "URL": PLAIN_ORACLE, "TORRC_D": str(client(built))}
    with example(Example(built, "ci", variables, base="gateway"), "up -d link") as made:
        yield made


def run(made: Example, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command that the file names, to its end."""
    made = replace(made, variables={**made.variables, **variables})
    with host_is_silent(made.engine):
        return made.compose("up", "--exit-code-from", "tests", "tests", "program")


@pytest.mark.promise("P1", "P12")
def test_a_program_that_only_tor_carries_passes(ci: Example) -> None:
    """The exit code is that of the tests; all that was sent was judged."""
    done = run(ci)
    assert "contained: " in done.stdout
    assert done.returncode == 0, done.stdout


@pytest.mark.promise("P3", "P12")
def test_a_program_that_asks_for_the_time_is_found_out(ci: Example) -> None:
    """Its tests pass, but one datagram would have left in clear, without Tor."""
    done = run(ci, CLOCK="ntp")
    assert "OK" in done.stdout
    assert "UDP (NTP), which Tor does not carry" in done.stdout
    assert done.returncode == 1, done.stdout


@pytest.mark.promise("P12")
def test_a_test_that_fails_is_red(ci: Example) -> None:
    """Whatever was sent: the site that the program asks does not exist."""
    done = run(ci, URL="http://nowhere.invalid/")
    assert "FAILED (errors=1)" in done.stdout
    assert done.returncode == 1, done.stdout
