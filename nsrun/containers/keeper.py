"""The keeper of one daemon's holders: removes each when its last container is removed.

``python -m nsrun.containers.keeper`` is started by ``ttp docker run``, which then becomes docker,
and ends with the last holder. When it is killed, holders stay until the next ``ttp docker``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import nsrun
from nsrun import paths
from nsrun.containers import holders
from nsrun.containers.engine import Engine
from nsrun.containers.holders import Holder
from nsrun.errors import NsrunError

EVENTS = {"type": "container", "event": ["create", "destroy"]}


def start(engine: Engine) -> None:
    """Start one; if one is there already, it ends by itself."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"DOCKER_HOST": engine.host, "PYTHONPATH": str(Path(nsrun.__file__).parents[1])}
    subprocess.run(
        # setsid(1) leaves at once: docker, which we become, is to have no child but its own
        ("setsid", "--fork", sys.executable, "-P", "-m", "nsrun.containers.keeper"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        check=True,
    )


KEPT = ("HOME", "PATH", "XDG_RUNTIME_DIR", "TTP_RUNTIME_DIR")


def keep(engine: Engine) -> None:
    """Sweep whenever a container comes or goes, or who made a holder ends, while there are any."""
    news: SimpleQueue[bool] = SimpleQueue()
    threading.Thread(target=_hear, args=(engine, news), daemon=True).start()
    watched: set[str] = set()
    while left := holders.sweep(engine):
        for holder in left:
            if holder.creator not in watched:
                watched.add(holder.creator)
                threading.Thread(target=_await, args=(holder, news), daemon=True).start()
        if not news.get():
            return  # the daemon has ended, and with it every container that we know of


def _hear(engine: Engine, news: SimpleQueue[bool]) -> None:
    """Tell of every container that comes or goes, then of the daemon's end."""
    with suppress(NsrunError), engine.doing("listen"):
        for _ in engine.api.events(filters=EVENTS):
            news.put(True)
    news.put(False)


def _await(holder: Holder, news: SimpleQueue[bool]) -> None:
    with suppress(OSError):  # it has ended
        process = os.pidfd_open(int(holder.creator.partition(" ")[0]))
        if holders.started(holder.creator.partition(" ")[0]) == holder.creator:
            select.select([process], [], [])
        os.close(process)
    news.put(True)


@contextmanager
def _alone(host: str) -> Iterator[bool]:
    """Whether we are the only keeper of a daemon, for the time of the block."""
    paths.private_directory(paths.runtime())
    path = Path(paths.runtime(), f"keeper-{hashlib.sha256(host.encode()).hexdigest()[:12]}")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)  # another may have it open, and lock it: two do no harm


def main() -> None:
    engine = Engine()
    while holders.found(engine):  # one that came while we were about to leave has no other keeper
        with _alone(engine.host) as alone:
            if not alone:
                return
            keep(engine)


if __name__ == "__main__":
    main()
