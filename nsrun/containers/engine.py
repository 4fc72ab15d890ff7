"""Docker on this machine: which daemon, and whether its containers are processes that we can see.

docker-py asks it, but for what the start of a container waits for: importing the library takes as
long as all else of ours does. That is ``api``. What a user watches is left to the docker program.
All three get the same address.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsrun.client import visible
from nsrun.containers.api import NOT_FOUND, SECONDS, Api, RefusalError
from nsrun.errors import MissingError, NsrunError, UsageError

if TYPE_CHECKING:
    from docker import APIClient

SOCKET = "unix:///var/run/docker.sock"


class Engine:
    """One daemon. Its errors come as NsrunError, with what was being done."""

    def __init__(self) -> None:
        """Raises MissingError, and UsageError for a daemon elsewhere. Nothing is asked yet."""
        self.program = shutil.which("docker") or ""
        if not self.program:
            raise MissingError("use docker", "it is not installed", "apt install docker.io")
        self.host = _host(self.program)
        if not self.host.startswith("unix://"):
            cause = f"{self.host} is another machine's, whose networks are not here"
            raise UsageError("use docker", cause, "DOCKER_HOST=unix:///var/run/docker.sock")
        self.api = Api(self.host.removeprefix("unix://"))

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Turn what the daemon answers, or that it does not, into NsrunError."""
        try:
            yield
        except RefusalError as error:
            raise NsrunError(what, visible(str(error))) from error
        except OSError as error:
            if refusal := getattr(error, "explanation", None):  # docker.errors.APIError
                raise NsrunError(what, visible(str(refusal))) from error
            raise NsrunError(what, *_unreachable(self.host, error)) from error

    @cached_property
    def library(self) -> APIClient:
        """docker-py's client of this daemon. Raises NsrunError."""
        from docker import APIClient
        from docker.errors import DockerException

        try:
            return APIClient(self.host, version="auto", timeout=SECONDS)
        except DockerException as error:
            cause, hint = _unreachable(self.host, error)
            raise NsrunError("ask the docker daemon", cause, hint) from error

    def command(self, *words: str) -> list[str]:
        """A command line of the docker program, for this daemon."""
        return [self.program, "--host", self.host, *words]

    @property
    def own(self) -> tuple[str, ...]:
        """Paths of the daemon's own: who has them, has the daemon. Raises NsrunError."""
        return (self.about["DockerRootDir"], self.host.removeprefix("unix://"))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the daemon says of itself; it takes it 8 ms. Raises NsrunError."""
        with self.doing("ask the docker daemon"):
            return dict(self.api.get("info"))

    def inspect(self, container: str) -> dict[str, Any]:
        """Raises NsrunError when there is no such container."""
        with self.doing(f"find the container {container}"):
            return dict(self.api.get("containers", container, "json"))

    def has(self, image: str) -> bool:
        """Whether an image is there, so that nothing is pulled."""
        with self.doing(f"find the image {image}"):
            try:
                self.api.get("images", image, "json")
            except RefusalError as error:
                if error.status != NOT_FOUND:
                    raise
                return False
        return True

    def network(self, container: str) -> tuple[int, int]:
        """A descriptor of a running container's network namespace, and its main process.

        By the process, as the daemon's own files may be in a mount namespace that is not ours. That
        the number is still the container's is asked for after it was opened. Raises NsrunError.
        """
        doing = f"open the network of the container {container}"
        pid = int(self.inspect(container)["State"]["Pid"])
        if not pid:
            raise UsageError(doing, "it is not running", f"docker start {container}")
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise NsrunError(doing, error.strerror, "use sudo") from error
        except OSError as error:
            raise NsrunError(doing, "its process is not one of this machine's") from error
        found = self.inspect(container)
        if found["State"]["Pid"] != pid or not _is_in(found["Id"], pid):
            os.close(fd)
            raise NsrunError(doing, f"process {pid} is not of that container")
        return fd, pid


def _is_in(container: str, pid: int) -> bool:
    """Whether a process is in the control group of a container: cgroups(7)."""
    with suppress(OSError):
        return container in Path(f"/proc/{pid}/cgroup").read_text()
    return False


def _host(program: str) -> str:
    """The address of the daemon that the docker program would use. Raises NsrunError."""
    if host := os.environ.get("DOCKER_HOST"):
        return host
    name = os.environ.get("DOCKER_CONTEXT", "")
    if not name:
        directory = os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser()
        with suppress(OSError, ValueError):
            told = json.loads(Path(directory, "config.json").read_text())
            name = str((told.get("currentContext") if isinstance(told, dict) else "") or "")
    if name in ("", "default"):
        return SOCKET
    asked = (program, "context", "inspect", "--format", "{{.Endpoints.docker.Host}}", name)
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise NsrunError(f"use the docker context {name}", done.stderr.strip())
    return done.stdout.strip()


def _unreachable(host: str, error: Exception) -> tuple[str, str]:
    """Cause and hint of an error of the system."""
    path = host.removeprefix("unix://")
    if not Path(path).exists():
        return f"there is no {path}", "is the daemon running? systemctl start docker"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"you may not use {path}", "use sudo"
    return f"{path} does not answer ({type(error).__name__})", "is the daemon running?"
