"""``ttp lab``: a private Tor network, for demonstrations and tests."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from nsrun.cli import output, settings
from nsrun.cli.completion import labs
from nsrun.client import visible
from nsrun.errors import ExitCode, NsrunError, UsageError
from nsrun.lab.topology import NAMESPACES

if TYPE_CHECKING:
    from nsrun.lab.control import Status

app = typer.Typer(help="A private Tor network with its own internet, LAN and host.")

Name = Annotated[
    str, typer.Argument(metavar="[NAME]", help="Name of the lab.", autocompletion=labs)
]
Lab = Annotated[
    str,
    typer.Option("--lab", envvar="TTP_LAB", help="Name of the lab.", autocompletion=labs),
]
In = Annotated[str, typer.Option("--in", metavar="PLACE", help="Where: host, router, lan or inet.")]


def _check(place: str = NAMESPACES[0], **_others: object) -> None:
    if place not in NAMESPACES:
        raise UsageError(f"enter {place}", f"{place!r} is none of {', '.join(NAMESPACES)}")


CLASS = settings.settable("lab", _check)


@app.command(cls=CLASS)
def up(
    name: Name = "lab",
    gateway: Annotated[
        bool,
        typer.Option("--gateway/--no-gateway", help="Start a gateway of the same name in it."),
    ] = True,
    onion: Annotated[
        bool, typer.Option("--onion", help="Wait for the onion service, too: 1.5 s more.")
    ] = False,
) -> None:
    """Start a lab; return when it carries traffic. Then: ttp run --gateway NAME -- COMMAND."""
    from nsrun.lab import control

    lab = control.up(name, _progress(), gateway=gateway, onion=onion)
    origin = "from a bake" if lab.baked else "from nothing"
    print(f"lab {lab.name}: up in {lab.boot_seconds:.1f} s {origin}, {len(lab.relays)} relays")


@app.command()
def down(name: Name = "lab") -> None:
    """End a lab and everything that runs in it."""
    from nsrun.lab import control

    control.down(name)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Name of a lab; all labs if none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the labs that are up: nodes, addresses, memory."""
    from dataclasses import asdict

    from nsrun.lab import control

    found = [control.status(one) for one in ([name] if name is not None else control.names())]
    if as_json:
        print(
            json.dumps(
                [{**asdict(s.lab), "memory_mb": s.memory_mb, "dead": s.dead} for s in found],
                indent=2,
            )
        )
    elif not found:
        print("no lab is up")
    else:
        print("\n\n".join(_describe(one) for one in found))


@app.command(cls=CLASS)
def logs(
    program: Annotated[
        str | None, typer.Argument(metavar="[NODE]", help="A relay, or web, dns, gateway, ….")
    ] = None,
    lab: Lab = "lab",
) -> None:
    """Print the log of a node of the lab; without NODE, the names of all logs."""
    from nsrun.lab import control

    if program is None:
        print("\n".join(control.logs(lab)))
    else:
        output.text(control.log(lab, program))


@app.command(
    cls=CLASS, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARGUMENTS]…")],
    lab: Lab = "lab",
    place: In = "host",
) -> None:
    """Run a command in the lab, as its root: on the simulated host, or where --in says.

    Nothing is torified here; for that there is ttp run --gateway NAME.
    """
    _enter(lab, place, command)


@app.command(cls=CLASS)
def shell(lab: Lab = "lab", place: In = "host") -> None:
    """Start a shell in the lab, as its root."""
    _enter(lab, place, [os.environ.get("SHELL") or "/bin/sh"])


def _enter(lab: str, place: str, command: list[str]) -> NoReturn:
    from nsrun.lab import control

    try:
        control.enter(lab, place, command)
    except OSError as error:
        line = f"ttp: cannot run {command[0]}: {error.strerror}"
        print(visible(line), file=sys.stderr)
        missing = isinstance(error, FileNotFoundError)
        sys.exit(ExitCode.NOT_FOUND if missing else ExitCode.NOT_EXECUTABLE)
    except NsrunError as error:
        error.code = ExitCode.RUN_FAILED  # as every code below that is the command's own
        raise


def _describe(found: Status) -> str:
    lab = found.lab
    origin = "from a bake" if lab.baked else "from nothing"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lab.since))
    rows = [
        ("lab", lab.name),
        ("up since", f"{since}, in {lab.boot_seconds:.1f} s {origin}"),
        ("tor", lab.tor),
        ("relays", " ".join(lab.relays)),
        *((name, " ".join(addresses)) for name, addresses in lab.exits.items()),
        ("onion", lab.onion),
        ("memory", f"{found.memory_mb:.0f} MB"),
        ("gateway", lab.name if lab.gateway else "none"),
    ]
    if found.dead:
        rows.append(("DEAD", " ".join(found.dead)))
    return "\n".join(f"{key:<10}{value}" for key, value in rows)


def _progress() -> Callable[[int, str], None]:
    """A bar on a terminal, else a line for each stage."""
    terminal = sys.stderr.isatty()

    def show(percent: int, summary: str) -> None:
        if terminal:
            bar = "█" * (percent // 5)
            end = "" if percent < 100 else "\r\033[K"
            line = f"\r\033[K{bar:░<20} {percent:3} % {summary}{end}"
        else:
            line = f"{percent:3} % {summary}\n"
        sys.stderr.write(line)
        sys.stderr.flush()

    return show
