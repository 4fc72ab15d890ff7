"""``ttp run`` as the parent of its command: for what can only be done when that has ended.

Otherwise the process becomes the command and nothing of ttp remains. With ``--pcap`` a process of
ttp's stays outside until the file is complete, and says so if it is not. To whoever started it, it
is the command: it stops, goes on and ends as that does, and hands on the signals it gets.
Loaded only when it is needed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
from contextlib import suppress
from typing import NoReturn

from nsrun import client, init, linux
from nsrun.leak.record import BEGUN, DONE

PATIENCE = 10.0  # seconds for the last packets to be written
SI_USER, SI_TKILL = 0, -6  # sigaction(2): sent by a process, not by the kernel for a terminal
OURS = {signal.SIGCHLD, signal.SIGIO}
NOT_OURS = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT}


def record(path: str, unneeded: int) -> dict[str, int]:
    """Open the file ``path`` for a capture, and go on in a child; the caller stays its parent.

    A descriptor that is ``unneeded`` by the parent is closed there, if it is not negative.
    Returns the descriptors that a supervisor needs, in the child. Raises RefusedError.
    """
    file = _open(path)
    ours, recorders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    every = signal.valid_signals() - NOT_OURS
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    pid = os.fork()
    if pid:
        os.close(file)
        recorders.close()
        if unneeded >= 0:
            os.close(unneeded)
        _wait(pid, _Report(path, ours), every)
    ours.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return {"pcap": file, "report": recorders.detach()}


def die_with(parent: int) -> None:
    """Let the kernel end this process when its ``parent`` is killed, as if the two were one.

    Ends at once if it has been killed already. A change of credentials revokes it: call it just
    before exec, or before a fork after which this process changes no more (PR_SET_PDEATHSIG).
    """
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _open(path: str) -> int:
    """A new file, an empty one, or something that is no file. Raises RefusedError."""
    doing = f"write the capture to {path}"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise client.RefusedError(doing, str(error.strerror), "", client.RUN_FAILED) from None
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_size:
        os.close(file)
        hint = "remove it, or name another"
        raise client.RefusedError(doing, "there is a file that is not empty", hint, 125)
    return file


class _Report:
    """What the recorder says. A signal tells that it says something (F_SETOWN, O_ASYNC)."""

    def __init__(self, path: str, recorder: socket.socket) -> None:
        self._path, self._recorder = path, recorder
        self._begun = self._done = self._complained = False
        fcntl.fcntl(recorder, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(recorder, fcntl.F_GETFL)
        fcntl.fcntl(recorder, fcntl.F_SETFL, flags | os.O_ASYNC)

    def read(self, seconds: float = 0) -> None:
        """Take in what is said, until a last word or for ``seconds``; pass on complaints."""
        self._recorder.settimeout(seconds)
        while not self._done and (message := self._recorder.recv(4096)):
            if message == BEGUN:
                self._begun = True
            elif message == DONE:
                self._done = True
            elif self._begun:  # else the supervisor's answer is an error
                self._complain(message.decode(errors="replace"))

    def finish(self) -> None:
        """Wait until all that was sent up to now is in the file, or say that it is not."""
        cause = "its recorder ended"
        try:
            with suppress(BlockingIOError):
                self.read()
            with suppress(BrokenPipeError):  # it ended; it may have had a last word
                self._recorder.send(b"?")
            self.read(PATIENCE)
        except TimeoutError:
            cause = f"its recorder does not answer for {PATIENCE:g} s"
        except ConnectionError:
            pass  # it ended without reading the question
        if self._begun and not (self._done or self._complained):
            self._complain(cause)

    def _complain(self, cause: str) -> None:
        self._complained = True
        client.complain(f"ttp: the capture in {self._path} is incomplete: {cause}\n")


def _wait(command: int, report: _Report, every: set[signal.Signals]) -> NoReturn:
    while True:
        told = signal.sigwaitinfo(every)
        if told.si_signo == signal.SIGIO:
            with suppress(BlockingIOError, ConnectionError):
                report.read()
        elif told.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(command, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(command, signal.SIGCONT)  # here we were continued ourselves
            elif pid:
                report.finish()
                init.end(status)
        elif told.si_code in (SI_USER, SI_TKILL):  # else a terminal's: the command has it too
            os.kill(command, told.si_signo)
