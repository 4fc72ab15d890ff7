"""Doors that must be found shut, with somebody behind them: else a closed door proves nothing.

    python3 -m nsrun.leak.decoys [--tcp PORT…] [--udp PORT…] [--unix PATH…] [--abstract NAME…]

answers on all addresses of the network namespace that it is started in, prints its process number
once it does, and ends with its standard input. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import sys
from contextlib import suppress
from pathlib import Path

ANSWER = b"decoy\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="nsrun.leak.decoys")
    for option, kind in (("tcp", int), ("udp", int), ("unix", str), ("abstract", str)):
        parser.add_argument(f"--{option}", type=kind, nargs="*", default=[])
    wanted = parser.parse_args()
    listeners = [
        *(_open(socket.SOCK_STREAM, port) for port in wanted.tcp),
        *(_open(socket.SOCK_DGRAM, port) for port in wanted.udp),
        *(_path(path) for path in wanted.unix),
        *(_path(f"\0{name}") for name in wanted.abstract),
    ]
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    try:
        _serve(listeners)
    finally:
        for path in wanted.unix:
            Path(path).unlink(missing_ok=True)


def _open(kind: socket.SocketKind, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        server.listen()
    return server


def _path(name: str) -> socket.socket:
    if not name.startswith("\0"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    if not name.startswith("\0"):
        Path(name).chmod(0o666)
    server.listen()
    return server


def _serve(listeners: list[socket.socket]) -> None:
    with selectors.DefaultSelector() as waiting:
        waiting.register(sys.stdin.buffer, selectors.EVENT_READ)
        for server in listeners:
            waiting.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if not isinstance(key.fileobj, socket.socket):
                    if not os.read(0, 4096):
                        return
                    continue
                with suppress(OSError):  # who went away before the answer
                    _answer(key.fileobj)


def _answer(server: socket.socket) -> None:
    if server.type == socket.SOCK_DGRAM:
        _, where, _, client = server.recvmsg(2048, socket.CMSG_SPACE(20))
        server.sendmsg([ANSWER], where, 0, client)  # from the address that was asked
        return
    connection, _ = server.accept()
    with connection:
        connection.sendall(ANSWER)


if __name__ == "__main__":
    main()
