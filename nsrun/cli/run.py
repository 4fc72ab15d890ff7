"""``ttp run`` and ``ttp plan``: their options, defined once, and the way to a gateway."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from nsrun import client
from nsrun.errors import NsrunError, UsageError
from nsrun.spec import RunSpec
from nsrun.user import resolve

CONTEXT = {"allow_interspersed_args": False}

Command = Annotated[list[str], typer.Argument(metavar="COMMAND [ARGS]…", show_default=False)]
Gateway = Annotated[
    str, typer.Option("--gateway", "-g", envvar="TTP_GATEWAY", help="Name of the gateway to use.")
]
Name = Annotated[
    str | None, typer.Option("--name", help="Name of the workload, as ttp ps shows it.")
]
User = Annotated[
    str | None,
    typer.Option("--user", help="Run as this user (name or number); only root can."),
]
NoIpv6 = Annotated[bool, typer.Option("--no-ipv6", help="Give the command no IPv6 at all.")]
Timeout = Annotated[
    float,
    typer.Option("--bootstrap-timeout", min=0, help="Seconds to wait until Tor is ready."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every effect, as it happens.")]


def run(
    command: Command,
    gateway: Gateway = "default",
    name: Name = None,
    user: User = None,
    no_ipv6: NoIpv6 = False,
    bootstrap_timeout: Timeout = 180.0,
    verbose: Verbose = False,
) -> None:
    """Run COMMAND behind Tor. Its exit code is ours; 125 if we fail, 126 and 127 as env(1).

    The gateway named default is started if it is not up.
    """
    from nsrun.gateway import control

    _spec(command, gateway, name, user, no_ipv6, bootstrap_timeout, verbose)
    arguments = sys.argv[sys.argv.index("run") + 1 :]
    try:
        for attempt in (1, 2):
            try:
                client.become(arguments, gateway)
            except client.NotHereError:
                if attempt == 2:
                    raise NsrunError("reach the gateway", "it ended as soon as it was up") from None
                if gateway != "default":
                    raise UsageError(
                        f"use the gateway {gateway}",
                        "it is not up",
                        f"ttp gateway up {gateway}, or for a lab: ttp lab up {gateway}",
                    ) from None
                control.start(control.default_spec(gateway), echo=client.echo if verbose else None)
    except client.RefusedError as failure:
        client.fail(failure)


def plan(
    command: Command,
    gateway: Gateway = "default",
    name: Name = None,
    user: User = None,
    no_ipv6: NoIpv6 = False,
    bootstrap_timeout: Timeout = 180.0,
    verbose: Verbose = False,
) -> None:
    """Print every step that `ttp run` would take on a new gateway, and do nothing.

    What runs on the host is shown as it is; namespaces are shown by name, though they have none.
    """
    from nsrun import facts
    from nsrun.gateway import control, uplink
    from nsrun.plan import make_plan
    from nsrun.steps import StartUplink

    spec = _spec(command, gateway, name, user, no_ipv6, bootstrap_timeout, verbose)
    rootless = os.geteuid() != 0
    caller, environment = resolve(spec, client.caller(), rootless)
    made = make_plan(control.default_spec(gateway), facts.probe(), caller, rootless)
    print("# the gateway, by its supervisor, once")
    for step in made.gateway:
        print(step.describe())
        if isinstance(step, StartUplink):
            for wanted in step.candidates:
                print(*uplink.describe(uplink.value(wanted, gateway), "gateway"), sep="\n")
    print("\n# the workload, by the supervisor")
    for step in made.workload:
        print(step.describe())
    print("\n# the command, by the client")
    for verb, *arguments in made.enter:
        print(" ".join([str(verb), *(repr(argument) for argument in arguments)]))
    for variable, value in environment.items():
        print(f"export {variable}={value}")
    print("exec", *command)


def parse(arguments: list[str], gateway: str) -> RunSpec | None:
    """The RunSpec of the arguments after ``ttp run``, ``gateway`` being the client's default.

    None if they are for the full interface to deal with: help is wanted, or they are wrong.
    """
    try:
        command = _command()
        with command.make_context(
            "run", list(arguments), default_map={"gateway": gateway}
        ) as found:
            return _spec(**found.params)
    except (typer.Exit, TyperException, UsageError):
        return None


def _spec(
    command: list[str],
    gateway: str,
    name: str | None,
    user: str | None,
    no_ipv6: bool,
    bootstrap_timeout: float,
    verbose: bool,
) -> RunSpec:
    return RunSpec(tuple(command), gateway, name, user, not no_ipv6, bootstrap_timeout, verbose)


@cache
def _command() -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command("run", context_settings=CONTEXT)(run)
    return typer.main.get_command(app)
