"""The examples in compose/ by compose 2 and newer Dockers, whose networks are plumbed otherwise."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from composed import Gone
from docker_host import IMAGE
from docker_machine import ASK, LONG, Docker
from driver_host import answered, by_tor
from harness import ROOT
from lab_helpers import PLAIN_ORACLE
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

CHECKOUT = "/root/ttp"
CHECK = (
    *("run", "--rm", "--network", "example_workloads", "--dns", "192.0.2.53", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--sysctl", "net.ipv6.conf.all.disable_ipv6=1"),
    "ttp/probe",
)
BY_TLS = {"is-tor", "address4"}  # checks that want certificates: the image does not trust the lab's


@dataclass
class Project:
    """Examples of compose/, the later based on the earlier, and how compose is called for them."""

    docker: Docker
    names: tuple[str, ...]

    def compose(
        self, *argv: str, seconds: float = 100, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        given = {"IMAGE": IMAGE, "URL": PLAIN_ORACLE, "TORRC_D": f"{CHECKOUT}/torrc.d", **variables}
        files = [f"{CHECKOUT}/compose/{name}/docker-compose.yml" for name in self.names]
        return self.docker.machine.run(
            *("env", *(f"{key}={value}" for key, value in given.items()), "docker", "compose"),
            *(word for file in files for word in ("-f", file)),
            *("-p", "example", *argv),
            seconds=seconds,
        )

    def printed(self, service: str) -> list[str]:
        # compose logs prints what clears a terminal's line
        container = self.compose("ps", "--all", "--quiet", service).stdout.strip()
        return self.docker.do("logs", container).splitlines()

    def left(self) -> str:
        label = "--filter=label=com.docker.compose.project=example"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return "".join(self.docker.do(*kind, "--quiet", label) for kind in kinds)


@pytest.fixture
def built(bare: Docker) -> Docker:
    """The images of images/, made as they say, without a registry."""
    if not (there := bare.machine.path(CHECKOUT)).exists():
        for name in ("compose", "images", "nsrun"):
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, there / name, ignore=unwanted)
        (there / "torrc.d").mkdir()
        told = str(bare.machine.lab.status()["client_torrc"])
        (there / "torrc.d/lab.conf").write_text(told)
        without = ("--network", "none", "--build-arg", f"BASE={IMAGE}")
        probe = ("--file", f"{CHECKOUT}/images/probe/Dockerfile", CHECKOUT)
        for words in (("ttp/gateway", f"{CHECKOUT}/images/gateway"), ("ttp/probe", *probe)):
            bare.do("build", *without, "--tag", *words)
    return bare


@contextmanager
def example(docker: Docker, *names: str, up: tuple[str, ...] = ()) -> Iterator[Project]:
    """It is up, and only Tor is on the wire; at the end it is down, and nothing is left of it."""
    made = Project(docker, names)
    with docker.silent():
        try:
            done = made.compose("up", "--detach", *up)
            assert done.returncode == 0, done.stderr
            yield made
        finally:
            # with its network: a relay whose connection was not ended sends on for minutes
            services = set(made.compose("ps", "--services").stdout.split())
            if tor := services & {"onion", "tor"}:
                made.compose("stop", *tor)
            made.compose("down", "--volumes", "--timeout", "0")
    assert made.left() == ""


@LONG
@pytest.mark.promise("P1", "P7", "P8")
def test_apps_by_newer_releases(built: Docker) -> None:
    """Two programs on a network of the driver, with an identity each."""
    with example(built, "apps") as apps:
        for service in ("first", "second"):
            eventually(lambda service=service: apps.printed(service), "an answer", 30)  # type: ignore[misc]
            assert by_tor(apps.printed(service)[0])


@LONG
@pytest.mark.promise("P1", "P8")
def test_pair_by_newer_releases(built: Docker) -> None:
    """A program and its database in one network of the driver."""
    with example(built, "pair") as pair:
        eventually(lambda: answered(pair.printed("program")), "an answer", 30)


@LONG
@pytest.mark.promise("P1", "P8", "P12")
def test_gateway_and_ci_by_newer_releases(built: Docker) -> None:
    """An app behind a gateway of containers; a program's tests on top of it, green, and red."""
    with example(built, "gateway", "ci", up=("app", "link")) as made:
        eventually(lambda: made.printed("app"), "an answer", 30)
        assert by_tor(made.printed("app")[0])
        tests = ("up", "--exit-code-from", "tests", "tests", "program")
        done = made.compose(*tests)
        assert "contained: " in done.stdout
        assert done.returncode == 0, done.stdout + done.stderr
        done = made.compose(*tests, CLOCK="ntp")
        assert "UDP (NTP), which Tor does not carry" in done.stdout
        assert done.returncode == 1, done.stdout + done.stderr


@LONG
@pytest.mark.promise("P1", "P8")
def test_onion_by_newer_releases(built: Docker) -> None:
    """An onion service, reached by a workload."""
    with example(built, "onion") as made:
        named = ("exec", "-T", "onion", "cat", "/var/lib/onion/hostname")
        eventually(lambda: ".onion" in made.compose(*named).stdout, "a name", 20)
        name = made.compose(*named).stdout.strip()
        # --socks: from 8.1 on, curl itself looks up no .onion name
        fetch = ("ttp", "run", "--socks", "--", "curl", "-sS", "--max-time", "15")
        run = (*fetch, f"http://{name}/")
        eventually(lambda: "An onion" in built.machine.run(*run).stdout, "the page", 60)


@LONG
@pytest.mark.promise("P1", "P4", "P12")
def test_a_gateway_of_containers_over_a_reboot(built: Docker) -> None:
    """What is behind it is contained; after the reboot all is closed until it is up again."""
    machine = built.machine
    made = Project(built, ("gateway",))
    with machine.lab.tap("router", "p-host") as wire:
        assert made.compose("up", "--detach").returncode == 0
        told = built.machine.run("docker", *CHECK).stdout.splitlines()
        assert len(told) > 10
        assert {line.split()[1] for line in told[:-1] if not line.startswith("cont")} <= BY_TLS
        machine.reboot()
        assert made.compose("up", "--detach").returncode == 0
        assert by_tor(made.compose("exec", "-T", "app", *ASK).stdout)
        verdict = judge("host", wire.stop(), [*machine.rules(), Gone()], expect_some=True)
        made.compose("stop", "tor")
        made.compose("down", "--volumes", "--timeout", "0")
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    assert made.left() == ""
