"""Containers behind Tor, as Docker and the gateways know them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsrun.containers import driver, holders
from nsrun.containers.engine import Engine
from nsrun.gateway import control

CUT_OFF = "cut off"  # its gateway has gone, and with it the link
SILENT = "unknown"  # the gateway does not answer


def found(engine: Engine) -> list[dict[str, str]]:
    """Every container that joins a holder, runs on a network of the driver, or is attached.

    Raises NsrunError.
    """
    listed, silent = control.all_workloads()
    live = {(one["gateway"], one["name"]): one for one in listed}
    rows = []

    def add(container: tuple[str, str, str], gateway: str, workload: str) -> None:
        row = dict(zip(("container", "image", "status"), container, strict=True))
        row |= {"workload": workload, "gateway": gateway}
        told = live.get((gateway, workload))
        unknown = SILENT if gateway in silent else CUT_OFF
        rows.append({**row, "identity": " ".join(told["identity"]) if told else unknown})

    held = holders.found(engine)
    for holder in held:
        for user in holder.users:
            add(user, holder.gateway, holder.workload)
    with engine.doing("list the containers"):
        running = {one["Id"]: one for one in engine.library.containers()}
        ours = _networks(engine)
    for one in running.values():
        networks = one["NetworkSettings"]["Networks"]
        others = [name for name, end in networks.items() if end["NetworkID"] not in ours]
        for end in networks.values():
            if end["NetworkID"] in ours:
                add(_told(one), ours[end["NetworkID"]], driver.workload(end["EndpointID"]))
                if others:
                    rows[-1]["identity"] = f"LEAKS by its other network: {' '.join(others)}"
    of_holders = {(holder.gateway, holder.workload) for holder in held}
    for (gateway, name), told in live.items():
        attached = running.get(_container(told["pid"]))
        if attached is not None and (gateway, name) not in of_holders:
            add(_told(attached), gateway, name)
    return rows


def _told(container: dict[str, Any]) -> tuple[str, str, str]:
    return container["Names"][0].removeprefix("/"), container["Image"], container["Status"]


def _networks(engine: Engine) -> dict[str, str]:
    """Of the driver's, by their id: the gateway."""
    return {
        one["Id"]: (one["Options"] or {}).get("ttp.gateway", "default")
        for one in engine.library.networks()
        if one["Driver"] == driver.NAME
    }


def _container(pid: int) -> str:
    """The container whose control group a process is in: cgroups(7); empty if it is none."""
    with suppress(OSError):
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        if match := re.search(r"[0-9a-f]{64}", groups):
            return match[0]
    return ""
