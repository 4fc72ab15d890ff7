"""The examples in compose/ by the second version of compose, that of Debian 13: what v1 did too."""

from __future__ import annotations

from dataclasses import replace

import pytest

import roots
from composed import Example, client, example, host_is_silent
from docker_host import IMAGE, Dockerd
from driver_host import Host, answered, by_tor
from lab_helpers import PLAIN_ORACLE
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]


@pytest.fixture(scope="module")
def compose() -> str:
    """A single program, which needs libc and nothing else."""
    return str(roots.root("trixie") / "usr/libexec/docker/cli-plugins/docker-compose")


@pytest.fixture
def variables(built: Dockerd) -> dict[str, str]:
    return {"IMAGE": IMAGE, "URL": PLAIN_ORACLE, "TORRC_D": str(client(built))}


@pytest.mark.promise("P1", "P8")
def test_apps(docker: Host, compose: str, variables: dict[str, str]) -> None:
    """Two programs on a network of the driver, by Tor."""
    given = {**variables, "GATEWAY": docker.lab.name}
    with (
        host_is_silent(docker.dockerd),
        example(Example(docker.dockerd, "apps", given, command=compose)) as apps,
    ):
        for service in ("first", "second"):
            eventually(lambda service=service: apps.printed(service), "an answer", 20)  # type: ignore[misc]
            assert by_tor(apps.printed(service)[0])


@pytest.mark.promise("P1", "P8")
def test_pair(docker: Host, compose: str, variables: dict[str, str]) -> None:
    """A program and its database in one network."""
    given = {**variables, "GATEWAY": docker.lab.name}
    with (
        host_is_silent(docker.dockerd),
        example(Example(docker.dockerd, "pair", given, command=compose)) as pair,
    ):
        eventually(lambda: answered(pair.printed("program")), "an answer", 20)


@pytest.mark.promise("P1", "P8", "P12")
def test_gateway_and_ci(engine: Dockerd, compose: str, variables: dict[str, str]) -> None:
    """An app behind a gateway of containers; a program's tests on top of it, green, and red."""
    made = Example(engine, "ci", variables, base="gateway", command=compose)
    with host_is_silent(engine), example(made, "up -d app link"):
        eventually(lambda: made.printed("app"), "an answer", 20)
        assert by_tor(made.printed("app")[0])
        tests = ("up", "--exit-code-from", "tests", "tests", "program")
        done = made.compose(*tests)
        assert "contained: " in done.stdout
        assert done.returncode == 0, done.stdout + done.stderr
        done = replace(made, variables={**variables, "CLOCK": "ntp"}).compose(*tests)
        assert "UDP (NTP), which Tor does not carry" in done.stdout
        assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.promise("P1", "P8")
def test_onion(engine: Dockerd, compose: str, variables: dict[str, str]) -> None:
    """An onion service, reached by a workload."""
    made = Example(engine, "onion", variables, command=compose)
    with host_is_silent(engine), example(made):
        named = ("onion", "cat", "/var/lib/onion/hostname")
        eventually(lambda: ".onion" in made.run(*named).stdout, "a name", 20)
        fetch = ("curl", "-sS", "--max-time", "15", f"http://{made.run(*named).stdout.strip()}/")
        eventually(lambda: "An onion" in engine.lab.run(*fetch).stdout, "the page", 60)
