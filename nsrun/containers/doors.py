"""Paths of the host that a container may not have: doors to what runs outside (P6, P10)."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from nsrun import paths
from nsrun.errors import UsageError

#: Sockets of daemons, other processes, the kernel's switches, devices.
CLOSED = ("/run", "/var/run", "/proc", "/sys", "/dev")


def check(binds: Iterable[str], engine_root: str) -> None:
    """Raises UsageError for a path that is a door, is behind one, or has one below it."""
    closed = [*CLOSED, paths.runtime(), paths.state(), engine_root]
    doors = {Path(path).resolve() for path in closed}
    for bind in binds:
        path = Path(bind).expanduser().resolve()
        doing = f"mount {bind} in a container"
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            raise UsageError(doing, "it is a socket: who listens there would act for it (P6)")
        for door in doors:
            if path == door or door in path.parents or path in door.parents:
                raise UsageError(doing, f"it leads to {door}, and out of its confinement (P6, P10)")
