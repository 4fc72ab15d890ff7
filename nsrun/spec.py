"""What the user asked for: plain values, checked when they are made. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

from nsrun.errors import UsageError

#: Private use (RFC 1918), shared address space (RFC 6598): no relay, and no site, is there.
OWN_NETWORKS = tuple(
    map(IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"))
)
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}", re.IGNORECASE)


def check_name(kind: str, name: str) -> str:
    """``name``, if it can be part of a path and of an interface's alias. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"use {name!r} as the name of a {kind}",
            "a name is 1 to 32 letters, digits, '.', '_' or '-', the first a letter or digit",
        )
    return name


def check_seconds(option: str, seconds: float) -> float:
    """``seconds``, if it is a time to wait. Raises UsageError."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UsageError(f"take {seconds} for {option}", "it is no number of seconds")
    return seconds


@dataclass(frozen=True)
class LabUplink:
    """A link to the LAN of a lab: ``bridge`` in the network namespace at ``netns``.

    ``address`` and ``address6`` carry their prefix length (192.0.2.1/24).
    """

    netns: str
    bridge: str
    address: str
    router: str
    address6: str = ""
    router6: str = ""


Isolation = Literal["workload", "destination", "connection"]
"""What shares no circuit with another of its kind (P7)."""

#: capabilities(7) that a command run by root keeps: those over its own files and processes.
ROOT_KEEPS = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("NET_BIND_SERVICE", "SYS_NICE", "SYS_RESOURCE", "LEASE", "AUDIT_WRITE"),
)

UPLINKS = ("pasta", "slirp4netns", "veth")


@dataclass(frozen=True)
class GatewaySpec:
    """A gateway: its directories, how its Tor reaches the network and how long it may idle.

    ``uplinks`` are tried in order, by name or as a LabUplink. ``idle`` is in seconds; 0 means
    that the gateway stays until it is told to go. ``bootstrap`` is how long a start may take.
    ``ca_bundle`` is a file of certificate authorities that workloads trust instead of the host's.
    ``group`` is the number of a group whose members may use a gateway of root's.
    """

    name: str
    runtime: str
    state: str
    uplinks: tuple[str | LabUplink, ...] = UPLINKS[:2]
    torrc: str = ""
    idle: float = 600.0
    ca_bundle: str = ""
    group: int | None = None

    def __post_init__(self) -> None:
        check_name("gateway", self.name)
        check_seconds("--idle", self.idle)
        for uplink in self.uplinks:
            if isinstance(uplink, str) and uplink not in UPLINKS:
                raise UsageError("choose an uplink", f"{uplink!r} is none of {', '.join(UPLINKS)}")


@dataclass(frozen=True)
class Strict:
    """Confine an untrusted command; ``sockets`` are paths that it may connect to nevertheless."""

    sockets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSpec:
    """One ``ttp run``. ``user`` is a name or a number; None means the one who calls.

    ``socks`` asks for Tor's proxies on loopback, ``pcap`` is a file to record the link in. ``env``
    is NAME=VALUE or NAME, after the files of ``env_files``. ``timeout`` is in seconds; with 0 the
    command may run for ever.
    ``status_fd`` is a descriptor of the caller's, to tell the status on; none if it is negative.
    ``join`` is the name of a workload whose network is to be joined; else there will be a new one.
    """

    command: tuple[str, ...]
    gateway: str = "default"
    name: str | None = None
    user: str | None = None
    ipv6: bool = True
    bootstrap_timeout: float = 180.0
    verbose: bool = False
    isolate: Isolation = "workload"
    socks: bool = False
    workdir: str | None = None
    env: tuple[str, ...] = ()
    env_files: tuple[str, ...] = ()
    timeout: float = 0.0
    strict: Strict | None = None
    pcap: str = ""
    join: str | None = None
    detach: bool = False
    status_fd: int = -1

    def __post_init__(self) -> None:
        check_name("gateway", self.gateway)
        check_seconds("--bootstrap-timeout", self.bootstrap_timeout)
        check_seconds("--timeout", self.timeout)
        for setting in self.env:
            if not setting.partition("=")[0]:
                raise UsageError(f"set {setting!r}", "there is no name", "--env NAME=VALUE")
        for name in (self.name, self.join):
            if name is not None:
                check_name("workload", name)
        if self.workdir == "":
            raise UsageError("run in the directory ''", "it has no name")
        if self.pcap == "-":
            cause = "standard output is the command's"
            raise UsageError("write the capture to -", cause, "a file; or --pcap /dev/stdout")
        if not self.command:
            raise UsageError("run", "no command given", "ttp run -- COMMAND [ARGUMENTS…]")


@dataclass(frozen=True)
class Plug:
    """A link into a network namespace that somebody else made: a container's, or its engine's.

    Without an ``address`` the namespace is empty, and all that is in one of ours is set up. With
    one, a link is made and nothing more: its owner will move it on, give it this address, and
    route by it.
    """

    link: str = "eth0"
    address: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,14}", self.link):
            raise UsageError(f"name a link {self.link!r}", "not 1 to 15 of a-z, 0-9 and -")
        if self.address:
            _check_private(self.address)


def _check_private(address: str) -> None:
    """Raises UsageError unless it is an IPv4 address of OWN_NETWORKS."""
    doing = f"give a workload the address {address}"
    try:
        wanted = IPv4Address(address)
    except ValueError:
        raise UsageError(doing, "it is no IPv4 address") from None
    if not any(wanted in network for network in OWN_NETWORKS):
        known = ", ".join(map(str, OWN_NETWORKS))
        raise UsageError(doing, f"it is in none of {known}")


@dataclass(frozen=True)
class Caller:
    """Whom a command runs as; ``switched`` says that this is not the user who calls.

    ``bus`` is the path of the user's D-Bus socket, if there is one; ``own`` are the directories
    of ttp itself, which a command must not see.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    bus: str = ""
    runtime_dir: str = ""
    switched: bool = False
    own: tuple[str, ...] = ()
