"""``ttp run`` as a client with a defect would do it, in a lab: the real operations, but for some.

    python3 -m nsrun.leak.careless DEFECT GATEWAY COMMAND…

asks the gateway's supervisor for a workload, performs what it answers as the defect changes it
(nsrun/leak/broken.py), and becomes the command.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from nsrun import client, enter
from nsrun.leak.broken import CARELESS


def main(defect: str, gateway: str, *command: str) -> NoReturn:
    careless = next(one for one in CARELESS if one.name == defect)
    nothing: dict[str, Any] = {"files": [], "environment": {}}  # no defaults but ttp's own
    arguments = ["--gateway", gateway, "--", *command]
    request = client.wish("run", arguments, gateway, nothing)
    answer, descriptors = client.ask(client.reach(gateway), request)
    umask = os.umask(0o022)  # as the real client
    for op in careless.changes(answer["enter"]):
        enter.perform(op, descriptors)
    os.umask(umask)
    os.execvpe(command[0], command, {**os.environ, **answer["environment"]})


if __name__ == "__main__":
    main(*sys.argv[1:])
