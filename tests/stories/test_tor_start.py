"""How a gateway's Tor is started: nothing of it may outlive who started it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT, SBIN
from town import eventually

PARENT = """
import os, subprocess, sys, time
from nsrun.steps import StartTor
command = StartTor(sys.argv[1], 0, 0, os.getpid()).command()
print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.promise("P4", "P8")
def test_tor_dies_with_its_parent(tmp_path: Path) -> None:
    """At once, though no controller owns it here: Tor itself looks for its owner now and then."""
    torrc = tmp_path / "torrc"
    torrc.write_text(f"DataDirectory {tmp_path}/data\nSocksPort 0\nDisableNetwork 1\n")
    parent = subprocess.Popen(
        (sys.executable, "-c", PARENT, str(torrc)),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{os.environ['PATH']}{SBIN}"},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        tor = os.pidfd_open(pid)
        try:
            comm = Path(f"/proc/{pid}/comm")
            eventually(lambda: comm.read_text() == "tor\n", "tor to be started")
            assert not select.select([tor], [], [], 0.2)[0], "it ended by itself"
            parent.kill()
            assert select.select([tor], [], [], 5)[0], "it lives on"
        finally:
            os.close(tor)
