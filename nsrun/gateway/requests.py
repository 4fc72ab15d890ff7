"""What can be asked of a supervisor, over its socket: one JSON line, one line of answer.

Descriptors travel with the line, either way. Who asks is known by the kernel's word (SO_PEERCRED),
never by the request's. docs/internals.md lists the requests.
"""

from __future__ import annotations

import array
import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsrun import __version__
from nsrun.errors import ExitCode, GatewayError, NsrunError, UsageError
from nsrun.gateway import outside
from nsrun.plan import enter_ops
from nsrun.spec import RunSpec
from nsrun.user import resolve

if TYPE_CHECKING:
    from nsrun.gateway.supervisor import Supervisor

log = logging.getLogger(__name__)

LONGEST = 1 << 23  # bytes of a request
MOST_DESCRIPTORS = 8

Parse = Callable[[dict[str, Any]], RunSpec | None]


class Client:
    """One connection: who is at the other end, what was asked, and the way to answer."""

    def __init__(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.uid, self.gid = struct.unpack("3i", credentials)
        self.descriptors: list[int] = []
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def request(self) -> dict[str, Any] | None:
        """What is asked, or None if the other end goes away first. Raises ValueError."""
        line = b""
        while not line.endswith(b"\n"):
            data = await self._receive()
            if not data or len(line) > LONGEST:
                return None
            line += data
        return dict(json.loads(line))

    async def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        if fds:  # they travel with the first byte
            socket.send_fds(self._connection, [line[:1]], fds)
            line = line[1:]
        await self._loop.sock_sendall(self._connection, line)

    async def says_more(self) -> bool:
        """Wait for one byte; False if the other end closes instead."""
        return bool(await self._loop.sock_recv(self._connection, 1))

    async def say(self, byte: bytes) -> None:
        await self._loop.sock_sendall(self._connection, byte)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self._connection.close()

    async def _receive(self) -> bytes:
        while True:
            try:
                data, ancillary, _, _ = self._connection.recvmsg(
                    1 << 16, socket.CMSG_SPACE(MOST_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _readable(self._loop, self._connection)
                continue
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.descriptors += array.array("i", content[: len(content) // 4 * 4])
            return data


class Requests:
    """Answers for one gateway. ``parse`` turns a request to run into a RunSpec, or None if the
    full interface must deal with it.
    """

    def __init__(self, gateway: Supervisor, parse: Parse) -> None:
        self._gateway, self._parse = gateway, parse

    async def accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(server)
            task = asyncio.ensure_future(self._serve(Client(connection)))
            task.add_done_callback(_log_failure)

    async def _serve(self, client: Client) -> None:
        try:
            self._check(client)
            request = await client.request()
            if request is not None:
                await self._answer(client, request)
        except NsrunError as error:
            await client.send({"error": _as_json(error)})
        except (OSError, ValueError) as error:
            log.warning("a request ended: %s", error)
        finally:
            client.close()

    async def _answer(self, client: Client, request: dict[str, Any]) -> None:
        gateway = self._gateway
        match request:
            case {"do": "run"}:
                await self._run(client, request)
                return
            case {"do": "wait", "timeout": timeout}:
                await self._bootstrapped(client, float(timeout))
                answer: dict[str, Any] = {}
            case {"do": "down"}:
                gateway.end()
                answer = {}
            case {"do": "inspect"}:
                answer = gateway.as_json()
            case {"do": "ps"}:
                answer = {"workloads": gateway.workloads.as_json()}
            case {"do": "refresh", "name": name}:
                answer = gateway.workloads.refresh(name).as_json()
            case _:
                raise UsageError("understand the request", f"no such request: {request.get('do')}")
        await client.send({**answer, "descriptors": []})

    async def _run(self, client: Client, request: dict[str, Any]) -> None:
        gateway = self._gateway
        if request["version"] != __version__:
            raise GatewayError(
                "use the running gateway",
                f"it is of version {__version__}, this ttp of {request['version']}",
                f"restart it: ttp gateway down {gateway.spec.name}",
            )
        spec = self._parse(request)
        if spec is None or spec.gateway != gateway.spec.name:
            await client.send({"elsewhere": True})
            return
        asked = request["caller"]
        nested = asked["user_namespace"] != Path("/proc/self/ns/user").stat().st_ino
        caller, environment = resolve(spec, asked, nested)
        uid = caller.uid if caller.switched else client.uid
        others = [live.pid for live in gateway.workloads.live.values()]
        warning = outside.warning(spec.command, uid, others)
        await self._bootstrapped(client, spec.bootstrap_timeout)
        live, fd = await gateway.workloads.give(spec, client.pid)
        log.info("workload %s: pid %d, %s", live.name, client.pid, " ".join(spec.command))
        descriptors = {"network": fd}
        if nested:
            descriptors["user"] = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        if bundle := gateway.spec.ca_bundle:
            descriptors["ca_bundle"] = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
            environment |= dict.fromkeys(CA_VARIABLES, CA_FILE)
        answer = {
            "descriptors": list(descriptors),
            "enter": enter_ops(gateway.spec, gateway.facts, gateway.block, caller, nested),
            "environment": environment,
            "command": spec.command,
            "verbose": spec.verbose,
            "effects": live.effects if spec.verbose else (),
            "warning": warning,
        }
        try:
            await client.send(answer, list(descriptors.values()))
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        if not nested and await client.says_more():
            _map_users(client.pid)
            await client.say(b"m")
        gateway.notify()

    async def _bootstrapped(self, client: Client, timeout: float) -> None:
        """Wait until Tor is ready, telling the client how far it is. Raises GatewayError."""
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
            await gateway.change(left)
        if told >= 0:
            await client.send({"progress": 100, "summary": "Done"})

    def _check(self, client: Client) -> None:
        """Raises GatewayError unless the client is our user, and outside our workloads."""
        try:  # a process beside our user namespace cannot be looked at; one below it is a workload
            space = Path(f"/proc/{client.pid}/ns/user")
            below = not space.samefile("/proc/self/ns/user")
        except OSError:
            below = False
        if client.uid != os.geteuid() or below:
            raise GatewayError("use this gateway", "it belongs to another user or is around you")


CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")


def listen(path: str) -> socket.socket:
    """The supervisor's socket, for our own user alone."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(mask)
    server.listen(64)
    return server


def _map_users(pid: int) -> None:
    """Map every user and group of ours to itself in the new user namespace of process ``pid``."""
    for kind in ("uid_map", "gid_map"):
        ranges = [line.split() for line in Path(f"/proc/self/{kind}").read_text().splitlines()]
        text = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        Path(f"/proc/{pid}/{kind}").write_text(text)


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _as_json(error: NsrunError) -> dict[str, Any]:
    code = ExitCode.RUN_FAILED
    return {"doing": error.doing, "cause": error.cause, "hint": error.hint, "code": code}


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a request failed", exc_info=error)
