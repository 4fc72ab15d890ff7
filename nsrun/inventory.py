"""Workloads as their user knows them: those that live, and detached ones by their records.

running   a supervisor says so
cut off   its gateway has gone, and the command has not: it reaches nothing any more
silent    its gateway does not answer, and the command has not ended; of detached ones only
ended     the command of a detached one has; ``exit_code`` says how
lost      the same, but its monitor was killed, so nobody knows how, or whether it runs still
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nsrun import processes, records
from nsrun.errors import AbsentError, GatewayError, UsageError
from nsrun.gateway import control
from nsrun.records import Record

SETTLED = 5.0  # seconds, at most
ALIVE = ("running", "cut off", "silent")


@dataclass(frozen=True)
class Found:
    """A workload. ``told`` is what its supervisor says, or said when it began."""

    told: dict[str, Any]
    state: str
    exit_code: int | None = None
    record: Record | None = None

    @property
    def name(self) -> str:
        return str(self.told["name"])

    @property
    def gateway(self) -> str:
        return str(self.told["gateway"])

    def as_json(self) -> dict[str, Any]:
        """For ``--json``. ``log`` is null for one that was not detached."""
        log = str(self.record.log) if self.record else None
        return {**self.told, "state": self.state, "exit_code": self.exit_code, "log": log}

    def processes(self) -> list[int]:
        """Process ids, if it runs: later the number of its namespace may be another one's."""
        if self.state not in ALIVE:
            return []
        return processes.members(self.told["network"], self.told["guest"])

    def send(self, number: int) -> None:
        """Send a signal to every process. Raises UsageError if it is not known to run."""
        self._need("signal", *ALIVE)
        processes.send(self.told["network"], self.told["guest"], number)

    def end(self) -> None:
        """Kill every process. Raises as ``send``, and NsrunError if some stay."""
        self._need("kill", *ALIVE)
        processes.end(self.told["network"], self.told["guest"], lambda: not self._lives())

    def settle(self) -> None:
        """Wait until the gateway has forgotten it, if no process is left: then its name is free.

        The kernel takes a link apart a moment after the last process has ended.
        """
        deadline = time.monotonic() + SETTLED
        while self._lives() and not self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)  # only the supervisor hears of it

    def need_gateway(self, doing: str) -> None:
        """Raises UsageError if it is not running, or its gateway has gone."""
        self._need(doing, "running")

    def need_record(self, doing: str) -> Record:
        """Raises UsageError if it was not detached."""
        if self.record is None:
            cause = "it was not detached: what it prints, and how it ends, is its caller's"
            raise UsageError(f"{doing} the workload {self.name}", cause, "ttp run --detach")
        return self.record

    def _need(self, doing: str, *states: str) -> None:
        if self.state not in states:
            causes = {
                "cut off": "its gateway is gone",
                "silent": "its gateway does not answer",
                "ended": "it has ended",
            }
            cause = causes.get(self.state, "its monitor was killed: nobody knows whether it runs")
            raise UsageError(f"{doing} the workload {self.name}", cause, "ttp ps lists them")

    def _lives(self) -> bool:
        if self.state == "running":
            with suppress(GatewayError):
                there = control.workloads(self.gateway)
                return any(one["link"] == self.told["link"] for one in there)
        return bool(self.processes())


def every(gateway: str | None) -> tuple[list[Found], dict[str, GatewayError]]:
    """The workloads of a gateway, or of all that this user may use; and those of all that do not
    answer, by name.

    Raises AbsentError if the gateway is not up and there are no records of it, and GatewayError.
    """
    kept = {(one.gateway, one.name): one for one in records.found(gateway)}
    silent: dict[str, GatewayError] = {}
    try:
        if gateway is None:
            live, silent = control.all_workloads()
        else:
            live = control.workloads(gateway)
    except AbsentError:
        if not kept:
            raise
        live = []
    found = []
    for told in live:
        record = kept.get((told["gateway"], told["name"]))
        if record is not None and _since(record) == told["since"]:
            del kept[record.gateway, record.name]
            found.append(Found(told, "running", record.exit_code(), record))
        else:
            found.append(Found(told, "running"))
    for record in kept.values():
        with suppress(OSError, ValueError):  # it has just been removed, or was never complete
            found.append(_recorded(record, "silent" if record.gateway in silent else "cut off"))
    return found, silent


def one(name: str, gateway: str | None) -> Found:
    """The workload of that name: our own before a guest's, one that runs before one that has run.

    Raises UsageError if there is none, or one in each of two places; GatewayError if it may be on
    a gateway that does not answer.
    """
    doing = f"find the workload {name}"
    all_of_them, silent = every(gateway)
    found = [one for one in all_of_them if one.name == name]
    found = [one for one in found if one.told["guest"] in (None, os.geteuid())] or found
    found = [one for one in found if one.state == "running"] or found
    if not found and silent:
        raise next(iter(silent.values()))
    if not found:
        raise UsageError(doing, "there is none", "ttp ps lists them")
    places = sorted({one.gateway for one in found})
    if len(places) > 1:
        cause = f"the gateways {' and '.join(places)} have one each"
        raise UsageError(doing, cause, "choose by --gateway")
    if len(found) > 1:
        raise UsageError(doing, "several guests have one", "ttp ps --json")
    return found[0]


def _recorded(record: Record, alive: str) -> Found:
    """A workload that no supervisor tells of; its state is ``alive`` if its command lives."""
    watched = record.watched()  # first: it may end in between
    code = record.exit_code()
    state = alive if watched else "lost" if code is None else "ended"
    return Found(record.started(), state, code, record)


def _since(record: Record) -> float | None:
    with suppress(OSError, ValueError):
        return float(record.started()["since"])
    return None
