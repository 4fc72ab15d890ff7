"""What is on disk and what runs: directories, the clock, gateways, labs, and what was left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nsrun import __version__, paths
from nsrun.doctor import MISSING, OK, WARNING, Finding
from nsrun.errors import GatewayError, UsageError
from nsrun.gateway import control, uplink_veth
from nsrun.lab import control as labs

MB = 1 << 20
# What a gateway writes: sockets and a torrc; Tor's directory, 20 MB on the public network, and log
NEEDED = {"runtime": 1, "state": 64}
SKEW = 3600  # seconds; a consensus is valid for three hours, and Tor tolerates one that is older


def look() -> Iterator[Finding]:
    yield from (_directory("runtime", paths.runtime()), _directory("state", paths.state()))
    yield clock()
    yield from gateways()
    yield from (_lab(name) for name in labs.names())
    yield from leftovers()


def _directory(kind: str, path: str) -> Finding:
    """Ours alone, or still to be made where we may; with room."""
    name = f"{kind} directory"
    elsewhere = f"set TTP_{kind.upper()}_DIR to a directory of yours"
    above = next(one for one in (Path(path), *Path(path).parents) if one.exists())
    try:
        if above == Path(path):
            paths.private_directory(path)
    except OSError as error:
        return Finding(name, MISSING, f"{path}: {error.strerror}", elsewhere)
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding(name, MISSING, f"{above} cannot be written to", elsewhere)
    room = os.statvfs(above)
    free = room.f_bavail * room.f_frsize // MB
    if free < NEEDED[kind] or not (room.f_favail or not room.f_files):
        return Finding(name, MISSING, f"{above} is full: {free} MB are free", elsewhere)
    return Finding(name, OK, f"{path}, {free} MB are free")


def clock() -> Finding:
    """Tor needs it right within the hour. Files that are newer than now tell that it is behind."""
    dated = [Path(__file__), Path("/var/lib/dpkg/status"), Path("/etc/ld.so.cache")]
    dated += Path(paths.state()).glob("gateways/*/tor/cached-*consensus")
    now, newest = time.time(), 0.0
    for file in dated:
        with suppress(OSError):
            newest = max(newest, file.stat().st_mtime)
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now + SKEW < newest:
        last = time.strftime("%Y-%m-%d", time.gmtime(newest))
        return Finding(
            "clock", WARNING, f"{shown}, yet there are files of {last}", "sudo date -s …"
        )
    return Finding("clock", OK, shown)


def gateways() -> Iterator[Finding]:
    """Those that run: whether they answer, are ready, and are of this version."""
    for name, found in control.ask_all({"do": "inspect"}):
        title = f"gateway {name}"
        restart = f"ttp gateway down {name}"
        if isinstance(found, GatewayError):
            yield Finding(title, WARNING, found.cause, found.hint)
            continue
        version, tor = found["version"], found["tor"]
        told = f"version {version}, {found['uplink']['kind']}, {len(found['workloads'])} workloads"
        if version != __version__:
            yield Finding(title, WARNING, f"{told}; this ttp is {__version__}", restart)
        elif not found["ready"]:
            problem = found["problem"] or tor.get("summary", "")
            yield Finding(title, WARNING, f"{told}; Tor at {tor.get('percent', 0)} %: {problem}")
        else:
            yield Finding(title, OK, told)


def _lab(name: str) -> Finding:
    try:
        status = labs.status(name)
    except UsageError as error:
        return Finding(f"lab {name}", WARNING, error.cause)
    if status.dead:
        dead = f"ended: {', '.join(status.dead)}"
        return Finding(f"lab {name}", WARNING, dead, f"ttp lab down {name}; ttp lab up {name}")
    return Finding(f"lab {name}", OK, f"tor {status.lab.tor}, {status.memory_mb:.0f} MB")


def leftovers() -> Iterator[Finding]:
    """What a killed supervisor or holder left: directories whose lock nobody holds, and veth."""
    held = control.locked()
    for kind, undo in (("gateway", "ttp gateway up {0}, then down"), ("lab", "ttp lab down {0}")):
        for lock in sorted(Path(paths.runtime()).glob(f"{kind}s/*/lock")):
            with suppress(OSError):
                if lock.stat().st_ino not in held:
                    name = lock.parent.name
                    found = f"{lock.parent} of one that was killed; nothing of it runs"
                    yield Finding(f"left by {kind} {name}", WARNING, found, undo.format(name))
    if os.geteuid() == 0:
        for table in uplink_veth.left_tables():
            found = f"table inet {table} and forwarding, of a killed gateway with --uplink veth"
            yield Finding("left on the host", WARNING, found, "the next ttp gateway up removes it")
