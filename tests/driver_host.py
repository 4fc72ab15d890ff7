"""Docker's network driver in a lab: dockerd and the driver on its simulated host, and a network."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker_host import IMAGE, Dockerd
from harness import ROOT
from lab_helpers import PLAIN_ORACLE, TTP, Lab
from town import eventually

CURL = ("curl", "-sS", "--max-time", "20")
# the image's Python lacks most of the library
TESTS = ("--volume", f"{ROOT}/tests:/tests:ro", "--volume", "/usr:/usr:ro")


# as the unit of systemd confines it
CONFINED = ("setpriv", "--bounding-set=-all,+sys_ptrace,+sys_admin", "--no-new-privs")


@dataclass
class Host:
    """The lab's host: its dockerd, and the driver."""

    dockerd: Dockerd
    driver: subprocess.Popen[bytes] | None = None

    @property
    def lab(self) -> Lab:
        return self.dockerd.lab

    def ask(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command of docker's."""
        return self.dockerd.docker(*argv)

    def docker(self, *argv: str) -> str:
        """One that succeeds, and what it prints."""
        done = self.ask(*argv)
        assert done.returncode == 0, f"docker {' '.join(argv)}: {done.stderr}"
        return done.stdout.strip()

    def run(self, network: str, *argv: str) -> str:
        """What a command prints that has a container of its own."""
        return self.docker("run", "--rm", "--network", network, *TESTS, IMAGE, *argv)

    def begin(self, network: str, name: str, *options: str) -> str:
        """A container that lives until it is stopped."""
        words = ("run", "--detach", "--stop-signal", "KILL", "--network", network, "--name", name)
        return self.docker(*words, *options, IMAGE, "sleep", "1000")

    def start_driver(self) -> None:
        with (self.dockerd.directory / "driver.log").open("ab") as log:
            command = self.lab.inside("host", *CONFINED, TTP, "docker", "driver", "serve")
            self.driver = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        socket = Path(f"/proc/{self.driver.pid}/root/run/docker/plugins/ttp.sock")
        eventually(lambda: socket.exists() and self.status()[0] in (0, 1), "the driver", 20)

    def stop_driver(self, number: int = signal.SIGTERM) -> None:
        assert self.driver is not None
        self.driver.send_signal(number)
        self.driver.wait(10)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End dockerd."""
        assert self.dockerd.process is not None
        self.dockerd.process.send_signal(number)
        self.dockerd.process.wait(30)
        # where nobody reaps orphans, the next dockerd would take its dead containerd for a live one
        (self.dockerd.directory / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def inside(self, *argv: str) -> str:
        """What a command prints on the simulated host."""
        return self.lab.do(*self.lab.inside_argv("host", *argv)).stdout

    def status(self) -> tuple[int, dict[str, Any]]:
        """The exit code of `ttp docker driver status`, and what it tells."""
        argv = self.lab.inside_argv("host", TTP, "docker", "driver", "status", "--json")
        done = self.lab.do(*argv)
        return done.returncode, dict(json.loads(done.stdout or "{}"))

    def states(self) -> list[str]:
        return [one["state"] for one in self.status()[1]["containers"]]

    def workloads(self) -> list[dict[str, Any]]:
        """What the gateway knows of containers."""
        listed = json.loads(self.lab.about("ps", "--json").stdout)
        return [one for one in listed if one["name"].startswith("docker-")]

    def is_behind_tor(self, name: str) -> bool:
        """Whether a container that runs reaches the oracle by Tor. That it does, is asserted."""
        return by_tor(self.docker("exec", name, *CURL, PLAIN_ORACLE))


def create(lab: Lab, *options: str) -> tuple[str, ...]:
    gateway = ("--opt", f"ttp.gateway={lab.name}")
    return ("network", "create", "--driver", "ttp", "--internal", *gateway, *options)


def by_tor(told: str) -> bool:
    return bool(json.loads(told)["IsTor"])


def answered(lines: list[str]) -> bool:
    """Whether the oracle did, in what a program printed, and saw it come by Tor."""
    return any(by_tor(line) for line in lines if line.startswith("{"))


@contextmanager
def container(docker: Host, name: str, *options: str, network: str = "tor") -> Iterator[str]:
    docker.begin(network, name, *options)
    try:
        yield name
    finally:
        docker.docker("rm", "--force", name)


@contextmanager
def loopback_resolver(docker: Host) -> Iterator[list[str]]:
    """The host has a resolver on loopback, as with systemd-resolved; the names it is asked for."""
    before = docker.inside("cat", "/etc/resolv.conf")  # the lab's own
    docker.inside("sh", "-c", "echo nameserver 127.0.0.53 >/etc/resolv.conf")
    listen = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.bind(('127.0.0.53', 53))\nprint('ready', flush=True)\n"
        "while True: print(s.recv(512).hex(), flush=True)\n"
    )
    command = docker.lab.inside("host", "/usr/bin/python3", "-c", listen)
    asked: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as decoy:
        assert decoy.stdout is not None
        assert decoy.stdout.readline() == "ready\n"
        try:
            yield asked
        finally:
            decoy.terminate()
            asked += decoy.stdout.read().split()
            docker.inside("sh", "-c", 'printf %s "$0" >/etc/resolv.conf', before)
