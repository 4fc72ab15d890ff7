"""The workloads of one gateway: a few ready-made, those given out, and their end.

A workload ends when the kernel says that its link is gone, which is when the last process in its
namespace has ended: nobody else has to be alive, or to behave, for that.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nsrun import netlink, ruleset
from nsrun.apply import Machine, apply
from nsrun.errors import NsrunError
from nsrun.netns import Namespace
from nsrun.plan import Workload, option_steps, workload_steps
from nsrun.spec import Isolation, RunSpec
from nsrun.steps import DropElements, SetElements

READY = 3  # made ahead: as many as a shell pipeline of torified commands has


@dataclass
class Live:
    """A workload that exists in the kernel. ``pid`` is 0 until it is given out.

    ``network`` is the inode number of its network namespace.
    """

    workload: Workload
    machine: Machine
    undo: ExitStack
    effects: tuple[str, ...]
    name: str = ""
    pid: int = 0
    network: int = 0
    command: tuple[str, ...] = ()
    since: float = 0.0
    isolate: Isolation = "workload"
    socks: bool = False
    identity: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For ``ttp ps --json``. ``since`` is in seconds of the epoch.

        ``identity`` is what Tor sees: addresses, or the ranges that each connection has one of.
        """
        addresses = (self.workload.address4, self.workload.address6)
        identity = [self.identity.get(address, address) for address in addresses]
        if self.isolate == "connection":
            block = self.workload.block
            identity = [str(block.connections), str(block.connections6)]
        return {
            "name": self.name,
            "pid": self.pid,
            "command": list(self.command),
            "since": self.since,
            "link": self.workload.link,
            "network": self.network,
            "address": list(addresses),
            "identity": identity,
            "isolate": self.isolate,
            "socks": self.socks,
        }


class Workloads:
    """Makes, gives out and forgets workloads. Numbers and identities are never used again."""

    def __init__(self, gateway: Namespace, first: Workload) -> None:
        self._gateway, self._block = gateway, first.block
        self._number, self._identities = first.number, 0
        self._ready: list[Live] = []
        self.live: dict[str, Live] = {}  # by link
        self.given = 0

    async def fill(self) -> None:
        """Make ready workloads until there are enough of them."""
        while len(self._ready) < READY:
            self._ready.append(await self._make())

    async def give(self, spec: RunSpec, pid: int) -> tuple[Live, int]:
        """A workload and a descriptor of its namespace, which the caller must close.

        Raises NsrunError when the name is taken.
        """
        self.given += 1
        name = spec.name or f"{Path(spec.command[0]).name[:20]}-{self.given}"
        live = self._ready.pop(0) if self._ready else await self._make()
        if any(other.name == name for other in self.live.values()):
            self._ready.append(live)
            raise NsrunError(
                f"name the workload {name}",
                "another one of this gateway has that name",
                "choose another, or leave --name out; ttp ps lists them",
            )
        effects: list[str] = []
        live.machine.echo = effects.append
        try:
            live.undo.enter_context(apply(option_steps(live.workload, spec), live.machine.do))
        except NsrunError:
            live.undo.close()
            raise
        live.machine.echo = lambda _: None
        live.effects += tuple(effects)
        live.isolate, live.socks = spec.isolate, spec.socks
        live.name, live.pid, live.command, live.since = name, pid, spec.command, time.time()
        namespace = live.machine.namespaces.pop("workload")
        fd = os.dup(namespace.fd)
        live.network = os.fstat(fd).st_ino
        # from here on only the descriptor, and the command, keep it alive; the client goes first
        asyncio.get_running_loop().call_soon(namespace.close)
        self.live[live.workload.link] = live
        return live, fd

    def missing(self) -> list[str]:
        """Links of workloads that are no more, by looking at those that are."""
        there = {name for _, name in self._gateway.call(socket.if_nameindex)}
        known = [*self.live, *(live.workload.link for live in self._ready)]
        return [link for link in known if link not in there]

    def ended(self, link: str) -> Live | None:
        """The kernel says that ``link`` is gone: forget the workload and its elements."""
        live = self.live.pop(link, None)
        if live is None:
            live = next((one for one in self._ready if one.workload.link == link), None)
            if live is not None:
                self._ready.remove(live)
        if live is not None:
            live.undo.close()
            for address, identity in live.identity.items():
                self._drop_identity(address, identity)
        return live

    def refresh(self, name: str) -> Live:
        """Give the workload ``name`` a new identity, alone (P7). Raises NsrunError if unknown."""
        live = self.named(name)
        if live.isolate == "connection":
            return live  # each of its connections is somebody new already
        self._identities += 1
        fresh = self._block.identity(self._identities)
        for address, identity in zip(
            (live.workload.address4, live.workload.address6), fresh, strict=True
        ):
            new = str(identity)
            text = ruleset.set_identity(address, new, live.identity.get(address))
            inverse = ruleset.drop_identity(address, new)
            Machine({"gateway": self._gateway}).do(SetElements("gateway", text, inverse))
            live.identity[address] = new
        return live

    def as_json(self) -> list[dict[str, object]]:
        return [live.as_json() for live in self.live.values()]

    def named(self, name: str) -> Live:
        found = next((live for live in self.live.values() if live.name == name), None)
        if found is None:
            raise NsrunError(f"find the workload {name}", "there is none", "ttp ps lists them")
        return found

    def close(self) -> None:
        for live in [*self._ready, *self.live.values()]:
            live.undo.close()
        self._ready.clear()
        self.live.clear()

    async def _make(self) -> Live:
        """In a thread: other requests need not wait for the programs that it runs."""
        workload = Workload(self._block, self._number)
        self._number += 1
        return await asyncio.to_thread(self._build, workload)

    def _build(self, workload: Workload) -> Live:
        effects: list[str] = []
        machine = Machine({"gateway": self._gateway}, echo=effects.append)
        undo = apply(workload_steps(workload), machine.do)
        machine.echo = lambda _: None
        return Live(workload, machine, undo, tuple(effects))

    def _drop_identity(self, address: str, identity: str) -> None:
        text = ruleset.drop_identity(address, identity)
        Machine({"gateway": self._gateway}).do(DropElements("gateway", text))


def link_monitor(gateway: Namespace) -> socket.socket:
    """A socket in the gateway that hears of every link that comes or goes (rtnetlink(7))."""

    def make() -> socket.socket:
        monitor = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        rtmgrp_link = 1
        monitor.bind((0, rtmgrp_link))
        return monitor

    return gateway.call(make)


def gone_links(monitor: socket.socket) -> list[str] | None:
    """Names of the links that went since the last call; None if there were too many to tell."""
    names: list[str] = []
    lost = False
    while True:
        try:
            names += netlink.gone_links(monitor.recv(1 << 16))
        except BlockingIOError:
            return None if lost else names
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # netlink(7): the socket was full, messages are lost
                raise
            lost = True
