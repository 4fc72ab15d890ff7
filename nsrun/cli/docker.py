"""``ttp docker``: containers behind Tor, by the docker that is there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from nsrun import client
from nsrun.cli import driver, output, settings
from nsrun.cli.run import Gateway, Isolate, Name, NoIpv6, Timeout
from nsrun.errors import AbsentError, NsrunError, UsageError
from nsrun.ruleset import HTTP_AT, SOCKS_AT
from nsrun.spec import NAME, RunSpec

if TYPE_CHECKING:
    from nsrun.containers.engine import Engine
    from nsrun.containers.options import Wanted

app = typer.Typer(help="Containers behind Tor, by the docker that is there.")
app.add_typer(driver.app, name="driver")

Socks = Annotated[
    bool,
    typer.Option(
        "--socks",
        help=f"Tor's SOCKS proxy at the gateway's address, port {SOCKS_AT}, and in ALL_PROXY; "
        f"HTTP CONNECT at port {HTTP_AT}.",
    ),
]
Pcap = Annotated[
    str | None,
    typer.Option(
        "--pcap",
        metavar="FILE",
        show_default=False,
        help="Record what the container sends and receives, for tcpdump and wireshark.",
    ),
]

PULL = "outside of Tor, docker pull {}; or ttp docker run -- --pull missing …"


class _Run(TyperCommand):
    """Tells who forgot ``--``, or takes it for ``ttp run``, what is the matter."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            from nsrun.containers.options import misplaced

            option = getattr(error, "option_name", "")
            cause, hint = misplaced(option)
            if cause:
                raise UsageError(f"run a container with {option}", cause, hint) from None
            raise


@app.command(cls=_Run, context_settings={"allow_interspersed_args": False})
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- [OPTIONS OF DOCKER] IMAGE [COMMAND]…", show_default=False),
    ],
    gateway: Gateway = "default",
    name: Name = None,
    no_ipv6: NoIpv6 = False,
    bootstrap_timeout: Timeout = 180.0,
    isolate: Isolate = "workload",
    socks: Socks = False,
    pcap: Pcap = None,
) -> None:
    """Run a container behind Tor, as `docker run` does, whose options stand after `--`.

    Its network is ready, and was looked at from inside, before its first process starts. Options
    that would break a promise are refused. No image is pulled, but with --pull.
    """
    from nsrun.containers import holders, options

    wanted = options.parse(arguments)
    if pcap == "":
        raise UsageError("record in the file ''", "it has no name")
    _need_root()
    engine = _engine()
    spec = RunSpec(
        ("docker", "run", wanted.image, *wanted.command),
        gateway,
        _name(wanted) if name is None else name,
        ipv6=not no_ipv6,
        isolate=isolate,
        socks=socks,
        pcap=pcap or "",
        bootstrap_timeout=bootstrap_timeout,
    )
    _check(engine, wanted)
    outside = os.getpid()
    files = _recorded(pcap) if pcap else {}  # from here on we are a child
    with ExitStack() as undo:
        resolver = _ready(spec)
        holder = _hold(engine, wanted, spec, resolver, files, undo)
        command = engine.command(
            *("run", "--network", f"{holders.JOINS}{holder}", "--cap-drop", "NET_RAW"),
            *("--security-opt", "no-new-privileges"),  # the last one counts: it can be lifted
            *("--label", f"{holders.WORKLOAD}={spec.name}", "--pull", wanted.pull or "never"),
            *(_proxies(resolver) if socks else ()),
            *(*wanted.kept, "--", wanted.image, *wanted.command),
        )
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python; inherited through exec
            signal.signal(number, signal.SIG_DFL)
        if files:
            from nsrun import parent

            parent.die_with(outside)
        os.execv(command[0], command)


@app.command()
def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the containers behind Tor, with their workloads and identities."""
    from nsrun.containers import pods

    found = pods.found(_engine())
    if as_json:
        output.as_json(found)
        return
    heads = ("CONTAINER", "IMAGE", "STATUS", "WORKLOAD", "GATEWAY", "IDENTITY")
    output.table(heads, [tuple(one[head.lower()] for head in heads) for one in found])


@app.command("attach-network")
def attach_network(
    container: Annotated[str, typer.Argument(metavar="CONTAINER", help="Its name or id.")],
    gateway: Gateway = "default",
    name: Name = None,
    no_ipv6: NoIpv6 = False,
    bootstrap_timeout: Timeout = 180.0,
    isolate: Isolate = "workload",
    socks: Socks = False,
) -> None:
    """Put a running container behind Tor: one on the network none, or whose gateway has gone.

    Until it is restarted, as that gives it a new network, with nothing in it.
    """
    from nsrun.containers import doors, holders, options, plugging

    _need_root()
    engine = _engine()
    made = engine.inspect(container)
    limits = made["HostConfig"]
    held = next((one for one in holders.found(engine) if one.holds(limits["NetworkMode"])), None)
    if held is None and limits["NetworkMode"] != "none":
        cause = f"its network is {limits['NetworkMode']}"
        raise UsageError(f"attach {container}", cause, "docker run --network none …")
    options.check_made(limits, engine.about["DefaultRuntime"])
    binds = [mount["Source"] for mount in made["Mounts"] if mount["Type"] == "bind"]
    doors.check(binds, engine.own)
    _check_volumes(engine, [mount["Name"] for mount in made["Mounts"] if mount["Type"] == "volume"])
    chosen = name or (held.workload if held else made["Name"].removeprefix("/"))
    spec = RunSpec(
        ("docker", "attach-network", container),
        gateway,
        chosen,
        ipv6=not no_ipv6,
        isolate=isolate,
        socks=socks,
        bootstrap_timeout=bootstrap_timeout,
    )
    plugging.plug(
        engine, held.id if held else made["Id"], spec, _ready(spec), pinned=held is not None
    )


@app.command()
def revive() -> None:
    """Start containers of `ttp docker run` that Docker was to start, after a boot, and could not.

    It starts none that joins another one's network. Prints their names; exit code 1 if one stays
    stopped, because its gateway is not up, for instance.
    """
    from nsrun.containers import keeper

    _need_root()
    engine = _engine()
    failed = []
    for name, error in keeper.revive(engine):
        if error is None:
            print(name)
        else:
            failed.append((name, error))
    keeper.start(engine)
    if failed:
        names, error = ", ".join(name for name, _ in failed), failed[0][1]
        raise NsrunError(f"start {names}", error, error.hint)


def _need_root() -> None:
    """Before a gateway is started that could not be plugged in. Raises UsageError."""
    if os.geteuid() != 0:
        cause = "only root can reach into the network of one"
        raise UsageError("put a container behind Tor", cause, "use sudo")


def _engine() -> Engine:
    """The daemon, and nothing left behind by who was killed."""
    from nsrun.containers import holders, keeper
    from nsrun.containers.engine import Engine

    engine = Engine()
    holders.sweep(engine)
    keeper.tidy(engine)
    return engine


def _name(wanted: Wanted) -> str:
    """That of the container, if it can be a workload's; else the image's, and some digits."""
    if NAME.fullmatch(wanted.name):
        return wanted.name
    image = PurePosixPath(wanted.image.partition("@")[0]).name.partition(":")[0]
    stem = "".join(letter for letter in image if letter.isalnum())[:20] or "container"
    return f"{stem}-{os.urandom(2).hex()}"


def _check(engine: Engine, wanted: Wanted) -> None:
    """Refuse what the daemon would do in the clear, or cannot do. Raises NsrunError."""
    from nsrun.containers import doors
    from nsrun.containers.options import LOG_DRIVERS

    doors.check(wanted.binds, engine.own)
    _check_volumes(engine, wanted.volumes)
    driver = wanted.log_driver or engine.about["LoggingDriver"]
    if driver not in LOG_DRIVERS:
        cause = f"the daemon sends what containers print to elsewhere (log driver {driver})"
        raise UsageError("run a container", cause, "ttp docker run -- --log-driver local …")
    if wanted.pull not in ("", "never"):
        print("ttp: the daemon pulls images by the host's network, outside of Tor", file=sys.stderr)
    elif not engine.has(wanted.image):
        doing, cause = f"run the image {wanted.image}", "it is not on this machine"
        raise UsageError(doing, cause, PULL.format(wanted.image))


def _check_volumes(engine: Engine, names: Iterable[str]) -> None:
    """Those that are there already; what docker makes by itself is a directory of its own."""
    from nsrun.containers import doors
    from nsrun.containers.api import NOT_FOUND, RefusalError

    for name in names:
        with engine.doing(f"find the volume {name}"):
            try:
                doors.check_volume(engine.api.get("volumes", name), engine.own)
            except RefusalError as error:
                if error.status != NOT_FOUND:
                    raise


def _recorded(path: str) -> dict[str, int]:
    """Go on in a child, whose parent waits for the end of the recording; descriptors for that."""
    from nsrun import parent

    try:
        return parent.record(path, -1)
    except client.RefusedError as error:
        raise NsrunError(error.doing, error.cause, error.hint) from None


def _proxies(gateway: str) -> list[str]:
    """Variables that tell programs of Tor's proxy; those of the container's own come after them."""
    from nsrun.user import PROXY_VARIABLES

    return [f"--env={name}=socks5h://{gateway}:{SOCKS_AT}" for name in PROXY_VARIABLES]


def _hold(
    engine: Engine,
    wanted: Wanted,
    spec: RunSpec,
    resolver: str,
    files: dict[str, int],
    undo: ExitStack,
) -> str:
    """A holder whose network is behind Tor; ``undo`` removes it. Raises NsrunError."""
    from nsrun.containers import holders, keeper

    holder = holders.create(engine, wanted, spec, resolver)

    def forget() -> None:
        with suppress(NsrunError):  # what failed before is to be told; the keeper comes by, too
            holders.remove(engine, holder)

    undo.callback(forget)
    started = holders.start(engine, holder)
    keeper.start(engine)  # it gets ready meanwhile, and so do we
    from nsrun.containers import plugging  # takes 15 ms

    started()
    plugging.plug(engine, holder, spec, resolver, pinned=True, files=files)
    return holder


def _ready(spec: RunSpec) -> str:
    """The address of the gateway, once its Tor is ready; it is started on demand."""
    from nsrun.gateway import control

    try:
        return control.resolver(spec.gateway, spec.bootstrap_timeout)
    except AbsentError:
        from nsrun.cli.gateway import on_demand

        with control.start(on_demand(spec.gateway, settings.here())):
            return control.resolver(spec.gateway, spec.bootstrap_timeout)
