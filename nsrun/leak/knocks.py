"""How ``ttp check-leak`` knocks: each attempt comes to a verdict, and to words that say why."""

from __future__ import annotations

import socket
import ssl
import struct
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address

from nsrun.address import BLOCKS, LINKS6
from nsrun.leak.verdict import Value

PATIENCE = 30.0  # seconds for an answer through Tor, which may have to build a circuit
LONGEST = 1000  # bytes of an answer that are read
SECONDS = 1.0  # for all others, which are refused in a millisecond
RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
MSG_ERRQUEUE = 0x2000
ORIGIN_LOCAL = 1  # SO_EE_ORIGIN_LOCAL, ip(7)

Came = tuple[Value, str]


def get(url: str, family: socket.AddressFamily) -> str:
    """The body of an HTTPS resource, by one family. Raises OSError or HTTPException."""
    host, _, path = url.removeprefix("https://").partition("/")
    where = socket.getaddrinfo(host, 443, family, socket.SOCK_STREAM)[0][4]
    head = f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    context = ssl.create_default_context()
    with (
        socket.create_connection((str(where[0]), 443), PATIENCE) as tcp,
        context.wrap_socket(tcp, server_hostname=host) as tls,
        HTTPResponse(tls) as answer,
    ):
        tls.sendall(head.encode())
        answer.begin()
        body = answer.read(LONGEST).decode(errors="replace").strip()
        if answer.status != 200:
            raise HTTPException(f"{answer.status} {answer.reason}")
        return body


def send(host: str, port: int, payload: bytes = b"ttp check-leak") -> tuple[Came, bytes]:
    """One datagram: who refused it, or the answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        udp.setsockopt(*RECVERR[family], 1)
        try:
            udp.connect(socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)[0][4])
            udp.send(payload)
            return (Value.LEAK, "answered"), udp.recv(4096)
        except TimeoutError:
            return (Value.INCONCLUSIVE, "silence: it may have left"), b""
        except OSError as error:
            return _refusal(udp, error), b""


def _refusal(udp: socket.socket, error: OSError) -> Came:
    """By the gateway, by this machine before it left, or by somebody who got it (ip(7))."""
    try:
        _, ancillary, _, _ = udp.recvmsg(1, 512, MSG_ERRQUEUE)
    except OSError:
        return Value.CONTAINED, f"not sent: {words(error)}"
    found = ancillary[0][2]
    if found[4] == ORIGIN_LOCAL:
        return Value.CONTAINED, f"not sent: {words(error)}"
    if struct.unpack_from("H", found, 16)[0] == socket.AF_INET6:
        refuser = socket.inet_ntop(socket.AF_INET6, found[24:40])
    else:
        refuser = socket.inet_ntop(socket.AF_INET, found[20:24])
    own = udp.getsockname()[0]
    if refuser == own:
        return Value.CONTAINED, f"refused by this machine, {refuser}"
    if refuser in gateways(own):
        return Value.CONTAINED, f"refused by the gateway, {refuser}"
    return Value.LEAK, f"it reached {refuser}, who refused it"


def gateways(own: str) -> set[str]:
    """Who may refuse: the gateway that a workload with this address would have."""
    address = ip_address(own)
    return {str(block.gateway) for block in BLOCKS if address in block.links} | (
        {str(LINKS6[1])} if address in LINKS6 else set()
    )


def knock(host: str, port: int) -> Came:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(SECONDS)
        try:
            tcp.connect(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4])
        except TimeoutError:
            return Value.INCONCLUSIVE, "silence: it may have left"
        except OSError as error:
            return Value.CONTAINED, f"refused: {words(error)}"
    return Value.LEAK, "connected"


def door(path: str) -> Came:
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(SECONDS)
        try:
            door.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            return Value.CONTAINED, words(error)
        except PermissionError:
            return Value.CONTAINED, "closed to this user"
        except OSError as error:
            return Value.LEAK, f"it is there: {words(error)}"
    return Value.LEAK, "somebody answers"


def words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
