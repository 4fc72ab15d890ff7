"""A dockerd of the tests' own, on the simulated host of a lab, and an image for it.

    web, DNS ══ router ══ host (dockerd, docker0, containers)
                     └─── gateway

Its socket, directories and bridge are private; what it changes of a network is the lab's, and what
its containers send without ttp arrives on the lab's wires. One that runs already is not asked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, SBIN
from lab_helpers import TTP, Lab
from nsrun import paths
from town import eventually

IMAGE = "ttp/base"
DAYS = 30  # until the archive of the image is made anew
START = 30.0  # seconds


@dataclass
class Dockerd:
    """A daemon that is up: ``docker`` and ``ttp docker`` for it."""

    lab: Lab
    directory: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.directory}/docker.sock"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name[:7] != "DOCKER_"}
        return {**kept, "DOCKER_HOST": self.host, "PATH": os.environ["PATH"] + SBIN}

    def do(self, *argv: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command for which this is the daemon."""
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds, env=self.environment
        )

    def docker(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.do("docker", *argv)

    def run(self, *argv: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """``ttp docker run`` on the lab's gateway."""
        return self.do(TTP, "docker", "run", "-g", self.lab.name, *options, "--", *argv)

    def inspect(self, container: str) -> dict[str, Any]:
        done = self.docker("inspect", container)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)[0])

    def containers(self) -> list[str]:
        """The names of all, holders too."""
        return self.docker("ps", "--all", "--format", "{{.Names}}").stdout.split()

    def listed(self) -> list[dict[str, Any]]:
        """The workloads of the lab's gateway."""
        return list(json.loads(self.lab.about("ps", "--json").stdout))

    def workloads(self) -> list[str]:
        return [str(one["name"]) for one in self.listed()]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = self.lab.inside(
            "host",
            *("dockerd", "--host", self.host, "--pidfile", f"{self.directory}/pid"),
            *("--data-root", f"{self.directory}/data", "--exec-root", f"{self.directory}/exec"),
            *("--userland-proxy=false", *self.options),
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )
        eventually(self._answers, f"dockerd: {self.directory}/log", START)

    def stop(self) -> None:
        """End it, by its process id, as service managers do."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(START)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
        return self.docker("version").returncode == 0

    def clear(self) -> None:
        """Remove every container, and wait until the gateway knows of none."""
        if every := self.docker("ps", "--all", "--quiet").stdout.split():
            self.docker("rm", "--force", *every)
        eventually(lambda: not self.workloads(), "the workloads to end", 10)


@contextmanager
def dockerd(lab: Lab, directory: Path, *options: str) -> Iterator[Dockerd]:
    """A daemon with the image IMAGE, for the time of the block."""
    daemon = Dockerd(lab, directory, options)
    daemon.start()
    try:
        done = daemon.docker("import", str(archive()), IMAGE)
        assert done.returncode == 0, done.stderr
        yield daemon
        daemon.clear()
    finally:
        daemon.stop()


def archive() -> Path:
    """The root file system of the image: from the cache, or made now, in a minute."""
    paths.private_directory(paths.cache())
    build = ROOT / "images/base/build"
    version = hashlib.sha256(build.read_bytes()).hexdigest()[:12]
    made = Path(paths.cache(), f"docker-base-{version}.tar")
    with Path(f"{made}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.stat().st_mtime < time.time() - DAYS * 86400:
            done = subprocess.run([build, made], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return made


def keepers(engine: Dockerd) -> list[int]:
    """Processes that keep this daemon's holders."""
    return [pid for pid in _python() if f"DOCKER_HOST={engine.host}" in _read(pid, "environ")]


def _python() -> list[int]:
    every = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in every if "nsrun.containers.keeper" in _read(pid, "cmdline")]


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}") as file:
            return file.read()
    except OSError:
        return ""
