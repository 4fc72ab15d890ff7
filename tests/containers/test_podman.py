"""Podman joins the network of a workload: `--network ns:` and the path of its namespace."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from docker_host import archive
from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

# runc, as crun knows no machine with both versions of cgroups; limits that it need not raise
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")


@pytest.fixture(scope="module")
def podman(docker_lab: Lab) -> Iterator[list[str]]:
    """The start of a command: on the lab's host, with a store of its own, on a file system."""
    # podman refuses a path of more than 50 characters
    with tempfile.TemporaryDirectory(prefix="ttp-podman-") as home:
        store = ("--root", f"{home}/root", "--runroot", f"{home}/run", "--tmpdir", f"{home}/tmp")
        ways = ("--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "runc")
        root = Path(home, "rootfs")
        root.mkdir()
        subprocess.run(["tar", "-xf", archive(), "-C", root], check=True)
        line = ("podman", *store, *ways, "run", "--rm", *LIMITS)
        yield docker_lab.inside("host", *line, "--rootfs=true")


@contextmanager
def workload(lab: Lab, name: str) -> Iterator[int]:
    """A named workload that does nothing; its process."""
    command = lab.command(TTP, "run", "-g", lab.name, "--name", name, "--", "sleep", "1000")
    with subprocess.Popen(command) as process:
        try:
            eventually(lambda: name in lab.about("ps").stdout, "the workload", 30)
            yield int(lab.workload(name)["pid"])
        finally:
            process.kill()


def run(podman: list[str], network: str, *words: str) -> subprocess.CompletedProcess[str]:
    split = next(i for i, word in enumerate(words) if not word.startswith("-"))
    root = str(Path(podman[podman.index("--root") + 1]).parent / "rootfs")
    line = [*podman, "--network", network, *words[:split], root, *words[split:]]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.mark.promise("P1", "P2", "P3", "P12")
def test_a_container_of_podman_is_behind_tor(docker_lab: Lab, podman: list[str]) -> None:
    """As the workload whose network it joins; on the host's own it is not."""
    ask = ("curl", "-sS", "--max-time", "20", PLAIN_ORACLE)
    with workload(docker_lab, "pod") as pid:
        network = f"ns:/proc/{pid}/ns/net"
        with docker_lab.tap("router", "p-host") as host:
            done = run(podman, network, *ask)
            stray = run(podman, network, "python3", "-c", STRAY)
            own = (topology.HOST, topology.HOST6, topology.RESOLVER)
            verdict = judge("host", host.stop(), [docker_lab.neighbours(*own)])
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["IsTor"] is True
        assert told["IP"] in docker_lab.exits()
        assert "No route to host" in stray.stderr
        pinned = run(
            podman, network, "--dns=10.64.0.1", "--dns-search=.", "cat", "/etc/resolv.conf"
        )
        assert pinned.stdout.split() == ["nameserver", "10.64.0.1"]
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    bare = run(podman, "host", *ask)
    assert json.loads(bare.stdout)["IsTor"] is False  # control


STRAY = f"""
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(("{topology.WEB}", 7))
udp.send(b"stray")
udp.recv(10)
"""
