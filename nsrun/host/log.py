"""The log of the whole host, /run/ttp/ttp.log: root's, with a line for each thing that happened.

Its lines are text, ``TIMESTAMP LEVEL MESSAGE``, or JSON objects that tell the same. All lines of a
file have one form: who wants the other one begins another file.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from nsrun.host import session
from nsrun.host.session import LogFormat

BYTES = 1 << 20  # then it is renamed, in the place of the one that was renamed before


def write(level: int, words: str, form: LogFormat | None = None) -> None:
    """A line at the end; without ``form``, in that of the file. Raises OSError."""
    there = _form()
    handler = _Handler(session.LOG, maxBytes=BYTES, backupCount=1)
    try:
        if form and there and form != there:
            handler.doRollover()
        handler.setFormatter(_Formatter(form or there or "text"))
        logger = logging.Logger("ttp", logging.INFO)
        logger.addHandler(handler)
        logger.log(level, "%s", words)
    finally:
        handler.close()


def _form() -> LogFormat | None:
    """That of the file's lines; None if there is none yet."""
    try:
        with Path(session.LOG).open("rb") as file:
            first = file.read(1)
    except FileNotFoundError:
        return None
    if not first:
        return None
    return "json" if first == b"{" else "text"


class _Handler(RotatingFileHandler):
    """Nobody else may read the file, from when it is made on: whoever has it open, goes on."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class _Formatter(logging.Formatter):
    """One line each; the time as in RFC 3339."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self.form == "json":
            return json.dumps(told)
        return f"{told['timestamp']} {told['level']} {told['message']}"
