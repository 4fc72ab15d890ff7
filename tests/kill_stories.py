"""Kill -9 at every step of every plan, told inside the host of a lab by tests/lab/test_kill.py.

kill_stories.py STORY UPLINK FRAGMENT DEFECT    one JSON object: the cases, the first trouble
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import stem.control  # noqa: F401  which each supervisor would load, in 70 ms

import nsrun.gateway.__main__
import nsrun.gateway.supervisor
from kill_accidents import ACCIDENTS
from kill_askers import asking
from kill_enter import enter
from kill_place import TTP, Place, end, spaces
from kill_plans import ASKING, ENTERING, NAME
from mortal import Moment, Wanted, describe
from nsrun import paths
from nsrun.address import BLOCKS
from nsrun.plan import Workload, gateway_steps, workload_steps
from nsrun.spec import GatewaySpec, LabUplink
from nsrun.steps import StartUplink, Step

# where the supervisor finds what a defect exchanges
PLAN, MAIN = cast("Any", nsrun.gateway.supervisor), cast("Any", nsrun.gateway.__main__)
PARTS = ("tor", "uplink")
LIMIT = 250  # seconds that a story may take


def start(place: Place) -> None:
    """The supervisor, killed at every step of the gateway's plan."""

    def wanted(moment: Moment) -> bool:
        return (moment.plan == "gateway" and moment.when == "before") or _is_last(moment)

    steps = PLAN.gateway_steps(place.spec, place.facts, BLOCKS[0])
    for number in range(len(steps) + 1):
        moment = _start_and_kill(place, wanted, number)
        assert number == len(steps) or moment.step == describe(steps[number])
    assert _is_last(moment)
    place.nothing_left()


def deep(place: Place) -> None:
    """The same before everything that is done within a step, and before the first."""

    def wanted(moment: Moment) -> bool:
        return moment.plan == "deep" or _is_last(moment)

    for number in count():
        if _is_last(_start_and_kill(place, wanted, number, deep=True)):
            break
    for number in count():  # and while what a predecessor has left is removed
        with place.up():
            pass
        gateway = place.supervisor(wanted, deep=True)
        moment = gateway.advance(number)
        place.case("supervisor", moment)
        gateway.kill()
        if moment.step.startswith("socket.bind"):
            break
    place.nothing_left()


def _start_and_kill(place: Place, wanted: Wanted, number: int, *, deep: bool = False) -> Moment:
    """One death at the moment of this number. First, what the one before has left must go."""
    sweeper = place.supervisor(lambda moment: moment.step.startswith("MakeNamespace"))
    sweeper.advance(0)
    place.as_before()
    sweeper.kill()
    gateway = place.supervisor(wanted, deep=deep)
    squatter = 0
    try:
        for index in range(number + 1):
            moment = gateway.advance(0)
            if not squatter and spaces(gateway.pid):
                squatter = place.squat(gateway.pid)
            if index < number:
                gateway.go()
        place.stray(gateway.pid)
        place.case("supervisor", moment)
        place.dies(gateway, *((squatter,) if squatter else ()))
        return moment
    finally:
        gateway.kill()
        if squatter:
            end(squatter)


def parts(place: Place) -> None:
    """Tor and the uplink, killed after every step of the gateway's plan since their own start."""

    def wanted(moment: Moment) -> bool:
        return moment.plan == "gateway" and moment.when == "after"

    moments = _rehearse(place, wanted)
    for who, first in (("uplink", "StartUplink"), ("tor", "StartTor")):
        born = next(n for n, moment in enumerate(moments) if _is(moment, "after", first))
        for number in range(born, len(moments)):
            gateway = place.supervisor(wanted)
            try:
                place.case(who, gateway.advance(number))
                assert place.kill_part(gateway, who)
                gateway.free()
                place.recovers(gateway)
            finally:
                gateway.kill()
    place.nothing_left()


def stop(place: Place) -> None:
    """The supervisor, Tor and the uplink, killed at every undo of a gateway that goes down."""

    undone: set[str] = set()  # in the supervisor: each start begins with none

    def wanted(moment: Moment) -> bool:
        if moment.plan != "undo":
            return False
        if moment.step.startswith("DropElements") or moment.step.endswith("del workload"):
            new = moment.step.split()[0] not in undone  # workloads are alike: the first will do
            undone.update([moment.step.split()[0]] if moment.when == "before" else [])
            return new and moment.when == "before"
        return moment.when == "before" or moment.step.endswith("del gateway")

    for who in ("supervisor", *PARTS):
        for number in count():
            with place.up(wanted) as gateway, place.busy() as workload:
                place.ask(do="down")
                moment: Moment | None = None
                for _ in range(number + 1):
                    if moment is not None:
                        gateway.go()
                    moment = gateway.moment()
                if moment is None:  # it has come to its end
                    break
                if who == "supervisor":
                    place.stray(gateway.pid)
                    place.dies(gateway, workload)
                elif place.kill_part(gateway, who):
                    place.stray(gateway.pid)
                    gateway.free()
                    assert gateway.wait() == 0
                else:
                    break
                place.case(who, moment)
    place.nothing_left()


def workload(place: Place) -> None:
    """The supervisor, Tor and the uplink, killed at every step by which a workload is made."""
    steps = workload_steps(Workload(BLOCKS[0], 2))
    last = describe(steps[-1])

    def wanted(moment: Moment) -> bool:
        after = moment.when == "after" and moment.step == last
        return moment.plan == "workload" and (moment.when == "before" or after)

    for number in range(len(steps) + 1):
        with place.up(wanted) as gateway:
            moment = gateway.advance(number)
            assert number == len(steps) or moment.step == describe(steps[number])
            place.stray(gateway.pid)
            place.case("supervisor", moment)
            place.dies(gateway)
    for who in PARTS:
        with place.up(wanted) as gateway:
            for _ in range(len(steps) + 1):
                moment = gateway.advance(0)
                place.ask(do="wait", timeout=20)  # the one before has a successor
                assert place.kill_part(gateway, who)
                place.stray(gateway.pid)
                place.case(who, moment)
                gateway.go()
            gateway.free()
            place.recovers(gateway)
    place.nothing_left()


def given(place: Place) -> None:
    """The same while a workload gets a new identity, and after the end of one."""

    def refresh(moment: Moment) -> bool:
        after = moment.when == "after" and "identities6" in moment.step
        return moment.plan == "refresh" and (moment.when == "before" or after)

    def ended(moment: Moment) -> bool:
        after = _is(moment, "after", "DropNamespace")
        return moment.plan == "undo" and (moment.when == "before" or after)

    for wanted, asked in (
        (refresh, [TTP, "refresh", "busy", "-g", NAME]),
        (ended, place.run("true")),
    ):
        for who in ("supervisor", *PARTS):
            # two steps each: of two families; elements and namespace
            for number in range(3) if who == "supervisor" else (1,):
                with place.up(wanted) as gateway, place.busy() as busy:
                    asking = subprocess.Popen(
                        asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                    )
                    place.case(who, gateway.advance(number))
                    place.stray(gateway.pid)
                    if who == "supervisor":
                        place.dies(gateway, busy)
                        error = asking.communicate(timeout=20)[1]
                        assert asking.returncode == 0 or error.startswith("ttp: cannot "), error
                        continue
                    assert place.kill_part(gateway, who)
                    gateway.free()
                    assert asking.wait(20) == 0
                    place.recovers(gateway)
    place.nothing_left()


def _is(moment: Moment, when: str, kind: str) -> bool:
    return moment.when == when and moment.step.startswith(f"{kind} ")


def _is_last(moment: Moment) -> bool:
    """Of a gateway's start."""
    return _is(moment, "after", "StartTor")


def _rehearse(place: Place, wanted: Wanted) -> list[Moment]:
    """All the moments of a start."""
    gateway = place.supervisor(wanted)
    try:
        found = [gateway.advance(0)]
        while not _is_last(found[-1]):
            gateway.go()
            found.append(gateway.advance(0))
        return found
    finally:
        gateway.kill()


# Whoever is killed at each operation of a client. Tor's end and the uplink's are the same however
# a command is entered, and a recorder's is however strict it is.
VICTIMS = {
    "enter": ("client", "supervisor", *PARTS),
    "strict": ("client", "supervisor", *PARTS),
    "recorded": ("client", "supervisor", "recorder"),
    "recorded strict": ("client",),
}


def _enter(name: str, place: Place) -> None:
    enter(place, ENTERING[name], *VICTIMS.get(name, ("client", "supervisor")))


STORIES: dict[str, Callable[[Place], None]] = {
    "start": start,
    "deep": deep,
    "parts": parts,
    "stop": stop,
    "workload": workload,
    "given": given,
    **ACCIDENTS,
    **{name: partial(asking, asker=asker) for name, asker in ASKING.items()},
    **{name: partial(_enter, name) for name in ENTERING},
}


def open_first() -> None:
    """A defect: the uplink comes before the rules, and the gateway forwards."""

    def steps(*arguments: Any) -> tuple[Step, ...]:
        planned = list(gateway_steps(*arguments))
        uplink = next(step for step in planned if isinstance(step, StartUplink))
        planned.remove(uplink)
        planned.insert(1, uplink)
        return tuple(planned)

    PLAN.gateway_steps = steps


def no_sweep() -> None:
    """A defect: what a killed gateway left on the host stays."""
    MAIN.sweep_veth = lambda _: []


DEFECTS = {"": lambda: None, "open-first": open_first, "no-sweep": no_sweep}


def _tail(log: Path) -> str:
    """The end of a log, without what Tor warns of at each start."""
    lines = log.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if "non-loopback address" not in line)[-4000:]


def main(story: str, uplink: str, fragment: str, defect: str) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # should something hang
    DEFECTS[defect]()
    home = Path(tempfile.mkdtemp(prefix="ttp-kill-"))
    home.chmod(0o711)  # Tor's user passes through
    os.environ |= {"TTP_RUNTIME_DIR": f"{home}/run", "TTP_STATE_DIR": f"{home}/state"}
    wanted = LabUplink(**json.loads(uplink)) if uplink.startswith("{") else uplink
    runtime, state = paths.gateway(NAME), f"{paths.state()}/gateways/{NAME}"
    place = Place(GatewaySpec(NAME, runtime, state, (wanted,), fragment, idle=0), home)
    trouble = ""
    try:
        STORIES[story](place)
    except BaseException:
        import traceback

        logs = [*home.glob("*.log"), Path(paths.log(state))]
        said = [f"{path.name}: …{_tail(path)}" for path in logs if path.exists()]
        trouble = "\n".join((traceback.format_exc(), *said))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps({"cases": place.cases, "trouble": trouble}))


if __name__ == "__main__":
    main(*sys.argv[1:])
