"""Holders: containers that do nothing but keep a network, which others then join.

Docker gives `--network container:HOLDER` no resolver of its own, no other network and no published
port, so there is nothing beside the link. A holder is in use as long as the process that made it
lives (which becomes docker run), or a container that joined it exists; everybody who comes by
removes those that are not, so that a kill -9 leaves none for long.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsrun.containers import pause
from nsrun.containers.api import CONFLICT, NOT_FOUND, RefusalError
from nsrun.containers.engine import Engine
from nsrun.errors import NsrunError

if TYPE_CHECKING:  # who only sweeps needs neither
    from nsrun.containers.options import Wanted
    from nsrun.spec import RunSpec

GATEWAY, WORKLOAD, CREATOR = "ttp.gateway", "ttp.workload", "ttp.creator"  # labels
ISOLATE, IPV6, SOCKS = "ttp.isolate", "ttp.ipv6", "ttp.socks"  # what the workload was given
JOINS = "container:"
ENDED = "ZX"  # states of a process


@dataclass(frozen=True)
class Holder:
    """A holder that exists. ``creator`` is a process id and the time when that was started,
    ``users`` are the containers that join it: name, image, and what docker ps says of them.
    """

    id: str
    gateway: str
    workload: str
    creator: str
    running: bool
    users: tuple[tuple[str, str, str], ...]

    @property
    def in_use(self) -> bool:
        return bool(self.users) or started(self.creator.partition(" ")[0]) == self.creator

    def holds(self, mode: str) -> bool:
        """Whether a container of that network mode joins this one."""
        return mode == f"{JOINS}{self.id}"


def started(pid: str) -> str:
    """A process, as ``creator`` has it: its number, and field 22 of proc_pid_stat(5).

    Empty for one that has ended, a zombie too: when its parent reaps it, nobody is told.
    """
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return f"{pid} {fields[19]}" if fields[0] not in ENDED else ""
    return ""


def create(engine: Engine, wanted: Wanted, spec: RunSpec, resolver: str) -> str:
    """Make a holder, without a network; its id. Raises NsrunError."""
    image = _image(engine)
    settings = {
        "Image": image.tag,
        "Hostname": wanted.hostname,
        "Domainname": wanted.domainname,
        "Labels": {
            GATEWAY: spec.gateway,
            WORKLOAD: str(spec.name),
            CREATOR: started(str(os.getpid())),
            ISOLATE: spec.isolate,
            IPV6: str(int(spec.ipv6)),
            SOCKS: str(int(spec.socks)),
        },
        "HostConfig": {
            "NetworkMode": "none",
            "Dns": [resolver],
            "DnsSearch": ["."],  # else the host's, whose names would be sent to exits
            "ExtraHosts": _pairs(wanted.hosts),
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "PidsLimit": 1,
            "LogConfig": {"Type": "none"},
        },
    }
    with engine.doing("make a holder for the container's network"):
        try:
            return _made(engine, spec, settings)
        except RefusalError as error:
            if error.status != NOT_FOUND:
                raise
        engine.api.post("images", "load", body=image.archive, quiet=1)
        return _made(engine, spec, settings)


def _made(engine: Engine, spec: RunSpec, settings: dict[str, Any]) -> str:
    made = engine.api.post("containers", "create", body=settings, name=f"ttp-{spec.name}")
    return str(made["Id"])


def start(engine: Engine, holder: str) -> Callable[[], None]:
    """Have one started; what comes back waits for that. Both raise NsrunError."""
    doing = "start a holder for the container's network"
    with engine.doing(doing):
        ended = engine.api.start(holder)

    def wait() -> None:
        with engine.doing(doing):
            ended()

    return wait


def remove(engine: Engine, holder: str) -> None:
    """Remove one; that it is gone already is no error. Raises NsrunError."""
    with engine.doing("remove a holder"):
        try:
            engine.api.delete("containers", holder, force=1)
        except RefusalError as error:
            if error.status not in (NOT_FOUND, CONFLICT):  # somebody else is removing it
                raise


def found(engine: Engine) -> list[Holder]:
    """All holders, with the containers that use them. Raises NsrunError."""
    with engine.doing("list the containers"):
        every = engine.api.get("containers", "json", all=1)
    holders = [one for one in every if _is_holder(one)]
    users: dict[str, list[tuple[str, str, str]]] = {one["Id"]: [] for one in holders}
    for one in every:
        joined = str(one["HostConfig"].get("NetworkMode", "")).removeprefix(JOINS)
        if joined in users:
            name = one["Names"][0].removeprefix("/")
            users[joined].append((name, one["Image"], one["Status"]))
    return [
        Holder(
            one["Id"],
            one["Labels"][GATEWAY],
            one["Labels"].get(WORKLOAD, ""),
            one["Labels"][CREATOR],
            one["State"] == "running",
            tuple(users[one["Id"]]),
        )
        for one in holders
    ]


def _is_holder(container: dict[str, Any]) -> bool:
    """By what only ttp makes: anybody, an image too, can have its labels."""
    image, mode = str(container["Image"]), container["HostConfig"].get("NetworkMode")
    ours = image.startswith(f"{pause.NAME}:") and mode == "none"
    return ours and {CREATOR, GATEWAY} <= container["Labels"].keys()


def sweep(engine: Engine) -> list[Holder]:
    """Remove every holder that nobody uses; those that stay. Raises NsrunError."""
    every = found(engine)
    for holder in every:
        if not holder.in_use:
            remove(engine, holder.id)
    return [holder for holder in every if holder.in_use]


def _image(engine: Engine) -> pause.Image:
    architecture = engine.about["Architecture"]
    if architecture not in pause.PROGRAMS:
        cause = f"it has no program for {architecture}, only for {', '.join(pause.PROGRAMS)}"
        raise NsrunError("make a holder", cause, "attach a running container: --network none")
    return pause.image(architecture)


def _pairs(hosts: tuple[str, ...]) -> list[str]:
    """NAME:ADDRESS, or NAME=ADDRESS, as docker's --add-host takes them; the daemon the former."""
    pairs = (host.partition("=" if "=" in host else ":") for host in hosts)
    return [f"{name}:{address.strip('[]')}" for name, _, address in pairs]
