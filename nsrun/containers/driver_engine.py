"""What can be found of the dockerd that asks, without asking it: it waits for our answer.

All is looked up from the kernel's word on who is at the other end of the socket (SO_PEERCRED), in
the namespaces of that process: it may be in others than ours.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nsrun.containers.driver import Engine
from nsrun.netns import Namespace

PATIENCE = 10.0  # seconds that `dockerd --version` may take on a busy machine


@dataclass(frozen=True)
class Peer:
    """The process that connected to our socket."""

    pid: int

    def lives(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def look(self, sandbox: str = "") -> Engine:
        """What is found now; of the container whose network namespace is, or will be, there."""
        return Engine(self._version(), self._resolvers(), self.links(sandbox) or ())

    def network(self) -> int:
        """A descriptor of its network namespace, which the caller must close. Raises OSError."""
        return os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def keeps(self, sandbox: str) -> bool:
        """Whether there is a network namespace at ``sandbox``, and not only the file for one."""
        try:
            return self._at(sandbox).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
        except OSError:
            return False

    def _at(self, path: str) -> Path:
        """``path`` as the process sees it."""
        return Path(f"/proc/{self.pid}/root{path}")

    def _version(self) -> tuple[int, ...]:
        """Of the program that it is; empty if that does not say, and so counts as an old one."""
        program = f"/proc/{self.pid}/exe"
        try:
            status = Path(program).stat()
        except OSError:
            return ()
        return _version_of(program, (status.st_dev, status.st_ino, status.st_mtime_ns))

    def _resolvers(self) -> tuple[str, ...]:
        """The nameservers of its resolv.conf(5). Without one, Docker asks no resolver of the host.

        Raises OSError when it is there and cannot be read.
        """
        try:
            text = self._at("/etc/resolv.conf").read_text(errors="replace")
        except FileNotFoundError:
            return ()
        return tuple(re.findall(r"^\s*nameserver\s+(\S+)", text, re.MULTILINE))

    def links(self, sandbox: str) -> tuple[str, ...] | None:
        """Links, but loopback, of the container whose network namespace is at ``sandbox``.

        None while there is no namespace: before Docker 28 it comes after the answer to Join.
        """
        if not sandbox or not self.keeps(sandbox):
            return None
        space = Namespace(str(self._at(sandbox)))
        try:
            names = [name for _, name in space.call(socket.if_nameindex)]
        finally:
            space.close()
        return tuple(name for name in names if name != "lo")


@lru_cache(maxsize=8)
def _version_of(program: str, _file: tuple[int, int, int]) -> tuple[int, ...]:
    """By its own word (``--version``), for which a dockerd does not speak to the one that runs."""
    try:
        told = subprocess.run(
            (program, "--version"), capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.match(r"Docker version (\d+)\.(\d+)\.(\d+)", told.stdout)
    return tuple(map(int, found.groups())) if found else ()
