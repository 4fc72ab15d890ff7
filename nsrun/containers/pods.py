"""Containers behind Tor, as Docker and the gateways know them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from nsrun.containers import holders
from nsrun.containers.engine import Engine
from nsrun.gateway import control

CUT_OFF = "cut off"  # its gateway has gone, and with it the link
SILENT = "unknown"  # the gateway does not answer


def found(engine: Engine) -> list[dict[str, str]]:
    """Every container that joins a holder, or is attached itself. Raises NsrunError."""
    listed, silent = control.all_workloads()
    live = {(one["gateway"], one["name"]): one for one in listed}
    rows = []
    for holder in holders.found(engine):
        told = live.pop((holder.gateway, holder.workload), None)
        unknown = SILENT if holder.gateway in silent else CUT_OFF
        identity = " ".join(told["identity"]) if told else unknown
        for name, image, status in holder.users:
            where = {"workload": holder.workload, "gateway": holder.gateway}
            row = {"container": name, "image": image, "status": status}
            rows.append({**row, **where, "identity": identity})
    with engine.doing("list the containers"):
        running = {one["Id"]: one for one in engine.api.get("containers", "json")}
    for (gateway, name), told in live.items():
        one = running.get(_container(told["pid"]))
        if one is not None:
            row = {"container": one["Names"][0].removeprefix("/"), "image": one["Image"]}
            row |= {"status": one["Status"], "workload": name, "gateway": gateway}
            rows.append({**row, "identity": " ".join(told["identity"])})
    return rows


def _container(pid: int) -> str:
    """The container whose control group a process is in: cgroups(7); empty if it is none."""
    with suppress(OSError):
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        if match := re.search(r"[0-9a-f]{64}", groups):
            return match[0]
    return ""
