"""``ttp docker run``, and Docker's network driver, beside Docker's bridge; as root only.

By a dockerd on the lab's host, beside which the driver serves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from figures import Figure
from labs import TTP, Lab, plain_environment, run, spawn
from nsrun.errors import NsrunError

ROUNDS = 10
IMAGE, NETWORK = "bench", "tor"
LINKS = ("bin", "lib", "lib64", "sbin")  # to /usr, which is mounted from the machine
SECONDS = 30  # for dockerd or the driver to answer, or to end


def starts_of_containers(lab: Lab) -> Iterator[Figure]:
    """Each until the container has ended. A holder goes by itself, before the next one's time."""
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        return
    with dockerd(lab) as host:
        links = [name for name in LINKS if Path("/", name).is_symlink()]
        line = f"tar -c -C / {' '.join(links)} | docker --host {host} import - {IMAGE}"
        run("sh", "-c", line)
        words = ("--rm", "-v", "/usr:/usr:ro", IMAGE, "true")
        environment = {**plain_environment(lab), "DOCKER_HOST": host}
        program = shutil.which("docker") or "docker"
        with network(lab, host) as name:
            commands = (
                (program, "run", *words),
                (TTP, "docker", "run", "-g", lab.name, "--", *words),
                (program, "run", "--network", name, *words),
            )
            rounds = [_in_turns(commands, environment, host) for _ in range(ROUNDS)]
    plain, ours, driven = zip(*rounds, strict=True)
    yield Figure("`docker run --rm … true`, on its bridge", plain, "ms")
    yield Figure("`ttp docker run -- --rm … true`", ours, "ms")
    yield Figure("`docker run --network tor --rm … true`, by the driver", driven, "ms")
    for what, measured, most in (
        ("`ttp docker run` to `docker run`", ours, 1.3),
        ("a start on the driver's network to one on the bridge", driven, 1.1),
    ):
        ratios = [mine / least for mine, least in zip(measured, plain, strict=True)]
        yield Figure(f"ratio of {what}", ratios, "", most=most)


def _in_turns(
    commands: Sequence[tuple[str, ...]], environment: dict[str, str], host: str
) -> list[float]:
    found = []
    for command in commands:
        found.append(spawn(command, environment))
        _until(lambda: not run("docker", "--host", host, "ps", "--all", "--quiet"), "the holder")
    return found


@contextmanager
def network(lab: Lab, host: str) -> Iterator[str]:
    """A network of ttp's driver, which serves for the time of the block; its name."""
    driver, docker = (*lab.host, TTP, "docker", "driver"), ("docker", "--host", host, "network")
    process = subprocess.Popen((*driver, "serve"), stdin=subprocess.DEVNULL)
    try:
        asked = (*driver, "status")
        _until(lambda: not subprocess.run(asked, capture_output=True).returncode, "the driver")
        option = f"ttp.gateway={lab.name}"
        run(*docker, "create", "--driver", "ttp", "--internal", "--opt", option, NETWORK)
        yield NETWORK
        run(*docker, "rm", NETWORK)
    finally:
        process.terminate()
        process.wait(SECONDS)


def _until(true: Callable[[], bool], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        if time.monotonic() > deadline:
            last = log.read_text().splitlines()[-1:] if log else ()
            raise NsrunError(f"wait for {what}", *(last or (f"{SECONDS} s passed",)))
        time.sleep(0.05)  # the interval of the poll


@contextmanager
def dockerd(lab: Lab) -> Iterator[str]:
    """A daemon with a socket, directories and a bridge of its own; its address."""
    home = lab.files / "docker"
    home.mkdir()
    host = f"unix://{home}/socket"
    command = (
        *(*lab.host, "dockerd", "--host", host, "--pidfile", f"{home}/pid"),
        *("--data-root", f"{home}/data", "--exec-root", f"{home}/exec", "--userland-proxy=false"),
    )
    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        asked = ("docker", "--host", host, "version")
        _until(lambda: not subprocess.run(asked, capture_output=True).returncode, "dockerd", log)
        yield host
    finally:
        process.terminate()
        process.wait(SECONDS)
