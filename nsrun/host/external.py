"""A Tor that somebody else runs: what can be known of it without its control port.

Whose it is, is told by the processes that hold its listeners: the kernel's own note of a socket's
user is who made it, and Tor makes them before it becomes its user. That it is Tor, and what its
.onion addresses are, is told by its DNSPort, which gives such a name an address without a packet;
that it has bootstrapped, by a name that it must ask the network for.
"""

from __future__ import annotations

import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

from nsrun import dns
from nsrun.address import AUTOMAP6
from nsrun.errors import GatewayError, UsageError
from nsrun.host import machine, oracle, people, session
from nsrun.host.session import HostSpec, Session

DOING = "use a Tor that somebody else runs"
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
KINDS, OPTIONS = ("tcp", "udp"), ("--transport-port", "--dns-port")
LISTEN, UNCONNECTED = "0A", "07"  # TCP_LISTEN, and TCP_CLOSE of UDP (tcp_states.h)
POLL = 0.1  # seconds between two questions
ANSWER = 2.0  # seconds for an answer that needs no network, and until one is asked again


@dataclass(frozen=True)
class External:
    """``listeners`` are the numbers of its sockets on loopback, ``pid`` a process that has them.

    ``onion`` says that it gives .onion names addresses, ``ipv6`` that it listens on ::1 as well.
    """

    uid: int
    gid: int
    pid: int
    listeners: tuple[int, ...]
    ipv6: bool
    onion: bool


def look(spec: HostSpec, automap4: str) -> External:
    """Look at it, change nothing. Raises UsageError if it cannot be relied on."""
    uid = _user(spec)
    ports = spec.trans_port, spec.dns_port
    for kind, option, port in zip(KINDS, OPTIONS, ports, strict=True):
        if not _listening(kind, port, socket.AF_INET):
            where = f"{LOOPBACK[socket.AF_INET]}:{port}"
            raise UsageError(DOING, f"nothing listens at {where}, {kind}", f"{option} tells where")
    both6 = all(_listening(k, p, socket.AF_INET6) for k, p in zip(KINDS, ports, strict=True))
    found = listeners(ports)
    pid = _holder(found, uid)
    if pid == machine.main_process(session.TOR_UNIT):
        hint = "--transport-port and --dns-port tell where another one is"
        raise UsageError(DOING, "it is the one of ttp's session, and ends with it", hint)
    return External(
        uid=uid,
        gid=people.group_of(uid),
        pid=pid,
        listeners=found,
        ipv6=both6,
        onion=_maps_onion(spec.dns_port, automap4, ipv6=both6 and spec.ipv6),
    )


def listeners(ports: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of the sockets that redirected packets reach: another one has another number."""
    return tuple(
        inode
        for kind, port in zip(KINDS, ports, strict=True)
        for family in LOOPBACK
        for inode in _listening(kind, port, family)
    )


def is_as_it_was(found: Session) -> bool:
    """Whether these are still the listeners that were looked at: nobody took their place."""
    return listeners((found.spec.trans_port, found.spec.dns_port)) == found.facts.listeners


def await_bootstrap(spec: HostSpec) -> None:
    """Wait until a name is answered that only Tor's network knows. Raises GatewayError."""
    deadline = time.monotonic() + spec.bootstrap_timeout
    while time.monotonic() < deadline:
        if _ask(spec.dns_port, oracle.HOST, dns.A):
            return
        time.sleep(POLL)  # it may have refused at once
    cause = f"it answers no name after {spec.bootstrap_timeout:g} s"
    raise GatewayError("wait for Tor", cause, "its own log tells how far it is")


def remarks(made: Session) -> Iterator[str]:
    """What follows from this Tor, and should be known."""
    uid = made.facts.tor_uid
    if name := people.logs_in(uid):
        yield f"{name} logs in: all that {name} sends by TCP is let past Tor, as Tor's own is"
    if made.spec.ipv6 and not made.facts.ipv6:
        yield "Tor does not listen on ::1: IPv6 is refused"
    if not made.facts.onion:
        yield "Tor gives .onion names no addresses: they are not reached"


def _user(spec: HostSpec) -> int:
    """The number of the user whose Tor it is to be: the distribution's, if it is not said."""
    uid = people.users(DOING, [spec.tor_user])[0] if spec.tor_user else people.tor_user()
    if uid is None:
        raise UsageError(DOING, "there is no user for Tor on this machine", "--tor-uid USER")
    if uid == 0:
        cause = "as root's, and all that root sends would be let past Tor with it"
        raise UsageError(DOING, cause, "User in its torrc, and --tor-uid")
    return uid


def _listening(kind: str, port: int, family: socket.AddressFamily) -> list[int]:
    """Inodes of the sockets bound to this port of loopback (proc_pid_net(5))."""
    words = socket.inet_pton(family, LOOPBACK[family])
    numbers = (int.from_bytes(words[i : i + 4], sys.byteorder) for i in range(0, len(words), 4))
    local = "".join(f"{number:08X}" for number in numbers) + f":{port:04X}"
    state = LISTEN if kind == "tcp" else UNCONNECTED
    table = Path(f"/proc/net/{kind}{'6' if family == socket.AF_INET6 else ''}")
    if not table.exists():  # without IPv6
        return []
    rows = (line.split() for line in table.read_text().splitlines()[1:])
    return [int(row[9]) for row in rows if row[1] == local and row[3] == state]


def _holder(inodes: tuple[int, ...], uid: int) -> int:
    """A process that has these sockets. Raises UsageError if one of another user has them, too."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    held: set[str] = set()
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            has = wanted & set(_open_in(process))
            if not has:
                continue
            who = _users((process / "status").read_text())
            if who != {uid}:
                told = ", ".join(map(people.name_of, sorted(who)))
                cause = f"process {process.name}, which listens there, is {told}'s"
                raise UsageError(DOING, cause, "--tor-uid tells whose it is to be")
            held |= has
            found = int(process.name)
    if held != wanted:
        raise UsageError(DOING, "no process here has its listeners", "is it in a container?")
    return found


def _open_in(process: Path) -> Iterator[str]:
    """What its descriptors are, by their links (proc_pid_fd(5))."""
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):  # it has just been closed
            yield str(descriptor.readlink())


def _users(status: str) -> set[int]:
    """Real, effective, saved and of files: of a process that could become nobody else."""
    line = next(line for line in status.splitlines() if line.startswith("Uid:"))
    return set(map(int, line.split()[1:]))


def _maps_onion(port: int, automap4: str, *, ipv6: bool) -> bool:
    """Whether .onion names have addresses, all of which the rules lead to Tor."""
    name = dns.onion(secrets.token_bytes(32))
    found = []
    for kind in (dns.A, dns.AAAA) if ipv6 else (dns.A,):
        came = _ask(port, name, kind)
        if came is None:
            raise UsageError(DOING, f"nobody answers at 127.0.0.1:{port}", "is it a DNSPort?")
        found += came
    for address in found:
        automap = ip_network(automap4) if address.version == 4 else AUTOMAP6
        if address not in automap:
            cause = f"it gives a .onion name {address}, which is not in {automap}"
            network = f"VirtualAddrNetworkIPv{address.version} {_in_torrc(str(automap))}"
            raise UsageError(DOING, cause, f"{network} in its torrc")
    return bool(found)


def _in_torrc(network: str) -> str:
    address, _, length = network.partition("/")
    return f"[{address}]/{length}" if ":" in address else network


def _ask(port: int, name: str, kind: int) -> list[IPv4Address | IPv6Address] | None:
    """Its answer, by loopback; None if there is none in time."""
    number = secrets.randbits(16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(ANSWER)
        asking.connect(("127.0.0.1", port))
        with suppress(OSError):  # refused, or silent
            asking.send(dns.question(number, name, kind))
            return dns.answers(asking.recv(4096), number, kind)
    return None
