"""The examples in compose/: each is started as it says, used, and judged on the wires."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from pytest_docker.plugin import get_docker_services

from docker_host import IMAGE
from driver_host import Host, by_tor
from harness import ROOT
from lab_helpers import PLAIN_ORACLE
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

# that of Debian 12 (v1) if it is there: it knows no `up --wait`
V1 = subprocess.run(("sh", "-c", "command -v docker-compose"), capture_output=True).returncode == 0
COMPOSE = "docker-compose" if V1 else "docker compose"


@contextmanager
def example(name: str, docker: Host, **variables: str) -> Iterator[None]:
    """It is up; at the end it is down, and nothing is left of it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**docker.dockerd.environment, **variables}.items():
            patch.setenv(key, value)
        file = str(ROOT / "compose" / name / "docker-compose.yml")
        with get_docker_services(COMPOSE, file, f"ttp-{name}", ["up -d"], ["down -v -t 0"]):
            yield
    assert (
        docker.docker(
            "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project=ttp-{name}"
        )
        == ""
    )


def printed(docker: Host, name: str, service: str) -> list[str]:
    """What a service has printed so far, by its container's name in either version of compose."""
    label = (
        "label=com.docker.compose.service=" + service,
        f"label=com.docker.compose.project=ttp-{name}",
    )
    container = docker.docker("ps", "--all", "--quiet", "--filter", label[0], "--filter", label[1])
    return docker.docker("logs", container).splitlines()


@pytest.mark.promise("P1", "P7", "P8")
def test_apps(docker: Host) -> None:
    """Two programs, two identities; only Tor's connections are on a wire."""
    lab = docker.lab
    variables = {"IMAGE": IMAGE, "GATEWAY": lab.name, "URL": PLAIN_ORACLE}
    with (
        lab.tap("router", f"gw-{lab.name}") as uplink,
        lab.tap("router", "p-host") as host,
        example("apps", docker, **variables),
    ):
        for service in ("first", "second"):
            eventually(partial(printed, docker, "apps", service), "an answer", 20)
            assert by_tor(printed(docker, "apps", service)[0])
        assert len({tuple(one["identity"]) for one in docker.workloads()}) == 2
        verdicts = [
            judge(
                "uplink",
                uplink.stop(),
                lab.rules(topology.GATEWAY, topology.GATEWAY6),
                expect_some=True,
            ),
            judge("host", host.stop(), []),
        ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    assert docker.workloads() == []
