"""Docker of a Debian release, with ttp's gateway and network driver as services of its systemd."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from docker_host import IMAGE, archive
from lab_helpers import PLAIN_ORACLE, TTP
from machine import Machine, debian
from nsrun.lab import control, topology
from nsrun.leak.bench import Bench
from nsrun.leak.probes import World
from nsrun.leak.verdict import Value, as_text, judge

# 26.1, and 28.5 or what unstable has by now; the short of it, and all
BOTH = pytest.mark.parametrize("engine", ["trixie", "sid"], indirect=True, scope="session")
LONG = pytest.mark.parametrize(
    "engine",
    ["trixie", pytest.param("sid", marks=pytest.mark.torture)],
    indirect=True,
    scope="session",
)
#: On an internal network Docker asks no resolver of the host's: docs/known-issues.md.
DNS = ("--dns", "192.0.2.53", "--dns-search", ".")
ASK = ("curl", "-sS4", "--max-time", "20", PLAIN_ORACLE)
LIVES = ("--detach", "--init")  # which ends by SIGTERM, as a service does
SLEEP = (IMAGE, "sleep", "1000")
#: A program that sends what Tor does not carry.
STRAY = """
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(("11.200.0.80", 7))
udp.send(b"stray")
udp.recv(10)
"""


@dataclass
class Docker:
    """A machine whose Docker has the image IMAGE and two networks: `tor`, and `plain`."""

    machine: Machine

    def do(self, *argv: str) -> str:
        """What a command of docker's prints. That it succeeds, is asserted."""
        return self.machine.run("docker", *argv, check=True).stdout.strip()

    def ttp(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """``ttp docker``."""
        return self.machine.run("ttp", "docker", *argv)

    def runs(self, container: str) -> bool:
        return self.do("inspect", "--format", "{{.State.Running}}", container) == "true"

    def is_cut_off(self, container: str) -> bool:
        """Whether one that runs has no link but loopback."""
        return self.do("exec", container, "ls", "/sys/class/net") == "lo"

    def is_behind_tor(self, container: str) -> bool:
        """Whether one that runs reaches the oracle by Tor. That it does, is asserted."""
        return bool(json.loads(self.do("exec", container, *ASK))["IsTor"])

    def restart(self) -> None:
        """Docker, however often it was in the last minute, at which systemd would refuse."""
        for verb in ("reset-failed", "restart"):
            self.machine.run("systemctl", verb, "docker", check=True)

    def active(self, unit: str) -> bool:
        return self.machine.run("systemctl", "is-active", unit).stdout == "active\n"

    def world(self, own: str, neighbour: str) -> World:
        """As a probe in the container ``own`` of a workload sees it."""
        gateway = json.loads(self.machine.run("ttp", "gateway", "inspect", "default").stdout)
        listed = json.loads(self.machine.run("ttp", "ps", "--json").stdout)
        # a container of the driver is called by its endpoint; they are listed by age
        named = {one["name"]: one["address"] for one in listed}
        ages = [one["address"] for one in listed]
        outside = self.machine.run("systemctl", "show", "-P", "MainPID", "docker").stdout
        lab = Bench(control.describe(self.machine.lab.name), TTP, self.machine.lab.home)
        return lab.world(
            gateway,
            int(outside),
            gateway=gateway["address"][0],
            gateway6=gateway["address"][1],
            uplink=topology.HOST,
            uplink6=topology.HOST6,
            neighbour=named.get(neighbour, ages[1])[0],
            neighbour6=named.get(neighbour, ages[1])[1],
            own=named.get(own, ages[0])[0],
            own6=named.get(own, ages[0])[1],
        )

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While the block runs, the machine sends nothing but Tor's own connections to relays."""
        with self.machine.lab.tap("router", "p-host") as wire:
            yield
            verdict = judge("host", wire.stop(), self.machine.rules(), expect_some=True)
        assert verdict.value is Value.CONTAINED, as_text([verdict])

    def clear(self) -> None:
        if every := self.do("ps", "--all", "--quiet").split():
            self.do("rm", "--force", *every)


@contextmanager
def docker(suite: str) -> Iterator[Docker]:
    with debian(suite) as machine:
        units = ("ttp-gateway@default", "docker")
        machine.run("systemctl", "enable", "--now", *units, check=True)
        with archive().open("rb") as image:
            command = machine.command("docker", "import", "-", IMAGE)
            subprocess.run(command, stdin=image, check=True, capture_output=True, timeout=60)
        machine.run("ttp", "docker", "driver", "install", check=True)
        made = Docker(machine)
        made.do("network", "create", "plain")
        made.do("network", "create", "--driver", "ttp", "--internal", "tor")
        yield made
