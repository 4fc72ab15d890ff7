"""Uplinks: how the gateway's Tor reaches the network.

kind          carried by                     changes on the host                   needs
pasta         a process, user-space TCP/IP   nothing                               passt(1)
slirp4netns   a process, user-space TCP/IP   nothing                               slirp4netns(1)
veth          the kernel                     a link, a table, forwarding of two    root
lab           the kernel                     nothing: the host is simulated        a lab

In the gateway the link is always named ``uplink``. Call these functions from a thread in the
*host's* network namespace that lives as long as the uplink shall: a helper opens its sockets where
it was started, and is killed when that thread ends.

On the host's wire pasta and slirp4netns cause what Tor asks for and nothing else: TCP from the
host's own address, by the host's own kernel. They outlive a change of that address, since their
end of the link has a constant one and their sockets are bound to none.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import socket
import subprocess
import time
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from nsrun import linux
from nsrun.errors import NsrunError, UsageError
from nsrun.gateway.uplink_veth import (
    INTERFACE,
    MTU,
    Command,
    Lab,
    Veth,
    ask,
    close_host,
    egress,
    forwards_ipv6,
    link_addresses,
    missing,
    open_host,
    rules,
    run,
    way_back,
)
from nsrun.netns import Namespace
from nsrun.spec import UPLINKS, LabUplink

if TYPE_CHECKING:
    from collections.abc import Sequence

DEADLINE = 5.0  # seconds for the link to get an address and a default route
GRACE = 0.2  # seconds for those of the other family, which pasta may leave out without a word

# TEST-NET-1 (RFC 5737) is in no LAN, so that it hides no bridge or proxy from Tor; slirp4netns
# has .100 and .2 of any network, and fd00::/64, built in
ADDRESS, ROUTER = "192.0.2.100/24", "192.0.2.2"
ADDRESS6, ROUTER6 = "fd00::100/64", "fd00::2"


class Uplink(Protocol):
    """The values of an uplink. ``gateway`` is always the path of the gateway's namespace."""

    @property
    def kind(self) -> str: ...
    @property
    def families(self) -> tuple[int, ...]: ...  # 4, 6: what the link carries
    def helper(self) -> Command: ...  # the program that carries it, if any; standard input: gateway
    def links(self, gateway: str) -> tuple[Command, ...]: ...  # makes the link, run on the host
    def addresses(self) -> tuple[Command, ...]: ...  # run in the gateway


@dataclass(frozen=True)
class Pasta:
    """passt(1). 31 MB resident, up after 20 ms. Does not start without a default route.

    The build of Debian 12 (2023-03) does not pass a refusal on, so that a connection to a closed
    port times out, and carries IPv6 only if the host's interface has a link-local address.
    """

    families: tuple[int, ...] = (4, 6)
    kind: ClassVar[str] = "pasta"

    def helper(self) -> Command:
        address, prefix = ADDRESS.split("/")
        v4 = ("--address", address, "--netmask", prefix, "--gateway", ROUTER)
        v6 = ("--address", ADDRESS6.split("/")[0], "--gateway", ROUTER6)
        return (
            # --runas: as real root it would become nobody, who may not join the namespace; its own
            # sandbox (empty root directory, seccomp, two capabilities) is the same either way.
            *("pasta", "--foreground", "--quiet", "--runas", "0"),
            # The namespace is standard input: having dropped capabilities, pasta may not open
            # /proc/PID/fd of another process, and newer ones close what else they inherit.
            *("--netns", "/proc/self/fd/0", "--no-netns-quit"),
            *("--config-net", "--ns-ifname", INTERFACE, "--mtu", str(MTU)),
            *("-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw"),
            *("--no-dhcp", "--no-dhcpv6", "--no-ra", "--dns", "none"),
            *(v4 if 4 in self.families else ("--ipv6-only",)),
            *(v6 if 6 in self.families else ("--ipv4-only",)),
        )

    def links(self, gateway: str) -> tuple[Command, ...]:  # noqa: ARG002  it makes its own
        return ()

    def addresses(self) -> tuple[Command, ...]:
        return ()


@dataclass(frozen=True)
class Slirp:
    """slirp4netns(1). 4 MB resident, up after 13 ms. Starts offline too; always carries IPv4."""

    families: tuple[int, ...] = (4, 6)
    kind: ClassVar[str] = "slirp4netns"

    def helper(self) -> Command:
        return (
            *("slirp4netns", "--configure", f"--mtu={MTU}"),
            f"--cidr={ip_interface(ADDRESS).network}",
            *("--disable-host-loopback", "--disable-dns", "--enable-sandbox", "--enable-seccomp"),
            *(("--enable-ipv6",) if 6 in self.families else ()),
            *("--netns-type=path", "/proc/self/fd/0", INTERFACE),
        )

    def links(self, gateway: str) -> tuple[Command, ...]:  # noqa: ARG002  it makes its own
        return ()

    def addresses(self) -> tuple[Command, ...]:
        # it would leave IPv6 to router advertisements, which the gateway does not accept
        return link_addresses("", "", ADDRESS6, ROUTER6) if 6 in self.families else ()


def value(wanted: str | LabUplink, gateway: str) -> Uplink:
    """The uplink that ``wanted`` names, for the gateway of that name, as the host is now.

    Raises UsageError when there is no such kind.
    """
    families = tuple(family for family in (4, 6) if egress(family))
    mark = _checksum(gateway)
    match wanted:
        case LabUplink():
            return Lab(gateway, **asdict(wanted))
        case "pasta":
            return Pasta(families or (4,))
        case "slirp4netns":
            return Slirp((4, 6) if 6 in families else (4,))
        case "veth":
            low = mark % 64 * 4  # several gateways side by side, in TEST-NET-3 (RFC 5737)
            prefix6 = f"fd74:7470:2:{mark & 0xFFFF:x}::"
            return Veth(
                veth_name(gateway),
                *(f"203.0.113.{low + 2}/30", f"203.0.113.{low + 1}"),
                *(f"{prefix6}2/64", f"{prefix6}1"),
            )
    raise UsageError("choose an uplink", f"{wanted!r} is none of {', '.join(UPLINKS)}")


def veth_name(gateway: str) -> str:
    """The part of the names of a gateway's veth and its table that tells it from others'."""
    return f"{_checksum(gateway):08x}"


def _checksum(gateway: str) -> int:
    return zlib.crc32(gateway.encode())


def describe(uplink: Uplink, gateway: str = "$GATEWAY") -> list[str]:
    """What ``start`` runs, as a person could paste it; ``gateway``: path of its namespace."""
    there = f'nsenter --net="{gateway}" '
    lines = [shlex.join(step).replace("'$GATEWAY'", '"$GATEWAY"') for step in uplink.links(gateway)]
    if isinstance(uplink, Veth):
        opened = way_back("$EGRESS", uplink.families)
        table = rules(uplink.name, uplink.sources, opened)
        lines.insert(1, f"nft -f - <<END\n{table}END")
        forwarding = (*opened, *way_back(uplink.peer, uplink.families))
        lines[2:2] = [f"sysctl -w net/{key}=1" for key in forwarding]
    if uplink.helper():
        lines.append(f'unshare --mount {shlex.join(uplink.helper())} <"{gateway}"')
    return lines + [there + shlex.join(step) for step in uplink.addresses()]


class Running:
    """An uplink that is up. ``pidfd`` is readable once its helper has died; None without helper."""

    interface = INTERFACE

    def __init__(
        self,
        kind: str,
        gateway: Namespace,
        process: subprocess.Popen[bytes] | None,
        undo: ExitStack,
    ) -> None:
        self.kind = kind
        self.pidfd = os.pidfd_open(process.pid) if process else None
        self.pid = process.pid if process else None
        self._gateway, self._undo = gateway, undo

    @property
    def addresses(self) -> tuple[IPv4Interface | IPv6Interface, ...]:
        """The gateway's own addresses on the link now, with prefix; none when it is gone."""
        return _link(self._gateway)[0]

    @property
    def routers(self) -> tuple[str, ...]:
        """The next hops of the default routes over the link now."""
        return _link(self._gateway)[1]

    @property
    def gone(self) -> bool:
        """Whether the gateway has no such link any more."""
        return INTERFACE not in self._gateway.call(_interfaces)

    def stop(self) -> None:
        """End the helper, remove the link and all that was made for it. May be called again."""
        try:
            self._undo.close()
        finally:
            if self.pidfd is not None:
                os.close(self.pidfd)
                self.pidfd = None


def start(uplink: Uplink, gateway: Namespace, log: str) -> Running:
    """Bring ``uplink`` up in ``gateway``; a helper writes to the file ``log``.

    In the gateway this also turns off, for links to come, router advertisements, duplicate address
    detection and link-local addresses.

    Raises NsrunError with the helper's own last words; then nothing of the uplink remains.
    """
    doing = f"start the uplink {uplink.kind}"
    process = None
    if INTERFACE in gateway.call(_interfaces):
        raise NsrunError(doing, f"the gateway has a link {INTERFACE} already", "stop that first")
    with ExitStack() as undo:
        try:
            gateway.call(_quiet)
        except OSError as error:
            raise NsrunError(doing, error, "/proc/sys must be writable") from error
        undo.callback(_gone, gateway, doing)
        if isinstance(uplink, Veth) and not forwards_ipv6():
            uplink = Veth(uplink.name, uplink.address, uplink.router)
        for step in uplink.links(gateway.path):
            run(step, doing)
            if step[:3] == ("ip", "link", "add"):  # from here on the names are ours
                undo.callback(_delete, gateway)
                if isinstance(uplink, Veth):
                    host = Namespace("/proc/thread-self/ns/net")  # stop() may come from anywhere
                    undo.callback(host.close)
                    undo.callback(host.call, close_host, f"ttp_{uplink.name}")
                    open_host(uplink.name, uplink.sources, doing)  # before it carries a packet
        if uplink.helper():
            begin = Path(log).stat().st_size if Path(log).exists() else 0
            process = _spawn(uplink.helper(), gateway, log, doing)
            undo.callback(_kill, process)
            expected = (4,) if isinstance(uplink, Slirp) else uplink.families
            _wait(process, gateway, expected, log, begin, doing)
        for step in uplink.addresses():
            gateway.call(run, step, doing)
        return Running(uplink.kind, gateway, process, undo.pop_all())


def choose(wanted: Sequence[str | LabUplink], name: str, gateway: Namespace, log: str) -> Running:
    """Start the first of ``wanted`` that works here, found by trying: versions tell too little.

    Raises NsrunError with every candidate's reason.
    """
    reasons = []
    for one in wanted:
        uplink = value(one, name)
        try:
            return start(uplink, gateway, log)
        except NsrunError as error:
            reasons.append(f"{uplink.kind}: {error.cause}")
    refusal = tun_refusal()
    hint = refusal[1] if refusal else "install one of them: apt install passt slirp4netns"
    raise NsrunError("start an uplink", "; ".join(reasons), hint)


def tun_refusal() -> tuple[str, str] | None:
    """Why pasta and slirp4netns can make no link, and what to do; None if /dev/net/tun opens."""
    path = "/dev/net/tun"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        return f"{path}: {error.strerror}", f"sudo chmod 666 {path}"
    except OSError as error:
        return f"{path}: {error.strerror}", f"sudo modprobe tun; in a container: --device {path}"
    return None


def _quiet() -> None:
    default = Path("/proc/sys/net/ipv6/conf/default")  # of the calling thread
    if default.exists():  # else the kernel has no IPv6
        values = {"accept_ra": 0, "router_solicitations": 0, "accept_dad": 0, "addr_gen_mode": 1}
        for name, value in values.items():
            (default / name).write_text(str(value))


def _spawn(argv: Command, gateway: Namespace, log: str, doing: str) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)
        if os.getppid() != parent:  # it died before the prctl
            os._exit(1)
        # slirp4netns would mount its sandbox over the host's /tmp where that is a shared mount
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)

    with Path(log).open("ab") as output:
        try:
            return subprocess.Popen(
                argv,
                stdin=gateway.fd,
                stdout=output,
                stderr=output,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise missing(argv[0], doing, error) from error


def _wait(
    process: subprocess.Popen[bytes],
    gateway: Namespace,
    families: tuple[int, ...],
    log: str,
    begin: int,
    doing: str,
) -> None:
    begun = time.monotonic()
    half = 0.0
    while True:
        addresses, routers = _link(gateway)
        ready = {a.version for a in addresses} & {6 if ":" in router else 4 for router in routers}
        now = time.monotonic()
        if ready >= set(families) or (half and now > half + GRACE):
            return
        if ready and not half:
            half = now
        if _died(process, seconds=0.005):
            cause = _last_words(log, begin) or f"it exited with {process.wait()}"
            raise NsrunError(doing, cause, f"its log: {log}")
        if now > begun + DEADLINE:
            awaited = f"no address and default route on {INTERFACE} after {DEADLINE:.0f} s"
            words = _last_words(log, begin)
            raise NsrunError(doing, f"{awaited}; {words}".rstrip("; "), f"its log: {log}")


def _died(process: subprocess.Popen[bytes], seconds: float) -> bool:
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def _last_words(log: str, begin: int) -> str:
    text = Path(log).read_bytes()[begin:].decode(errors="replace")
    noise = ("Failed to send", "WARNING: Support for", "sent tapfd", "received tapfd")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join([line for line in lines if not line.startswith(noise)][-3:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _link(gateway: Namespace) -> tuple[tuple[IPv4Interface | IPv6Interface, ...], tuple[str, ...]]:
    """Addresses, but link-local ones, and default routers of the link if it is up."""

    def listed(*argv: str) -> list[dict[str, Any]]:
        return list(json.loads(ask(("ip", "-json", *argv)) or "[]"))

    def look() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        links = listed("address", "show", "dev", INTERFACE, "up")
        show = ("route", "show", "default", "dev", INTERFACE)
        routes = listed("-4", *show) + listed("-6", *show)
        return links, routes

    links, routes = gateway.call(look)
    found = [a for link in links for a in link.get("addr_info", ()) if a["scope"] == "global"]
    addresses = tuple(ip_interface(f"{a['local']}/{a['prefixlen']}") for a in found)
    return addresses, tuple(r["gateway"] for r in routes if "gateway" in r)


def _gone(gateway: Namespace, doing: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while INTERFACE in gateway.call(_interfaces):
        if time.monotonic() > deadline:
            raise NsrunError(doing, f"waited {DEADLINE:.0f} s for {INTERFACE} to vanish")


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _delete(gateway: Namespace) -> None:
    gateway.call(ask, ("ip", "link", "delete", INTERFACE))
