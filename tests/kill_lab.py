"""A lab whose holder, or who ends it, is killed at every statement: tests/lab/test_interrupt.py.

kill_lab.py NAME STORY     the cases, a line each; a traceback and 1 if something is left

A lab has no plan. Its steps are the statements of the functions below, as their source has them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

from kill_place import dead, descendants, eventually
from mortal import Moment, Mortal
from nsrun import paths
from nsrun.errors import UsageError
from nsrun.lab import control, holder, namespaces
from nsrun.lab.programs import Programs

LIMIT = 250  # seconds that a story may take
BOOT = (holder.main, holder.boot, namespaces.unshare, namespaces.connect)
END = (control.down, control._end, control._forget)
UP = "signal.pause()"  # where the holder of a lab that is up stands


def hold(name: str, home: Path, *lines: object, gateway: bool = True) -> Mortal:
    """A holder, which stops before each statement of ``lines``."""
    with control.prepared(name, gateway=gateway, onion=False) as (order, lock):
        told = os.memfd_create("order")
        os.write(told, json.dumps(asdict(order)).encode())
        os.lseek(told, 0, os.SEEK_SET)
        log = home / "holder.log"
        log.write_text("")
        made = Mortal(holder.main, _any, (told, str(log)), lines=lines)
        os.close(told)
        lock.write(str(made.pid))
    return made


def boot(name: str, home: Path) -> None:
    """The holder, killed at every statement until the lab is up."""
    for number in count():
        made = hold(name, home, *BOOT)
        try:
            moment = made.advance(number)
            print(moment)
            _dies(made, name)
        finally:
            made.kill()
        if moment.step.endswith(UP):
            break


def end(name: str, home: Path) -> None:
    """Who ends a lab, killed at every statement of that: the next command ends it."""
    null = os.open(os.devnull, os.O_RDWR)
    made = _up(name, home)
    for number in count():
        inside = [made.pid, *descendants(made.pid)]
        ending = Mortal(lambda: control.down(name), _any, (null, str(home / "down.log")), lines=END)
        try:
            going_on = _comes_to(ending, number)
        finally:
            ending.kill()
        if going_on and name in control.names() and not any(map(dead, inside)):
            continue  # nothing has been done yet
        with suppress(UsageError):  # it had come to its end
            control.down(name)
        eventually(partial(_all_dead, inside), "the end of its programs")
        made.kill()
        _nothing_left(name)
        if not going_on:
            break
        made = _up(name, home)


def ending(name: str, home: Path) -> None:
    """The holder, killed at every statement by which it ends its programs."""
    for number in count():
        made = _up(name, home, Programs.stop)
        os.kill(made.pid, signal.SIGTERM)
        try:
            if not _comes_to(made, number):
                break
            _dies(made, name)
        finally:
            made.kill()
    control.down(name)


def _comes_to(process: Mortal, number: int) -> bool:
    """Whether it comes to the moment of this number, before its end."""
    for _ in range(number):
        if process.moment() is None:
            return False
        process.go()
    moment = process.moment()
    if moment is not None:
        print(moment)
    return moment is not None


def _up(name: str, home: Path, *lines: object) -> Mortal:
    """The holder of a lab that is up."""
    made = hold(name, home, *lines, gateway=False)
    eventually(lambda: '{"ready"' in (home / "holder.log").read_text(), "the lab", 30)
    return made


def _dies(made: Mortal, name: str) -> None:
    inside = descendants(made.pid)
    made.kill()
    eventually(partial(_all_dead, inside), "the end of its programs")
    assert name not in control.names()
    control.down(name)
    _nothing_left(name)


def _nothing_left(name: str) -> None:
    left = [path for path in Path(paths.runtime()).rglob("*") if path.name == name]
    assert not left, left


def _all_dead(pids: list[int]) -> bool:
    return all(map(dead, pids))


def _any(_moment: Moment) -> bool:
    return True


STORIES = {"boot": boot, "end": end, "ending": ending}


def main(name: str, story: str) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # should something hang
    home = Path(tempfile.mkdtemp(prefix="ttp-kill-"))
    home.chmod(0o711)  # Tor's user passes through
    os.environ |= {"TTP_RUNTIME_DIR": f"{home}/run", "TTP_STATE_DIR": f"{home}/state"}
    try:
        STORIES[story](name, home)
    except BaseException:
        for log in home.glob("*.log"):
            sys.stderr.write(f"{log.name}: …{log.read_text()[-2000:]}\n")
        raise
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
