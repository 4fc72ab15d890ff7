"""Records of detached workloads, which outlive them: what they printed, and how they ended.

A record is a directory of the caller's, <state>/workloads/GATEWAY/NAME:

log      standard output and error of the command
status   how it ended, then a line of JSON with what was known at its start

The first ROOM bytes of ``status`` are there from the beginning, so that a full disk cannot keep the
end from being written. Its monitor (detach.py) holds a lock on it for as long as that lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nsrun import paths

ROOM = 32


def directory(gateway: str = "") -> Path:
    """Where the records of a gateway's detached workloads are; of all gateways, if it is none."""
    return Path(paths.state(), "workloads", gateway)


class Record:
    """The record in the directory ``path``. It may go at any time: OSError."""

    def __init__(self, path: Path) -> None:
        self.path, self.gateway, self.name = path, path.parent.name, path.name
        self.log, self.status = path / "log", path / "status"

    def watched(self) -> bool:
        """Whether its monitor lives; then the command does, too."""
        with self.status.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def wait(self) -> None:
        """Wait until the monitor has ended."""
        with self.status.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)

    def exit_code(self) -> int | None:
        """That of the command, 128 and its number if it died by a signal; None if unknown."""
        text = self.status.read_bytes()[:ROOM].strip()
        return int(json.loads(text)["exit_code"]) if text else None

    def started(self) -> dict[str, Any]:
        """What ``ttp ps --json`` said of the workload at its start."""
        return dict(json.loads(self.status.read_bytes()[ROOM:]))

    def begin(self, name: str, gateway: str, status: str) -> Record:
        """Keep what is known at the start, and take the place that goes with the name.

        Raises FileExistsError if a workload which has not ended is there. Does not ask who we
        are: a guest's client is somebody else by now.
        """
        with self.status.open("r+b") as file:
            file.seek(ROOM)
            file.write(f"{status}\n".encode())
        home = self.path.parent
        with _alone(home):
            kept = Record(home / gateway / name)
            kept.path.parent.mkdir(0o700, exist_ok=True)
            if kept.path.exists():
                if kept.watched():
                    raise FileExistsError
                kept.forget()
            self.path.rename(kept.path)
        return kept

    def remove(self) -> None:
        """One that is gone already is no error."""
        home = directory()
        with _alone(home):
            self.forget()
            if self.path.parent != home:
                with suppress(OSError):  # there are others
                    self.path.parent.rmdir()

    def forget(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Nobody else names, sweeps or removes meanwhile. Raises OSError."""
    fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def new() -> tuple[Record, int]:
    """A record that has no name yet, and the descriptor that locks it. Raises OSError.

    Those of clients that were killed before there was a name are removed.
    """
    home = directory()
    paths.private_directory(str(home))
    with _alone(home):
        for path in home.glob(".*"):
            if not (path / "status").exists() or not Record(path).watched():
                Record(path).forget()
        record = Record(home / f".{os.getpid()}")
        record.path.mkdir(0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        held = os.open(record.status, flags, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        os.pwrite(held, b" " * (ROOM - 1) + b"\n", 0)
        os.close(os.open(record.log, flags, 0o600))
    return record, held


def names(gateway: str) -> list[str]:
    """Of the workloads of a gateway that have a record."""
    try:
        return [path.name for path in directory(gateway).iterdir()]
    except OSError:
        return []


def found(gateway: str | None) -> list[Record]:
    """The records of a gateway, or of all."""
    return [Record(path) for path in sorted(directory().glob(f"{gateway or '[!.]*'}/*"))]
