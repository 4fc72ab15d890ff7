"""What runs commands: ``ttp run``, ``shell``, ``exec`` and ``plan``. Options are defined once."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.exceptions import TyperException

from nsrun import client
from nsrun.cli import settings
from nsrun.cli.completion import gateways, programs, workloads
from nsrun.errors import NsrunError, UsageError
from nsrun.ruleset import HTTP_AT, SOCKS_AT
from nsrun.spec import GatewaySpec, Isolation, RunSpec, Strict
from nsrun.user import resolve

CONTEXT = {"allow_interspersed_args": False}

Command = Annotated[
    list[str],
    typer.Argument(metavar="COMMAND [ARGS]…", show_default=False, autocompletion=programs),
]
Gateway = Annotated[
    str,
    typer.Option(
        *("--gateway", "-g"),
        envvar="TTP_GATEWAY",
        help="Name of the gateway to use.",
        autocompletion=gateways,
    ),
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
Isolate = Annotated[
    Isolation, typer.Option("--isolate", help="What shares no circuit with another of its kind.")
]
Socks = Annotated[
    bool,
    typer.Option(
        "--socks",
        help=f"Tor's SOCKS proxy at 127.0.0.1:{SOCKS_AT}, and in ALL_PROXY; "
        f"HTTP CONNECT at 127.0.0.1:{HTTP_AT}.",
    ),
]
Pcap = Annotated[
    str | None,
    typer.Option(
        "--pcap",
        metavar="FILE",
        show_default=False,
        help="Record what the command sends and receives, for tcpdump and wireshark.",
    ),
]
Workdir = Annotated[
    str | None, typer.Option("--workdir", metavar="DIR", help="Directory to run in; else this one.")
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME[=VALUE]", help="Set a variable, or keep ours; can be repeated."
    ),
]
EnvFile = Annotated[
    list[str] | None,
    typer.Option("--env-file", metavar="FILE", help="The same, a line each; can be repeated."),
]
TimeLimit = Annotated[
    float,
    typer.Option("--timeout", min=0, help="End it after so many seconds, by TERM, then KILL."),
]
Strictly = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="For an untrusted command: own processes, /tmp and /run, no socket files outside.",
    ),
]
AllowSocket = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-socket", metavar="PATH", help="With --strict: it may connect to PATH. Repeatable."
    ),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Print the workload's name, and let it run on by itself."),
]
StatusFd = Annotated[
    int | None,
    typer.Option(
        "--json-status-fd", metavar="FD", min=0, help="Descriptor to tell what runs, as JSON."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every effect, as it happens.")]


def request(
    command: Command,
    gateway: Gateway = "default",
    name: Name = None,
    user: User = None,
    no_ipv6: NoIpv6 = False,
    bootstrap_timeout: Timeout = 180.0,
    strict: Strictly = False,
    allow_socket: AllowSocket = None,
    verbose: Verbose = False,
    isolate: Isolate = "workload",
    socks: Socks = False,
    workdir: Workdir = None,
    env: Env = None,
    env_file: EnvFile = None,
    timeout: TimeLimit = 0.0,
    pcap: Pcap = None,
    detach: Detach = False,
    json_status_fd: StatusFd = None,
) -> RunSpec:
    """The options of every command that runs something: what the command line says, as a value."""
    if pcap == "":
        raise UsageError("record in the file ''", "it has no name")
    if allow_socket and not strict:
        raise UsageError("allow a socket", "without --strict none is forbidden", "add --strict")
    return RunSpec(
        tuple(command),
        gateway,
        name,
        user,
        not no_ipv6,
        bootstrap_timeout,
        verbose,
        isolate=isolate,
        socks=socks,
        workdir=workdir,
        env=tuple(env or ()),
        env_files=tuple(env_file or ()),
        timeout=timeout,
        strict=Strict(tuple(allow_socket or ())) if strict else None,
        pcap=pcap or "",
        detach=detach,
        status_fd=-1 if json_status_fd is None else json_status_fd,
    )


def _check(**option: Any) -> None:
    request(["true"], **{"strict": True, **option})  # for those that mean nothing without


CLASS = settings.settable("run", _check)


def takes_request(act: Callable[[RunSpec], None], *, of_shell: bool = False) -> Callable[..., None]:
    """A typer command that has the options of ``request`` and acts on the value they make.

    One ``of_shell`` is not told which command to run, and cannot do without a terminal.
    """

    @wraps(act)
    def command(**given: Any) -> None:
        if of_shell:
            given["command"] = [_shell()]
        act(request(**given))

    left_out = {"command", "detach"} if of_shell else set()
    hints = get_type_hints(request, include_extras=True)
    signature = inspect.signature(request, eval_str=True)
    command.__annotations__ = {
        name: hint for name, hint in hints.items() if name not in {*left_out, "return"}
    }
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[one for one in signature.parameters.values() if one.name not in left_out],
        return_annotation=None,
    )
    return command


def run(spec: RunSpec) -> None:
    """Run COMMAND behind Tor. Its exit code is ours; 125 if we fail, 126 and 127 as env(1).

    The gateway named default, and those that a configuration file describes, are started if they
    are not up.
    """
    _enter("run", spec)


def shell(spec: RunSpec) -> None:
    """Run your shell ($SHELL) behind Tor: as `ttp run -- $SHELL`, with a prompt that says so."""
    _enter("shell", spec)


def _enter(verb: str, spec: RunSpec) -> None:
    from nsrun.cli.gateway import on_demand
    from nsrun.gateway import control

    arguments = sys.argv[sys.argv.index(verb) + 1 :]
    try:
        with suppress(client.NotHereError):
            client.become(arguments, spec.gateway, settings.gathered(), verb)
        echo = client.echo if spec.verbose else None
        with control.start(on_demand(spec.gateway, settings.here()), echo=echo):
            client.become(arguments, spec.gateway, settings.gathered(), verb)
    except client.NotHereError:
        raise NsrunError("reach the gateway", "it ended as soon as it was up") from None
    except client.RefusedError as failure:
        client.fail(failure)


def exec_(
    workload: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Name of the workload.", autocompletion=workloads),
    ],
    command: Command,
    gateway: Annotated[
        str | None, typer.Option("--gateway", "-g", help="Only of this gateway; else of all.")
    ] = None,
    user: User = None,
    workdir: Workdir = None,
    env: Env = None,
    env_file: EnvFile = None,
    verbose: Verbose = False,
) -> None:
    """Run COMMAND in the network of the workload NAME: the same identity, the same circuits."""
    from nsrun import inventory

    found = inventory.one(workload, gateway)
    found.need_gateway("join")
    joining(workload, command, found.gateway, user, workdir, env, env_file, verbose)
    arguments = sys.argv[sys.argv.index("exec") + 1 :]
    try:
        client.become(arguments, found.gateway, settings.gathered(), "exec")
    except client.NotHereError:
        raise NsrunError(f"join the workload {workload}", "it has just ended") from None
    except client.RefusedError as failure:
        client.fail(failure)


def joining(
    workload: str,
    command: list[str],
    gateway: str,
    user: str | None,
    workdir: str | None,
    env: list[str] | None,
    env_file: list[str] | None,
    verbose: bool,
) -> RunSpec:
    """What ``ttp exec`` asks for, as a value."""
    return RunSpec(
        tuple(command[command[0] == "--" :]),  # after NAME, `--` is taken for an argument
        gateway,
        user=user,
        verbose=verbose,
        workdir=workdir,
        env=tuple(env or ()),
        env_files=tuple(env_file or ()),
        join=workload,
    )


def _shell() -> str:
    return os.environ.get("SHELL") or "/bin/sh"


def plan(spec: RunSpec) -> None:
    """Print every step that `ttp run` would take on a new gateway, and do nothing.

    On a gateway that ttp run could not start, a lab's for instance, those that are left.
    What runs on the host is shown as it is; namespaces are shown by name, though they have none.
    """
    from nsrun import facts
    from nsrun.cli.gateway import may_start, on_demand
    from nsrun.gateway import control, uplink
    from nsrun.gateway.requests import CA_FILE, CA_VARIABLES
    from nsrun.plan import make_plan
    from nsrun.steps import StartUplink

    defaults, user = settings.here(), control.owner(spec.gateway)
    shared = user == 0 != os.geteuid()
    rootless = os.geteuid() != 0 and not shared
    caller, environment = resolve(spec, client.caller(), rootless)
    if shared or (user is not None and not may_start(spec.gateway, defaults)):
        found = control.ask(spec.gateway, {"do": "inspect"})
        gateway = GatewaySpec(spec.gateway, found["runtime"], found["state"])
        guest = os.getpid() if shared else 0
        made = make_plan(gateway, facts.probe(), caller, rootless, spec, guest=guest)
        if shared:
            (first, *_), *rest = made.enter
            print(f"# the gateway is root's, and up\n\n# ahead of all, by the client\n{first}")
            made = replace(made, enter=tuple(rest))
        else:
            print("# the gateway is up")
        if found["uplink"]["kind"] == "lab":
            environment |= dict.fromkeys(CA_VARIABLES, CA_FILE)
        made = replace(made, gateway=())
    else:
        gateway = on_demand(spec.gateway, defaults)
        made = make_plan(gateway, facts.probe(), caller, rootless, spec)
        print("# the gateway, by its supervisor, once")
    for step in made.gateway:
        print(step.describe())
        if isinstance(step, StartUplink):
            for wanted in step.candidates:
                print(*uplink.describe(uplink.value(wanted, spec.gateway), "gateway"), sep="\n")
    print("\n# the workload, by the supervisor")
    for step in made.workload:
        print(step.describe())
    print("\n# the command, by the client")
    for verb, *arguments in made.enter:
        print(" ".join([str(verb), *(repr(argument) for argument in arguments)]))
    for variable, value in environment.items():
        print(f"export {variable}={value}")
    print("exec", *map(client.visible, spec.command))


def parse(asked: dict[str, Any]) -> RunSpec | None:
    """The RunSpec of a client's request: its arguments, and the client's defaults.

    None if they are for the full interface to deal with: help is wanted, or they are wrong.
    """
    verb = asked["do"]
    group = _commands()
    parent = typer.Context(group, obj=asked["defaults"])
    try:
        with group.commands[verb].make_context(verb, list(asked["arguments"]), parent) as found:
            if verb == "run":
                return request(**found.params)
            if verb == "shell":
                return request([asked["shell"]], **found.params)
            return joining(**{**found.params, "gateway": asked["gateway"]})
    except (typer.Exit, TyperException, UsageError):
        return None


@cache
def _commands() -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    register(app)
    return typer.main.get_command(app)


def register(app: typer.Typer) -> None:
    """Add the commands that end as another program (client.ENTERING)."""
    app.command("run", cls=CLASS, context_settings=CONTEXT)(takes_request(run))
    app.command("shell", cls=CLASS)(takes_request(shell, of_shell=True))
    app.command("exec", context_settings=CONTEXT)(exec_)
