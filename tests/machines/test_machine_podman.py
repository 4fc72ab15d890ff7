"""Podman 5 of a Debian 13 joins the network of a workload, as docs/containers.md says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from docker_host import IMAGE, archive
from docker_machine import ASK, STRAY
from machine import Machine
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

# a machine in a machine whose cgroups are of version 1 has no controllers of version 2
LIMITS = ("--cgroups", "disabled")
GATEWAY = "ttp-gateway@default"


@pytest.fixture
def pod(machine: Machine) -> Iterator[str]:
    """The network of a workload that does nothing; podman has the image."""
    machine.run("systemctl", "start", GATEWAY, check=True)
    with archive().open("rb") as image:
        command = machine.command("podman", "import", "--quiet", "-", IMAGE)
        subprocess.run(command, stdin=image, check=True, capture_output=True, timeout=100)
    with workload(machine, "pod") as network:
        yield network
    machine.run("podman", "system", "reset", "--force", check=True)
    machine.run("systemctl", "stop", GATEWAY, check=True)


@contextmanager
def workload(machine: Machine, name: str) -> Iterator[str]:
    with machine.start("ttp", "run", "--name", name, "--", "sleep", "1000") as process:
        try:
            eventually(lambda: name in machine.run("ttp", "ps").stdout, "the workload", 30)
            told = json.loads(machine.run("ttp", "inspect", "--json", name, check=True).stdout)
            yield f"ns:/proc/{told['pid']}/ns/net"
        finally:
            process.kill()


@pytest.mark.promise("P1", "P2", "P3", "P12")
def test_a_container_of_podman_5_is_behind_tor(machine: Machine, pod: str) -> None:
    """As the workload whose network it joins; on the host's own it is not."""

    def run(network: str, *argv: str) -> subprocess.CompletedProcess[str]:
        resolver = ("--dns", "10.64.0.1", "--dns-search", ".") if network == pod else ()
        line = ("podman", "run", "--rm", *LIMITS, "--network", network, *resolver)
        return machine.run(*line, IMAGE, *argv)

    with machine.lab.tap("router", "p-host") as wire:
        done = run(pod, *ASK)
        stray = run(pod, "python3", "-c", STRAY)
        verdict = judge("host", wire.stop(), machine.rules(), expect_some=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["IsTor"] is True
    assert "No route to host" in stray.stderr
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    assert json.loads(run("host", *ASK).stdout)["IsTor"] is False  # control
