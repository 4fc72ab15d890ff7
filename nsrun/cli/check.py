"""``ttp check-leak``: try from inside a workload, on a live machine, what must not be possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsrun import enter
from nsrun.cli import leak, output, workload
from nsrun.errors import ExitCode, NsrunError, UsageError

if TYPE_CHECKING:
    from nsrun.leak.machine import Machine

UNSEEN = (
    "Not seen from inside: the wires. A packet that left and was not answered is not noticed;",
    "`ttp leaktest` watches every wire, in a lab.",
)

Gateway = Annotated[
    str | None,
    typer.Option(
        "--gateway",
        "-g",
        callback=workload.named,
        help="Name of the gateway to check; else that of ttp run.",
    ),
]


def check_leak(
    gateway: Gateway = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every single attempt.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try from inside a workload what must not be possible, and ask sites how they see it.

    Sites are asked through Tor only. Exit code 0 if all is contained; 1 if anything leaked, or if
    it could not be proven. Inside a workload, that one is checked; where the whole host is behind
    Tor, the host, unless a gateway is named.
    """
    from nsrun.host import control, leaks
    from nsrun.leak.machine import Machine, look
    from nsrun.leak.verdict import Value

    inside: tuple[str, ...] = (sys.executable, "-P", "-m", "nsrun.leak.inside")
    if Path(enter.WORKLOAD_MARK).exists():
        if gateway is not None:
            cause = "this process is in a workload, and that one is checked"
            raise UsageError(f"check the gateway {gateway}", cause, "leave out --gateway")
        around, command = Machine(), inside
    elif gateway is None and control.current() is not None:
        around, command = look(), leaks.command(control.verified_rules("check-leak"))
    else:
        chosen = ("--gateway", gateway) if gateway is not None else ()
        around, command = look(), (leak.program(), "run", *chosen, "--", *inside)
    found = []
    for one in _findings(command, around):
        found.append(one)
        if not as_json:
            _show(one, verbose)
    counts = {value: sum(one["value"] == value for one in found) for value in Value}
    worst = max(Value, key=lambda value: (counts[value] > 0) * list(Value).index(value))
    if as_json:
        output.as_json({"value": worst, "checks": found, "unseen": " ".join(UNSEEN)})
    else:
        told = ", ".join(f"{count} {value}" for value, count in counts.items())
        print(f"{worst}: {len(found)} checks: {told}", *UNSEEN, sep="\n")
    if worst is not Value.CONTAINED:
        raise typer.Exit(1)


def _findings(command: Sequence[str], around: Machine) -> Iterator[dict[str, Any]]:
    """Each as it is told. Raises NsrunError if the workload did not come to its end."""
    search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            json.dump(asdict(around), process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended: its exit code tells
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode == ExitCode.RUN_FAILED:  # ttp run has said why
        raise typer.Exit(ExitCode.FAILED)
    if process.returncode:
        raise NsrunError("check for leaks", f"the checks ended with {process.returncode}")


def _show(one: dict[str, Any], verbose: bool) -> None:
    print(f"{one['value']:<12}  {one['name']:<12}  {one['tried']}: {one['found']}", flush=True)
    for detail in one["details"] if verbose else ():
        print(f"{'':<28}{detail}")
