"""Listens where daemons of the host would, and tells who came: standard library only.

decoys.py PATH...     prints "ready"; at the end of standard input, the paths that were
                      connected to, as JSON. A PATH that begins with @ is abstract.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys


def main(paths: list[str]) -> None:
    selector = selectors.DefaultSelector()
    visited: list[str] = []
    listeners: dict[str, socket.socket] = {}
    for path in paths:
        if not path.startswith("@"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path.replace("@", "\0", 1))
        listener.listen()
        listeners[path] = listener
        selector.register(listener, selectors.EVENT_READ, path)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                print(json.dumps(visited), flush=True)
                return
            listeners[key.data].accept()[0].close()
            visited.append(key.data)


if __name__ == "__main__":
    main(sys.argv[1:])
