"""The commands about workloads: list, look, wait, read, signal, renew, remove."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from typing import Annotated

import typer

from nsrun import inventory
from nsrun.cli import output
from nsrun.cli.completion import workloads
from nsrun.client import visible
from nsrun.errors import GatewayError, NsrunError, UsageError
from nsrun.inventory import Found
from nsrun.spec import check_name

Name = Annotated[
    str,
    typer.Argument(help="Name of the workload, as ttp ps shows it.", autocompletion=workloads),
]

OrHost = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        help="Name of the workload, as ttp ps shows it; without, the session of the whole host.",
        autocompletion=workloads,
        show_default=False,
    ),
]


def named(gateway: str | None) -> str | None:
    """An empty name is none: a variable that is not set in a script, and not the default."""
    return gateway if gateway is None else check_name("gateway", gateway)


Gateway = Annotated[
    str | None,
    typer.Option("--gateway", "-g", callback=named, help="Only of this gateway; else of all."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def ps(gateway: Gateway = None, as_json: Json = False) -> None:
    """List the workloads, and detached ones that have ended.

    If a gateway does not answer, those of the others are listed, and it ends with 1.
    """
    found, silent = inventory.every(gateway)
    if as_json:
        output.as_json([one.as_json() for one in found])
    else:
        _table(found)
    if silent:
        causes = "; ".join(f"{name}: {error.cause}" for name, error in silent.items())
        hint = next(iter(silent.values())).hint
        raise GatewayError("list the workloads of every gateway", causes, hint)


def _table(found: list[Found]) -> None:
    rows = [
        (
            one.name,
            one.gateway,
            _state(one),
            str(one.told["pid"]) if one.state == "running" else "-",
            one.told["identity"][0] if one.state == "running" else "-",
            f"{time.time() - one.told['since']:.0f} s",
            " ".join(one.told["command"])[:60],
        )
        for one in found
    ]
    output.table(("NAME", "GATEWAY", "STATE", "PID", "IDENTITY", "AGE", "COMMAND"), rows)


def inspect(name: Name, gateway: Gateway = None, as_json: Json = False) -> None:
    """Print all that is known of the workload NAME, with its processes."""
    found = inventory.one(name, gateway)
    told = {**found.as_json(), "processes": found.processes()}
    if as_json:
        output.as_json(told)
        return
    rows = {
        "name": found.name,
        "gateway": found.gateway,
        "state": _state(found),
        "command": " ".join(told["command"]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["since"])),
        "identity": " ".join(told["identity"]),
        "address": f"{' '.join(told['address'])} on {told['link']}",
        "network": f"net:[{told['network']}]",
        "processes": " ".join(map(str, told["processes"])) or "-",
        "log": told["log"] or "-",
    }
    for key, value in rows.items():
        print(f"{key:<10} {visible(value)}")


def wait(name: Name, gateway: Gateway = None) -> None:
    """Wait until the command of the detached workload NAME ends, and end with its exit code."""
    found = inventory.one(name, gateway)
    record = found.need_record("wait for")
    try:
        record.wait()
        code = record.exit_code()
    except OSError as error:
        raise NsrunError(f"wait for the workload {name}", error.strerror) from error
    if code is None:
        cause = "its monitor was killed: nobody knows how it ended"
        raise NsrunError(f"wait for the workload {name}", cause)
    found.settle()
    sys.exit(code)


def logs(
    name: OrHost = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the command has ended.")
    ] = False,
    gateway: Gateway = None,
) -> None:
    """Print what the detached workload NAME has printed, or what became of the whole host."""
    if name is None:
        from nsrun.cli import host

        file, watched = host.log(), host.is_logging
    else:
        record = inventory.one(name, gateway).need_record("read the log of")
        file, watched = record.log, record.watched
    if sys.stdout is None:  # closed by who started us: nobody wants to read it
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ttp logs NAME | head`
    try:
        with file.open("rb") as log:
            while True:
                going_on = follow and watched()  # first: it may print once more
                if log.tell() > os.fstat(log.fileno()).st_size:
                    log.seek(0)  # somebody has emptied it
                shutil.copyfileobj(log, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                if not going_on:
                    return
                time.sleep(0.1)  # nothing in the library tells that a file has grown
    except OSError as error:
        whose = f"the workload {name}" if name else "the whole host"
        raise NsrunError(f"read the log of {whose}", error.strerror) from error


def kill(
    name: Name,
    number: Annotated[
        str, typer.Option("--signal", "-s", metavar="SIGNAL", help="Name or number.")
    ] = "TERM",
    gateway: Gateway = None,
) -> None:
    """Send a signal to every process of the workload NAME; by KILL, wait until it has ended."""
    chosen = _signal(number)
    found = inventory.one(name, gateway)
    if chosen == signal.SIGKILL:
        found.end()
    else:
        found.send(chosen)


def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME…", help="Names of workloads.", autocompletion=workloads),
    ],
    gateway: Gateway = None,
) -> None:
    """Remove what is kept of detached workloads that have ended: how, and what they printed."""
    found = [inventory.one(name, gateway) for name in names]
    for one in found:
        if one.exit_code is None and one.state in inventory.ALIVE:
            raise UsageError(f"remove the workload {one.name}", "it runs", f"ttp kill {one.name}")
    for one in found:
        one.need_record("remove").remove()


def refresh(name: OrHost = None, gateway: Gateway = None) -> None:
    """Give the workload NAME, or the whole host, new circuits, from its next connection on."""
    from nsrun.gateway import control

    if name is None:
        from nsrun.cli import host

        host.refresh()
        return
    found = inventory.one(name, gateway)
    found.need_gateway("refresh")
    answer = control.ask(found.gateway, {"do": "refresh", "name": name})
    print(f"{name}: {answer['identity'][0]}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(ps)
    app.command()(inspect)
    app.command()(wait)
    app.command()(logs)
    app.command()(kill)
    app.command()(rm)
    app.command()(refresh)


def _state(found: Found) -> str:
    return f"exit {found.exit_code}" if found.state == "ended" else found.state


def _signal(text: str) -> int:
    """The number of a signal: ``TERM``, ``SIGTERM`` or ``15``. Raises UsageError."""
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        hint = "kill -l lists them"
        raise UsageError(f"send the signal {text}", "there is no such signal", hint) from None
