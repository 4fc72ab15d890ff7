"""Whether the host is still in the network that Tor's connections were made from.

A connection from an address that the host has no longer is never answered, and nobody says so to
Tor, which takes minutes to give it up.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

GROUPS = 0x10 | 0x40 | 0x100 | 0x400  # rtnetlink(7): addresses, routes of IPv4; the same of IPv6
# for documentation (RFC 5737, RFC 3849): nobody has a route of its own to there
FAR_AWAY = ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1"))
ANY_PORT = 9


def monitor() -> socket.socket:
    """A socket that hears when an address or a route of the host comes or goes."""
    made = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
    )
    made.bind((0, GROUPS))
    return made


def drain(heard: socket.socket) -> None:
    """Forget what a monitor has heard: it is looked at how things are now."""
    while True:
        try:
            heard.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # netlink(7): some messages are lost
                raise


def place() -> str:
    """The address from which the internet would be reached now; empty without a network.

    connect(2) chooses it, and sends nothing for UDP (P11).
    """
    for family, target in FAR_AWAY:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((target, ANY_PORT))
            return str(asking.getsockname()[0])
    return ""


def moved(before: str, now: str) -> bool:
    """Whether connections from the address ``before`` are lost.

    Without a network they may be of use again. A new temporary address of IPv6 (RFC 8981) leaves
    those from the one before as they are.
    """
    ipv6 = ":" in before and ":" in now
    return now not in ("", before) and not (ipv6 and _is_ours(before))


def _is_ours(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as trial:
            trial.bind((address, 0))
    except OSError:
        return False
    return True
