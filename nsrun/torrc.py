"""The torrc of a gateway, and what a foreign fragment may not say. Pure. Source: tor(1), 0.4.9."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nsrun.address import AddressBlock
from nsrun.errors import UsageError
from nsrun.ruleset import (
    DNS_PORT,
    DNS_PORT_BY_DESTINATION,
    HTTP_PORT,
    HTTP_PORT_BY_DESTINATION,
    SOCKS_PORT,
    SOCKS_PORT_BY_DESTINATION,
    TRANS_PORT,
    TRANS_PORT_BY_DESTINATION,
)

_BY_DESTINATION = " IsolateDestAddr IsolateDestPort"


@dataclass(frozen=True)
class TorConfig:
    """What the Tor of one gateway needs to know. Paths are absolute.

    ``owner`` is the process that it dies with; None in a container, whose first process it is.
    ``links6``: workloads have IPv6, too.
    """

    block: AddressBlock
    data: str
    control: str
    owner: int | None
    ipv6: bool
    fragment: str = ""
    links6: bool = True


def render(config: TorConfig) -> str:
    """The whole torrc.

    Listeners are fixed and bound to the exact link address: Tor answers DNS from the address it
    listens on, and a later change of listeners by SETCONF can fail half way. One SessionGroup for
    all of them, so that a name and the connection to it share a circuit; circuits are isolated
    by client address, which is Tor's default, and by what a program tells a proxy as user and
    password, which is too. The ruleset leads each link to the listeners that it may have.
    """
    block = config.block
    gateway = block.gateway
    hosts = (str(gateway), f"[{block.gateway6}]")[: 1 + config.links6]
    owner = () if config.owner is None else (f"__OwningControllerProcess {config.owner}",)
    lines = [
        f"DataDirectory {_quoted(config.data)}",
        f"ControlSocket {_quoted(config.control)}",
        "CookieAuthentication 1",
        *owner,
        "ClientOnly 1",
        *_listeners("TransPort", hosts, TRANS_PORT, TRANS_PORT_BY_DESTINATION),
        *_listeners("DNSPort", hosts, DNS_PORT, DNS_PORT_BY_DESTINATION),
        *_listeners("SocksPort", (gateway,), SOCKS_PORT, SOCKS_PORT_BY_DESTINATION),
        *_listeners("HTTPTunnelPort", (gateway,), HTTP_PORT, HTTP_PORT_BY_DESTINATION),
        "AutomapHostsOnResolve 1",
        "AutomapHostsSuffixes .onion",
        f"VirtualAddrNetworkIPv4 {block.automap}",
        f"VirtualAddrNetworkIPv6 [{block.automap6.network_address}]/{block.automap6.prefixlen}",
        f"ClientUseIPv6 {int(config.ipv6)}",
        "ClientRejectInternalAddresses 1",
        "ClientDNSRejectInternalAddresses 1",
        "ShutdownWaitLength 0",
        "Log notice stdout",
    ]
    return "\n".join([*lines, config.fragment.strip(), ""])


# Names that programs look up to learn whether they may use DNS over HTTPS past the resolver they
# were given (Mozilla's canary domain), and those of the best known services that offer it.
CANARIES = (
    *("use-application-dns.net", "cloudflare-dns.com", "dns.google", "dns.quad9.net"),
    *("doh.opendns.com", "dns.adguard.com"),
)


@dataclass(frozen=True)
class HostTor:
    """What the Tor of a whole host needs to know. Paths are absolute; automap ranges as in tor(1).

    ``ipv6`` says that loopback has it, ``reaches_ipv6`` that relays may be asked by it. ``socks``
    is a socket for who owns its directory, or empty. ``others`` are addresses to listen at for
    other machines.
    """

    data: str
    control: str
    cookie: str
    trans_port: int
    dns_port: int
    automap4: str
    automap6: str
    ipv6: bool
    reaches_ipv6: bool
    socks: str = ""
    others: tuple[str, ...] = ()
    fragments: tuple[str, ...] = ()


def render_host(config: HostTor) -> str:
    """The torrc of a whole host: listeners on loopback only, and no proxy that others could ask."""
    at = ("127.0.0.1", *(("::1",) if config.ipv6 else ()), *config.others)
    hosts = tuple(f"[{one}]" if ":" in one else one for one in at)
    network, _, length = config.automap6.partition("/")
    lines = [
        f"DataDirectory {_quoted(config.data)}",
        f"ControlSocket {_quoted(config.control)}",
        "CookieAuthentication 1",
        f"CookieAuthFile {_quoted(config.cookie)}",
        "ClientOnly 1",
        *(f"TransPort {host}:{config.trans_port} SessionGroup=1" for host in hosts),
        *(f"DNSPort {host}:{config.dns_port} SessionGroup=1" for host in hosts),
        f"SocksPort {_quoted(f'unix:{config.socks}') if config.socks else 0}",
        "AutomapHostsOnResolve 1",
        "AutomapHostsSuffixes .onion",
        f"VirtualAddrNetworkIPv4 {config.automap4}",
        f"VirtualAddrNetworkIPv6 [{network}]/{length}",
        f"ClientUseIPv6 {int(config.reaches_ipv6)}",
        "ClientRejectInternalAddresses 1",
        "ClientDNSRejectInternalAddresses 1",
        *(f"MapAddress {name} 0.0.0.0" for name in CANARIES),
        "ShutdownWaitLength 0",
        "Log notice stdout",
    ]
    return "\n".join([*lines, *filter(None, map(str.strip, config.fragments)), ""])


# An option belongs here if a fragment could break a promise with it; the reason is shown.
REFUSED = {
    "SocksPort": "P5: it is set by the gateway",
    "SOCKSListenAddress": "P5: a listener that no workload is isolated on",
    "HTTPTunnelPort": "P5: it is set by the gateway",
    "NATDPort": "P5: a listener that no workload is isolated on",
    "NATDListenAddress": "P5: a listener that no workload is isolated on",
    "TransPort": "P1: it is set by the gateway",
    "TransListenAddress": "P1: it is set by the gateway",
    "TransProxyType": "P1: it is set by the gateway",
    "DNSPort": "P2: it is set by the gateway",
    "DNSListenAddress": "P2: it is set by the gateway",
    "ControlPort": "P5: control sockets are Unix sockets of the gateway only",
    "ControlListenAddress": "P5: control sockets are Unix sockets of the gateway only",
    "ControlSocket": "P5: it is set by the gateway",
    "ControlSocketsGroupWritable": "P5: only the supervisor controls Tor",
    "CookieAuthentication": "P5: only the supervisor controls Tor",
    "CookieAuthFile": "P5: only the supervisor controls Tor",
    "CookieAuthFileGroupReadable": "P5: only the supervisor controls Tor",
    "HashedControlPassword": "P5: only the supervisor controls Tor",
    "__OwningControllerProcess": "P4: Tor must die with the supervisor",
    "DataDirectory": "P8: it is set by the gateway",
    "CacheDirectory": "P8: it is set by the gateway",
    "KeyDirectory": "P8: it is set by the gateway",
    "PidFile": "P8: a file that nobody removes",
    "User": "P10: the supervisor chooses the user",
    "RunAsDaemon": "P4: Tor must stay a child of the supervisor",
    "KeepBindCapabilities": "P10: Tor has no capabilities",
    "DisableDebuggerAttachment": "P5: a workload could read Tor's memory",
    "AutomapHostsOnResolve": "P2: it is set by the gateway",
    "AutomapHostsSuffixes": "P2: it is set by the gateway",
    "VirtualAddrNetwork": "P1: it is set by the gateway",
    "VirtualAddrNetworkIPv4": "P1: it is set by the gateway",
    "VirtualAddrNetworkIPv6": "P1: it is set by the gateway",
    "ClientRejectInternalAddresses": "P5: exits could reach private addresses",
    "ClientDNSRejectInternalAddresses": "P5: exits could name private addresses",
    "TestingTorNetwork": "P5: it switches several of Tor's own safeguards off",
    "__LeaveStreamsUnattached": "P7: circuits are chosen by Tor's isolation",
    "TrackHostExits": "P7: it keeps circuits for longer than their isolation",
    "ORPort": "P3: the gateway takes no connections",
    "DirPort": "P3: the gateway takes no connections",
    "ExtORPort": "P3: the gateway takes no connections",
    "MetricsPort": "P5: a listener of the gateway",
    "BridgeRelay": "P3: the gateway takes no connections",
    "ExitRelay": "P3: the gateway takes no connections",
    "HiddenServiceDir": "P5: it would lead strangers into the gateway",
    "HiddenServicePort": "P5: it would lead strangers into the gateway",
    "ServerTransportPlugin": "P3: the gateway takes no connections",
    "%include": "it would bring in lines that were not checked",
}


def check_fragment(text: str, source: str) -> str:
    """The fragment, if none of its options would break a promise.

    Tor takes any unambiguous beginning of a name for the name, in any case and with a leading
    ``+`` or ``/``, so beginnings are refused as well. Raises UsageError naming option and line.
    """
    refused = {name.lower(): name for name in REFUSED}
    continued = False
    for number, line in enumerate(text.splitlines(), 1):
        word = "" if continued else (line.split("#")[0].split() or [""])[0]
        continued = line.split("#")[0].rstrip().endswith("\\")
        key = word.lstrip("+/").lower()
        if not key or key == "bridge":  # an option itself, not the beginning of BridgeRelay
            continue
        name = next((refused[full] for full in refused if full.startswith(key)), None)
        if name is not None:
            raise UsageError(
                f"use the torrc fragment {source}",
                f"line {number}: {word} is not allowed ({REFUSED[name]})",
                "remove that line",
            )
    return text


def _listeners(option: str, hosts: Iterable[object], port: int, by_destination: int) -> list[str]:
    """One listener with Tor's own isolation, one with more of it, on each of ``hosts``."""
    return [
        f"{option} {host}:{number} SessionGroup=1{flags}"
        for number, flags in ((port, ""), (by_destination, _BY_DESTINATION))
        for host in hosts
    ]


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
