"""The keeper of one daemon's holders: removes each when its last container is removed.

``python -m nsrun.containers.keeper`` is started by ``ttp docker run``, which then becomes docker,
and ends with the last holder. When it is killed, holders stay until the next ``ttp docker``.

When the daemon comes back after an end that took all containers along, it does not start those
that join another one, whatever their policy: the keeper does, after their holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import nsrun
from nsrun import paths
from nsrun.containers import holders
from nsrun.containers.engine import Engine
from nsrun.containers.holders import Holder
from nsrun.errors import NsrunError

PATIENCE = 120.0  # seconds for a daemon to come back
#: What the daemon says of a container whose holder is not running: moby, daemon/container.go. From
#: 28 on, the network's namespace cannot be joined; till then, the network.
UNJOINED = "of a non running container"


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
    """Sweep whenever a container comes or goes, or who made a holder ends, while there are any.

    Returns also when the daemon has ended. Raises NsrunError if it does while we ask it.
    """
    news: SimpleQueue[bool] = SimpleQueue()
    threading.Thread(target=_hear, args=(engine, news), daemon=True).start()
    watched: set[str] = set()
    while left := holders.sweep(engine):
        for holder in left:
            if holder.creator not in watched:
                watched.add(holder.creator)
                threading.Thread(target=_await, args=(holder, news), daemon=True).start()
        if not news.get():
            return


def revive(engine: Engine) -> Iterator[tuple[str, NsrunError | None]]:
    """Start the holders of containers that the daemon could not start without, and then those.

    Tells of each container why it was not started: its gateway is not up, for instance. Then all
    is as it was, and closed. Raises NsrunError if the daemon does not answer.
    """
    with _one_at_a_time():
        for holder in holders.found(engine):
            left_out = [name for name, *_ in holder.users if _was_left_out(engine, name)]
            if holder.running or not left_out:
                continue
            failed = None
            try:
                _start(engine, holder, left_out)
            except NsrunError as error:
                failed = error
            yield from ((name, failed) for name in left_out)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among all that revive, who else would take away each other's holders: a keeper, a unit."""
    paths.private_directory(paths.runtime())
    directory = os.open(paths.runtime(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _start(engine: Engine, holder: Holder, containers: list[str]) -> None:
    """A holder, plugged in, then the containers. Raises NsrunError; then none of them runs."""
    from nsrun.containers import plugging
    from nsrun.gateway import control
    from nsrun.spec import RunSpec

    labels = engine.inspect(holder.id)["Config"]["Labels"]
    spec = RunSpec(
        ("docker", "run", *containers),
        holder.gateway,
        holder.workload,
        ipv6=labels[holders.IPV6] == "1",
        isolate=labels[holders.ISOLATE],
        socks=labels[holders.SOCKS] == "1",
    )
    resolver = control.resolver(holder.gateway, spec.bootstrap_timeout)
    with engine.doing(f"start {containers[0]} again"), ExitStack() as undo:
        undo.callback(engine.library.kill, holder.id)
        engine.library.start(holder.id)
        plugging.plug(engine, holder.id, spec, resolver, pinned=True)
        undo.pop_all()
        for name in containers:
            engine.library.start(name)


def _was_left_out(engine: Engine, container: str) -> bool:
    """Whether the daemon was to start a container, and could not, for want of its holder."""
    told = engine.inspect(container)
    policy = told["HostConfig"]["RestartPolicy"]["Name"]
    return policy not in ("", "no") and UNJOINED in told["State"]["Error"]


def _hear(engine: Engine, news: SimpleQueue[bool]) -> None:
    """Tell of every container that comes or goes, then of the daemon's end.

    First of all once it is heard: who went before that was there, perhaps, when we looked.
    """
    with suppress(NsrunError), engine.doing("listen"):
        for _ in engine.api.events(type=["container"], event=["create", "destroy"]):
            news.put(True)
    news.put(False)


def _await(holder: Holder, news: SimpleQueue[bool]) -> None:
    with suppress(OSError, ValueError):  # it has ended
        process = os.pidfd_open(int(holder.creator.partition(" ")[0]))
        if holders.started(holder.creator.partition(" ")[0]) == holder.creator:
            select.select([process], [], [])
        os.close(process)
    news.put(True)


def lock(host: str) -> Path:
    """The file that the keeper of a daemon holds locked."""
    return Path(paths.runtime(), f"keeper-{hashlib.sha256(host.encode()).hexdigest()[:12]}")


def tidy(engine: Engine) -> None:
    """Remove what a keeper leaves that was killed."""
    with suppress(FileNotFoundError, BlockingIOError), lock(engine.host).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock(engine.host).unlink(missing_ok=True)


@contextmanager
def _alone(host: str) -> Iterator[bool]:
    """Whether we are the only keeper of a daemon, for the time of the block."""
    paths.private_directory(paths.runtime())
    with lock(host).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        lock(host).unlink(missing_ok=True)  # another may have it open, and lock it: two do no harm


def _back() -> Engine | None:
    """The daemon, when it answers again; None if it does not within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(NsrunError):
            engine = Engine()
            holders.found(engine)
            return engine
        time.sleep(0.5)  # nothing tells when it is back
    return None


def main() -> None:
    engine: Engine | None = Engine()
    while engine and holders.found(engine):  # one that came while we were about to leave, too
        with _alone(engine.host) as alone:
            if not alone:
                return
            with suppress(NsrunError):
                keep(engine)
            engine = _back()
            if engine:
                for _ in revive(engine):
                    pass  # nobody is there to be told why one was not started: it stays closed


if __name__ == "__main__":
    main()
