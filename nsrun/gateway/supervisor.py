"""One supervisor per gateway: brings it up, keeps it whole, answers requests, takes it down.

The main thread lives in the network namespace that the supervisor was started in (the host's),
and is the parent of the uplink; the gateway namespace has a thread of its own, which is the parent
of Tor. Both children die with their parent. Nothing else outlives the supervisor: a command that
still runs keeps its namespace, whose only link ended in a gateway that is no more (P4).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from nsrun import __version__, facts, paths, ruleset
from nsrun.address import choose_block
from nsrun.apply import Machine, apply
from nsrun.errors import NsrunError
from nsrun.gateway import roaming, uplink
from nsrun.gateway.connection import listen
from nsrun.gateway.requests import Parse, Requests
from nsrun.gateway.tor import Progress, Tor, learn_control
from nsrun.gateway.workloads import Workloads, gone_links, link_monitor
from nsrun.plan import LINK_PREFIX, Workload, gateway_steps
from nsrun.plan import UPLINK as UPLINK_LINK
from nsrun.spec import GatewaySpec
from nsrun.steps import StartTor, StartUplink

log = logging.getLogger(__name__)

RETRY = 2.0  # seconds until a part that could not be started again is tried once more
SETTLE = 1.0  # seconds in which addresses and routes of the host change together
REST = 0.01  # seconds before the stock is filled up: a command that just started needs the CPU

Tell = Callable[[dict[str, Any]], None]


class Supervisor:
    """One gateway, from nothing to up and to nothing again.

    ``starter`` is the writing end of a pipe. When whoever started us closes the other end before
    Tor was ready, and nobody else waits for it, the gateway ends.
    """

    def __init__(
        self, spec: GatewaySpec, parse: Parse, tell: Tell, starter: int | None = None
    ) -> None:
        self.spec, self._tell = spec, tell
        self._requests = Requests(self, parse)
        self.facts = facts.probe()
        self.block = choose_block(self.facts.networks)
        self.machine = Machine(
            starters={"uplink": self._start_uplink, "tor": self._start_tor}, echo=self._echo
        )
        self.log_path = paths.log(spec.state)
        self.tor: Tor | None = None
        self.uplink: uplink.Running | None = None
        self.workloads: Workloads
        self.problem = ""
        self._starter, self._deserted = starter, False
        self._dead: dict[str, StartTor | StartUplink] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._place, self._was_elsewhere = "", False
        self._look: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop

    async def run(self) -> None:
        """From nothing to up, and to nothing again. Raises NsrunError when it cannot come up."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self.end)
        self._loop.run_in_executor(None, learn_control)  # 80 ms, while the uplink starts
        server = listen(f"{self.spec.runtime}/api", self.spec.group)  # first: who comes early waits
        with server, apply(gateway_steps(self.spec, self.facts, self.block), self.machine.do):
            await self._serve(server)

    async def _serve(self, server: socket.socket) -> None:
        gateway = self.machine.namespaces["gateway"]
        self.workloads = Workloads(gateway, Workload(self.block, 2))
        monitor, network = link_monitor(gateway), roaming.monitor()
        self._loop.add_reader(monitor, self._links_changed, monitor)
        self._loop.add_reader(network, self._network_changed, network)
        self._check_uplink()  # it may have gone before anybody was listening
        self._look_around()
        accepting = asyncio.ensure_future(self._requests.accept(server))
        idle = asyncio.ensure_future(self._watch_idle())
        if self._starter is not None:  # of a pipe's writing end, an error is all there is to read
            self._loop.add_reader(self._starter, self._starter_gone)
        self._tell({"ready": True})
        gc.freeze()  # what was loaded stays: no request need wait until it was looked through
        try:
            await self._stop.wait()
        finally:
            for task in (accepting, idle):
                task.cancel()
            server.close()  # who comes now is not to wait for us to end, but to start another one
            for heard in (monitor, network):
                self._loop.remove_reader(heard)
                heard.close()
            self.workloads.close()

    # -- what keeps the gateway whole ------------------------------------------------------------

    def _start_tor(self, step: StartTor | StartUplink) -> Tor:
        assert isinstance(step, StartTor)
        gateway = self.machine.namespaces["gateway"]

        def changed() -> None:  # called from a thread of stem's
            self._loop.call_soon_threadsafe(self._tor_changed)

        self.tor = Tor(step, gateway, self.log_path, changed)
        self._loop.add_reader(self.tor.pidfd, self._tor_died, step)
        return self.tor

    def _start_uplink(self, step: StartTor | StartUplink) -> uplink.Running:
        assert isinstance(step, StartUplink)
        gateway = self.machine.namespaces["gateway"]
        self._place, self._was_elsewhere = roaming.place(), False
        self.uplink = uplink.choose(step.candidates, self.spec.name, gateway, self.log_path)
        if self.uplink.pidfd is not None:
            self._loop.add_reader(self.uplink.pidfd, self._uplink_died, step)
        return self.uplink

    def _tor_changed(self) -> None:
        progress = self.progress
        summary = progress.problem or progress.summary
        self._tell({"progress": progress.percent, "summary": summary})
        self.notify()

    def _tor_died(self, step: StartTor) -> None:
        """Tor ended: closed until a new one has bootstrapped, which is started at once."""
        assert self.tor is not None
        self._loop.remove_reader(self.tor.pidfd)
        self._lost("tor", step)

    def _uplink_died(self, step: StartUplink) -> None:
        """The uplink ended: another one knows nothing of Tor's connections, so Tor starts anew."""
        if self.uplink is not None and self.uplink.pidfd is not None:
            self._loop.remove_reader(self.uplink.pidfd)
        if self.tor is not None:
            self.tor.kill()
        self._lost("uplink", step)

    def _lost(self, name: str, step: StartTor | StartUplink) -> None:
        log.error("the %s ended; starting it again", name)
        self._dead[name] = step
        self._revive()

    def _revive(self) -> None:
        """Start what has died; if that fails, try again after a while, as long as we live.

        The uplink first: a Tor that finds no network may take minutes to look again.
        """
        if self._retry is not None:
            self._retry.cancel()
        for name in [name for name in ("uplink", "tor") if name in self._dead]:
            try:
                if name in self.machine.processes:
                    self.machine.processes.pop(name).stop()
                self.machine.processes[name] = self.machine.starters[name](self._dead[name])
            except (NsrunError, OSError) as error:
                self.problem = str(error)
                log.exception("the %s did not start", name)
                self._retry = self._loop.call_later(RETRY, self._revive)
                break
            del self._dead[name]
            self.problem = ""
        self.notify()

    def _links_changed(self, monitor: socket.socket) -> None:
        links = gone_links(monitor)
        for link in [*self.workloads.missing(), UPLINK_LINK] if links is None else links:
            if link == UPLINK_LINK:
                self._check_uplink()
            elif link.startswith(LINK_PREFIX) and (ended := self.workloads.ended(link)):
                log.info("workload %s ended", ended.name or link)
        self.notify()

    def _check_uplink(self) -> None:
        """Of a helper's end we hear otherwise; but a link can be deleted, and some have none."""
        if "uplink" not in self._dead and self.uplink is not None and self.uplink.gone:
            self._uplink_died(StartUplink(self.spec.uplinks))

    def _network_changed(self, network: socket.socket) -> None:
        roaming.drain(network)
        self._was_elsewhere |= roaming.moved(self._place, roaming.place())  # it may soon be back
        if self._look is None:
            self._look = self._loop.call_later(SETTLE, self._look_around)

    def _look_around(self) -> None:
        """In another network Tor's connections lead nowhere, and an uplink may be of no use.

        That of a lab's gateway is none of the host's.
        """
        self._look = None
        before, now = self._place, roaming.place()
        self._place = now or before
        outside = self.uplink is None or self.uplink.kind != "lab"
        if outside and now and (self._was_elsewhere or roaming.moved(before, now)):
            log.info("the host is in another network")
            self._uplink_died(StartUplink(self.spec.uplinks))

    async def _watch_idle(self) -> None:
        """Keep ready workloads in stock; end the gateway when nobody used it for long enough."""
        idle_since = self._loop.time()
        while True:
            if self.ready:
                await asyncio.sleep(REST)
                await self._fill()
            if self.workloads.live or self._requests.waiting or not self.spec.idle:
                await self.change(None)
                idle_since = self._loop.time()
                continue
            left = idle_since + self.spec.idle - self._loop.time()
            if left <= 0:
                log.info("idle for %g s", self.spec.idle)
                self.end()
                return
            await self.change(left)

    async def _fill(self) -> None:
        try:
            await self.workloads.fill()
        except NsrunError as error:  # somebody took the rules away: it stays closed
            self.problem = str(error)
            log.error("no workload can be made: %s", error)

    def change(self, timeout: float | None) -> Coroutine[None, None, None]:
        """Wait until anything has changed since this call, or ``timeout`` seconds."""
        changed = self._changed

        async def wait() -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), timeout)

        return wait()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _starter_gone(self) -> None:
        self.stay()
        self._deserted = True
        self.end_if_deserted()

    def stay(self) -> None:
        """Somebody who waited got an answer: from now on, whoever goes, the gateway stays."""
        self._deserted = False
        if self._starter is not None:
            self._loop.remove_reader(self._starter)
            os.close(self._starter)
            self._starter = None

    def end_if_deserted(self) -> None:
        """End when whoever wanted the gateway went away while it was being started."""
        if self._deserted and not self._requests.waiting:
            log.info("whoever started the gateway has gone")
            self.end()

    # -- what can be asked --------------------------------------------------------------------

    def end(self) -> None:
        """Take the gateway down, and end."""
        self._stop.set()

    @property
    def ready(self) -> bool:
        return self.tor is not None and self.tor.ready and "tor" in self.machine.processes

    @property
    def progress(self) -> Progress:
        return self.tor.progress if self.tor is not None else Progress()

    def as_json(self, guest: int | None = None) -> dict[str, Any]:
        """For ``ttp gateway inspect``: with the workloads that ``guest`` may see; None: all."""
        tor, link = self.tor, self.uplink
        return {
            "name": self.spec.name,
            "version": __version__,
            "pid": os.getpid(),
            "runtime": self.spec.runtime,
            "state": self.spec.state,
            "ready": self.ready,
            "problem": self.problem or self.progress.problem,
            "tor": {"pid": tor.pid, "version": tor.version, **asdict(tor.progress)} if tor else {},
            "uplink": {
                "kind": link.kind if link else "",
                "pid": link.pid if link else None,
                "addresses": [str(address) for address in link.addresses] if link else [],
            },
            "address": [str(self.block.gateway), str(self.block.gateway6)],
            "rules": ruleset.outline(self._rules()),
            "workloads": self.workloads.as_json(guest),
            "group": self.spec.group,
            "waiting": self._requests.waiting,
            "idle": self.spec.idle,
        }

    def _rules(self) -> str:
        gateway = self.machine.namespaces["gateway"]
        listing = ("nft", "list", "table", "inet", "ttp")
        environment = {**os.environ, "PATH": facts.search_path()}
        return gateway.call(
            subprocess.run, listing, capture_output=True, text=True, env=environment
        ).stdout

    def _echo(self, effect: str) -> None:
        log.info("[#] %s", effect)
        self._tell({"effect": effect})
