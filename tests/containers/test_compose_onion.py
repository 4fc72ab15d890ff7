"""compose/onion: an onion service before a web container that reaches nobody.

a workload ══ gateway ══ Tor ══ host: dockerd ── onion ── web
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from composed import Example, client, example, host_is_silent
from docker_host import IMAGE, Dockerd
from driver_host import Host, loopback_resolver
from nsrun.lab import topology
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

GREETING = "An onion service of ttp"
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
LOOKUP = ("dig", "+tries=1", "+time=2", "outside.test")


@pytest.fixture(scope="module")
def onion(built: Dockerd) -> Iterator[Example]:
    variables = {"IMAGE": IMAGE, "TORRC_D": str(client(built))}
    with example(Example(built, "onion", variables)) as made:
        yield made


def name(made: Example) -> str:
    done = made.run("onion", "cat", "/var/lib/onion/hostname")
    return done.stdout.strip()


def fetch(made: Example) -> subprocess.CompletedProcess[str]:
    return made.engine.lab.run("curl", "-sS", "--max-time", "15", f"http://{name(made)}/")


def python(made: Example, *argv: str) -> subprocess.CompletedProcess[str]:
    return made.run("web", "python3", "-c", *argv)


@pytest.mark.promise("P1", "P3", "P12")
def test_the_service_is_reached_by_its_name(onion: Example) -> None:
    """By a workload of the lab's gateway; its host's wire has Tor's connections, and no others."""
    with host_is_silent(onion.engine):
        eventually(lambda: name(onion).endswith(".onion"), "a name", 20)
        eventually(lambda: GREETING in fetch(onion).stdout, "the page", 60)


@pytest.mark.promise("P2", "P3", "P5", "P6")
def test_the_web_container_reaches_nobody(onion: Example) -> None:
    """No site, no host of the LAN, no resolver. The control is one on Docker's own bridge."""
    engine = onion.engine
    places = ((topology.WEB, "80"), (topology.LAN_WEB, "80"))
    with host_is_silent(engine), loopback_resolver(Host(engine)) as asked:
        for place in places:
            assert "Error: " in python(onion, KNOCK, *place).stderr
        assert "ANSWER SECTION" not in onion.run("web", *LOOKUP).stdout
    assert asked == []
    for place in places:
        assert engine.docker("run", "--rm", IMAGE, "python3", "-c", KNOCK, *place).returncode == 0


@pytest.mark.promise("P8")
def test_its_name_is_kept(onion: Example) -> None:
    """The key is in a volume: containers that are made anew are the same service."""
    before = name(onion)
    assert onion.compose("up", "-d", "--force-recreate", "-t", "0").returncode == 0
    eventually(lambda: name(onion), "a name", 20)
    assert name(onion) == before
    kept = onion.run("onion", "stat", "-c", "%u %a", "/var/lib/onion", "/var/lib/onion/hostname")
    assert kept.stdout.split() == ["61042", "700", "61042", "600"]
