"""``python3 -m nsrun.host.oracle WAY WHO…``: ask Tor's own service how it sees this host.

By a way that cannot lead past Tor, whatever the rules catch, and with no privilege that would be
needed to be told the truth:

any       like any program, as a user whom no exemption lets past Tor: names by libc, TCP by what
          the rules do with it
caught    as one of the users who alone are caught; of libc's ways to a name only that by packets is
          left, as daemons, whom it would ask first, are not caught
tor       where nobody here is caught, by a socket of Tor's own, and so without a packet at all

The answer is a line of JSON: ``{"IsTor", "IP", "seconds"}``, or ``{"error"}``.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from nsrun import linux
from nsrun.host import session
from nsrun.host.policy import HostPolicy

HOST, PATH, PORT = "check.torproject.org", "/api/ip", 443
SECONDS = 20.0  # until there is no answer; a circuit takes one to a few
UIDS = (65534, 65533, 65532)  # nobody, and numbers that Debian's policy (9.2.2) gives to nobody


@dataclass(frozen=True)
class Seen:
    """``seconds`` is how long the answer took; without an address, ``error`` says why."""

    is_tor: bool
    address: str = ""
    seconds: float = 0.0
    error: str = ""


def ask(policy: HostPolicy) -> Seen:
    """How the host is seen, by the way that is certain under these rules."""
    environment = {
        **{name: os.environ[name] for name in ("SSL_CERT_FILE", "LANG") if name in os.environ},
        "PATH": os.defpath,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-P", "-m", "nsrun.host.oracle", *way(policy)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=2 * SECONDS
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Seen(is_tor=False, error=f"no answer in {2 * SECONDS:g} s")
    except ValueError:
        last = ["it said nothing", *done.stderr.splitlines()][-1]
        return Seen(is_tor=False, error=last)
    if "error" in found:
        return Seen(is_tor=False, error=found["error"])
    return Seen(found["IsTor"] is True, str(found["IP"]), found["seconds"])


def way(policy: HostPolicy) -> tuple[str, ...]:
    """The way, and who goes it: the numbers of a user and a group, or the path of a socket."""
    nobody = str(unprivileged((*policy.bypass_users, *policy.bypass_groups)))
    match policy.own:
        case "all":
            return "any", nobody, nobody
        case "users":
            return "caught", str(policy.users[0]), nobody
        case "onion" | "none":
            return "tor", session.SOCKS


def unprivileged(exempt: tuple[int, ...]) -> int:
    """The number of a user and of a group who are nobody, and whom the rules do not exempt."""
    return next(number for number in UIDS if number not in exempt)


def become(uid: int, gid: int) -> None:
    """Be this user and group, and no more; whatever has to be read is imported by now."""
    import encodings.idna  # noqa: F401  else by the first name that is looked up

    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def hide_daemons() -> None:
    """No socket of a name service is in reach; without a resolv.conf in /run, libc asks
    127.0.0.1 (resolv.conf(5))."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/run", "tmpfs", data="mode=755")


class ByTor(HTTPSConnection):
    """By Tor's SOCKS proxy at the other end of ``proxy``, which is told the name (RFC 1928)."""

    def __init__(self, host: str, port: int, proxy: socket.socket) -> None:
        self._proxy, self._tls = proxy, ssl.create_default_context()
        super().__init__(host, port, timeout=SECONDS, context=self._tls)

    def connect(self) -> None:
        self._proxy.settimeout(SECONDS)
        self._proxy.sendall(b"\5\1\0")  # version 5, one method: no authentication
        name = self.host.encode()
        if self._read(2) != b"\5\0":
            raise OSError("Tor's socket speaks another protocol")
        request = struct.pack("!4BB", 5, 1, 0, 3, len(name)) + name  # connect to a name
        self._proxy.sendall(request + struct.pack("!H", self.port))
        _, code, _, kind = self._read(4)
        if code:
            raise OSError(f"Tor did not connect, and answered {code}")
        self._read({1: 4, 4: 16}[kind] + 2)  # an address, which is nobody's, and a port
        self.sock = self._tls.wrap_socket(self._proxy, server_hostname=self.host)

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self._proxy.recv(count - len(found))
            if not more:
                raise OSError("Tor ended the connection")
            found += more
        return found


def _connection(kind: str, *who: str) -> HTTPSConnection:
    """Of one who is no longer root."""
    if kind == "tor":
        proxy = socket.socket(socket.AF_UNIX)
        proxy.connect(who[0])  # which only root and Tor can
        become(UIDS[0], UIDS[0])
        return ByTor(HOST, PORT, proxy)
    if kind == "caught":
        hide_daemons()
    uid, gid = map(int, who)
    become(uid, gid)
    return HTTPSConnection(HOST, PORT, timeout=SECONDS)


def main() -> None:
    begin = time.monotonic()
    try:
        connection = _connection(*sys.argv[1:])
        connection.request("GET", PATH)
        told = json.loads(connection.getresponse().read(4096))
        found = {"IsTor": told["IsTor"], "IP": told["IP"]}
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps({**found, "seconds": time.monotonic() - begin}) + "\n")


if __name__ == "__main__":
    main()
