"""What a gateway in the foreground tells: the service manager of itself, by sd_notify(3)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def teller(echo: Callable[[str], None] | None) -> Callable[[dict[str, Any]], None]:
    """What takes a supervisor's messages. ``echo`` is told every effect.

    READY=1 means that the gateway answers: who asks for a command waits for Tor himself.
    """
    manager = os.environ.pop("NOTIFY_SOCKET", "")  # ours alone, not our children's

    def tell(message: dict[str, Any]) -> None:
        if "ready" in message:
            _notify(manager, "READY=1")
        elif "progress" in message:
            _notify(manager, f"STATUS=Tor {message['progress']} % {message['summary']}")
        elif "effect" in message and echo is not None:
            echo(message["effect"])

    return tell


def _notify(manager: str, state: str) -> None:
    """One datagram to the socket at ``manager``, @ for an abstract one; none if it is empty.

    A manager that does not listen, or has too much to read, is not waited for.
    """
    if manager:
        address = f"\0{manager[1:]}" if manager.startswith("@") else manager
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as to, suppress(OSError):
            to.sendto(state.encode(), address)
