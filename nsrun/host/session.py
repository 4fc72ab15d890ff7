"""A session of the whole host: what was asked for, what was found, and the record of both. Pure.

The record is written before the first effect. From it alone the plan can be made again, and so
be taken back, by whichever command comes next: after kill -9 at any step nothing is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from nsrun.errors import UsageError
from nsrun.host import bridges
from nsrun.host.policy import DNS_PORT, TRANS_PORT, Own, check_interface
from nsrun.spec import check_seconds

RUNTIME = "/run/ttp"
RECORD = f"{RUNTIME}/ttp.lock"
LOG = f"{RUNTIME}/ttp.log"
RESOLV_CONF, RESOLVER = f"{RUNTIME}/resolv.conf", "/etc/resolv.conf"  # ours, over libc's
TOR_RESOLV_CONF, TOR_NSSWITCH = f"{RUNTIME}/tor-resolv.conf", f"{RUNTIME}/tor-nsswitch.conf"
TOR_RUNTIME = "/run/tor/ttp"
TORRC = f"{TOR_RUNTIME}/torrc"
CONTROL = f"{TOR_RUNTIME}/control.sock"
COOKIE = f"{TOR_RUNTIME}/auth_cookie"
SOCKS = f"{TOR_RUNTIME}/socks.sock"
TOR_STATE = "/var/lib/tor/ttp"
TOR_UNIT, WATCHDOG = "ttp-tor.service", "ttp-watchdog.service"
# No "-" in these: that would be a slice within a slice (systemd.slice(5)).
TOR_SLICE = "ttp_tor.slice"
BYPASS = "ttp_bypass.slice"
UNITS = "/run/systemd/system"  # of volatile units: gone at reboot (systemd.unit(5))
RESOLVED = "/run/systemd/resolved.conf.d/ttp.conf"  # resolved.conf(5)

INTERVAL = 15.0  # seconds between two looks of the watchdog that nothing called for

State = Literal["closed", "starting", "up", "locked", "stopping"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class HostSpec:
    """The options of ``ttp start``. ``lan`` says that private addresses are reached directly;
    ``interval`` is the watchdog's, in seconds; ``external`` says that Tor is somebody else's, and
    ``tor_user`` whose.

    ``only_users`` alone are caught; if there are none, everybody is, or with ``onion_only`` nobody,
    but for names and addresses of .onion. ``gateway_for`` are interfaces for whose LANs this
    machine is the gateway, as in HostPolicy; with ``gateway_only`` that alone.
    ``bridges`` and ``torrc``, which may be secret, are no part of the record.
    """

    interface: str = ""
    bootstrap_timeout: float = 180.0
    allow_root: bool = False
    lan: bool = True
    ipv6: bool = True
    bypass_users: tuple[str, ...] = ()
    bypass_groups: tuple[str, ...] = ()
    trans_port: int = TRANS_PORT
    dns_port: int = DNS_PORT
    bridges: tuple[str, ...] = ()
    torrc: str = ""
    watchdog: bool = False
    interval: float = INTERVAL
    log_format: LogFormat = "text"
    external: bool = False
    tor_user: str = ""
    only_users: tuple[str, ...] = ()
    onion_only: bool = False
    gateway_for: tuple[str, ...] = ()
    gateway_only: bool = False

    @property
    def own(self) -> Own:
        """Which of this machine's own traffic is caught."""
        if self.only_users:
            return "users"
        if self.onion_only:
            return "onion"
        return "none" if self.gateway_only else "all"

    @property
    def asks_for_bridges(self) -> bool:
        """Whether a helper has names to look up, where everybody's go to Tor."""
        return self.own == "all" and bridges.need_names(self.bridges)

    def __post_init__(self) -> None:
        self._check_modes()
        for name in self.gateway_for:
            check_interface("be a gateway", name)
        check_seconds("--bootstrap-timeout", self.bootstrap_timeout)
        if not 1 <= self.interval <= 3600:  # NaN neither
            cause = f"{self.interval:g} is not from 1 to 3600 seconds"
            raise UsageError("look at that --interval", cause)
        if self.tor_user and not self.external:
            raise UsageError("use --tor-uid", "the Tor is our own", "add --external-daemon")
        if self.external and (self.bridges or self.torrc):
            cause = "--external-daemon says that this Tor has its own"
            raise UsageError("use bridges or a torrc", cause, "in that Tor's torrc")
        if self.external and self.gateway_for:
            cause = "it must listen where only one that is started by ttp does"
            raise UsageError("be a gateway with a Tor that is somebody else's", cause)
        for option, port in (
            ("--transport-port", self.trans_port),
            ("--dns-port", self.dns_port),
        ):
            if not 1024 <= port <= 65535:
                raise UsageError(f"use {port} as {option}", "it is not from 1024 to 65535")
        if self.trans_port == self.dns_port:
            raise UsageError(f"use {self.dns_port} twice", "--transport-port is --dns-port")
        if not self.ipv6 and any(":" in address for address in bridges.direct(self.bridges)):
            raise UsageError("use these bridges", "one has an address of IPv6", "without --no-ipv6")
        # linux/netdevice.h, dev_valid_name(): it becomes part of what is printed and kept
        if self.interface and not re.fullmatch(r"[^\s/:]{1,15}", self.interface):
            raise UsageError(f"use the interface {self.interface!r}", "that is no name of one")

    def _check_modes(self) -> None:
        """Raises UsageError for an option that has no effect beside another."""
        doing = "choose what is caught"
        given = {
            "--external-daemon": self.external,
            "--gateway-for": self.gateway_for,
            "--gateway-only": self.gateway_only,
            "--only-user": self.only_users,
            "--allow-root": self.allow_root,
            "--bypass-user": self.bypass_users,
            "--bypass-group": self.bypass_groups,
            "--no-lan-bypass": not self.lan,
            "--no-ipv6": not self.ipv6,
        }
        for mode, is_given, others in (
            ("--only-user", self.only_users, ("--allow-root", "--bypass-user")),
            ("--gateway-only", self.gateway_only, [*given][3:7]),
            ("--onion-only", self.onion_only, given),
        ):
            if is_given and (other := next(filter(given.get, others), "")):
                raise UsageError(
                    doing, f"{mode} and {other} exclude each other", "leave one of them out"
                )
        if self.gateway_only and not self.gateway_for:
            raise UsageError(doing, "no interface is named", "--gateway-for INTERFACE")


@dataclass(frozen=True)
class HostFacts:
    """What was found on this machine; numbers of the users and groups that were named.

    ``python`` has ttp. ``resolv_conf`` says that there is one to cover, ``network_manager`` that it
    is NetworkManager's. ``made`` are the directories that are not there yet, and so ours to remove;
    ``services`` are TCP ports that others may connect to. ``cgroups`` are those of version 2 alone.
    ``tor_resolvers`` are asked by Tor's helpers, ``tor_udp`` says that these send by UDP.
    Of a Tor that is somebody else's, ``listeners`` are the numbers of its sockets, ``tor_pid`` is a
    process that has them; ``onion`` says that it gives .onion names addresses; ``tor`` is empty.
    """

    tor: str
    python: str
    tor_uid: int
    tor_gid: int
    interface: str
    ipv6: bool
    reaches_ipv6: bool
    automap4: str
    resolv_conf: bool
    resolved: bool
    services: tuple[int, ...] = ()
    bypass_uids: tuple[int, ...] = ()
    bypass_gids: tuple[int, ...] = ()
    only_uids: tuple[int, ...] = ()
    made: tuple[str, ...] = ()
    cgroups: bool = False
    tor_resolvers: tuple[str, ...] = ()
    tor_udp: bool = False
    listeners: tuple[int, ...] = ()
    tor_pid: int = 0
    onion: bool = True
    network_manager: bool = False


@dataclass(frozen=True)
class Session:
    """``exit`` is the address that sites saw when it was verified last; empty if never.

    ``since`` is in seconds of the epoch; ``rules`` is the fingerprint of the table as loaded.
    ``redirected`` says that connections may have been led to Tor, and so are to be ended.
    ``barred`` are the numbers of users whom name services take no connection of: those of the
    session that this one is in the place of, too, so that there is no moment between.
    """

    spec: HostSpec
    facts: HostFacts
    pid: int
    since: float
    state: State = "starting"
    exit: str = ""
    rules: str = ""
    redirected: bool = False
    barred: tuple[int, ...] = ()

    def at(self, state: State, **changes: Any) -> Session:
        return replace(self, state=state, **changes)

    def as_text(self) -> str:
        """The record: JSON, without what may be secret."""
        told = asdict(replace(self, spec=replace(self.spec, bridges=(), torrc="")))
        return json.dumps(told, indent=2) + "\n"


def read(text: str) -> Session:
    """The session of a record. Raises ValueError if it is none of ours, or of another version."""
    try:
        told = json.loads(text)
        spec, facts = _made(HostSpec, told["spec"]), _made(HostFacts, told["facts"])
        found: Session = _made(Session, {**told, "spec": spec, "facts": facts})
    except (KeyError, TypeError, UsageError) as error:
        raise ValueError(f"not a record of a session: {error}") from error
    return found


def _made(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of exactly these values; JSON's lists are its tuples."""
    if {one.name for one in fields(kind)} != set(values):
        raise ValueError("a record of another version")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
