"""One client of a supervisor: who it is, what it asks for, and the way to answer it.

One request, one line of JSON, one connection; docs/internals.md lists the requests. Descriptors
travel with the line, either way. Who asks is known by the kernel's word (SO_PEERCRED), never by
the request's.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsrun.gateway import guests

LONGEST = 1 << 23  # bytes of a request
MOST_DESCRIPTORS = 8
BEAT = 5.0  # seconds after which a client that waits is told that we are at work


def listen(path: str, group: int | None) -> socket.socket:
    """The supervisor's socket, for our own user, and the members of ``group``, alone."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(mask)
    if group is not None:
        os.chown(path, -1, group)
        Path(path).chmod(0o660)
    server.listen(64)
    return server


class Client:
    """One connection: who is at the other end, what was asked, and the way to answer.

    A ``guest`` is another user than ours, and may not keep us waiting: TimeoutError.
    """

    def __init__(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.uid, self.gid = struct.unpack("iII", credentials)
        self.groups = guests.groups_of(connection)
        self.guest = self.uid != os.geteuid()
        self.user = self.uid if self.guest else None  # as Workloads tells users apart
        self.descriptors: list[int] = []
        self._patience = guests.PATIENCE if self.guest else None
        self._longest = guests.LONGEST if self.guest else LONGEST
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._beat: asyncio.TimerHandle | None = None

    async def request(self) -> dict[str, Any] | None:
        """What is asked, or None if the other end goes away first. Raises ValueError."""
        line = b""
        async with asyncio.timeout(self._patience):
            while not line.endswith(b"\n"):
                data = await self._receive()
                if not data or len(line) > self._longest:
                    return None
                line += data
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("not a request")
        self._beat = self._loop.call_later(BEAT, self._still_here)
        return found

    async def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send a line; unless it tells of progress, what comes after it is the client's affair."""
        if self._beat is not None and "progress" not in message:
            self._beat.cancel()
        line = json.dumps(message).encode() + b"\n"
        if fds:  # they travel with the first byte
            socket.send_fds(self._connection, [line[:1]], fds)
            line = line[1:]
        async with asyncio.timeout(self._patience):
            await self._loop.sock_sendall(self._connection, line)

    async def says_more(self) -> bool:
        """Wait for one byte; False if the other end closes instead."""
        async with asyncio.timeout(self._patience):
            return bool(await self._loop.sock_recv(self._connection, 1))

    async def while_there(self, what: Coroutine[None, None, None]) -> None:
        """Wait for ``what``. Raises ConnectionResetError when the other end goes away before."""
        waiting = asyncio.ensure_future(what)
        gone = asyncio.ensure_future(_readable(self._loop, self._connection))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not waiting.done():
                raise ConnectionResetError("the client has gone")
        finally:
            waiting.cancel()
            gone.cancel()
            await asyncio.wait({waiting, gone})  # else its end takes the next one's reader away

    async def say(self, byte: bytes) -> None:
        await self._loop.sock_sendall(self._connection, byte)

    def close(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self._connection.close()

    def _still_here(self) -> None:
        """A client takes a supervisor that is silent for too long to be stopped."""
        with suppress(OSError):
            self._connection.send(b"{}\n")
        self._beat = self._loop.call_later(BEAT, self._still_here)

    async def _receive(self) -> bytes:
        # without space for them, the kernel closes what is sent along
        space = 0 if self.guest else socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)
        while True:
            try:
                data, ancillary, _, _ = self._connection.recvmsg(
                    1 << 16, space, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _readable(self._loop, self._connection)
                continue
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.descriptors += array.array("i", content[: len(content) // 4 * 4])
            return data


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
