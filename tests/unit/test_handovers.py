"""Which commands hand their work to which running processes; with processes by those names."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from nsrun.gateway.outside import warning
from town import eventually


def names() -> dict[int, str]:
    """What every process calls itself."""
    found = {}
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # it has ended
            found[int(comm.parent.name)] = comm.read_text().strip()
    return found


@pytest.mark.parametrize(
    ("server", "command", "warned"),
    [
        ("firefox-esr", "firefox https://example.com", True),
        ("firefox", "/usr/bin/firefox --no-remote", False),
        ("chrome", "google-chrome --incognito", True),
        ("chrome", "google-chrome --user-data-dir=/tmp/x", False),
        ("gnome-terminal-server", "gnome-terminal", True),
        ("konsole", "konsole", False),
        ("konsole", "konsole --new-tab", True),
        ("gvim", "gvim file", False),
        ("gvim", "gvim --remote-tab file", True),
        ("tmux", "tmux new-session", True),
        ("tmux", "tmux -L mine", False),
        ("screen", "screen", False),
        ("screen", "screen -x", True),
        ("emacs", "emacsclient -t", True),
        ("dockerd", "docker run alpine", True),
        ("podman", "podman run alpine", False),
        ("firefox", "echo firefox", False),
    ],
)
def test_a_handover_is_seen(tmp_path: Path, server: str, command: str, warned: bool) -> None:
    """Only if the process runs, and only with arguments that make the command a client of it."""
    program = tmp_path / server
    shutil.copy("/bin/sleep", program)
    words = tuple(command.split())
    with subprocess.Popen([program, "60"]) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            eventually(lambda: comm.read_text().strip() == server[:15], "it to run")
            found = warning(words, os.geteuid(), ())
            there = [pid for pid, name in names().items() if name == server[:15]]  # of others, too
            named = found is not None and any(f"(process {pid})" in found[0] for pid in there)
            assert named is warned
            assert process.pid in there
            assert warning(words, os.geteuid(), there) is None  # they are behind Tor themselves
        finally:
            process.kill()
