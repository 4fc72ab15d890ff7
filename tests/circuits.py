"""Which identity used which circuits, by STREAM events of a gateway's Tor (control-spec 4.1.2).

circuits.py CONTROL_SOCKET     prints "ready"; at the end of standard input one JSON object:
                               identity -> circuits, a pair joined by Conflux counting as one
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from typing import Any

from stem.control import Controller, EventType


def main(path: str) -> None:
    sources: dict[str, str] = {}
    used: defaultdict[str, set[str]] = defaultdict(set)

    def on_stream(event: Any) -> None:
        if event.source_addr:
            sources[event.id] = event.source_addr.rpartition(":")[0]
        if event.circ_id not in (None, "0") and event.id in sources:
            used[sources[event.id]].add(event.circ_id)

    with Controller.from_socket_file(path) as controller:
        controller.authenticate()
        controller.add_event_listener(on_stream, EventType.STREAM)
        print("ready", flush=True)
        sys.stdin.read()
        status = controller.get_info("circuit-status")
    joined = {
        line.split()[0]: match[1]
        for line in status.splitlines()
        if (match := re.search(r"CONFLUX_ID=(\S+)", line))
    }
    print(json.dumps({who: sorted({joined.get(c, c) for c in one}) for who, one in used.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
