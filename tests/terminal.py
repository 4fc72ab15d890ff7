"""A command on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import time

TIOCGPTN = 0x80045430


class Terminal:
    """A command on a terminal of its own, as a shell's foreground job would be."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGQUIT):  # ignored if we run in the background
                signal.signal(number, signal.SIG_DFL)
            os.execvp(command[0], command)

    def name(self) -> str:
        """The path of the terminal (ioctl_tty(2)): asked of our end, whatever the command has."""
        number = fcntl.ioctl(self.fd, TIOCGPTN, bytes(4))
        return f"/dev/pts/{int.from_bytes(number, 'little')}"

    def expect(self, text: str, seconds: float = 20) -> str:
        seen, deadline = "", time.monotonic() + seconds
        while text not in seen:
            left = deadline - time.monotonic()
            assert left > 0, f"waited {seconds} s for {text!r}, saw {seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                seen += os.read(self.fd, 4096).decode(errors="replace")
        return seen

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self, options: int = 0) -> int:
        return os.waitpid(self.pid, options)[1]
