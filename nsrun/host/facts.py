"""What is on this host: the only reader of the outside that its plan is made from."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface
from pathlib import Path

from nsrun import facts, netlink
from nsrun.errors import MissingError, UsageError
from nsrun.host import bridges, cover, doors, external, flows, machine, people, session
from nsrun.host.export_lan import Lan
from nsrun.host.policy import DNS_PORT, TRANS_PORT, choose_automap
from nsrun.host.session import HostFacts, HostSpec

DOING = "put the host behind Tor"


def probe(spec: HostSpec) -> HostFacts:
    """Look, change nothing. Raises UsageError or MissingError."""
    if not Path(session.UNITS).parent.is_dir() or shutil.which("systemctl") is None:
        raise MissingError(DOING, "systemd does not run here", "ttp run -- COMMAND does without")
    resolved = machine.is_active(machine.RESOLVED_UNIT)
    if spec.onion_only and resolved:
        _check_encrypted()
    networks, is_global6 = facts.networks()
    found = HostFacts(
        tor="",
        python=sys.executable,
        tor_uid=0,
        tor_gid=0,
        interface=_interface(spec.interface),
        ipv6=_has_ipv6(),
        reaches_ipv6=is_global6 and spec.ipv6,
        automap4=choose_automap(networks),
        resolv_conf=os.path.lexists(session.RESOLVER),
        resolved=resolved,
        services=_services(),
        bypass_uids=people.exempt_users(DOING, spec.bypass_users),
        bypass_gids=people.exempt_groups(DOING, spec.bypass_groups),
        cgroups=Path("/sys/fs/cgroup/cgroup.controllers").exists(),
        tor_resolvers=resolvers() if spec.asks_for_bridges else (),
        tor_udp=spec.own == "all" and bridges.need_udp(spec.bridges),
        network_manager=cover.has_manager(session.RESOLVER),
    )
    found = with_theirs(found, spec) if spec.external else _with_own(found)
    return replace(found, only_uids=_only(spec, found.tor_uid))


def with_theirs(found: HostFacts, spec: HostSpec) -> HostFacts:
    """What is known of a Tor that is somebody else's, looked at now. Raises UsageError."""
    tor = external.look(spec, found.automap4)
    return replace(
        found,
        tor_uid=tor.uid,
        tor_gid=tor.gid,
        tor_pid=tor.pid,
        listeners=tor.listeners,
        ipv6=tor.ipv6,
        onion=tor.onion,
    )


def _with_own(found: HostFacts) -> HostFacts:
    facts.tor_version()
    tor, user = shutil.which("tor", path=facts.search_path()), facts.probe()
    assert tor is not None, "facts.probe() has looked for it"
    if not user.tor_uid:
        raise MissingError(DOING, "there is no user for Tor", "install the package tor")
    return replace(
        found,
        tor=tor,
        tor_uid=user.tor_uid,
        tor_gid=user.tor_gid,
        made=_absent("/run/tor", session.TOR_RUNTIME),
    )


def ports() -> tuple[int, int]:
    """TransPort and DNSPort of the torrc that is there; without one, where they are by default."""
    found = dict(re.findall(r"^(TransPort|DNSPort) \S+:(\d+)", _text(session.TORRC), re.MULTILINE))
    return int(found.get("TransPort", TRANS_PORT)), int(found.get("DNSPort", DNS_PORT))


def ours_alone() -> tuple[str, ...]:
    """Tor's runtime directory, and the one above, if nobody else has anything there."""
    above = Path(session.TOR_RUNTIME).parent
    alone = above.is_dir() and [entry.name for entry in above.iterdir()] == ["ttp"]
    return (str(above), session.TOR_RUNTIME) if alone else (session.TOR_RUNTIME,)


def resolvers() -> tuple[str, ...]:
    """Addresses of this host's resolvers, but for those on loopback.

    For systemd-resolved, which is on loopback, whom it asks. libc uses three (resolv.conf(5)).
    """
    for path in (session.RESOLVER, "/run/systemd/resolve/resolv.conf"):
        found = re.findall(r"^nameserver\s+(\S+)", _text(path), re.MULTILINE)
        if outside := tuple(one for one in found if not _is_loopback(one)):
            return outside[:3]
    return ()


def _is_loopback(address: str) -> bool:
    """What is no address is of no use either."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return True


def check_resolvers(spec: HostSpec, found: HostFacts) -> None:
    """Raises UsageError where a bridge cannot be found by its name."""
    if spec.asks_for_bridges and not found.tor_resolvers:
        cause = "a bridge line has a name, and there is no resolver but on loopback"
        raise UsageError(DOING, cause, "a nameserver elsewhere in /etc/resolv.conf")


def check_torrc(found: HostFacts, text: str) -> None:
    """Have Tor read a torrc that is not yet in effect, as the user who owns its directories.

    Raises UsageError with what it says.
    """
    command = (found.tor, "--verify-config", "--hush", "--defaults-torrc", "/dev/null", "-f", "-")
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        user=found.tor_uid,
        group=found.tor_gid,
        extra_groups=(),
    )
    if done.returncode:
        said = re.findall(
            r"\[(?:warn|err)\] (?:Failed to parse/validate config: )?(.*)", done.stdout
        )
        # the last is that there are warnings above; those before may be about nothing
        why = said[-2] if len(said) > 1 else f"exit code {done.returncode}"
        cause = bridges.without_secrets(why, text)
        raise UsageError("use these options for Tor", cause, "see --torrc and --bridge; tor(1)")


def _only(spec: HostSpec, tor_uid: int) -> tuple[int, ...]:
    """Numbers of those who alone are caught. Raises UsageError where names would pass by."""
    if not spec.only_users:
        return ()
    found = tuple(dict.fromkeys(people.users(DOING, spec.only_users)))
    if 0 in found:
        raise UsageError(
            DOING, "root's processes serve others", "without --only-user all is caught"
        )
    if tor_uid in found:
        raise UsageError(DOING, f"Tor itself runs as uid {tor_uid}", "name another user")
    nsswitch = Path(doors.NSSWITCH)
    if others := doors.strangers(nsswitch.read_text() if nsswitch.exists() else ""):
        cause = f"{doors.NSSWITCH} has names of hosts looked up by {', '.join(others)}, in clear"
        raise UsageError(DOING, cause, "hosts: files dns")
    return found


def _check_encrypted() -> None:
    """Raises UsageError where systemd-resolved asks for names of .onion so that no rule sees it."""
    done = subprocess.run(("resolvectl", "dnsovertls"), capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if not line.endswith((": no", ":"))]
    if done.returncode or said:
        cause = f"systemd-resolved asks by TLS, .onion too: {(said or ['nobody knows'])[0]}"
        raise UsageError(DOING, cause, "DNSOverTLS=no in /etc/systemd/resolved.conf")


def check_ports(spec: HostSpec, ours: tuple[int, ...] = ()) -> None:
    """Raises UsageError where somebody has one of the ports, but for ``ours``, already.

    An external Tor has to.
    """
    if spec.external:
        return
    for option, port, kind in (
        ("--transport-port", spec.trans_port, socket.SOCK_STREAM),
        ("--dns-port", spec.dns_port, socket.SOCK_DGRAM),
    ):
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            if port in ours or (family == socket.AF_INET6 and not _has_ipv6()):
                continue
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((host, port))
                except OSError as error:
                    cause = f"port {port} of {host}: {error.strerror}"
                    raise UsageError(DOING, cause, f"{option} chooses another one") from error


def helpers(lines: Iterable[str]) -> dict[str, str]:
    """Paths of the programs that bridges need, by transport. Raises MissingError."""
    found = {}
    for name in bridges.transports(lines):
        programs = bridges.HELPERS[name].programs
        paths = (shutil.which(program, path=facts.search_path()) for program in programs)
        path = next(filter(None, paths), None)
        if path is None:
            raise bridges.missing(name)
        found[name] = path
    return found


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _interface(wanted: str) -> str:
    """The one that is named, or that of the default route; empty if there is none.

    Rules, and the overlay of resolv.conf, are for all of them.
    """
    if wanted:
        if wanted not in (name for _, name in socket.if_nameindex()):
            raise UsageError(DOING, f"there is no interface {wanted}", "ip link lists them")
        return wanted
    return default_route()


def default_route() -> str:
    """The interface that leads to the internet; empty if there is none."""
    for family in ("-4", "-6"):
        command = ("ip", "-j", family, "route", "show", "default")
        environment = {**os.environ, "PATH": facts.search_path()}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for route in json.loads(done.stdout or "[]"):
            if "dev" in route:
                return str(route["dev"])
    return ""


def lans(doing: str, names: Iterable[str]) -> list[Lan]:
    """The networks at interfaces, by the first address of each. Raises UsageError."""
    found = []
    for name in names:
        if absent_interfaces([name]) or name.endswith("*"):
            raise UsageError(doing, f"there is no interface {name}", "ip link lists them")
        told = json.loads(machine.ip("-json", "address", "show", "dev", name, "scope", "global"))
        known = [
            ip_interface(f"{one['local']}/{one['prefixlen']}")
            for link in told
            for one in link.get("addr_info", ())
            if "local" in one  # of an address of another scope nothing is left
        ]
        four = next((one for one in known if isinstance(one, IPv4Interface)), None)
        six = next((one for one in known if isinstance(one, IPv6Interface)), None)
        found.append(Lan(name, four, six))
    if not found:
        raise UsageError(doing, "no interface is named", "--gateway-for INTERFACE")
    return found


def absent_interfaces(names: Iterable[str]) -> list[str]:
    """Those of ``names``, in which * stands for any rest of one, that no interface has."""
    there = [name for _, name in socket.if_nameindex()]
    return [name for name in names if not any(_is_named(one, [name]) for one in there)]


def _is_named(interface: str, names: Iterable[str]) -> bool:
    return any(
        interface.startswith(name[:-1]) if name.endswith("*") else interface == name
        for name in names
    )


def check_gateway_for(names: tuple[str, ...]) -> None:
    """Raises UsageError for a port of a bridge or a bond: rules see what arrives there as arriving
    at its master, so with its own name nothing would be caught."""
    for link in json.loads(machine.ip("-json", "-details", "link", "show")) if names else ():
        port, master = link["ifname"], link.get("master", "")
        kind = link.get("linkinfo", {}).get("info_slave_kind")
        if kind not in (None, "vrf") and _is_named(port, names) and not _is_named(master, names):
            cause = f"{port} is a port of {master}, where what arrives at it arrives"
            raise UsageError(DOING, cause, f"--gateway-for {master}")


def _has_ipv6() -> bool:
    """Whether loopback has it, for Tor to listen there."""
    with suppress(OSError):
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
    return False


def _services() -> tuple[int, ...]:
    """TCP ports that somebody listens on, and not on loopback only."""
    with netlink.connect(flows.NETLINK_SOCK_DIAG) as diag:
        listening = [one for one in flows.sockets(diag) if one.state == flows.LISTEN]
    return tuple(sorted({one.ends[1] for one in listening if not one.ends[0].is_loopback}))


def _absent(*directories: str) -> tuple[str, ...]:
    return tuple(one for one in directories if not Path(one).is_dir())
