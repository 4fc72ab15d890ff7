"""``ttp diagnose``: what there is of a session, for a report. Nothing is sent, nothing changed.

What could tell a bridge, which may be secret, is left out everywhere, Tor's own words included; of
the firewall only our own table is shown.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nsrun import __version__
from nsrun.errors import NsrunError
from nsrun.host import bridges, machine, session

LINES = 20  # of the journal


def sections() -> Iterator[tuple[str, str]]:
    """A title and a text each."""
    torrc = _text(session.TORRC)
    for title, text in _sections():
        yield title, bridges.without_secrets(text, torrc)


def _sections() -> Iterator[tuple[str, str]]:
    release = re.search(r'PRETTY_NAME="?([^"\n]*)', _text("/etc/os-release"))
    system = os.uname()
    yield (
        "system",
        f"ttp {__version__}, {release[1] if release else '?'}, {system.sysname} {system.release}",
    )
    yield session.RECORD, _text(session.RECORD)
    for unit in (session.TOR_UNIT, session.WATCHDOG):
        yield unit, _said("systemctl", "status", "--no-pager", f"--lines={LINES}", unit)
    yield session.TORRC, _text(session.TORRC)
    try:
        yield f"table {machine.TABLE}", machine.listed()
    except NsrunError as error:
        yield f"table {machine.TABLE}", str(error)
    yield (
        "/etc/resolv.conf",
        f"{os.path.realpath('/etc/resolv.conf')}\n" + _text("/etc/resolv.conf"),
    )
    yield (
        "mounts",
        _said("findmnt", "--raw", "--noheadings", "--output", "TARGET,SOURCE", "-t", "tmpfs"),
    )
    yield "addresses of loopback", _said("ip", "-brief", "address", "show", "dev", "lo")
    yield "systemd-resolved", _said("resolvectl", "--no-pager", "dns")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError as error:
        return str(error.strerror)


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout + done.stderr
