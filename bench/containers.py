"""``ttp docker run`` beside plain ``docker run``, by a dockerd on the lab's host; as root only."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import Figure
from labs import TTP, Lab, plain_environment, run, spawn
from nsrun.errors import NsrunError

ROUNDS = 10
IMAGE = "bench"
LINKS = ("bin", "lib", "lib64", "sbin")  # to /usr, which is mounted from the machine
SECONDS = 30  # for dockerd to answer


def starts_of_containers(lab: Lab) -> Iterator[Figure]:
    """Both until the container has ended; the holder goes by itself, in the next one's time."""
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        return
    with dockerd(lab) as host:
        links = [name for name in LINKS if Path("/", name).is_symlink()]
        line = f"tar -c -C / {' '.join(links)} | docker --host {host} import - {IMAGE}"
        run("sh", "-c", line)
        words = ("--rm", "-v", "/usr:/usr:ro", IMAGE, "true")
        environment = {**plain_environment(lab), "DOCKER_HOST": host}
        program = shutil.which("docker") or "docker"
        plain: list[float] = []
        ours: list[float] = []
        for _ in range(ROUNDS):
            plain.append(spawn((program, "run", *words), environment))
            ours.append(spawn((TTP, "docker", "run", "-g", lab.name, "--", *words), environment))
    yield Figure("`docker run --rm … true`, on its bridge", plain, "ms")
    yield Figure("`ttp docker run -- --rm … true`", ours, "ms")
    ratios = [mine / least for mine, least in zip(ours, plain, strict=True)]
    yield Figure("ratio of `ttp docker run` to `docker run`", ratios, "", most=1.3)


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
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while subprocess.run(("docker", "--host", host, "version"), capture_output=True).returncode:
            if time.monotonic() > deadline:
                last = (home / "log").read_text().splitlines()[-1:]
                raise NsrunError("start dockerd", *last)
            time.sleep(0.1)  # the interval of the poll
        yield host
    finally:
        process.terminate()
        process.wait(SECONDS)
