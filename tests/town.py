"""The actors of the network stories: an app and its neighbour, their gateway, and the world.

    app ─eth0══w2─┐
                  ├─ gateway ─uplink══eth0─ world
    bob ─eth0══w3─┘

The gateway is a real one, made by the real steps, but for Tor: a stand-in listens on TransPort and
DNSPort and says who reached it and where they meant to go. The world has every address there is
and hears every frame on its wire.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

from nsrun.address import BLOCKS
from nsrun.apply import Machine
from nsrun.gateway.workloads import Live, Workloads
from nsrun.netns import Namespace
from nsrun.plan import LINK_MAC
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
from nsrun.spec import RunSpec
from nsrun.steps import Ip, LoadRules, SetSysctl

BLOCK = BLOCKS[0]
GATEWAY4, GATEWAY6 = str(BLOCK.gateway), str(BLOCK.gateway6)
UPLINK4, UPLINK6 = "198.51.100.2", "2001:db8:100::2"
WORLD4, WORLD6 = "198.51.100.1", "2001:db8:100::1"
SITE4, SITE6 = "93.184.216.34", "2606:2800:220:1::1"
ETH_P_ALL = 3
LISTENERS = {
    TRANS_PORT: socket.SOCK_STREAM,
    TRANS_PORT_BY_DESTINATION: socket.SOCK_STREAM,
    SOCKS_PORT: socket.SOCK_STREAM,
    SOCKS_PORT_BY_DESTINATION: socket.SOCK_STREAM,
    HTTP_PORT: socket.SOCK_STREAM,
    HTTP_PORT_BY_DESTINATION: socket.SOCK_STREAM,
    DNS_PORT: socket.SOCK_DGRAM,
    DNS_PORT_BY_DESTINATION: socket.SOCK_DGRAM,
}


@dataclass
class Actor:
    """Somebody in a network namespace. Sockets made by ``open`` are in it."""

    name: str
    space: Namespace
    live: Live | None = None

    def run(self, *command: str) -> str:
        done = self.space.call(
            subprocess.run, command, capture_output=True, text=True, check=True, timeout=10
        )
        return str(done.stdout)

    def open(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        made = self.space.call(socket.socket, family, kind, proto)
        made.settimeout(2)
        return made

    def connect(self, host: str, port: int, seconds: float = 2) -> socket.socket:
        """A TCP connection. Raises OSError as connect(2) does."""
        connection = self.open(_family(host), socket.SOCK_STREAM)
        connection.settimeout(seconds)
        try:
            connection.connect((host, port))
        except OSError:
            connection.close()
            raise
        return connection

    def send(self, host: str, port: int, payload: bytes) -> socket.socket:
        """A connected UDP socket that has sent ``payload``."""
        udp = self.open(_family(host), socket.SOCK_DGRAM)
        try:
            udp.connect((host, port))
            udp.send(payload)
        except OSError:
            udp.close()
            raise
        return udp

    def ask(self, resolver: str, name: str) -> bytes:
        """One DNS query for A of ``name``; the answer as it came."""
        labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
        query = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
        with self.send(resolver, 53, query) as udp:
            return bytes(udp.recv(512))

    def raw(self, frame: bytes, interface: str = "eth0") -> None:
        """Put one Ethernet frame on the link, past every rule on its way out."""
        with self.open(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
            link.bind((interface, 0))
            link.send(frame)


@dataclass
class Town:
    app: Actor
    bob: Actor
    gateway: Actor
    world: Actor
    machine: Machine
    workloads: Workloads
    stack: ExitStack
    heard: list[tuple[str, str, int]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)

    def arrive(self, spec: RunSpec) -> Actor:
        """One more workload, with the options of ``spec``."""
        return arrive(self.workloads, self.stack, spec)

    @contextmanager
    def world_hears(self) -> Iterator[list[bytes]]:
        """Frames on the world's wire while the block runs, closed by a marker that must be there.

        The marker is sent by the gateway past its own rules: without it the silence proves nothing.
        """
        frames: list[bytes] = []
        with self.world.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
            tap.bind(("eth0", ETH_P_ALL))
            yield frames
            marker = b"\2" * 12 + b"\x88\xb5" + os.urandom(16)
            self.gateway.raw(marker, "uplink")
            while (frame := tap.recv(70000)) != marker:
                frames.append(frame)

    def without_guard(self) -> None:
        """Take the guard away: what a positive control needs. The gateway forwards everything."""
        self.machine.do(LoadRules("gateway", "flush ruleset\n"))
        for key in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
            self.machine.do(SetSysctl("gateway", f"net.{key}", "1"))


def arrive(workloads: Workloads, stack: ExitStack, spec: RunSpec) -> Actor:
    """A workload as the supervisor gives it out; in it until ``stack`` is closed."""
    live, fd = asyncio.run(workloads.give(spec, os.getpid()))
    space = Namespace(f"/proc/self/fd/{fd}")
    os.close(fd)
    stack.callback(space.close)
    return Actor(live.name, space, live)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET


class Uplink:
    """A veth to the world, in the place of pasta."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.do(
            Ip(
                "gateway",
                (
                    "link add uplink type veth peer name eth0 netns @world",
                    # as on the links: no ARP, so that the first packet need not wait, or be missed
                    f"link set uplink address {LINK_MAC} addrgenmode none",
                    "link set uplink arp off up",
                    f"address add {UPLINK4}/24 dev uplink",
                    f"address add {UPLINK6}/64 dev uplink nodad",
                ),
            )
        )
        machine.do(
            Ip(
                "world",
                (
                    "link set lo up",
                    f"link set eth0 address {LINK_MAC} addrgenmode none",
                    "link set eth0 arp off up",
                    f"address add {WORLD4}/24 dev eth0",
                    f"address add {WORLD6}/64 dev eth0 nodad",
                    "route add local 0.0.0.0/1 dev lo table main",
                    "route add local 128.0.0.0/1 dev lo table main",
                    "route add local 2000::/3 dev lo table main",
                    f"route add {UPLINK4}/32 dev eth0",
                    f"route add {UPLINK6}/128 dev eth0",
                    # the way back to workloads, so that an unguarded packet is even answered
                    f"route add {BLOCK.links} via {UPLINK4}",
                ),
            )
        )
        machine.do(
            Ip(
                "gateway",
                (f"route add 0.0.0.0/0 via {WORLD4}", f"route add ::/0 via {WORLD6}"),
            )
        )

    def stop(self) -> None:
        """It goes with its namespaces."""


class TorStandIn:
    """Accepts like TransPort and the proxies, and answers like DNSPort.

    Of each it keeps in ``heard`` (who, where to, port), and in ``ports`` which listener it was.
    """

    def __init__(
        self,
        gateway: Namespace,
        heard: list[tuple[str, str, int]],
        ports: list[int],
        at: tuple[str, ...] = (GATEWAY4, GATEWAY6),
        kinds: dict[int, socket.SocketKind] = LISTENERS,
    ) -> None:
        self.heard, self.ports, self._sockets = heard, ports, []
        for host in at:
            for port, kind in kinds.items():
                listener = gateway.call(socket.socket, _family(host), kind)
                listener.bind((host, port))
                if kind == socket.SOCK_STREAM:
                    listener.listen()
                self._sockets.append(listener)
        self._wake, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self._stop.close()
        self._thread.join()
        for listener in (*self._sockets, self._wake):
            listener.close()

    def _serve(self) -> None:
        while True:
            for ready in select.select([self._wake, *self._sockets], [], [])[0]:
                if ready is self._wake:
                    return
                self.ports.append(ready.getsockname()[1])
                if ready.type == socket.SOCK_STREAM:
                    connection, peer = ready.accept()
                    with connection:
                        self.heard.append((peer[0], *_original_destination(connection)))
                        connection.sendall(b"hello from a stand-in of Tor\n")
                else:
                    query, peer = ready.recvfrom(512)
                    self.heard.append((peer[0], "dns", 53))
                    ready.sendto(query[:2] + b"\x81\x80" + query[4:], peer)


def _original_destination(connection: socket.socket) -> tuple[str, int]:
    """Where the client meant to go, as conntrack remembers it (SO_ORIGINAL_DST, 80)."""
    if connection.family == socket.AF_INET6:
        found = connection.getsockopt(socket.IPPROTO_IPV6, 80, 28)
        return str(ip_address(found[8:24])), int.from_bytes(found[2:4])
    found = connection.getsockopt(socket.IPPROTO_IP, 80, 16)
    return str(ip_address(found[4:8])), int.from_bytes(found[2:4])


def eventually(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Wait until ``condition()`` holds; fail with ``what`` was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)  # the interval of the poll
