"""``python3 -m nsrun.leak.inside``: what ``ttp check-leak`` tries, from inside a workload.

Standard input is a JSON object with the fields of Machine; each line of the output is a Finding.
Tor is asked for by name, through Tor. Everything else is sent to nobody (RFC 5737, RFC 3849) or to
the machine's own surroundings, and must be refused *by the gateway*: a refusal by anybody else is
an answer, and silence proves nothing, as a packet may have left.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPException
from ipaddress import ip_address, ip_network
from pathlib import Path

from nsrun import dns
from nsrun.address import AUTOMAP6, BLOCKS
from nsrun.host.policy import AUTOMAPS
from nsrun.leak import machine
from nsrun.leak.knocks import SECONDS, Came, door, gateways, get, knock, send, words
from nsrun.leak.machine import Machine
from nsrun.leak.verdict import Value
from nsrun.linux import CAPABILITIES
from nsrun.ruleset import PRIVATE4, PRIVATE6
from nsrun.spec import ROOT_KEEPS

ORACLE = "https://check.torproject.org/api/ip"
SITES4 = ("https://api4.my-ip.io/ip", "https://api.ipify.org/", "https://ifconfig.me/ip")
SITES6 = ("https://api6.my-ip.io/ip", "https://ifconfig.me/ip")
NOBODY4, NOBODY6 = "203.0.113.1", "2001:db8::1"
LAN = ("192.168.1.1",)  # where many routers are; those of this machine are tried as well
METADATA = "169.254.169.254"
SOCKETS = (
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/nscd/socket",
    "/run/avahi-daemon/socket",
    "/run/dbus/system_bus_socket",
    "/run/docker.sock",
    "/run/systemd/private",
)


@dataclass(frozen=True)
class Finding:
    """``found`` is what came of it, ``details`` every single attempt."""

    name: str
    tried: str
    value: str
    found: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """``attempt`` yields what came of each single thing that it tried: what, how judged, why."""

    name: str
    tried: str
    attempt: Callable[[Machine], Sequence[tuple[str, Came]]]

    def make(self, around: Machine) -> Finding:
        """The worst of the attempts decides, and the first of these is shown."""
        came = self.attempt(around)
        order = (Value.LEAK, Value.INCONCLUSIVE, Value.CONTAINED)
        what, (value, found) = min(came, key=lambda one: order.index(one[1][0]))
        if len(came) > 1:
            more = f"; {len(came) - 1} more contained" if value is Value.CONTAINED else ""
            found = f"{what}: {found}{more}"
        details = tuple(f"{each}: {judged}, {why}" for each, (judged, why) in came)
        return Finding(self.name, self.tried, value, found, details)


# -- through Tor ------------------------------------------------------------------------------


def _oracle(family: socket.AddressFamily) -> tuple[Value, str, str]:
    """Whether Tor's own service saw us come from Tor: how that is judged, why, the address."""
    try:
        said = json.loads(get(ORACLE, family))
        address, is_tor = str(ip_address(said["IP"])), said["IsTor"] is True
    except (OSError, HTTPException) as error:
        return Value.INCONCLUSIVE, f"no answer: {words(error)}", ""
    except (ValueError, KeyError, TypeError):
        return Value.INCONCLUSIVE, "an answer that says nothing", ""
    value = Value.CONTAINED if is_tor else Value.LEAK
    return value, f"IsTor {str(is_tor).lower()}, seen as {address}", address


def _is_tor(_around: Machine) -> list[tuple[str, Came]]:
    value, why, _ = _oracle(socket.AF_INET)
    return [("IPv4", (value, why))]


def _seen_as(around: Machine, family: socket.AddressFamily, sites: Sequence[str]) -> Came:
    """Another site must see the address that Tor's service calls Tor's, or it proves nothing."""
    problem = "no site"
    for site in sites:
        try:
            seen = str(ip_address(get(site, family)))
        except (OSError, HTTPException, ValueError) as error:
            problem = f"{site}: {words(error)}"
            continue
        if seen in around.addresses:
            return Value.LEAK, f"{site} saw {seen}, an address of this machine"
        value, why, address = _oracle(family)
        if address == seen:
            return value, f"{site} saw {seen}, {why.split(',')[0]}"
        problem = f"{site} saw {seen}, and Tor's service {address or 'nobody'}"
    return Value.INCONCLUSIVE, problem


def _address4(around: Machine) -> list[tuple[str, Came]]:
    return [("IPv4", _seen_as(around, socket.AF_INET, SITES4))]


def _address6(around: Machine) -> list[tuple[str, Came]]:
    if all(":" not in address for found in machine.addresses().values() for address in found):
        return [("IPv6", (Value.CONTAINED, "there is no IPv6 here"))]
    return [("IPv6", _seen_as(around, socket.AF_INET6, SITES6))]


# -- names ------------------------------------------------------------------------------------


def _onion() -> str:
    """A name that nobody has."""
    return dns.onion(secrets.token_bytes(32))


def _of_tor(address: str) -> bool:
    found = ip_address(address)
    ranges = (*(block.automap for block in BLOCKS), *map(ip_network, AUTOMAPS))
    return found in AUTOMAP6 or any(found in one for one in ranges)


def _libc(_around: Machine) -> list[tuple[str, Came]]:
    """Whatever nsswitch.conf says."""
    try:
        found = {str(one[4][0]) for one in socket.getaddrinfo(_onion(), 443)}
    except socket.gaierror as error:
        nobody = error.errno == socket.EAI_AGAIN
        value = Value.INCONCLUSIVE if nobody else Value.LEAK
        return [("libc", (value, f"{error.strerror}: not Tor's answer"))]
    return [("libc", _judge_answer(sorted(found)))]


def _ask(server: str) -> Came:
    number = secrets.randbits(16)
    came, answer = send(server, 53, dns.question(number, _onion(), dns.A))
    if not answer:
        refused = came[0] is Value.CONTAINED
        return (Value.INCONCLUSIVE, f"{came[1]}, where Tor should answer") if refused else came
    if found := dns.answers(answer, number, dns.A):
        return _judge_answer(list(map(str, found)))
    return Value.LEAK, f"answered with code {answer[3] & 15}, not by Tor"


def _judge_answer(found: Sequence[str]) -> Came:
    if all(map(_of_tor, found)):
        return Value.CONTAINED, f"answered by Tor, {found[0]}"
    return Value.LEAK, f"answered, not by Tor: {', '.join(found)}"


def _dns(around: Machine) -> list[tuple[str, Came]]:
    servers = dict.fromkeys((NOBODY4, *around.resolvers))
    return [(server, _ask(server)) for server in servers if "%" not in server]


# -- what must be refused ---------------------------------------------------------------------


def _udp(host: str) -> list[tuple[str, Came]]:
    return [(f"{host} port {port}", send(host, port)[0]) for port in (443, 3478, 123)]


def _udp4(_around: Machine) -> list[tuple[str, Came]]:
    return _udp(NOBODY4)


def _udp6(_around: Machine) -> list[tuple[str, Came]]:
    return _udp(NOBODY6)


def _private(*hosts: str) -> list[tuple[str, Came]]:
    """A datagram to each, whose refusal tells by whom; a connection, if it is not for Tor."""
    came = []
    for host in dict.fromkeys(hosts):
        came.append((f"UDP {host}", send(host, 9)[0]))
        if _is_private(host):
            came += [(f"TCP {host} port {port}", knock(host, port)) for port in (53, 80)]
    return came


def _is_private(host: str) -> bool:
    address = ip_address(host.partition("%")[0])
    private = PRIVATE6 if address.version == 6 else PRIVATE4
    return any(address in ip_network(one) for one in private)


def _lan(around: Machine) -> list[tuple[str, Came]]:
    own = [address for address in around.addresses if not address.startswith("fe80:")]
    public = [host for host in (*around.routers, *own) if not _loopback(host)]
    return _private(*LAN, *public)


def _loopback(host: str) -> bool:
    return ip_address(host.partition("%")[0]).is_loopback


def _metadata(_around: Machine) -> list[tuple[str, Came]]:
    return _private(METADATA)


def _ping(_around: Machine) -> list[tuple[str, Came]]:
    """An echo request (RFC 792), by whichever socket we are given."""
    echo = struct.pack(">BBHHH", 8, 0, 0xF7FE, 0, 1)  # its checksum by hand
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as icmp:
                icmp.settimeout(SECONDS)
                icmp.connect((NOBODY4, 0))
                icmp.send(echo)
                icmp.recv(2048)
        except PermissionError:
            continue
        except TimeoutError:
            return [("ping", (Value.INCONCLUSIVE, "silence: it may have left"))]
        except OSError as error:
            return [("ping", (Value.CONTAINED, f"refused: {words(error)}"))]
        return [("ping", (Value.LEAK, "answered"))]
    return [("ping", (Value.CONTAINED, "forbidden by the kernel"))]


# -- what is in reach, without a packet ---------------------------------------------------------


def _link_local(_around: Machine) -> list[tuple[str, Came]]:
    """Without an address of its own, nothing can be said to the neighbours of a link."""
    came = []
    for interface, addresses in machine.addresses().items():
        own = [address for address in addresses if address.startswith("fe80:")]
        said = send(f"fe80::1%{interface}", 9)[0]
        came.append((interface, (Value.LEAK, f"it has {own[0]}") if own else said))
    return came or [("no interface", (Value.CONTAINED, "nothing to send by"))]


def _interfaces(around: Machine) -> list[tuple[str, Came]]:
    """A workload's own link has an address of ours, and there is no other link."""
    came = []
    for interface, addresses in machine.addresses().items():
        foreign = [one for one in addresses if one in around.addresses or not gateways(one)]
        if foreign:
            found = Value.LEAK, f"it has {foreign[0]}, which is not of a workload"
        else:
            found = Value.CONTAINED, " ".join(addresses) or "no address"
        came.append((interface, found))
    return came or [("no interface", (Value.CONTAINED, "no address"))]


def _network(around: Machine) -> list[tuple[str, Came]]:
    if not around.network:
        return [("network", (Value.CONTAINED, "a workload's: the check was started in one"))]
    if around.network == machine.network():
        return [("network", (Value.LEAK, "it is the machine's own"))]
    return [("network", (Value.CONTAINED, "it is another one than the machine's"))]


def _sockets(around: Machine) -> list[tuple[str, Came]]:
    return [(path, door(path)) for path in dict.fromkeys((*SOCKETS, *around.sockets))]


def _raw(_around: Machine) -> list[tuple[str, Came]]:
    kinds = (
        ("IPv4", socket.AF_INET, socket.IPPROTO_RAW),
        ("IPv6", socket.AF_INET6, socket.IPPROTO_RAW),
        ("packet", socket.AF_PACKET, 0),
    )
    came = []
    for name, family, protocol in kinds:
        try:
            socket.socket(family, socket.SOCK_RAW, protocol).close()
            found = Value.LEAK, "made one"
        except OSError as error:
            found = Value.CONTAINED, words(error)
        came.append((name, found))
    return came


def _capabilities(_around: Machine) -> list[tuple[str, Came]]:
    """Those of P10 at most, and no way to gain others (capabilities(7), proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    allowed = sum(1 << CAPABILITIES[name] for name in ROOT_KEEPS)
    came = []
    for name in ("CapPrm", "CapInh", "CapAmb"):
        more = int(status[name], 16) & ~allowed
        value = Value.LEAK if more else Value.CONTAINED
        came.append((name, (value, f"{status[name]}" + (" is more than P10 says" * bool(more)))))
    closed = status["NoNewPrivs"] == "1"
    found = "nothing is gained by setuid" if closed else "setuid programs gain more"
    return [*came, ("NoNewPrivs", (Value.CONTAINED if closed else Value.LEAK, found))]


CHECKS = (
    Check("is-tor", ORACLE, _is_tor),
    Check("address4", "what sites see, by IPv4", _address4),
    Check("address6", "what sites see, by IPv6", _address6),
    Check("dns-libc", "a .onion name that nobody has, by libc", _libc),
    Check("dns", "the same, from other resolvers", _dns),
    Check("udp", "QUIC's, STUN's and NTP's ports", _udp4),
    Check("udp6", "the same by IPv6", _udp6),
    Check("icmp", "an echo request", _ping),
    Check("lan", "routers and the machine itself", _lan),
    Check("metadata", "a cloud's metadata service", _metadata),
    Check("link-local", "IPv6 neighbours", _link_local),
    Check("interfaces", "addresses in sight", _interfaces),
    Check("network", "the network namespace", _network),
    Check("sockets", "daemons by their sockets", _sockets),
    Check("raw-sockets", "raw and packet sockets", _raw),
    Check("capabilities", "powers", _capabilities),
)


def main(names: Collection[str] = ()) -> None:
    """Make these checks; all, if none is named."""
    given = json.load(sys.stdin)
    known = {key: tuple(value) for key, value in given.items() if key != "network"}
    around = Machine(network=given["network"], **known)
    for check in (one for one in CHECKS if not names or one.name in names):
        sys.stdout.write(json.dumps(asdict(check.make(around))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
