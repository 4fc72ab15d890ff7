"""Recordings of workloads' links: the recorder's process, from the supervisor's side."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from nsrun.errors import GatewayError
from nsrun.netns import Namespace
from nsrun.steps import StartRecorder

PATIENCE = 10.0  # seconds that a recorder may take to start

# No capability but the one to read packets: it writes to a file that is a user's. And it ends with
# the supervisor, as a process in the gateway's namespace would keep every link in being.
CONFINED = ("setpriv", "--inh-caps=-all", "--bounding-set=-all,+net_raw", "--no-new-privs")
RECORDER = (*CONFINED, "--pdeathsig=KILL", sys.executable, "-m", "nsrun.leak.record")


class Recording:
    """What goes over a link, from now on, in a file."""

    def __init__(self, gateway: Namespace, files: Mapping[str, int], step: StartRecorder) -> None:
        """Start it, and wait until nothing can be missed. Raises GatewayError.

        ``files`` are ``pcap``, to write to, and ``report``, the recorder's end of a socket to the
        client. They stay the caller's.
        """
        lifeline, self._lifeline = os.pipe()
        try:
            process = gateway.call(
                subprocess.Popen,
                (*RECORDER, step.link, str(files["pcap"]), str(files["report"])),
                stdin=lifeline,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=tuple(files.values()),
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            )
        finally:
            os.close(lifeline)
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            process.kill()
        if process.stdout.readline() != b"ready\n":
            self.stop()
            words = process.communicate()[1].decode(errors="replace").strip().splitlines()
            cause = words[-1] if words else f"it was not ready after {PATIENCE:g} s"
            raise GatewayError("record what the command sends", cause)
        threading.Thread(target=process.communicate, daemon=True).start()  # who reaps it

    def stop(self) -> None:
        """The link has gone: let the recorder write what it has, and end."""
        os.close(self._lifeline)
