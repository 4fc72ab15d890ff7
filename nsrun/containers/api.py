"""Docker's Engine API by its Unix socket, as far as the start of a container needs it.

In HTTP/1.0 and a connection for each request: the answer is whole when the daemon closes, and never
in chunks. Without a version in its path, a daemon takes a request as one of its own; all that is
asked here is the same from 20.10 on. A library for it costs 0.1 s of each start.
Source: https://docs.docker.com/reference/api/engine/.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlencode

SECONDS = 60  # for an answer of the daemon
NOT_FOUND, CONFLICT = 404, 409


class RefusalError(Exception):
    """The daemon does not do it: HTTP's ``status``, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Api:
    """A daemon by the path of its socket. Raises OSError if it does not answer, and RefusalError.

    ``parts`` of a target are quoted, so that a name is never taken for more than a name.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, *parts: str, **query: object) -> Any:
        return self._ask(_request("GET", parts, query))

    def post(self, *parts: str, body: object = None, **query: object) -> Any:
        """``body`` is sent as JSON, or as it is if it is bytes: a tar archive."""
        return self._ask(_request("POST", parts, query, body))

    def delete(self, *parts: str, **query: object) -> None:
        self._ask(_request("DELETE", parts, query))

    def start(self, container: str) -> Callable[[], None]:
        """Have a container started, which takes 0.15 s; what comes back waits for that."""
        connection = self._send(_request("POST", ("containers", container, "start"), {}), SECONDS)
        return lambda: _answer(connection)

    def events(self, **filters: list[str]) -> Iterator[Any]:
        """What the daemon tells, until it ends; first of all None, when it begins to."""
        request = _request("GET", ("events",), {"filters": json.dumps(filters)})
        with self._send(request, None) as connection, connection.makefile("rb") as told:
            _status(told.readline())
            while told.readline().strip():
                pass  # the headers
            yield None
            yield from map(_parsed, told)

    def _ask(self, request: bytes) -> Any:
        return _answer(self._send(request, SECONDS))

    def _send(self, request: bytes, seconds: float | None) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(seconds)
        try:
            connection.connect(self._path)
            connection.sendall(request)
        except BaseException:
            connection.close()
            raise
        return connection


def _request(
    method: str, parts: tuple[str, ...], query: dict[str, object], body: object = None
) -> bytes:
    target = "/" + "/".join(quote(part, safe="") for part in parts)
    if query:
        target += f"?{urlencode(query)}"
    if isinstance(body, bytes):
        kind, content = "application/x-tar", body
    else:
        kind, content = "application/json", b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.0\r\nHost: docker\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _answer(connection: socket.socket) -> Any:
    """To a request that was sent: JSON, of many lines the last one, which tells how it ended."""
    with connection, connection.makefile("rb") as told:
        head, _, content = told.read().partition(b"\r\n\r\n")
    status, lines = _status(head), content.splitlines()
    found = _parsed(lines[-1]) if lines else None
    if not 200 <= status < 300:
        why = found.get("message") if isinstance(found, dict) else None
        raise RefusalError(status, why or f"HTTP status {status}: that is no name")
    return found


def _parsed(line: bytes) -> Any:
    """Raises ConnectionError for what is not JSON: the daemon ended over it."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConnectionError("its answer is cut short") from error


def _status(head: bytes) -> int:
    """Of an answer's first line: HTTP/1.0 200 OK. Raises ConnectionError if it is none."""
    words = head[:16].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ConnectionError("what answers is not HTTP")
    return int(words[1])
