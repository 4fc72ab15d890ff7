"""The servers of the lab's internet and LAN: web, plain and TLS, and UDP echo.

In `inet`, every host name gets the same answers, chosen by path:
    /            the client's address, and a line saying whether it is an exit of the lab
    /api/ip      {"IsTor": …, "IP": …} as https://check.torproject.org/api/ip
    /ip          the client's address alone, as https://ifconfig.me/ip
    /bytes/N     N bytes, to measure throughput
    else         the file of that name in /run/lab/www, which a user of the lab may fill
The host api.ipify.org answers with the address alone at / as well.
"""

from __future__ import annotations

import json
import mimetypes
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from abc import abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from nsrun.errors import MissingError, NsrunError
from nsrun.lab import topology

if TYPE_CHECKING:
    from nsrun.netns import Namespace

BLOCK = 1 << 20  # bytes sent at a time by /bytes
IP_PKTINFO = 8  # ip(7); missing from the socket module


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        listener: socket.socket,
        handler: type[BaseHTTPRequestHandler],
        log: Path,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.tls = tls
        self.log = log.open("a", buffering=1)
        self.block = log.with_name("block")
        self.files = log.parents[1] / "www"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that a slow client holds up nobody."""
        if self.tls is not None:
            request.settimeout(30)
            request = self.tls.wrap_socket(request, server_side=True)
        try:
            super().finish_request(request, client_address)
        finally:
            if self.tls is not None:
                request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Note a connection that broke; clients of a leak test often go away."""
        self.log.write(f"{client_address[0]} {sys.exception()!r}\n")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "lab"
    sys_version = ""
    disable_nagle_algorithm = True
    server: _Server

    @property
    def client(self) -> str:
        address: str = self.client_address[0]
        return address

    def reply(self, text: str, kind: str = "text/plain") -> None:
        self.send(text.encode(), kind)

    def send(self, body: bytes, kind: str) -> None:
        self.head(len(body), kind)
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, length: int, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    @abstractmethod
    def do_GET(self) -> None:
        """Answer a GET or, without a body, a HEAD."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        host = self.headers.get("Host", "-") if hasattr(self, "headers") else "-"
        self.server.log.write(f"{self.client} {host} {format % args}\n")


class Internet(_Handler):
    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").partition(":")[0]
        exit_seen = self.client in topology.EXIT_ADDRESSES
        first, _, rest = self.path.lstrip("/").partition("/")
        if self.path == "/api/ip":
            answer = {"IsTor": exit_seen, "IP": self.client}
            self.reply(json.dumps(answer, separators=(",", ":")), "application/json")
        elif self.path == "/ip" or host == "api.ipify.org":
            self.reply(self.client)
        elif first == "bytes" and rest.isdecimal():
            self._bytes(int(rest))
        elif self.path == "/":
            self.reply(f"{self.client}\n{'an exit' if exit_seen else 'not an exit'} of the lab\n")
        else:
            self._file()

    def _file(self) -> None:
        """Answer with a file; for a directory, with its index.html."""
        path = unquote(urlsplit(self.path).path)
        file = Path(f"{self.server.files}/{path}").resolve()
        if file.is_dir():
            file /= "index.html"
        if file.is_relative_to(self.server.files) and file.is_file():
            kind, _ = mimetypes.guess_type(file.name)
            self.send(file.read_bytes(), kind or "application/octet-stream")
        else:
            self.send_error(404)

    def _bytes(self, count: int) -> None:
        self.head(count, "application/octet-stream")
        if self.command == "HEAD":
            return
        with self.server.block.open("rb") as block:
            while count > 0:
                size = min(count, BLOCK)
                block.seek(0)  # sendfile() heeds an offset of 0 on plain sockets only
                self.connection.sendfile(block, 0, size)
                count -= size


class Lan(_Handler):
    def do_GET(self) -> None:
        local = self.connection.getsockname()[0]
        if local == topology.METADATA:
            self.reply("lab-metadata: credentials of this machine\n")
        else:
            self.reply(f"LAN web server\n{self.client}\n")


def serve_internet(certificate: Path, key: Path, log: Path) -> None:
    """Serve at every address of this process's own namespace, until the process ends."""
    # random: compressible bytes would flatter a link
    log.with_name("block").write_bytes(os.urandom(BLOCK))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    for family in (socket.AF_INET, socket.AF_INET6):
        _in_background(_Server(_listener(family, 80), Internet, log))
        _in_background(_Server(_listener(family, 443), Internet, log, tls))
        for port in topology.ECHO_PORTS:
            threading.Thread(target=_echo, args=(_datagrams(family, port),), daemon=True).start()


def serve_lan(lan: Namespace, log: Path) -> None:
    """Serve the LAN's web server and the metadata service from inside its namespace."""
    for family in (socket.AF_INET, socket.AF_INET6):
        _in_background(_Server(lan.call(_listener, family, 80), Lan, log))


def make_certificates(directory: Path) -> None:
    """A certificate authority of this lab alone, and the web server's certificate.

    Leaves ca.pem, web.pem and web.key in ``directory``.
    """
    names = (*topology.WEB_NAMES, *topology.ORACLES, topology.ORACLE4, topology.ORACLE6)
    subjects = [f"DNS:{name}" for name in names]
    subjects += [f"IP:{address}" for address in (topology.WEB, topology.WEB6)]
    new = ("openssl", "req", "-x509", "-nodes", "-days", "30", "-newkey", "ec")
    curve = ("-pkeyopt", "ec_paramgen_curve:P-256")
    authority = (
        *("-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ttp lab"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),  # Python 3.13 insists (RFC 5280)
    )
    server = (
        *("-keyout", "web.key", "-out", "web.pem", "-subj", "/CN=web.test"),
        *("-CA", "ca.pem", "-CAkey", "ca.key"),
        *("-addext", f"subjectAltName={','.join(subjects)}"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    for part in (authority, server):
        try:
            made = subprocess.run(
                (*new, *curve, *part), cwd=directory, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise MissingError("make the lab's certificates", error, "install openssl") from error
        if made.returncode != 0:
            raise NsrunError("make the lab's certificates", made.stderr.strip())
    (directory / "ca.key").unlink()


def _in_background(server: _Server) -> None:
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 3600}, daemon=True
    ).start()


def _listener(family: socket.AddressFamily, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))
    listener.listen(512)
    return listener


def _datagrams(family: socket.AddressFamily, port: int) -> socket.socket:
    """A UDP socket that learns which address each datagram was sent to."""
    receiver = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        receiver.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    receiver.bind(("", port))
    return receiver


def _echo(receiver: socket.socket) -> None:
    """Send every datagram back from the address it was sent to."""
    while True:
        data, ancillary, _, sender = receiver.recvmsg(65536, 256)
        back = [(level, kind, _from_here(kind, info)) for level, kind, info in ancillary]
        try:
            receiver.sendmsg([data], back, 0, sender)
        except OSError:
            continue  # sent to a broadcast address, or the sender is out of reach


def _from_here(kind: int, info: bytes) -> bytes:
    if kind == IP_PKTINFO:  # struct in_pktinfo: interface, local address, header's address
        _, local, _ = struct.unpack("=I4s4s", info)
        return struct.pack("=I4s4s", 0, local, bytes(4))
    return info[:16] + bytes(4)  # struct in6_pktinfo: address, interface
