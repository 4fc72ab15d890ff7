"""The Tor of a gateway: its process, and what it says over the control socket.

The only module of a gateway that knows stem, which works in threads of its own; ``on_change`` is
called from one of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsrun.errors import GatewayError
from nsrun.facts import search_path
from nsrun.netns import Namespace
from nsrun.steps import StartTor

# Reasons of a BOOTSTRAP warning (control-spec, STATUS_CLIENT) in words that help
STALLS = {
    "NOROUTE": "there is no route to the relays: is the host's network up?",
    "CONNECTREFUSED": "relays refuse the connection: a firewall may block Tor",
    "TIMEOUT": "relays do not answer: a firewall may block Tor",
    "CONNECTRESET": "connections to relays are cut: a firewall may block Tor",
    "RESOURCELIMIT": "Tor is out of file descriptors or memory",
    "IOERROR": "the network fails while talking to relays",
    "DONE": "relays end the connection: is the clock of this machine right?",
    "CLOCK_SKEW": "the clock of this machine is wrong",
}

STARTING = 20.0  # seconds for Tor to listen on its control socket, and to answer there
TAIL = 1 << 16  # bytes of the log in which Tor's last words are looked for


@dataclass(frozen=True)
class Progress:
    """How far the bootstrap is: percent, tag and summary of control-spec's BOOTSTRAP event."""

    percent: int = 0
    tag: str = "starting"
    summary: str = "Starting"
    problem: str = ""

    def after(self, told: dict[str, str]) -> Progress:
        """This, or what Tor has told since. It never goes back; an answer may be overtaken."""
        percent = int(told.get("PROGRESS", self.percent))
        if percent < self.percent:
            return self
        return Progress(percent, told.get("TAG", self.tag), told.get("SUMMARY", self.summary))


class Tor:
    """One run of Tor in a gateway namespace."""

    def __init__(
        self, step: StartTor, gateway: Namespace, log: str, on_change: Callable[[], None]
    ) -> None:
        """Start it. Raises GatewayError with Tor's own last line if it ends at once."""
        self._progress, self._reason = Progress(), ""
        self.version = ""
        self._changed = on_change
        self._telling = threading.Lock()
        self._control_path = str(Path(step.torrc).with_name("control"))
        self._controller: Any = None
        with suppress(FileNotFoundError):
            Path(self._control_path).unlink()
        self._log = log
        self._begin = begin = Path(log).stat().st_size if Path(log).exists() else 0
        with Path(log).open("ab") as output:
            self._process = gateway.call(
                subprocess.Popen,
                step.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": search_path(), "HOME": "/"},
            )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        try:
            self._listen(log, begin)
        except BaseException:
            self.stop()
            raise

    @property
    def ready(self) -> bool:
        return self._progress.percent >= 100

    @property
    def progress(self) -> Progress:
        """With what is wrong by now: Tor may say more of it in its log, after the event."""
        return replace(self._progress, problem=self._problem()) if self._reason else self._progress

    def circuits(self) -> str:
        """The answer to GETINFO circuit-status (control-spec)."""
        return str(self._controller.get_info("circuit-status"))

    def kill(self) -> None:
        """End the process without waiting; it keeps nothing that it has not written."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """End the process and wait for it; no error if it has ended."""
        if self._controller is not None:
            self._controller.close()
            self._controller = None
        self.kill()
        self._process.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _listen(self, log: str, begin: int) -> None:
        from stem import ControllerError, SocketError
        from stem.connection import AuthenticationFailure
        from stem.control import Controller, EventType

        # stem waits for an answer without limit; of a Tor that ends, it hears at once
        limit = threading.Timer(STARTING, self.kill)
        limit.start()
        try:
            while self._controller is None:
                with suppress(SocketError):
                    self._controller = Controller.from_socket_file(self._control_path)
                if self._process.poll() is not None:
                    raise _ended(log, begin)
                time.sleep(0.005)  # until the socket is there: it cannot be waited for
            self._controller._event_notice = _Told()  # noqa: SLF001  there is no other way
            self._controller.authenticate()
            self.version = str(self._controller.get_info("version"))
            # at once: an event of the first kind, told while stem asks for a second one and Tor
            # dies, would have each of its threads wait for another
            kinds = (EventType.STATUS_CLIENT, EventType.STATUS_GENERAL)
            self._controller.add_event_listener(self._on_status, *kinds)
            phase = str(self._controller.get_info("status/bootstrap-phase"))
            self._update(_pairs(phase))
        except (ControllerError, AuthenticationFailure) as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # it may be about to end, and has closed its socket
                raise _ended(log, begin) from error
            cause = f"its control socket: {error}"
            raise GatewayError("start Tor", cause, "the whole log: ttp gateway logs") from error
        finally:
            limit.cancel()

    def _on_status(self, event: Any) -> None:
        if event.action in ("BOOTSTRAP", "CLOCK_SKEW"):
            arguments = dict(event.keyword_args)
            if event.action == "CLOCK_SKEW":
                arguments["REASON"] = "CLOCK_SKEW"
            self._update(arguments)

    def _update(self, told: dict[str, str]) -> None:
        with self._telling:  # an event, in a thread of stem's, and the answer to a question
            now = self._progress.after(told)
            if now is not self._progress:
                self._progress, self._reason = now, told.get("REASON", "")
        self._changed()

    def _problem(self) -> str:
        """What is wrong, in words that help; of the clock in Tor's own, as it knows by how much.

        A clock that is days ahead shows only as certificates that have expired.
        """
        words = STALLS.get(self._reason, "")
        if words and self._reason not in ("CLOCK_SKEW", "DONE"):
            return words
        with Path(self._log).open("rb") as file:
            file.seek(max(self._begin, file.seek(0, os.SEEK_END) - TAIL))
            said = file.read().decode(errors="replace")
        about = r"\[warn\] (?!Problem bootstrapping)(.*(?:clock|certificate expired).*)"
        if found := re.findall(about, said):
            return f"{STALLS['CLOCK_SKEW']}; Tor says: {found[-1]}"
        return words or f"Tor says: {self._reason}"


def learn_control() -> None:
    """Load what speaks Tor's control protocol, in a thread, before it is needed."""
    import stem.control  # noqa: F401


class _Told(threading.Event):
    """stem looks for events 20 times a second, though its thread is told of each and of its end."""

    def wait(self, _timeout: float | None = None) -> bool:
        return super().wait()


def _ended(log: str, begin: int) -> GatewayError:
    """Why Tor did not start: what it says in ``log`` after byte ``begin``."""
    if not os.statvfs(log).f_bavail:
        cause = f"no space is left in {Path(log).parent}"
        return GatewayError("start Tor", cause, "make room, or set TTP_STATE_DIR")
    return GatewayError("start Tor", last_words(log, begin), "the whole log: ttp gateway logs")


def last_words(log: str, begin: int) -> str:
    """Tor's first complaint in ``log`` after byte ``begin``: later ones follow from it."""
    with Path(log).open(errors="replace") as file:
        file.seek(begin)
        lines = file.read().splitlines()
    complaint = re.compile(r"\[(?:err|warn)\] (?!You are running Tor as root)(.*)")
    found = [match[1] for line in lines if (match := complaint.search(line))]
    return (found or lines or ["it ended without a word"])[0]


def _pairs(line: str) -> dict[str, str]:
    """KEY=value and KEY="value" words of a control-protocol line."""
    return {
        key: quoted or plain
        for key, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', line)
    }
