"""One supervisor per gateway: brings it up, keeps it whole, answers requests, takes it down.

The main thread lives in the network namespace that the supervisor was started in (the host's),
and is the parent of the uplink; the gateway namespace has a thread of its own, which is the parent
of Tor. Both children die with their parent. Nothing else outlives the supervisor: a command that
still runs keeps its namespace, whose only link ended in a gateway that is no more (P4).
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsrun import __version__, facts, paths, ruleset
from nsrun.address import choose_block
from nsrun.apply import Machine, apply
from nsrun.errors import ExitCode, GatewayError, NsrunError, UsageError
from nsrun.gateway import uplink
from nsrun.gateway.tor import Progress, Tor
from nsrun.gateway.workloads import Workloads, gone_links, learn_netlink, link_monitor
from nsrun.plan import LINK_PREFIX, Workload, enter_ops, gateway_steps
from nsrun.plan import UPLINK as UPLINK_LINK
from nsrun.spec import GatewaySpec, RunSpec
from nsrun.steps import StartTor, StartUplink
from nsrun.user import resolve

log = logging.getLogger(__name__)

REST = 0.05  # seconds before the stock is filled up: a command that just started needs the CPU

Parse = Callable[[list[str], str], RunSpec | None]
Tell = Callable[[dict[str, Any]], None]


class Supervisor:
    """``parse`` turns the arguments of a ``ttp run`` into a RunSpec, or None if it is not one."""

    def __init__(self, spec: GatewaySpec, parse: Parse, tell: Tell) -> None:
        self.spec, self._parse, self._tell = spec, parse, tell
        self.facts = facts.probe()
        self.block = choose_block(self.facts.networks)
        self.machine = Machine(
            starters={"uplink": self._start_uplink, "tor": self._start_tor}, echo=self._echo
        )
        self.log_path = paths.log(spec.state)
        self.tor: Tor | None = None
        self.uplink: uplink.Running | None = None
        self.workloads: Workloads
        self._problem = ""
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop

    async def run(self) -> None:
        """From nothing to up, and to nothing again. Raises NsrunError when it cannot come up."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        server = _listen(f"{self.spec.runtime}/api")  # first: who comes early waits
        try:
            with server, apply(gateway_steps(self.spec, self.facts, self.block), self.machine.do):
                await self._serve(server)
        finally:
            shutil.rmtree(self.spec.runtime, ignore_errors=True)

    async def _serve(self, server: socket.socket) -> None:
        gateway = self.machine.namespaces["gateway"]
        self.workloads = Workloads(gateway, self.facts, Workload(self.block, 2))
        monitor = link_monitor(gateway)
        self._loop.add_reader(monitor, self._links_changed, monitor)
        reading = asyncio.ensure_future(asyncio.to_thread(learn_netlink))  # while Tor bootstraps
        accepting = asyncio.ensure_future(self._accept(server))
        idle = asyncio.ensure_future(self._watch_idle())
        self._tell({"ready": True})
        gc.freeze()  # what was loaded stays: no request need wait until it was looked through
        try:
            await self._stop.wait()
        finally:
            for task in (reading, accepting, idle):
                task.cancel()
            self._loop.remove_reader(monitor)
            monitor.close()
            self.workloads.close()

    # -- what keeps the gateway whole ------------------------------------------------------------

    def _start_tor(self, step: StartTor | StartUplink) -> Tor:
        assert isinstance(step, StartTor)
        gateway = self.machine.namespaces["gateway"]

        def changed() -> None:  # called from a thread of stem's
            self._loop.call_soon_threadsafe(self._notify)

        self.tor = Tor(step, gateway, self.log_path, changed)
        self._loop.add_reader(self.tor.pidfd, self._tor_died, step)
        return self.tor

    def _start_uplink(self, step: StartTor | StartUplink) -> uplink.Running:
        assert isinstance(step, StartUplink)
        gateway = self.machine.namespaces["gateway"]
        self.uplink = uplink.choose(step.candidates, self.spec.name, gateway, self.log_path)
        if self.uplink.pidfd is not None:
            self._loop.add_reader(self.uplink.pidfd, self._uplink_died, step)
        return self.uplink

    def _tor_died(self, step: StartTor) -> None:
        """Tor ended: closed until a new one has bootstrapped, which is started at once."""
        log.error("Tor ended; starting it again")
        assert self.tor is not None
        self._loop.remove_reader(self.tor.pidfd)
        self._revive("tor", step, lambda: self._start_tor(step))

    def _uplink_died(self, step: StartUplink) -> None:
        """The uplink ended: another one knows nothing of Tor's connections, so Tor starts anew."""
        log.error("the uplink ended; starting it again")
        if self.uplink is not None and self.uplink.pidfd is not None:
            self._loop.remove_reader(self.uplink.pidfd)
        self._revive("uplink", step, lambda: self._start_uplink(step))
        if self.tor is not None:
            self.tor.kill()

    def _revive(self, name: str, step: StartTor | StartUplink, start: Callable[[], Any]) -> None:
        """Start a dead part again; if that fails, try again after a while, as long as we live."""
        if name in self.machine.processes:
            self.machine.processes.pop(name).stop()
        try:
            self.machine.processes[name] = start()
        except NsrunError as error:
            self._problem = str(error)
            log.exception("%s did not start", name)
            self._loop.call_later(2.0, self._revive, name, step, start)
        else:
            self._problem = ""
        self._notify()

    def _links_changed(self, monitor: socket.socket) -> None:
        for link in gone_links(monitor):
            if link == UPLINK_LINK and "uplink" in self.machine.processes:
                if self.uplink is not None and self.uplink.pidfd is None:
                    self._uplink_died(StartUplink(self.spec.uplinks))
            elif link.startswith(LINK_PREFIX) and (ended := self.workloads.ended(link)):
                log.info("workload %s ended", ended.name or link)
        self._notify()

    async def _watch_idle(self) -> None:
        """Keep ready workloads in stock; end the gateway when nobody used it for long enough."""
        idle_since = self._loop.time()
        while True:
            if self.ready:
                await asyncio.sleep(REST)
                await self.workloads.fill()
            if self.workloads.live or not self.spec.idle:
                await self._change(None)
                idle_since = self._loop.time()
                continue
            left = idle_since + self.spec.idle - self._loop.time()
            if left <= 0:
                log.info("idle for %g s", self.spec.idle)
                self._stop.set()
                return
            await self._change(left)

    async def _change(self, timeout: float | None) -> None:
        """Wait until anything changed, or ``timeout`` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- requests ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.tor is not None and self.tor.ready and "tor" in self.machine.processes

    @property
    def progress(self) -> Progress:
        return self.tor.progress if self.tor is not None else Progress()

    async def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(server)
            task = asyncio.ensure_future(self._answer(connection))
            task.add_done_callback(_log_failure)

    async def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                peer = self._check_peer(connection)
                line = b""
                while not line.endswith(b"\n"):
                    data = await self._loop.sock_recv(connection, 1 << 16)
                    if not data or len(line) > 1 << 23:
                        return
                    line += data
                await self._handle(connection, json.loads(line), peer)
            except NsrunError as error:
                await self._send(connection, {"error": _as_json(error)})
            except (OSError, ValueError) as error:
                log.warning("a request ended: %s", error)

    async def _handle(self, connection: socket.socket, request: dict[str, Any], peer: int) -> None:
        match request:
            case {"do": "run"}:
                await self._run(connection, request, peer)
                return
            case {"do": "wait", "timeout": timeout}:
                await self._bootstrapped(connection, float(timeout))
                answer: dict[str, Any] = {}
            case {"do": "down"}:
                self._stop.set()
                answer = {}
            case {"do": "inspect"}:
                answer = self.as_json()
            case {"do": "refresh", "name": name}:
                answer = self.workloads.refresh(name).as_json()
            case _:
                raise UsageError("understand the request", f"no such request: {request.get('do')}")
        await self._send(connection, {**answer, "descriptors": []})

    async def _run(self, connection: socket.socket, request: dict[str, Any], peer: int) -> None:
        if request["version"] != __version__:
            raise GatewayError(
                "use the running gateway",
                f"it is of version {__version__}, this ttp of {request['version']}",
                f"restart it: ttp gateway down {self.spec.name}",
            )
        spec = self._parse(request["arguments"], request["gateway"])
        if spec is None or spec.gateway != self.spec.name:
            await self._send(connection, {"elsewhere": True})
            return
        asked = request["caller"]
        nested = asked["user_namespace"] != Path("/proc/self/ns/user").stat().st_ino
        caller, environment = resolve(spec, asked, nested)
        await self._bootstrapped(connection, spec.bootstrap_timeout)
        live, fd = await self.workloads.give(spec.name, peer, spec.command, spec.ipv6)
        log.info("workload %s: pid %d, %s", live.name, peer, " ".join(spec.command))
        descriptors = {"network": fd}
        if nested:
            descriptors["user"] = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        if self.spec.ca_bundle:
            bundle = self.spec.ca_bundle
            descriptors["ca_bundle"] = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
            environment |= dict.fromkeys(CA_VARIABLES, CA_FILE)
        answer = {
            "descriptors": list(descriptors),
            "enter": enter_ops(self.spec, self.facts, self.block, caller, nested),
            "environment": environment,
            "command": spec.command,
            "verbose": spec.verbose,
            "effects": live.effects if spec.verbose else (),
        }
        try:
            await self._send(connection, answer, list(descriptors.values()))
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        if not nested and await self._loop.sock_recv(connection, 1):
            _map_users(peer)
            await self._loop.sock_sendall(connection, b"m")
        self._notify()

    async def _bootstrapped(self, connection: socket.socket, timeout: float) -> None:
        """Wait until Tor is ready, telling the client how far it is. Raises GatewayError."""
        deadline = self._loop.time() + timeout
        told = -1
        while not self.ready:
            progress = self.progress
            if progress.percent != told:
                told = progress.percent
                told_line = {"progress": told, "summary": progress.problem or progress.summary}
                await self._send(connection, told_line)
            left = deadline - self._loop.time()
            if left <= 0:
                cause = f"{timeout:g} s passed at {progress.percent} % ({progress.summary})"
                if problem := self._problem or progress.problem:
                    cause += f": {problem}"
                raise GatewayError(
                    "reach the Tor network",
                    cause,
                    f"more in: ttp gateway logs {self.spec.name}; more time: --bootstrap-timeout",
                )
            await self._change(left)
        if told >= 0:
            await self._send(connection, {"progress": 100, "summary": "Done"})

    async def _send(
        self, connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None
    ) -> None:
        line = json.dumps(message).encode() + b"\n"
        if fds:  # they travel with the first byte
            socket.send_fds(connection, [line[:1]], fds)
            line = line[1:]
        await self._loop.sock_sendall(connection, line)

    def _check_peer(self, connection: socket.socket) -> int:
        """The peer's pid. Raises GatewayError unless it is our user, and outside our workloads."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("3i", credentials)
        try:  # a process beside our user namespace cannot be looked at; one below it is a workload
            below = not Path(f"/proc/{pid}/ns/user").samefile("/proc/self/ns/user")
        except OSError:
            below = False
        if uid != os.geteuid() or below:
            raise GatewayError("use this gateway", "it belongs to another user or is around you")
        return int(pid)

    def as_json(self) -> dict[str, Any]:
        """For ``ttp gateway inspect``."""
        tor, link = self.tor, self.uplink
        return {
            "name": self.spec.name,
            "version": __version__,
            "pid": os.getpid(),
            "runtime": self.spec.runtime,
            "state": self.spec.state,
            "ready": self.ready,
            "problem": self._problem or self.progress.problem,
            "tor": {"pid": tor.pid, "version": tor.version, **asdict(tor.progress)} if tor else {},
            "uplink": {
                "kind": link.kind if link else "",
                "pid": link.pid if link else None,
                "addresses": [str(address) for address in link.addresses] if link else [],
            },
            "address": [str(self.block.gateway), str(self.block.gateway6)],
            "rules": ruleset.outline(self._rules()),
            "workloads": [live.as_json() for live in self.workloads.live.values()],
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


CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def _map_users(pid: int) -> None:
    """Map every user and group of ours to itself in the new user namespace of process ``pid``."""
    for kind in ("uid_map", "gid_map"):
        ranges = [line.split() for line in Path(f"/proc/self/{kind}").read_text().splitlines()]
        text = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        Path(f"/proc/{pid}/{kind}").write_text(text)


def _listen(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(mask)
    server.listen(64)
    return server


def _as_json(error: NsrunError) -> dict[str, Any]:
    code = ExitCode.RUN_FAILED
    return {"doing": error.doing, "cause": error.cause, "hint": error.hint, "code": code}


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a request failed", exc_info=error)
