"""The examples in compose/, started as their users would, on the lab's host."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_docker.plugin import get_docker_services

from docker_host import IMAGE, Dockerd
from harness import ROOT
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Icmp, Ip
from nsrun.leak.verdict import Value, as_text, judge

# that of Debian 12 (v1) if it is there: it knows no `up --wait`
V1 = subprocess.run(("sh", "-c", "command -v docker-compose"), capture_output=True).returncode == 0
COMPOSE = "docker-compose" if V1 else "docker compose"


@dataclass
class Example:
    """One that is up, or will be: its directory in compose/, and one that it is based on."""

    engine: Dockerd
    name: str
    variables: dict[str, str]
    base: str = ""
    command: str = COMPOSE

    @property
    def project(self) -> str:
        return f"ttp-{self.name}"

    @property
    def files(self) -> list[str]:
        names = (self.base, self.name) if self.base else (self.name,)
        return [str(ROOT / "compose" / name / "docker-compose.yml") for name in names]

    @property
    def environment(self) -> dict[str, str]:
        return {**self.engine.environment, **self.variables}

    def compose(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command of compose's, to its end."""
        words = [*self.command.split(), *(word for file in self.files for word in ("-f", file))]
        return subprocess.run(
            [*words, "-p", self.project, *argv],
            capture_output=True,
            text=True,
            timeout=100,
            env=self.environment,
        )

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

    def left(self) -> list[str]:
        """Ids of its containers, networks and volumes."""
        label = f"--filter=label=com.docker.compose.project={self.project}"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        found = [self.engine.docker(*kind, "--quiet", label).stdout for kind in kinds]
        return "".join(found).split()


@contextmanager
def example(made: Example, up: str = "up -d") -> Iterator[Example]:
    """It is up; at the end it is down, and nothing is left of it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in made.environment.items():
            patch.setenv(key, value)
        with (
            ExitStack() as ended,
            get_docker_services(made.command, made.files, made.project, [up], ["down -v -t 0"]),
        ):
            yield made
            ended.enter_context(relays_forget(made))
    assert made.left() == []


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


def client(engine: Dockerd) -> Path:
    """A directory with what the Tor of a lab's client must know."""
    directory = engine.directory / "torrc.d"
    directory.mkdir(exist_ok=True)
    (directory / "lab.conf").write_text(str(engine.lab.status()["client_torrc"]))
    return directory


def images(engine: Dockerd) -> None:
    """Make those of images/, without a registry, as they say."""
    base = ("--network", "none", "--build-arg", f"BASE={IMAGE}")
    probe = ("--file", str(ROOT / "images/probe/Dockerfile"), str(ROOT))
    for words in (("ttp/gateway", str(ROOT / "images/gateway")), ("ttp/probe", *probe)):
        done = engine.docker("build", *base, "--tag", *words)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Gone:
    """The host's kernel tells a relay that the container it sends to is not there (RFC 792)."""

    name = "to relays of a gateway that has gone"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=topology.HOST, target=target, body=Icmp(version=4, kind=3)):
                return any(target in node.addresses for node in topology.NODES)
        return False


@contextmanager
def host_is_silent(engine: Dockerd) -> Iterator[None]:
    """But for Tor's connections: that of these gateways is on the host's own wire."""
    with engine.lab.tap("router", "p-host") as host:
        yield
        own = (topology.HOST, topology.HOST6)
        known = engine.lab.neighbours(*own, topology.RESOLVER, topology.LAN_WEB)
        verdict = judge("host", host.stop(), [*engine.lab.rules(*own), known, Gone()])
    assert verdict.value is Value.CONTAINED, as_text([verdict])
