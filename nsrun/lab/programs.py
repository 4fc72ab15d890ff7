"""The lab's own programs: started in its namespaces, logged, dead when the lab's holder is dead."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nsrun.errors import NsrunError

RUN = Path("/run/lab")  # on the lab's private tmpfs: nothing in it outlives the lab
LOGS = RUN / "log"


class Programs:
    """Programs by name. Start them from the main thread: they die with the thread that did it."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def start(self, name: str, *command: str | Path, netns: str = "") -> subprocess.Popen[bytes]:
        """Start ``command`` in the namespace ``netns`` (or in `inet`); its output goes to a log."""
        # emptied, since what is waited for in it must come from this start
        with (LOGS / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                bound(command, netns), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes[name] = process
        return process

    def adopt(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Take charge of a process that was started with ``bound``."""
        self._processes[name] = process

    def check(self, name: str) -> None:
        """Raise NsrunError when the program has ended, with its last words."""
        if self._processes[name].poll() is not None:
            raise NsrunError(f"keep {name} running in the lab", last_words(name))

    def stop(self, *names: str, seconds: float = 5) -> None:
        """End the named programs (all, if none is named), by force after ``seconds``."""
        chosen = [self._processes.pop(name) for name in names or tuple(self._processes)]
        for process in chosen:
            process.terminate()
        deadline = time.monotonic() + seconds
        for process in chosen:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def bound(command: tuple[str | Path, ...], netns: str = "") -> list[str | Path]:
    """The command line that runs ``command`` in a namespace of the lab and ends with its parent."""
    enter = ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []
    # of a parent that died before setpriv(1) could ask for the signal, there is none
    alive = ("sh", "-c", f'[ $PPID = {os.getpid()} ] && exec "$@"', "sh")
    return ["setpriv", "--pdeathsig", "KILL", "--", *alive, *enter, *command]


def last_words(name: str, lines: int = 3) -> str:
    text = (LOGS / f"{name}.log").read_text(errors="replace").strip()
    return "; ".join(text.splitlines()[-lines:]) or "it ended without a word"


def lock(file: IO[str]) -> bool:
    """Try to lock a file for as long as this process, or a child that inherits it, has it open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(state: Callable[[], object], seconds: float, what: str, *, hint: str = "") -> None:
    """Wait until ``state()`` is true. Raises NsrunError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not state():
        if time.monotonic() > deadline:
            raise NsrunError(f"wait for {what}", f"not so after {seconds:g} s", hint)
        time.sleep(0.02)  # the interval of the poll
