"""What can be asked of a supervisor, and what it does then; docs/internals.md has a table."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsrun import __version__, processes, prompt
from nsrun.client import visible
from nsrun.errors import ExitCode, GatewayError, NsrunError, UsageError
from nsrun.gateway import guests, outside, plugs
from nsrun.gateway.connection import Client
from nsrun.plan import Joined, Op, enter_ops
from nsrun.spec import Caller, RunSpec, check_seconds
from nsrun.user import resolve

if TYPE_CHECKING:
    from nsrun.gateway.supervisor import Supervisor
    from nsrun.gateway.workloads import Live

log = logging.getLogger(__name__)

Parse = Callable[[dict[str, Any]], RunSpec | None]


class Requests:
    """Answers for one gateway. ``parse`` turns a request to run into a RunSpec, or None if the
    full interface must deal with it.
    """

    def __init__(self, gateway: Supervisor, parse: Parse) -> None:
        self._gateway, self._parse = gateway, parse
        self.waiting = 0  # clients that wait for Tor
        self._guests = guests.Guests(gateway.spec.group)

    async def accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(server)
            except OSError as error:
                log.warning("a client has to wait: %s", error)
                await asyncio.sleep(0.1)  # until there is a free descriptor: nothing tells
                continue
            task = asyncio.ensure_future(self._serve(Client(connection)))
            task.add_done_callback(_log_failure)

    async def _serve(self, client: Client) -> None:
        try:
            try:
                self._check(client)
                if client.guest:
                    with self._guests.seat(client.uid) as turn:
                        await self._hear(client, turn)
                else:
                    await self._hear(client, asyncio.Lock())
            except NsrunError as error:
                await client.send({"error": _as_json(error)})
        except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            # a guest could fill the disk with these
            level = logging.DEBUG if client.guest else logging.WARNING
            log.log(level, "a request ended: %s", error)
        finally:
            client.close()

    async def _hear(self, client: Client, turn: asyncio.Lock) -> None:
        request = await client.request()
        if request is not None:
            await self._answer(client, request, turn)

    async def _answer(self, client: Client, request: dict[str, Any], turn: asyncio.Lock) -> None:
        gateway = self._gateway
        guest = client.user
        match request:
            case {
                "do": "run" | "exec" | "shell" | "plug" | "wait",
                "version": str() as version,
            } if version != __version__:
                raise GatewayError(
                    "use the running gateway",
                    f"it is of version {__version__}, this ttp of {version}",
                    f"restart it: ttp gateway down {gateway.spec.name}",
                )
            case {
                "do": "run" | "exec" | "shell",
                "version": str(),
                "gateway": str(),
                "shell": str(),
                "arguments": list(),
                "defaults": dict(),
                "caller": dict(),
            }:
                await self._run(client, request, turn)
                return
            case {"do": "wait", "timeout": str() | float() | int() as timeout}:
                await self._bootstrapped(client, check_seconds("the timeout", float(timeout)))
                answer: dict[str, Any] = {"address": str(gateway.block.gateway)}
            case {"do": "down"}:
                if client.guest:
                    raise UsageError(f"stop the gateway {gateway.spec.name}", "only root can")
                gateway.end()
                answer = {}
            case {"do": "inspect"}:
                answer = gateway.as_json(guest)
            case {"do": "ps"}:
                answer = {"workloads": gateway.workloads.as_json(guest)}
            case {"do": "refresh", "name": str() as name}:
                answer = gateway.workloads.refresh(name, guest).as_json()
            case {"do": "plug" | "unplug"} if client.guest:
                raise UsageError(plugs.DOING, "only root can, on a gateway of root's", "use sudo")
            case {"do": "plug", "version": str()}:
                answer = (await self._plug(client, request)).as_json()
            case {"do": "unplug", "name": str() as name}:
                gateway.workloads.unplug(name)
                answer = {}
            case _:
                raise UsageError("understand the request", f"no such request: {request.get('do')}")
        await client.send({**answer, "descriptors": []})

    async def _plug(self, client: Client, request: dict[str, Any]) -> Live:
        """Plug a link into the namespace of the descriptor that came along. Raises NsrunError."""
        gateway = self._gateway
        spec, plug, pid = plugs.wanted(request, gateway.spec.name)
        names = request.get("descriptors")
        if names != plugs.descriptors(spec) or len(client.descriptors) != len(names):
            cause = "the descriptors of its network, or of a recording, are missing"
            raise UsageError(plugs.DOING, cause)
        network, *others = client.descriptors
        files = dict(zip(names[1:], others, strict=True))
        await self._bootstrapped(client, spec.bootstrap_timeout)
        live = await gateway.workloads.plug(spec, plug, network, pid, files)
        log.info("workload %s: a container, %s", live.name, visible(" ".join(spec.command)))
        gateway.notify()
        return live

    async def _run(self, client: Client, request: dict[str, Any], turn: asyncio.Lock) -> None:
        gateway = self._gateway
        if client.guest:
            guests.check_words(request)
        spec = self._parse(request)
        if spec is None or spec.gateway != gateway.spec.name or not self._knows(client, spec):
            await client.send({"elsewhere": True})
            return
        names = () if client.guest else request.get("descriptors", ())
        files = dict(zip(names, client.descriptors, strict=False))
        kept = request.get("kept")
        if spec.detach and kept is None:  # first the client leaves its caller, with his terminal
            await self._bootstrapped(client, spec.bootstrap_timeout)
            await client.send({"detach": True, "status_fd": spec.status_fd, "descriptors": []})
            return
        if spec.pcap and not files:  # the client opens it: it is his file, not ours
            if client.guest:
                hint = "use one of your own: ttp gateway up NAME"
                raise UsageError("record on this gateway", "it takes no file of another user", hint)
            await client.send({"record": spec.pcap, "descriptors": []})
            return
        joined = self._joined(client, spec)
        if joined is not None:
            spec = replace(spec, socks=joined.socks, strict=joined.strict)
        asked, nested = request["caller"], False
        if client.guest:
            asked = guests.caller(client.uid, client.gid, client.groups, asked)
        else:
            nested = asked["user_namespace"] != Path("/proc/self/ns/user").stat().st_ino
        caller, environment = resolve(spec, asked, nested)
        uid = caller.uid if caller.switched else client.uid
        others = [live.pid for live in gateway.workloads.live.values()]
        warning = None if spec.strict else outside.warning(spec.command, uid, others)
        await self._bootstrapped(client, spec.bootstrap_timeout)
        if kept and spec.name is None:
            name = gateway.workloads.new_name(spec.command[0], client.user, kept)
            spec = replace(spec, name=name)
        placed = await self._place(client, spec, joined, caller, nested, files, turn)
        if placed is None:
            return
        live, enter, descriptors = placed
        if spec.timeout:
            gateway.workloads.limit(live, spec.timeout)
        what = f"of user {client.uid}" if client.guest else " ".join(spec.command)
        log.info("workload %s: pid %d, %s", live.name, client.pid, visible(what))
        if bundle := gateway.spec.ca_bundle:
            descriptors["ca_bundle"] = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
            environment |= dict.fromkeys(CA_VARIABLES, CA_FILE)
        if request["do"] == "shell":
            environment |= prompt.variables(spec.command[0], live.name)
        answer: dict[str, Any] = {
            "descriptors": list(descriptors),
            "enter": enter,
            "environment": environment,
            "command": spec.command,
            "verbose": spec.verbose,
            "effects": live.effects if spec.verbose and not joined else (),
            "warning": warning,
        }
        live.effects = ()  # told, or nobody wants to know: a kilobyte or two
        answer |= _options(spec, gateway.spec.name, live, caller)
        try:
            await client.send(answer, list(descriptors.values()))
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        if not (nested or client.guest) and await client.says_more():
            _map_users(client.pid)
            await client.say(b"m")
        gateway.notify()

    async def _place(
        self,
        client: Client,
        spec: RunSpec,
        joined: Live | None,
        caller: Caller,
        nested: bool,
        files: dict[str, int],
        turn: asyncio.Lock,
    ) -> tuple[Live, tuple[Op, ...], dict[str, int]] | None:
        """The workload for a command, how to enter it, and descriptors for that.

        None if the client has gone. Raises NsrunError.
        """
        gateway = self._gateway
        at = (gateway.spec, gateway.facts, gateway.block, caller, nested, spec)
        if joined is not None:
            pids = await asyncio.to_thread(processes.members, joined.network, joined.guest)
            there = Joined(joined.network, tuple(pids))
            return joined, enter_ops(*at, guest=client.guest, joined=there), {}
        enter = enter_ops(*at, guest=client.guest)
        if client.guest:
            await client.send({"perform": enter[0], "verbose": spec.verbose})
            if not await client.says_more():
                return None
            async with turn:
                return await gateway.workloads.attach(spec, client.pid, client.uid), enter[1:], {}
        live, network = await gateway.workloads.give(spec, client.pid, files)
        descriptors = {"network": network}
        if nested:
            descriptors["user"] = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        return live, enter, descriptors

    def _knows(self, client: Client, spec: RunSpec) -> bool:
        """Whether the workload that the client wants to join, if it wants that, is here."""
        seen = self._gateway.workloads.of(client.user)
        return spec.join is None or any(live.name == spec.join for live in seen)

    def _joined(self, client: Client, spec: RunSpec) -> Live | None:
        """The workload that the client wants to join, if it is one. Raises NsrunError."""
        if spec.join is None:
            return None
        found = self._gateway.workloads.named(spec.join, client.user)
        if found.guest != client.user:
            hint = f"only user {found.guest} can join it"
            raise UsageError(f"join the workload {spec.join}", "it is another user's", hint)
        return found

    async def _bootstrapped(self, client: Client, timeout: float) -> None:
        """Wait until Tor is ready, telling the client how far it is. Raises GatewayError."""
        self.waiting += 1
        try:
            await self._wait(client, timeout)
        except GatewayError:
            self._gateway.stay()
            raise
        else:
            self._gateway.stay()
        finally:
            self.waiting -= 1
            self._gateway.end_if_deserted()
            if not self._gateway.ready:
                self._gateway.notify()  # nobody waits any more: it may be idle now

    async def _wait(self, client: Client, timeout: float) -> None:
        gateway, loop = self._gateway, asyncio.get_running_loop()
        deadline = loop.time() + timeout
        told = -1
        while not gateway.ready:
            progress = gateway.progress
            if progress.percent != told:
                told = progress.percent
                summary = progress.problem or progress.summary
                await client.send({"progress": told, "summary": summary})
            left = deadline - loop.time()
            if left <= 0:
                cause = f"{timeout:g} s passed at {progress.percent} % ({progress.summary})"
                if problem := gateway.problem or progress.problem:
                    cause += f": {problem}"
                hint = f"more in: ttp gateway logs {gateway.spec.name}"
                raise GatewayError(
                    "reach the Tor network", cause, f"{hint}; more time: --bootstrap-timeout"
                )
            await client.while_there(gateway.change(left))
        if told >= 0:
            await client.send({"progress": 100, "summary": "Done"})

    def _check(self, client: Client) -> None:
        """Raises GatewayError unless the client may be here, and is outside our workloads."""
        try:  # a process beside our user namespace cannot be looked at; one below it is a workload
            space = Path(f"/proc/{client.pid}/ns/user")
            below = not space.samefile("/proc/self/ns/user")
        except OSError:
            below = client.guest  # whom root can look at, as long as there is somebody
        known = not client.guest or self._guests.welcome(client.gid, client.groups)
        if below or not known:
            raise GatewayError("use this gateway", "it belongs to another user or is around you")


def _options(spec: RunSpec, gateway: str, live: Live, caller: Caller) -> dict[str, Any]:
    """What a client must know for options that most requests do not have."""
    found: dict[str, Any] = {}
    if spec.env or spec.env_files:
        found["env"] = {"files": spec.env_files, "settings": spec.env}
    if spec.strict:
        found["sockets"] = spec.strict.sockets
    if spec.detach:
        owner = [caller.uid, caller.gid] if caller.switched else None
        found |= {"name": live.name, "owner": owner}
    if spec.detach or spec.status_fd >= 0:
        found["status"] = json.dumps({"gateway": gateway, **live.as_json()})
        found["status_fd"] = spec.status_fd
    return found


CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def _map_users(pid: int) -> None:
    """Map every user and group of ours to itself in the new user namespace of process ``pid``."""
    for kind in ("uid_map", "gid_map"):
        ranges = [line.split() for line in Path(f"/proc/self/{kind}").read_text().splitlines()]
        text = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        Path(f"/proc/{pid}/{kind}").write_text(text)


def _as_json(error: NsrunError) -> dict[str, Any]:
    code = ExitCode.RUN_FAILED
    return {"doing": error.doing, "cause": error.cause, "hint": error.hint, "code": code}


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a request failed", exc_info=error)
