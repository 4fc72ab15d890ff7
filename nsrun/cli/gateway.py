"""``ttp gateway``: up and down, and what runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nsrun import client, paths
from nsrun.cli import output, settings
from nsrun.cli.completion import gateways
from nsrun.errors import UsageError
from nsrun.spec import GatewaySpec, check_seconds
from nsrun.torrc import check_fragment

app = typer.Typer(help="Gateways: where Tor runs.")

Named = Annotated[
    str,
    typer.Argument(metavar="[NAME]", help="Name of the gateway.", autocompletion=gateways),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def describe(
    name: str,
    uplink: Sequence[str] | None = None,
    torrc: Path | None = None,
    idle: float | None = None,
    group: str | None = None,
    bootstrap_timeout: float | None = None,
    **_others: object,
) -> GatewaySpec:
    """The gateway that options of ``ttp gateway up`` describe. Raises UsageError."""
    from nsrun.gateway import control
    from nsrun.gateway.guests import group_number

    spec = control.default_spec(name)
    if uplink:
        spec = replace(spec, uplinks=tuple(uplink))
    if torrc is not None:
        try:
            text = Path(torrc).read_text()
        except OSError as error:
            raise UsageError(f"read the torrc fragment {torrc}", error.strerror) from error
        spec = replace(spec, torrc=check_fragment(text, str(torrc)))
    if idle is not None:
        spec = replace(spec, idle=idle)
    if group is not None:
        number = group_number(group)
        if os.geteuid() == 0:  # a file of the system is read by every user
            spec = replace(spec, group=number)
    if bootstrap_timeout is not None:
        check_seconds("--bootstrap-timeout", bootstrap_timeout)
    return spec


def may_start(name: str, found: settings.Settings) -> bool:
    """Whether ``ttp run`` starts this gateway, when it is not up."""
    return name == "default" or name in found.gateways


def on_demand(name: str, found: settings.Settings) -> GatewaySpec:
    """The gateway that ``ttp run`` may start. Raises UsageError when it must be up."""
    if not may_start(name, found):
        raise UsageError(
            f"use the gateway {name}",
            "it is not up",
            f"ttp gateway up {name}, or for a lab: ttp lab up {name}",
        )
    return describe(name, **found.given(settings.GATEWAY, name))


def _check(**option: Any) -> None:
    describe("any", **option)


@app.command(cls=settings.settable(settings.GATEWAY, _check))
def up(
    context: typer.Context,
    name: Named = "default",
    uplink: Annotated[
        list[str] | None,
        typer.Option(
            "--uplink", help="pasta, slirp4netns or veth; several are tried in this order."
        ),
    ] = None,
    torrc: Annotated[
        Path | None,
        typer.Option("--torrc", help="File with more options for Tor.", dir_okay=False),
    ] = None,
    idle: Annotated[
        float, typer.Option("--idle", min=0, help="Stop after so many unused seconds; 0: never.")
    ] = 0.0,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", help="Let members of this group use it, each for himself; only root can."
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and be the gateway; for service managers.")
    ] = False,
    bootstrap_timeout: Annotated[
        float, typer.Option("--bootstrap-timeout", min=0, help="Seconds to wait for Tor.")
    ] = 180.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every effect, as it happens.")
    ] = False,
) -> None:
    """Start the gateway NAME and wait until its Tor is ready."""
    from nsrun.gateway import control

    if group is not None and os.geteuid() != 0 and _is_given(context, "group"):
        raise UsageError(f"share the gateway {name}", "only root can", "use sudo")
    spec = describe(name, uplink, torrc, idle, group, bootstrap_timeout)
    if control.owner(name) == os.geteuid():
        raise UsageError(f"start the gateway {name}", "it is up", f"ttp gateway down {name}")
    echo = client.echo if verbose else None
    if foreground:
        from nsrun.gateway.__main__ import serve
        from nsrun.gateway.service import teller

        serve(spec, teller(echo))
        return
    with control.start(spec, echo):
        control.ask(name, {"do": "wait", "timeout": bootstrap_timeout})


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option is on the command line, not only in a file."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def down(name: Named = "default") -> None:
    """Stop the gateway NAME. Its workloads keep running, and reach nothing."""
    from nsrun.gateway import control

    control.stop(name)


@app.command("ls")
def list_(as_json: Json = False) -> None:
    """List the gateways that run."""
    from nsrun.gateway import control

    found = control.inspect_all()
    if as_json:
        output.as_json(found)
        return
    rows = [
        (
            gateway["name"],
            "ready" if gateway["ready"] else f"{gateway['tor'].get('percent', 0)} %",
            gateway["uplink"]["kind"],
            str(len(gateway["workloads"])),
        )
        if "tor" in gateway
        else (gateway["name"], "silent", "", "")
        for gateway in found
    ]
    output.table(("NAME", "TOR", "UPLINK", "WORKLOADS"), rows)


@app.command()
def logs(name: Named = "default") -> None:
    """Print the log of the gateway NAME, of its last run if it is down."""
    from nsrun.gateway import control

    state = control.default_spec(name).state
    if control.owner(name) is not None:  # whose files may be elsewhere: a lab has its own
        gateway = control.ask(name, {"do": "inspect"})
        state = f"/proc/{gateway['pid']}/root{gateway['state']}"
    path = Path(paths.log(state))
    try:
        output.text(path.read_text(errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"read the log of the gateway {name}", "it never ran") from None
    except PermissionError:
        raise UsageError(f"read the log of the gateway {name}", "only root can") from None


@app.command()
def inspect(name: Named = "default") -> None:
    """Print all that is known of the gateway NAME, as JSON."""
    from nsrun.gateway import control

    output.as_json(control.ask(name, {"do": "inspect"}))
