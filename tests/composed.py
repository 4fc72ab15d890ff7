"""The examples in compose/, started as their users would, on the lab's host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_docker.plugin import get_docker_services

from docker_host import IMAGE, Dockerd
from harness import ROOT
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge

# that of Debian 12 (v1) if it is there: it knows no `up --wait`
V1 = subprocess.run(("sh", "-c", "command -v docker-compose"), capture_output=True).returncode == 0
COMPOSE = "docker-compose" if V1 else "docker compose"
UP = ("up -d",)


@dataclass
class Example:
    """One that is up: ``compose`` for it, and what became of its services."""

    engine: Dockerd
    name: str

    @property
    def project(self) -> str:
        return f"ttp-{self.name}"

    def container(self, service: str) -> str:
        """The id of the container of a service, by labels of either version of compose."""
        labels = {"project": self.project, "service": service}
        words = [f"--filter=label=com.docker.compose.{key}={labels[key]}" for key in labels]
        return self.engine.docker("ps", "--all", "--quiet", *words).stdout.strip()

    def printed(self, service: str) -> list[str]:
        done = self.engine.docker("logs", self.container(service))
        return [*done.stdout.splitlines(), *done.stderr.splitlines()]

    def run(self, service: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command in the container of a service."""
        return self.engine.docker("exec", self.container(service), *argv)

    def pid(self, service: str) -> int:
        return int(self.engine.inspect(self.container(service))["State"]["Pid"])

    def compose(self, *argv: str) -> subprocess.CompletedProcess[str]:
        words = (*COMPOSE.split(), "-f", str(file(self.name)), "-p", self.project, *argv)
        return self.engine.do(*words)


@contextmanager
def relays_forget(made: Example) -> Iterator[None]:
    """Connections to relays that the example has now are over after the block, on either side.

    A relay would go on to send to those of a namespace that has gone, on wires of the next test.
    """
    listed = f"--filter=label=com.docker.compose.project={made.project}"
    own = []
    for container in made.engine.docker("ps", "--quiet", listed).stdout.split():
        pid = str(made.engine.inspect(container)["State"]["Pid"])
        told = made.engine.do("nsenter", "-t", pid, "-n", "ss", "-Htn").stdout
        own += [line.split()[3].rpartition(":")[2] for line in told.splitlines()]
    yield
    # the router and Docker masquerade, and keep the port
    for port in own:
        where = ("dst", topology.WAN, "dport", "=", f":{port}")
        made.engine.lab.do(*made.engine.lab.inside_argv("inet", "ss", "-K", *where))


def file(name: str) -> Path:
    return ROOT / "compose" / name / "docker-compose.yml"


@contextmanager
def example(
    name: str, engine: Dockerd, variables: dict[str, str], commands: Sequence[str] = UP
) -> Iterator[Example]:
    """It is up; at the end it is down, and nothing is left of it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**engine.environment, **variables}.items():
            patch.setenv(key, value)
        made = Example(engine, name)
        down = ["down -v -t 0"]
        with (
            ExitStack() as ended,
            get_docker_services(COMPOSE, str(file(name)), made.project, list(commands), down),
        ):
            yield made
            ended.enter_context(relays_forget(made))
    left = f"--filter=label=com.docker.compose.project={made.project}"
    for kind in ("container", "network", "volume"):
        every = ("--all",) if kind == "container" else ()
        assert engine.docker(kind, "ls", "--quiet", *every, left).stdout == ""


def images(engine: Dockerd) -> None:
    """Make those of images/, without a registry, as they say."""
    base = ("--network", "none", "--build-arg", f"BASE={IMAGE}")
    probe = ("--file", str(ROOT / "images/probe/Dockerfile"), str(ROOT))
    for words in (("ttp/gateway", str(ROOT / "images/gateway")), ("ttp/probe", *probe)):
        done = engine.docker("build", *base, "--tag", *words)
        assert done.returncode == 0, done.stderr


@contextmanager
def host_is_silent(engine: Dockerd) -> Iterator[None]:
    """But for Tor's connections: that of these gateways is on the host's own wire."""
    with engine.lab.tap("router", "p-host") as host:
        yield
        own = (topology.HOST, topology.HOST6)
        known = engine.lab.neighbours(*own, topology.RESOLVER, topology.LAN_WEB)
        verdict = judge("host", host.stop(), [*engine.lab.rules(*own), known])
    assert verdict.value is Value.CONTAINED, as_text([verdict])
