"""What runs behind Tor to be measured: ``visitor.py WAY MEASURE NUMBER…`` prints one number.

WAY is ``redirect`` (connections and lookups as any program makes them) or ``socks`` (by the proxy
that ``ttp run --socks`` offers on the same Tor).

    rate STREAMS BYTES        MB/s of that many downloads at once, each of so many bytes
    connections SECONDS       connect, one small request, close: so many a second, by 8 threads
    lookups SECONDS           addresses of names never asked for before: so many a second, the same
    first COUNT               median ms from connect() to the first byte of the answer
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from statistics import median

WEB, RESOLVER, PROXY = ("11.200.0.80", 80), ("11.200.0.53", 53), ("127.0.0.1", 9050)
THREADS = 8
PATIENCE = 30.0  # seconds
MEGA = 1e6
CONNECT, RESOLVE = 1, 0xF0  # commands of SOCKS 5; the second is Tor's own (socks-extensions.txt)

Connect = Callable[[], socket.socket]


def redirect() -> socket.socket:
    return socket.create_connection(WEB, PATIENCE)


def socks() -> socket.socket:
    host = b"\1" + socket.inet_aton(WEB[0])
    return _ask_proxy(CONNECT, host, WEB[1])


def lookup_by_redirect(name: str) -> None:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(PATIENCE)
        udp.connect(RESOLVER)
        udp.send(query)
        answers = struct.unpack(">6H", udp.recv(512)[:12])[3]
    assert answers, f"no address of {name}"


def lookup_by_socks(name: str) -> None:
    _ask_proxy(RESOLVE, bytes([3, len(name)]) + name.encode(), 0).close()


def _ask_proxy(command: int, host: bytes, port: int) -> socket.socket:
    """RFC 1928, without authentication; any answer but success is an error."""
    proxy = socket.create_connection(PROXY, PATIENCE)
    proxy.sendall(b"\5\1\0")
    assert proxy.recv(2) == b"\5\0"
    proxy.sendall(bytes([5, command, 0]) + host + port.to_bytes(2, "big"))
    answer = proxy.recv(10, socket.MSG_WAITALL)
    assert answer[1] == 0, f"the proxy answers {answer[1]}"
    return proxy


def get(connect: Connect, path: str) -> tuple[int, float]:
    """Bytes of the answer, and seconds from connect() to its first."""
    begin = time.perf_counter()
    with connect() as web:
        web.sendall(f"GET {path} HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n".encode())
        buffer = bytearray(1 << 18)
        size = web.recv_into(buffer)
        first = time.perf_counter() - begin
        while more := web.recv_into(buffer):
            size += more
    return size, first


def rate(connect: Connect, streams: int, size: int) -> float:
    def download() -> None:
        assert get(connect, f"/bytes/{size}")[0] > size

    seconds = _in_threads([download] * streams)
    return streams * size / MEGA / seconds


def often(act: Callable[[], object], seconds: float) -> float:
    """How many times a second ``act`` can be done, by several threads at once."""
    deadline, done = time.monotonic() + seconds, itertools.count()

    def repeat() -> None:
        while time.monotonic() < deadline:
            act()
            next(done)

    took = _in_threads([repeat] * THREADS)
    return next(done) / took


def _in_threads(acts: list[Callable[[], None]]) -> float:
    """Seconds until all are done. The first failure is raised."""
    failures: list[BaseException] = []

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - begin


def main(way: str, measure: str, *numbers: str) -> None:
    connect = {"redirect": redirect, "socks": socks}[way]
    lookup = {"redirect": lookup_by_redirect, "socks": lookup_by_socks}[way]
    get(connect, "/ip")  # from here on there is a circuit
    match measure, [float(number) for number in numbers]:
        case "rate", [streams, size]:
            found = rate(connect, int(streams), int(size))
        case "connections", [seconds]:
            found = often(lambda: get(connect, "/ip"), seconds)
        case "lookups", [seconds]:
            numbered = itertools.count()
            found = often(lambda: lookup(f"n{next(numbered)}-{os.getpid()}-{way}.test"), seconds)
        case "first", [count]:
            found = 1000 * median(get(connect, "/ip")[1] for _ in range(int(count)))
        case _:
            raise SystemExit(__doc__)
    print(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
