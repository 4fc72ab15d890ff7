"""The workloads of one gateway: a few ready-made, those given out, and their end.

A workload ends when the kernel says that its link is gone, which is when the last process in its
namespace has ended: nobody else has to be alive, or to behave, for that.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from nsrun import netlink, processes, ruleset
from nsrun.apply import Machine, apply
from nsrun.errors import NsrunError
from nsrun.gateway.guests import MOST_WORKLOADS
from nsrun.gateway.recording import Recording
from nsrun.netns import Namespace
from nsrun.plan import Workload, loose_link_steps, option_steps, workload_steps
from nsrun.spec import Isolation, Plug, RunSpec, Strict
from nsrun.steps import AttachNamespace, DropElements, OpenNamespace, SetElements, Step

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds between the TERM and the KILL of a workload whose time is over
NOTHING: Mapping[str, int] = {}
READY = 3  # made ahead: as many as a shell pipeline of torified commands has


@dataclass
class Live:
    """A workload that exists in the kernel. ``pid`` is 0 until it is given out.

    ``network`` is the inode number of its network namespace. ``guest`` is the user it is for, if
    that is not our own; a name is unique among those of one user. The link of one that is
    ``plugged`` ends in a namespace that somebody else made.
    """

    workload: Workload
    machine: Machine
    undo: ExitStack
    effects: tuple[str, ...]
    name: str = ""
    pid: int = 0
    network: int = 0
    guest: int | None = None
    command: tuple[str, ...] = ()
    since: float = 0.0
    until: float | None = None
    clock: asyncio.Task[None] | None = None
    isolate: Isolation = "workload"
    socks: bool = False
    strict: Strict | None = None
    plugged: bool = False
    identity: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For ``ttp ps --json``. ``since`` and ``until`` are in seconds of the epoch.

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
            "guest": self.guest,
            "command": list(self.command),
            "since": self.since,
            "until": self.until,
            "link": self.workload.link,
            "network": self.network,
            "address": list(addresses),
            "identity": identity,
            "isolate": self.isolate,
            "socks": self.socks,
            "strict": self.strict is not None,
        }


class Workloads:
    """Makes, gives out and forgets workloads. Numbers and identities are never used again."""

    def __init__(self, gateway: Namespace, first: Workload) -> None:
        self._gateway, self._block = gateway, first.block
        self._number, self._identities = first.number, 0
        self._ready: list[Live] = []
        self._building: dict[str, int | None] = {}  # link: guest
        self.live: dict[str, Live] = {}  # by link
        self._given: Counter[int | None] = Counter()  # by guest

    async def fill(self) -> None:
        """Make ready workloads until there are enough of them."""
        while len(self._ready) < READY:
            self._ready.append(await self._make())

    async def give(
        self, spec: RunSpec, pid: int, files: Mapping[str, int] = NOTHING
    ) -> tuple[Live, int]:
        """A workload and a descriptor of its namespace, which the caller must close.

        ``files`` are the open ones of a recording: see Recording. Raises NsrunError when the name
        is taken, or when something that was asked for cannot be had.
        """
        live = self._ready.pop(0) if self._ready else await self._make()
        try:
            name = self._name(spec, None)
        except NsrunError:
            self._ready.append(live)
            raise
        namespace = await self._begin(live, spec, name, pid, None, files)
        fd = os.dup(namespace.fd)
        # from here on only the descriptor, and the command, keep it alive; the client goes first
        asyncio.get_running_loop().call_soon(namespace.close)
        return live, fd

    async def attach(self, spec: RunSpec, pid: int, guest: int) -> Live:
        """Plug a link into the network namespace that process ``pid`` of the user ``guest`` made.

        Raises NsrunError when it is not the guest's own, the name is taken, or there are too many.
        """
        links = [*(live.guest for live in self.live.values()), *self._building.values()]
        if links.count(guest) >= MOST_WORKLOADS:
            cause = f"{MOST_WORKLOADS} commands of yours are running"
            raise NsrunError("run one more command", cause, "ttp ps lists them")
        live = await self._make(AttachNamespace("workload", pid, guest))
        try:
            name = self._name(spec, guest)
        except NsrunError:
            live.undo.close()
            raise
        # from here on only the client, and its command, keep the namespace alive
        (await self._begin(live, spec, name, pid, guest, NOTHING)).close()
        return live

    async def plug(
        self, spec: RunSpec, plug: Plug, fd: int, pid: int, files: Mapping[str, int] = NOTHING
    ) -> Live:
        """Plug a link into the network namespace of descriptor ``fd``, which is not ours.

        The workload ends with that namespace, or by ``unplug``. ``pid`` is its main process, 0 if
        there is none yet; ``files`` are as for ``give``. Raises NsrunError when the namespace has
        links, or the name or the address is taken.
        """
        self._name(spec, None)  # before anything is done; and once more, as others may be quicker
        if plug.address:
            self._check_address(plug.address)
        live = await self._make(OpenNamespace("workload", fd, not plug.address), plug)
        live.plugged = True
        try:
            name = self._name(spec, None)
        except NsrunError:
            live.undo.close()
            raise
        (await self._begin(live, spec, name, pid, None, files)).close()
        if plug.address and spec.isolate != "connection":
            try:
                self._renew(live)
            except NsrunError:
                self.ended(live.workload.link)
                raise
        return live

    def unplug(self, name: str) -> None:
        """Remove the link of the workload ``name``, wherever its other end is.

        Raises NsrunError if there is none, or if it is a command's, who made its own namespace.
        """
        live = self.named(name)
        if not live.plugged:
            cause = "it is a command's, not a container's"
            raise NsrunError(f"unplug the workload {name}", cause, f"ttp kill {name}")
        self.ended(live.workload.link)

    def _check_address(self, address: str) -> None:
        """Raises NsrunError when an address is not free for a link."""
        doing, wanted = f"give a workload the address {address}", IPv4Address(address)
        block = self._block
        if any(wanted in one for one in (block.links, block.identities, block.automap)):
            raise NsrunError(doing, "it is one of the gateway's own", "choose another subnet")
        if any(live.workload.given == address for live in self.live.values()):
            raise NsrunError(doing, "another one of this gateway has it", "ttp ps lists them")

    def new_name(self, program: str, guest: int | None, kept: Collection[str] = ()) -> str:
        """A name for a user's next workload, after its ``program``, and none of those ``kept``."""
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(program).name)
        stem = plain.lstrip("_.-")[:20] or "command"
        taken = {*kept, *(live.name for live in self.of(guest))}
        while True:
            self._given[guest] += 1
            if (name := f"{stem}-{self._given[guest]}") not in taken:
                return name

    def _name(self, spec: RunSpec, guest: int | None) -> str:
        """The name of a user's next workload. Raises NsrunError when it is taken."""
        if spec.name is None:
            return self.new_name(spec.command[0], guest)
        if any((live.name, live.guest) == (spec.name, guest) for live in self.live.values()):
            raise NsrunError(
                f"name the workload {spec.name}",
                "another one of this gateway has that name",
                "choose another, or leave --name out; ttp ps lists them",
            )
        return spec.name

    async def _begin(
        self,
        live: Live,
        spec: RunSpec,
        name: str,
        pid: int,
        guest: int | None,
        files: Mapping[str, int],
    ) -> Namespace:
        """Enter a workload into the books, and give it what was asked for.

        Its namespace is now the caller's to let go of. Raises NsrunError.
        """
        live.isolate, live.socks, live.strict = spec.isolate, spec.socks, spec.strict
        if not live.workload.given:  # else it is the engine's own, none of whose processes is ours
            live.network = os.fstat(live.machine.namespaces["workload"].fd).st_ino
        live.name, live.pid, live.guest = name, pid, guest
        live.command, live.since = spec.command, time.time()
        self.live[live.workload.link] = live  # now: nobody else may take the name
        if steps := option_steps(live.workload, spec, plugged=live.plugged):
            try:
                await asyncio.to_thread(self._add, live, steps, files)
            except NsrunError:
                self.ended(live.workload.link)
                raise
        return live.machine.namespaces.pop("workload")

    def missing(self) -> list[str]:
        """Links of workloads that are no more, by looking at those that are."""
        there = {name for _, name in self._gateway.call(socket.if_nameindex)}
        known = [*self.live, *(live.workload.link for live in self._ready)]
        return [link for link in known if link not in there]

    def ended(self, link: str) -> Live | None:
        """The kernel says that ``link`` is gone: forget the workload and its elements."""
        self._building.pop(link, None)
        live = self.live.pop(link, None)
        if live is None:
            live = next((one for one in self._ready if one.workload.link == link), None)
            if live is not None:
                self._ready.remove(live)
        if live is not None:
            live.undo.close()
            if live.clock is not None:
                live.clock.cancel()
            for address, identity in live.identity.items():
                self._drop_identity(address, identity)
        return live

    def of(self, guest: int | None) -> list[Live]:
        """Those that a user may see: a guest his own; we ourselves (None) all."""
        return [live for live in self.live.values() if guest in (None, live.guest)]

    def limit(self, live: Live, seconds: float) -> None:
        """End a workload after so many seconds, if it has not ended by itself."""
        live.until = live.since + seconds
        live.clock = asyncio.ensure_future(self._end(live, seconds))

    async def _end(self, live: Live, seconds: float) -> None:
        await asyncio.sleep(seconds)  # what the user asked for
        log.info("workload %s: its %g s are over", live.name, seconds)
        who = (live.network, live.guest)
        await asyncio.to_thread(processes.send, *who, signal.SIGTERM)
        await asyncio.sleep(GRACE)  # to put its things in order
        try:
            link = live.workload.link
            await asyncio.to_thread(processes.end, *who, lambda: link not in self.live)
        except NsrunError as error:
            log.error("workload %s: %s", live.name, error)

    def refresh(self, name: str, guest: int | None = None) -> Live:
        """Give the workload ``name`` a new identity, alone (P7). Raises NsrunError if unknown."""
        live = self.named(name, guest)
        if live.isolate != "connection":  # there, each of its connections is somebody new already
            self._renew(live)
        return live

    def _renew(self, live: Live) -> None:
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

    def as_json(self, guest: int | None = None) -> list[dict[str, object]]:
        return [live.as_json() for live in self.of(guest)]

    def named(self, name: str, guest: int | None = None) -> Live:
        """A workload that a user may see; our own comes before a guest's. Raises NsrunError."""
        found = [live for live in self.of(guest) if live.name == name]
        found = [live for live in found if live.guest == guest] or found
        if len(found) != 1:
            cause = "several users have one of that name" if found else "there is none"
            raise NsrunError(f"find the workload {name}", cause, "ttp ps lists them")
        return found[0]

    def close(self) -> None:
        for live in [*self._ready, *self.live.values()]:
            live.undo.close()
            if live.clock is not None:
                live.clock.cancel()
        self._ready.clear()
        self.live.clear()

    async def _make(
        self, own: AttachNamespace | OpenNamespace | None = None, plug: Plug | None = None
    ) -> Live:
        """In a thread: other requests need not wait for the programs that it runs."""
        workload = Workload(self._block, self._number, plug.address if plug else "")
        self._number += 1
        guest = own.owner if isinstance(own, AttachNamespace) else None
        self._building[workload.link] = guest
        if plug and plug.address and isinstance(own, OpenNamespace):
            steps = loose_link_steps(workload, own, plug.link)
        else:
            steps = workload_steps(workload, own)
        try:
            live = await asyncio.to_thread(self._build, workload, steps)
        except BaseException:
            self._building.pop(workload.link, None)
            raise
        if workload.link not in self._building:  # a guest can remove its other end
            live.undo.close()
            raise NsrunError("plug in the command", "its link was removed at once")
        del self._building[workload.link]
        return live

    def _build(self, workload: Workload, steps: tuple[Step, ...]) -> Live:
        effects: list[str] = []
        machine = Machine({"gateway": self._gateway}, echo=effects.append)
        undo = apply(steps, machine.do)
        machine.echo = lambda _: None
        return Live(workload, machine, undo, tuple(effects))

    def _add(self, live: Live, steps: tuple[Step, ...], files: Mapping[str, int]) -> None:
        effects: list[str] = []
        live.machine.echo = effects.append
        live.machine.starters["recorder"] = partial(Recording, self._gateway, files)
        live.undo.enter_context(apply(steps, live.machine.do))
        live.machine.echo = lambda _: None
        live.effects += tuple(effects)

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
