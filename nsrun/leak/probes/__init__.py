"""What a hostile or careless program may try: the stimuli of the leak battery.

A probe sends something that must not get out, or knocks at a door that must be shut, and says what
became of it. It proves nothing by itself: the wires do (nsrun/leak/battery.py), and each probe is
also made where the guard is gone, where it must be seen.

Everything below this package runs inside a workload, with the standard library alone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

# Each probe has an address of its own in these ranges, and its packets are known by it. They mean
# nothing outside of a lab, where everybody there answers.
SITES4, SITES6 = IPv4Address("11.77.0.0"), IPv6Address("2600:114d::")
SECONDS = 0.3  # to wait where silence is expected: on the wires of a lab an answer takes under 0.01
PORTS = 20000  # and a port of its own: a TCP connection comes from PORTS + its number


class Needs(StrEnum):
    """What the sender must be."""

    NOTHING = "nothing"
    NET_RAW = "net_raw"
    """CAP_NET_RAW in the workload's network namespace: more than any workload has."""
    TWO = "two"
    """Two workloads, each of which makes it; what they have in common, Tor tells."""


class Expect(StrEnum):
    """What must become of a probe behind the guard."""

    TOR = "through Tor"
    """It is answered, and nothing of it is on a wire in clear."""
    REFUSED = "refused"
    """It is refused at once, so that programs fall back; silence is a failure."""
    NOWHERE = "nowhere"
    """It is on no wire and reaches nobody; whether the sender is told does not matter."""


class Control(StrEnum):
    """Where the same probe is made without the guard, and what must be seen there."""

    WIRE = "wire"
    """From a workload of a gateway without rules, that forwards: on the wire beyond it."""
    GATEWAY = "gateway"
    """From there, too: somebody answers."""
    HOST = "host"
    """On the host, as root: it works."""
    IDENTITY = "identity"
    """In two workloads that the gateway takes for one."""


class Outcome(StrEnum):
    """What the sender noticed."""

    ANSWERED = "answered"
    REFUSED = "refused"
    SILENT = "silent"
    FORBIDDEN = "forbidden"
    """The kernel did not let this process even try."""


@dataclass(frozen=True)
class World:
    """Who is where, as a probe sees it: addresses, but for the last ones."""

    resolver: str
    resolver6: str
    lan_resolver: str
    lan_web: str
    lan_web6: str
    metadata: str
    router: str
    host: str
    host6: str
    gateway: str
    gateway6: str
    uplink: str
    uplink6: str
    neighbour: str
    neighbour6: str
    own: str
    own6: str
    interface: str = "eth0"
    control: str = ""
    """Path of the gateway's control socket."""
    api: str = ""
    """Path of its supervisor's socket."""
    abstract: str = "ttp-decoy"
    """Name of an abstract socket in the host's network."""
    outside: int = 0
    """A process of the host's, to be traced and robbed."""
    patience: float = 30.0
    """Seconds for an answer through Tor, which may have to build a circuit first."""
    moment: float = 5.0
    """Seconds for a refusal, which comes at once unless the machine is busy."""


@dataclass(frozen=True)
class Shot:
    """One probe being made: the world, and how its packets are known again."""

    world: World
    number: int
    seconds: float = SECONDS
    """To wait for what must come: an answer or a refusal."""

    @property
    def token(self) -> bytes:
        """In every payload that a probe chooses: 16 bytes, as a DNS label and in plain text."""
        return marks(self.number)[0]

    @property
    def site(self) -> str:
        return str(SITES4 + self.number)

    @property
    def site6(self) -> str:
        return str(SITES6 + self.number)


def marks(number: int) -> tuple[bytes, ...]:
    """One of these is in every packet of the probe ``number``, whatever its headers; but for the
    segments of a TCP connection to an address that probes share, which are known by PORTS.
    """
    return (b"ttp-leak-%07d" % number, (SITES4 + number).packed, (SITES6 + number).packed)


Send = Callable[[Shot], Outcome]


@dataclass(frozen=True)
class Probe:
    """``promises`` are those that it would break if it got out."""

    name: str
    title: str
    promises: tuple[str, ...]
    expect: Expect
    send: Send
    needs: Needs = Needs.NOTHING
    control: Control = Control.WIRE


def attempt(probe: Probe, number: int, world: World) -> tuple[Outcome, str]:
    """Make a probe: what became of it, and the error's own words if there was one."""
    try:
        return probe.send(Shot(world, number, _due(probe, world))), ""
    except TimeoutError:
        return Outcome.SILENT, ""
    except PermissionError as error:
        # EPERM for a raw socket; EACCES is how connect(2) reports "administratively prohibited"
        refused = error.errno == 13
        return Outcome.REFUSED if refused else Outcome.FORBIDDEN, error.strerror or str(error)
    except OSError as error:
        return Outcome.REFUSED, error.strerror or str(error)


def _due(probe: Probe, world: World) -> float:
    """Seconds to wait: long where an answer or a refusal must come, and behind a guard does."""
    if probe.expect is Expect.TOR or probe.control is not Control.WIRE:
        return world.patience
    return world.moment if probe.expect is Expect.REFUSED else SECONDS


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def datagram(shot: Shot, host: str, port: int, payload: bytes, *, source_port: int = 0) -> Outcome:
    """One UDP datagram; waits for an answer or an ICMP error."""
    with socket.socket(family(host), socket.SOCK_DGRAM) as udp:
        udp.settimeout(shot.seconds)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if source_port:
            udp.bind(("", source_port))
        udp.connect((host, port))
        udp.send(payload)
        udp.recv(2048)
    return Outcome.ANSWERED


def unconnected(host: str, port: int, payload: bytes) -> Outcome:
    """One UDP datagram by sendto(2), as to a group or a broadcast address; nobody answers."""
    with socket.socket(family(host), socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        udp.sendto(payload, (host, port))
        udp.recv(2048)
    return Outcome.ANSWERED


def stream(shot: Shot, host: str, port: int, payload: bytes) -> Outcome:
    """A TCP connection that sends ``payload`` and reads: an empty answer counts as refused.

    TransPort accepts a connection before it knows that it cannot be made, and closes it then.
    """
    with socket.socket(family(host), socket.SOCK_STREAM) as tcp:
        tcp.settimeout(shot.seconds)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(("", PORTS + shot.number))
        tcp.connect((host, port))
        tcp.sendall(payload)
        return Outcome.ANSWERED if tcp.recv(2048) else Outcome.REFUSED


def request(shot: Shot) -> bytes:
    """An HTTP request that carries the token."""
    return b"GET / HTTP/1.0\r\nHost: test\r\nX-Probe: " + shot.token + b"\r\n\r\n"


def question(shot: Shot, qtype: int = 1, qclass: int = 1, suffix: str = "test") -> bytes:
    """A DNS query (RFC 1035, 4.1) for a name that has the token as a label."""
    labels = [shot.token, *(label.encode() for label in suffix.split("."))]
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    header = struct.pack(">6H", shot.number & 0xFFFF, 0x0100, 1, 0, 0, 0)
    return header + name + struct.pack(">2H", qtype, qclass)
