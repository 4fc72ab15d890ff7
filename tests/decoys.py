"""Listens where daemons of the host would, and tells who came: standard library only.

decoys.py PATH...     prints "ready"; at the end of standard input, the paths that were
                      connected to, as JSON. A PATH that begins with @ is abstract; one that
                      ends in .dgram takes datagrams.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys


def main(paths: list[str]) -> None:
    os.umask(0)
    selector = selectors.DefaultSelector()
    visited: list[str] = []
    listeners: dict[str, socket.socket] = {}
    for path in paths:
        if not path.startswith("@"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        datagrams = path.endswith(".dgram")
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM
        )
        listener.bind(path.replace("@", "\0", 1))
        if not datagrams:
            listener.listen(4096)
        listeners[path] = listener
        selector.register(listener, selectors.EVENT_READ, path)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                print(json.dumps(visited), flush=True)
                return
            listener = listeners[key.data]
            if listener.type == socket.SOCK_DGRAM:
                listener.recv(100)
            else:
                listener.accept()[0].close()
            visited.append(key.data)


if __name__ == "__main__":
    main(sys.argv[1:])
