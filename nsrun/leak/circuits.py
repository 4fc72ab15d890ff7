"""Who used which circuit to go where, by STREAM events of a gateway's Tor (control-spec 4.1.2).

    python3 -m nsrun.leak.circuits CONTROL_SOCKET

prints "ready", and at the end of standard input one JSON list of [identity, target, circuit],
without repetition; a pair of circuits joined by Conflux counts as one.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from stem.control import Controller, EventType


def main(path: str) -> None:
    asked: dict[str, tuple[str, str]] = {}  # by stream, as it was new: a lookup's target changes
    used: set[tuple[str, str, str]] = set()

    def on_stream(event: Any) -> None:
        if event.source_addr:
            asked[event.id] = (event.source_addr.rpartition(":")[0], event.target)
        if event.circ_id not in (None, "0") and event.id in asked:
            used.add((*asked[event.id], event.circ_id))

    with Controller.from_socket_file(path) as controller:
        controller.authenticate()
        controller.add_event_listener(on_stream, EventType.STREAM)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.read()
        status = controller.get_info("circuit-status")
    joined = {
        line.split()[0]: match[1]
        for line in status.splitlines()
        if (match := re.search(r"CONFLUX_ID=(\S+)", line))
    }
    found = sorted({(who, where, joined.get(c, c)) for who, where, c in used})
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
