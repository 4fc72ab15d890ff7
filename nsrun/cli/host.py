"""The commands for the whole host: ``ttp start``, ``stop``, ``restart``, ``status``, ``check``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsrun import client
from nsrun.cli import output
from nsrun.cli.run import CONTEXT
from nsrun.errors import ExitCode, NsrunError, UsageError
from nsrun.host import bridges, session
from nsrun.host.policy import DNS_PORT, TRANS_PORT
from nsrun.host.session import HostFacts, HostSpec, LogFormat, Session
from nsrun.torrc import check_fragment

if TYPE_CHECKING:
    from nsrun.host.control import Ears, Outcome

MOST = 1 << 20  # bytes of a file of options: what never ends is not read on and on

Interface = Annotated[
    str,
    typer.Option(
        *("--interface", "-i"),
        help="Interface that must be there, and is shown; by default that of the default route.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float, typer.Option("--bootstrap-timeout", min=0, help="Seconds to wait until Tor is ready.")
]
AllowRoot = Annotated[
    bool, typer.Option("--allow-root", help="Let root's processes reach the network directly.")
]
NoLan = Annotated[
    bool, typer.Option("--no-lan-bypass", help="Let private addresses be reached by nobody.")
]
NoIpv6 = Annotated[bool, typer.Option("--no-ipv6", help="No IPv6 at all, to Tor neither.")]
BypassUser = Annotated[
    str | None,
    typer.Option(
        "--bypass-user",
        metavar="USER,…",
        help="Users who reach the network directly.",
        show_default=False,
    ),
]
BypassGroup = Annotated[
    str | None,
    typer.Option(
        "--bypass-group",
        metavar="GROUP,…",
        help="Groups who reach the network directly.",
        show_default=False,
    ),
]
OnlyUser = Annotated[
    str | None,
    typer.Option(
        "--only-user",
        metavar="USER,…",
        help="Catch what these users send, and leave all others alone.",
        show_default=False,
    ),
]
OnionOnly = Annotated[
    bool, typer.Option("--onion-only", help="Catch names and services of .onion, and nothing else.")
]
GatewayFor = Annotated[
    list[str] | None,
    typer.Option(
        "--gateway-for",
        metavar="INTERFACE",
        help="Catch what arrives there to be forwarded, too; * at the end: any that begins so.",
    ),
]
GatewayOnly = Annotated[
    bool, typer.Option("--gateway-only", help="Leave what this machine itself sends alone.")
]
TransportPort = Annotated[
    int, typer.Option("--transport-port", "-t", help="Where Tor takes connections.")
]
DnsPort = Annotated[int, typer.Option("--dns-port", "-d", help="Where Tor takes names.")]
UseBridges = Annotated[
    bool, typer.Option("--use-bridges", help="Reach Tor by the bridges given, and no other way.")
]
BridgeFile = Annotated[
    Path | None,
    typer.Option(
        "--bridge-file",
        help="File with bridge lines; - is standard input.",
        dir_okay=False,
        exists=True,
        allow_dash=True,
    ),
]
Bridge = Annotated[
    list[str] | None, typer.Option("--bridge", metavar="LINE", help="A bridge line; repeatable.")
]
Torrc = Annotated[
    Path | None,
    typer.Option("--torrc", help="File with more options for Tor.", dir_okay=False, exists=True),
]
Watchdog = Annotated[
    bool, typer.Option("--watchdog", "-w", help="See to it that it stays so: ttp watchdog.")
]
ExternalDaemon = Annotated[
    bool,
    typer.Option(
        "--external-daemon", help="Use a Tor that somebody else runs; it is neither made nor ended."
    ),
]
TorUid = Annotated[
    str,
    typer.Option(
        "--tor-uid",
        metavar="USER",
        help="Whose that Tor is.",
        show_default="the package's",
    ),
]
LogForm = Annotated[
    LogFormat,
    typer.Option("--log-format", help="How the log of the session is written, see ttp logs."),
]
Command = Annotated[list[str], typer.Argument(metavar="COMMAND [ARGS]…", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every effect, as it happens.")]


def start(spec: HostSpec, verbose: bool) -> None:
    """Put the whole host behind Tor, until `ttp stop` or a reboot.

    Exit code 0: up and verified; 1: it failed, and the network is as before (closed, where a
    session was cut short); 3: up, but Tor could not be verified; all else is refused.
    """
    from nsrun.host import control

    done = control.start(spec, ears(verbose))
    _tell(done, "up" if done.fresh else "up already")


def restart(spec: HostSpec, verbose: bool) -> None:
    """Stop and start, with these options; closed from the first to the last moment.

    Exit codes are those of ttp start.
    """
    from nsrun.host import control

    _tell(control.restart(spec, ears(verbose)), "up")


def takes_session(act: Callable[[HostSpec, bool], None]) -> Callable[..., None]:
    """A command that has the options of a session."""

    def command(
        interface: Interface = "",
        bootstrap_timeout: Timeout = 180.0,
        allow_root: AllowRoot = False,
        no_lan_bypass: NoLan = False,
        no_ipv6: NoIpv6 = False,
        bypass_user: BypassUser = None,
        bypass_group: BypassGroup = None,
        only_user: OnlyUser = None,
        onion_only: OnionOnly = False,
        gateway_for: GatewayFor = None,
        gateway_only: GatewayOnly = False,
        transport_port: TransportPort = TRANS_PORT,
        dns_port: DnsPort = DNS_PORT,
        use_bridges: UseBridges = False,
        bridge_file: BridgeFile = None,
        bridge: Bridge = None,
        torrc: Torrc = None,
        watchdog: Watchdog = False,
        external_daemon: ExternalDaemon = False,
        tor_uid: TorUid = "",
        log_format: LogForm = "text",
        verbose: Verbose = False,
    ) -> None:
        lines = _bridges(use_bridges, bridge_file, bridge or [])
        spec = HostSpec(
            interface=interface,
            bootstrap_timeout=bootstrap_timeout,
            allow_root=allow_root,
            lan=not no_lan_bypass,
            ipv6=not no_ipv6,
            bypass_users=_names(bypass_user),
            bypass_groups=_names(bypass_group),
            only_users=_names(only_user),
            onion_only=onion_only,
            gateway_for=tuple(gateway_for or ()),
            gateway_only=gateway_only,
            trans_port=transport_port,
            dns_port=dns_port,
            bridges=bridges.check(lines),
            torrc=check_fragment(_text(torrc), str(torrc)) if torrc else "",
            watchdog=watchdog,
            log_format=log_format,
            external=external_daemon,
            tor_user=tor_uid,
        )
        act(spec, verbose)

    command.__name__, command.__doc__ = act.__name__, act.__doc__
    return command


def close(verbose: Verbose = False) -> None:
    """Let nothing out, until `ttp start` puts the host behind Tor, or `ttp stop` gives it back.

    For boot, before there is a network. A start from here that fails comes back to here.
    """
    from nsrun.host import control

    control.close(ears(verbose))


def stop(
    restore_only: Annotated[
        bool,
        typer.Option("--restore-only", help="Also where the record of the session is lost."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Take the whole host from behind Tor: what went through Tor is ended first."""
    from nsrun.host import control

    control.stop(ears(verbose), restore_only=restore_only)
    print("stopped: the network is as before")


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the session of the whole host. Nothing is sent; exit code 1 if there is none."""
    from nsrun.host import control

    found = control.current()
    rules = _rules(found) if found else ""
    if as_json:
        told: dict[str, object] = {"state": found.state if found else "stopped"}
        if found:
            told |= {"since": found.since, "exit": found.exit, "interface": found.facts.interface}
            told |= {
                "rules": rules or None,
                "caught": _caught(found.spec),
                "tor_resolvers": list(found.facts.tor_resolvers),
                "tor_udp": found.facts.tor_udp,
            }
        output.as_json(told)
    elif found is None:
        print("stopped: the host is not behind Tor")
    else:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
        rows = {
            "state": found.state,
            **({"rules": rules} if rules else {}),
            "exit": found.exit or "not verified",
            "since": when,
            "pid": str(found.pid),
            "interface": found.facts.interface or "-",
            "caught": _caught(found.spec),
            "bypass": _exempt(found.spec),
        }
        if opened := _opened(found.facts):
            rows["bridges"] = opened
        for key, value in rows.items():
            print(f"{key:<10} {client.visible(value)}")
    if found is None:
        raise typer.Exit(ExitCode.FAILED)


def _rules(found: Session) -> str:
    """Whether they are as they were loaded last; empty if that cannot be told."""
    from nsrun.host import machine

    if os.geteuid() != 0 or found.state not in ("up", "locked"):
        return ""
    return "as loaded" if machine.fingerprint() == found.rules else "changed"


def check(verbose: Verbose = False) -> None:
    """Ask Tor's own service, through Tor, how it sees the host. Exit code 3 if not as Tor."""
    from nsrun.host import control

    _tell(control.check(ears(verbose)), "up")


def refresh() -> None:
    """What ``ttp refresh`` does without a name."""
    from nsrun.host import control

    control.refresh()
    print("new connections have new circuits")


def log() -> Path:
    """The log of the session, which is root's. Raises UsageError."""
    from nsrun.host import control

    control.need_root("logs")
    if not Path(session.LOG).exists():
        raise UsageError("read the log", "the whole host was not behind Tor since boot")
    return Path(session.LOG)


def is_logging() -> bool:
    """Whether there is a session, and so may be more to read."""
    return Path(session.RECORD).exists()


def bypass(command: Command) -> None:
    """Run COMMAND past Tor, as who called sudo, while the rest of the host is behind it."""
    from nsrun.host import control

    control.need_bypass()
    who: tuple[str, ...] = ()
    if uid := os.environ.get("SUDO_UID"):
        gid = os.environ.get("SUDO_GID", uid)
        who = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--init-groups", "--")
    run = ("systemd-run", "--scope", "--quiet", f"--slice={session.BYPASS}", "--", *who, *command)
    os.execvp(run[0], run)  # its exit code is ours


def diagnose() -> None:
    """Print what there is of the session: for a report. No bridge line is in it."""
    from nsrun.host import control
    from nsrun.host.diagnose import sections

    control.need_root("diagnose")
    for title, text in sections():
        print(f"# {title}", *(client.visible(line) for line in text.splitlines()), "", sep="\n")


def uninstall(verbose: Verbose = False) -> None:
    """Remove ttp, as make install has installed it, and all that it keeps; stop it first."""
    from nsrun.host.uninstall import KEPT
    from nsrun.host.uninstall import uninstall as removed

    for path in removed(ears(verbose)):
        print(f"removed {path}")
    for kept in filter(os.path.exists, KEPT):
        print(f"kept {kept}, which is yours")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(takes_session(start))
    app.command()(close)
    app.command()(stop)
    app.command()(takes_session(restart))
    app.command()(status)
    app.command()(check)
    app.command(context_settings=CONTEXT)(bypass)
    app.command()(diagnose)
    app.command()(uninstall)


def _tell(done: Outcome, state: str) -> None:
    seen = done.seen
    if seen.is_tor:
        print(f"{state}: seen as {client.visible(seen.address)}, by Tor, in {seen.seconds:.1f} s")
        return
    why = seen.error or f"{seen.address} is no exit of Tor's"
    raise UnverifiedError("verify that the host is behind Tor", why, "ttp check, in a while")


class UnverifiedError(NsrunError):
    """Up, and closed to all but Tor; but nobody has confirmed that Tor works."""

    code = ExitCode.UNVERIFIED


def ears(verbose: bool) -> Ears:
    from nsrun.host.control import Ears, nobody

    return Ears(client.echo, client.echo if verbose else nobody)


def _caught(spec: HostSpec) -> str:
    own = " ".join(spec.only_users) or {"onion": ".onion", "none": ""}.get(spec.own, "all")
    return ", and ".join(filter(None, (own, _served(spec))))


def _served(spec: HostSpec) -> str:
    return f"behind {' '.join(spec.gateway_for)}" if spec.gateway_for else ""


def _exempt(spec: HostSpec) -> str:
    root, lan = ["root"] * spec.allow_root, ["LAN"] * spec.lan
    return " ".join((*lan, *root, *spec.bypass_users, *spec.bypass_groups)) or "-"


def _opened(facts: HostFacts) -> str:
    """What is let out for the sake of bridges, besides TCP of Tor's."""
    names = (f"names from {', '.join(facts.tor_resolvers)}",) if facts.tor_resolvers else ()
    return "; ".join((*names, *(("UDP",) if facts.tor_udp else ())))


def _names(text: str | None) -> tuple[str, ...]:
    """The names of a list with commas; none if it is not given. An empty one, of a variable that is
    not set perhaps, would be another mode: all is caught."""
    found = () if text is None else tuple(name.strip() for name in text.split(","))
    if "" in found:
        raise UsageError(f"take {text!r} for a list of names", "one of them is empty")
    return found


def _bridges(use: bool, file: Path | None, given: list[str]) -> list[str]:
    lines = [*(bridges.lines_of(_text(file)) if file else ()), *given]
    if lines and not use:
        raise UsageError("use bridges", "bridge lines without --use-bridges", "add --use-bridges")
    if use and not lines:
        raise UsageError("use bridges", "none is given", "--bridge LINE or --bridge-file FILE")
    return lines


def _text(file: Path) -> str:
    """With or without the mark that Windows puts first; of ``-`` the standard input."""
    stdin = str(file) == "-"
    try:
        with sys.stdin.buffer if stdin else file.open("rb") as stream:
            text = stream.read(MOST + 1)
        if len(text) > MOST:
            raise UsageError(f"read {file}", f"it has more than {MOST >> 20} MiB")
        return text.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"read {file}", error) from error
