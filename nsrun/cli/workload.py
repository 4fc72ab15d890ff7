"""The commands about workloads that run: list, look, signal, renew."""

from __future__ import annotations

import signal
import time
from typing import Annotated, Any

import typer

from nsrun.cli import output
from nsrun.cli.completion import workloads
from nsrun.client import visible
from nsrun.errors import UsageError

Name = Annotated[
    str,
    typer.Argument(help="Name of the workload, as ttp ps shows it.", autocompletion=workloads),
]
Gateway = Annotated[
    str | None, typer.Option("--gateway", "-g", help="Only of this gateway; else of all.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def ps(gateway: Gateway = None, as_json: Json = False) -> None:
    """List the workloads: name, process, identity (as Tor sees it), age and command."""
    from nsrun.gateway import control

    found = control.workloads(gateway)
    if as_json:
        output.as_json(found)
        return
    rows = [
        (
            workload["name"],
            workload["gateway"],
            "" if workload["guest"] is None else str(workload["guest"]),
            str(workload["pid"]),
            workload["identity"][0],
            _age(workload),
            " ".join(workload["command"])[:60],
        )
        for workload in found
    ]
    output.table(("NAME", "GATEWAY", "GUEST", "PID", "IDENTITY", "AGE", "COMMAND"), rows)


def inspect(name: Name, gateway: Gateway = None, as_json: Json = False) -> None:
    """Print all that is known of the workload NAME, with its processes."""
    from nsrun import processes
    from nsrun.gateway import control

    found = control.workload(name, gateway)
    found["processes"] = processes.members(found["network"], found["guest"])
    if as_json:
        output.as_json(found)
        return
    rows = {
        "name": found["name"],
        "gateway": found["gateway"],
        "command": " ".join(found["command"]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"])),
        "identity": " ".join(found["identity"]),
        "address": f"{' '.join(found['address'])} on {found['link']}",
        "network": f"net:[{found['network']}]",
        "processes": " ".join(map(str, found["processes"])),
    }
    for key, value in rows.items():
        print(f"{key:<10} {visible(value)}")


def kill(
    name: Name,
    number: Annotated[
        str, typer.Option("--signal", "-s", metavar="SIGNAL", help="Name or number.")
    ] = "TERM",
    gateway: Gateway = None,
) -> None:
    """Send a signal to every process of the workload NAME; by KILL, wait until it has ended."""
    from nsrun import processes
    from nsrun.gateway import control

    chosen = _signal(number)
    found = control.workload(name, gateway)
    if chosen == signal.SIGKILL:
        processes.end(found["network"], found["guest"], lambda: not control.lives(found))
    else:
        processes.send(found["network"], found["guest"], chosen)


def refresh(name: Name, gateway: Gateway = None) -> None:
    """Give the workload NAME a new identity: new circuits from its next connection on."""
    from nsrun.gateway import control

    found = control.workload(name, gateway)
    answer = control.ask(found["gateway"], {"do": "refresh", "name": name})
    print(f"{name}: {answer['identity'][0]}")


def _age(workload: dict[str, Any]) -> str:
    return f"{time.time() - workload['since']:.0f} s"


def _signal(text: str) -> int:
    """The number of a signal: ``TERM``, ``SIGTERM`` or ``15``. Raises UsageError."""
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        hint = "kill -l lists them"
        raise UsageError(f"send the signal {text}", "there is no such signal", hint) from None
