"""What an untrusted program tries on socket files outside: standard library only.

attacker.py knock PATH...          the paths that a connection or a datagram got to, as JSON
attacker.py race SECONDS OWN PATH  connect to OWN, while other threads put PATH in its place: in the
                                   address, behind a link, behind the descriptor; what became of it
attacker.py errors                 what connect() answers to what makes no sense, as JSON
"""

from __future__ import annotations

import collections
import ctypes
import errno
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)


def address_of(path: str) -> bytes:
    return socket.AF_UNIX.to_bytes(2, sys.byteorder) + path.encode().ljust(108, b"\0")


def connect(fd: int, address: object, length: int) -> str:
    done = LIBC.connect(fd, address, length)
    return errno.errorcode[ctypes.get_errno()] if done else "connected"


def knock(*paths: str) -> list[str]:
    met = []
    for path in paths:
        datagrams = path.endswith(".dgram")
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM
            ) as door:
                if datagrams:
                    door.sendto(b"x", path)
                else:
                    door.connect(path.replace("@", "\0", 1))
        except OSError:
            continue
        met.append(path)
    return met


def race(seconds: str, own: str, path: str) -> dict[str, int]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(own)
    server.listen(4096)
    address = ctypes.create_string_buffer(address_of(own), 110)
    link = tempfile.mkdtemp() + "/link"
    os.symlink(own, link)
    descriptor = socket.socket().detach()  # of another family, at times
    ended = threading.Event()

    def forever(act: Callable[[], None]) -> None:
        while not ended.is_set():
            act()

    def flip_address() -> None:
        ctypes.memmove(address, address_of(path), 110)
        ctypes.memmove(address, address_of(own), 110)

    def flip_link() -> None:
        for target in (path, own):
            os.symlink(target, f"{link}.new")
            os.rename(f"{link}.new", link)

    def flip_descriptor() -> None:
        for family in (socket.AF_INET, socket.AF_UNIX):
            with socket.socket(family) as made:
                os.dup2(made.fileno(), descriptor)

    def serve() -> None:
        server.accept()[0].close()

    for act in (flip_address, flip_link, flip_descriptor, serve):
        threading.Thread(target=forever, args=(act,), daemon=True).start()
    found: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
            found["address " + connect(one.fileno(), address, 110)] += 1
            found["link " + connect(two.fileno(), address_of(link), 110)] += 1
        found["descriptor " + connect(descriptor, address_of(path), 110)] += 1
    ended.set()
    return dict(found)


def errors() -> dict[str, str]:
    """As the kernel answers them; of what it would do, only connect()'s own errors."""
    stream, inet = socket.socket(socket.AF_UNIX), socket.socket()
    pipe = os.pipe()[0]
    long = address_of("/tmp/" + "x" * 103)
    port = (2).to_bytes(2, "little") + (1).to_bytes(2, "big") + bytes((127, 0, 0, 1)) + bytes(8)
    listener = socket.create_server(("127.0.0.1", 0))
    open_port = port[:2] + listener.getsockname()[1].to_bytes(2, "big") + port[4:]
    waiting = socket.socket()
    waiting.setblocking(False)
    connected = socket.create_connection(listener.getsockname())
    cases: dict[str, tuple[int, object, int]] = {
        "no descriptor": (999, address_of("/tmp/x"), 110),
        "no socket": (pipe, address_of("/tmp/x"), 110),
        "no memory": (stream.fileno(), ctypes.c_void_p(16), 110),
        "kernel memory": (stream.fileno(), ctypes.c_void_p(-4096), 110),
        "no address": (stream.fileno(), None, 0),
        "negative length": (stream.fileno(), address_of("/tmp/x"), -1),
        "too long": (stream.fileno(), address_of("/tmp/x") + bytes(99), 200),
        "longer than a path": (stream.fileno(), address_of("/tmp/x") + bytes(9), 115),
        "unnamed": (stream.fileno(), address_of(""), 2),
        "another family": (stream.fileno(), port, 16),
        "a path for TCP": (inet.fileno(), address_of("/tmp/x"), 110),
        "full length": (stream.fileno(), long, 110),
        "absent": (stream.fileno(), address_of("/nowhere/x"), 110),
        "a file": (stream.fileno(), address_of("/etc/passwd"), 110),
        "not a directory": (stream.fileno(), address_of("/etc/passwd/x"), 110),
        "abstract": (stream.fileno(), address_of("\0nobody"), 110),
        "refused": (inet.fileno(), port, 16),
        "waiting": (waiting.fileno(), open_port, 16),
        "connected": (connected.fileno(), open_port, 16),
    }
    return {name: connect(*case) for name, case in cases.items()}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
