"""What the Tor of the whole host says over its control socket. Root's alone; it knows stem."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nsrun.errors import GatewayError
from nsrun.host import session

POLL = 0.1  # seconds between two looks at the bootstrap
HINT = f"journalctl --unit {session.TOR_UNIT}"


def await_bootstrap(seconds: float, tell: Callable[[int, str], None]) -> None:
    """Wait until Tor is ready; ``tell`` hears of each percent. Raises GatewayError if it is not."""
    deadline = time.monotonic() + seconds
    told = -1
    with _asking() as ask:
        while True:
            percent, summary = _progress(ask)
            if percent != told:
                tell(percent, summary)
                told = percent
            if percent >= 100:
                return
            if time.monotonic() >= deadline:
                cause = f"Tor is at {percent} % after {seconds:g} s: {summary}"
                raise GatewayError("wait for Tor", cause, HINT)
            time.sleep(POLL)  # the interval of the poll: one connection answers, or tells of events


def progress() -> tuple[int, str]:
    """How far Tor's bootstrap is, in percent, and in its own words. Raises GatewayError."""
    with _asking() as ask:
        return _progress(ask)


def renew() -> None:
    """Circuits of before serve no new connection (SIGNAL NEWNYM). Raises GatewayError."""
    with _asking() as ask:
        ask("SIGNAL NEWNYM")


def _progress(ask: Callable[[str], str]) -> tuple[int, str]:
    said = ask("GETINFO status/bootstrap-phase")
    percent = re.search(r"PROGRESS=(\d+)", said)
    summary = re.search(r'SUMMARY="([^"]*)"', said)
    return int(percent[1]) if percent else 0, summary[1] if summary else "starting"


@contextmanager
def _asking() -> Iterator[Callable[[str], str]]:
    """What sends one line to Tor, and returns its answer."""
    from stem import ControllerError, SocketError
    from stem.connection import AuthenticationFailure
    from stem.control import Controller

    def ask(line: str) -> str:
        answer: Any = controller.msg(line)
        if not answer.is_ok():
            raise GatewayError("ask Tor", str(answer), HINT)
        return str(answer)

    try:
        with Controller.from_socket_file(session.CONTROL) as controller:
            controller.authenticate()
            yield ask
    except (ControllerError, SocketError, AuthenticationFailure) as error:
        raise GatewayError("ask Tor", f"its control socket: {error}", HINT) from error
