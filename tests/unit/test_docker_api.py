"""Docker's Engine API: what is sent, and what becomes of answers that are not whole."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsrun.containers.api import NOT_FOUND, Api, RefusalError


@contextmanager
def daemon(home: Path, answer: bytes) -> Iterator[tuple[Api, list[bytes]]]:
    """Hears one request, says what it is told to, and closes; and what it heard."""
    path, heard = home / "socket", list[bytes]()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(1 << 16))
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Api(str(path)), heard
        thread.join()


def test_a_name_is_never_more_than_a_name(tmp_path: Path) -> None:
    """Neither a path, nor a query, nor another line of the request."""
    with daemon(tmp_path, b"HTTP/1.0 200 OK\r\n\r\n{}\n") as (api, heard):
        api.post("containers", "../a?b=c\r\nd", "start", body={"e": 1}, t=0)
    target, *_, content = heard[0].split(b"\r\n")
    assert target == b"POST /containers/..%2Fa%3Fb%3Dc%0D%0Ad/start?t=0 HTTP/1.0"
    assert content == b'{"e": 1}'


def test_a_refusal_has_its_reason(tmp_path: Path) -> None:
    answer = b'HTTP/1.0 404 Not Found\r\nA: b\r\n\r\n{"message":"No such container: a"}\n'
    with (
        daemon(tmp_path, answer) as (api, _),
        pytest.raises(RefusalError, match="No such container: a") as caught,
    ):
        api.get("containers", "a", "json")
    assert caught.value.status == NOT_FOUND


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-x\r\n", b'HTTP/1.0 200 OK\r\n\r\n{"Id": "12', b"HTTP/1.0 500 \r\n\r\n<html>"],
)
def test_an_answer_that_is_not_whole_is_none(tmp_path: Path, answer: bytes) -> None:
    """The daemon was killed over it, or is none."""
    with daemon(tmp_path, answer) as (api, _), pytest.raises(ConnectionError):
        api.get("containers", "a", "json")


def test_events_end_with_the_daemon(tmp_path: Path) -> None:
    answer = b'HTTP/1.0 200 OK\r\nA: b\r\n\r\n{"id": 1}\n{"id": 2}\n'
    with daemon(tmp_path, answer) as (api, heard):
        assert list(api.events(type=["container"])) == [None, {"id": 1}, {"id": 2}]
    assert heard[0].startswith(b"GET /events?filters=%7B%22type%22")
