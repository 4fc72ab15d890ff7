"""Holders: containers that do nothing but keep a network, which others then join.

Docker gives `--network container:HOLDER` no resolver of its own, no other network and no published
port, so there is nothing beside the link. A holder is in use as long as the process that made it
lives (which becomes docker run), or a container that joined it exists; everybody who comes by
removes those that are not, so that a kill -9 leaves none for long.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.errors import APIError, ImageNotFound, NotFound

from nsrun.containers import pause
from nsrun.containers.engine import Engine
from nsrun.containers.options import Wanted
from nsrun.errors import NsrunError
from nsrun.spec import RunSpec

GATEWAY, WORKLOAD, CREATOR = "ttp.gateway", "ttp.workload", "ttp.creator"  # labels
ISOLATE, IPV6 = "ttp.isolate", "ttp.ipv6"  # what the workload was given
JOINS = "container:"


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
    """A process, as ``creator`` has it: its number, and field 22 of proc_pid_stat(5)."""
    with suppress(OSError):
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return f"{pid} {fields[19]}"
    return ""


def create(engine: Engine, wanted: Wanted, spec: RunSpec, resolver: str) -> str:
    """Make and start a holder, without a network; its id. Raises NsrunError."""
    api = engine.api
    limits = api.create_host_config(
        network_mode="none",
        dns=[resolver],
        dns_search=["."],  # else the host's, whose names would be sent to exits
        extra_hosts=_pairs(wanted.hosts),
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        read_only=True,
        pids_limit=1,
        log_config={"Type": "none"},
    )
    with engine.doing("make a holder for the container's network"):
        image = _image(engine)
        settings: dict[str, Any] = {
            "name": f"ttp-{spec.name}",
            "hostname": wanted.hostname or None,
            "domainname": wanted.domainname or None,
            "host_config": limits,
            "labels": {
                GATEWAY: spec.gateway,
                WORKLOAD: str(spec.name),
                CREATOR: started(str(os.getpid())),
                ISOLATE: spec.isolate,
                IPV6: str(int(spec.ipv6)),
            },
        }
        try:
            made = api.create_container(image.tag, **settings)["Id"]
        except ImageNotFound:
            for _ in api.load_image(image.archive):
                pass  # what it says is read to its end
            made = api.create_container(image.tag, **settings)["Id"]
    try:
        with engine.doing("start a holder for the container's network"):
            api.start(made)
    except BaseException:
        remove(engine, made)
        raise
    return str(made)


def remove(engine: Engine, holder: str) -> None:
    """Remove one; that it is gone already is no error. Raises NsrunError."""
    with engine.doing("remove a holder"), suppress(NotFound):
        try:
            engine.api.remove_container(holder, force=True)
        except APIError as error:
            if error.status_code != 409:  # somebody else is removing it
                raise


def found(engine: Engine) -> list[Holder]:
    """All holders, with the containers that use them. Raises NsrunError."""
    with engine.doing("list the containers"):
        every = engine.api.containers(all=True)
    holders = [one for one in every if CREATOR in one["Labels"] and GATEWAY in one["Labels"]]
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


def sweep(engine: Engine) -> list[Holder]:
    """Remove every holder that nobody uses; those that stay. Raises NsrunError."""
    every = found(engine)
    for holder in every:
        if not holder.in_use:
            remove(engine, holder.id)
    return [holder for holder in every if holder.in_use]


def _image(engine: Engine) -> pause.Image:
    architecture = engine.api.version()["Arch"]
    if architecture not in pause.PROGRAMS:
        cause = f"it has no program for {architecture}, only for {', '.join(pause.PROGRAMS)}"
        raise NsrunError("make a holder", cause, "attach a running container: --network none")
    return pause.image(architecture)


def _pairs(hosts: tuple[str, ...]) -> dict[str, str]:
    """NAME:ADDRESS, or NAME=ADDRESS, as docker's --add-host takes them."""
    pairs = (host.partition("=" if "=" in host else ":") for host in hosts)
    return {name: address for name, _, address in pairs}
