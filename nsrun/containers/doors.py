"""Paths of the host that a container may not have: doors to what runs outside (P6, P10)."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsrun import paths
from nsrun.errors import UsageError

#: Sockets of daemons, other processes, the kernel's switches, devices.
CLOSED = ("/run", "/var/run", "/proc", "/sys", "/dev")


def check(binds: Iterable[str], engine: Iterable[str]) -> None:
    """Raises UsageError for a path that is a door, is behind one, or has one below it.

    ``engine`` are paths of the daemon's own.
    """
    closed = [*CLOSED, paths.runtime(), paths.state(), *engine]
    doors = {Path(path).resolve() for path in closed}
    for bind in binds:
        doing = f"mount {bind} in a container"
        try:
            path = Path(bind).resolve()
            is_socket = path.exists() and stat.S_ISSOCK(path.stat().st_mode)
        except (OSError, ValueError) as error:
            raise UsageError(doing, getattr(error, "strerror", None) or error) from error
        if is_socket:
            raise UsageError(doing, "it is a socket: who listens there would act for it (P6)")
        for door in doors:
            if path == door or door in path.parents or path in door.parents:
                raise UsageError(doing, f"it leads to {door}, and out of its confinement (P6, P10)")


def check_volume(volume: dict[str, Any], engine: Iterable[str]) -> None:
    """The same of a volume, as docker tells of it: it may be a name for a path, or for another
    machine's files. Raises UsageError."""
    doing, options = f"mount the volume {volume['Name']}", volume.get("Options") or {}
    if volume["Driver"] != "local":
        raise UsageError(doing, f"its driver {volume['Driver']} may connect for it (P6)")
    if {"bind", "rbind"} & set(options.get("o", "").split(",")):
        check([options.get("device", "")], engine)
    elif options and options.get("type") != "tmpfs":
        raise UsageError(doing, "the host would mount what it is for it, perhaps by a network (P6)")
