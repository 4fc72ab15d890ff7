"""The supervisor, its parts and who asks, killed at every step that is taken for who asks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from kill_place import GROUP, PESTER, Place, eventually, recorders
from kill_plans import GIVEN, NAME, READY, Asker
from mortal import Moment, Mortal, Wanted, describe
from nsrun import linux
from nsrun.client import RefusedError
from nsrun.errors import NsrunError
from nsrun.gateway import control
from nsrun.spec import Plug, RunSpec
from nsrun.steps import Step

PARTS = ("tor", "uplink")
# what a plan cannot know: who asks, and which of the links that are ready he gets
UNKNOWN = re.compile(r"\S*\d\S*|(?<=-w )\S+")


def ask(place: Place, asker: Asker, seconds: str = "0.3") -> Mortal:
    """Somebody who asks, and is served for so long."""
    if asker.command is not None:
        file = str(place.home / f"{next(FILES)}.pcap")
        words = asker.command.words(*PESTER, seconds, file=file)
        return place.client(*words, guest=asker.command.guest)
    plug = Plug("ttp7", GIVEN) if "refresh" in asker.plans else Plug()

    def main() -> int:
        linux.unshare(linux.CLONE_NEWNET)
        network = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            control.plug(network, RunSpec(("container",), NAME, "container"), plug)
        except NsrunError:
            return 125
        return 0

    return place.process(main)


FILES = count()


def asking(place: Place, asker: Asker) -> None:
    """At every step, and at every undo when it ends."""
    if asker.command is not None and asker.command.guest:
        place.spec = replace(place.spec, group=GROUP)
    steps = asker.steps(0)
    wanted = _wanted(asker.plans, steps)
    for number in range(len(steps) + 1):
        with place.up(wanted) as gateway, _asked(place, asker) as client:
            moment = gateway.advance(number)
            assert number == len(steps) or _same(moment, steps[number]), moment
            place.stray(gateway.pid)
            place.case("supervisor", moment)
            place.dies(gateway)
            assert os.waitstatus_to_exitcode(client.wait()) == 125, place.said()
    # what becomes of Tor and the uplink does not depend on what a container gets
    for who in PARTS if asker.command else ():
        with place.up(wanted) as gateway, _asked(place, asker) as client:
            for _ in range(len(steps) + 1):
                moment = gateway.advance(0)
                stuck = moment.plan == "refresh"  # in the thread that would start another one
                if not stuck:
                    place.ask(do="wait", timeout=20)  # the one before has a successor
                assert place.kill_part(gateway, who) or stuck
                place.stray(gateway.pid)
                place.case(who, moment)
                gateway.go()
            gateway.free()
            assert client.wait() == 0, place.said()
            place.recovers(gateway)
    _asker_killed(place, asker, wanted, len(steps) + 1)
    _ended(place, asker)
    place.nothing_left()


def _asker_killed(place: Place, asker: Asker, wanted: Wanted, moments: int) -> None:
    """The supervisor goes on, and then takes all of it back."""
    with place.up(wanted) as gateway:
        stock = 2 + READY  # links: loopback, uplink, and those of ready workloads
        for number in range(moments):
            with _asked(place, asker) as client:
                place.case("client", gateway.advance(number))
                client.kill()
                gateway.go()
                while not eventually_quiet(place, gateway):
                    gateway.advance(0)
                    gateway.go()
            eventually(lambda: not place.workloads(), "the end of the workload")
            eventually(lambda: not recorders(gateway.pid), "the end of its recorder")
            eventually(lambda: len(place.links(gateway)) == stock, "the link to go")
        gateway.free()
        place.recovers(gateway)


def eventually_quiet(place: Place, gateway: Mortal) -> bool:
    """Whether the supervisor comes to no other moment."""
    while not gateway.stands(0.05):  # the interval of the poll
        try:
            if not place.workloads():
                return not gateway.stands(0.2)  # it may be between two steps, ahead of its books
        except RefusedError:
            assert gateway.stands(0), "silent, and not because it stands"
    return False


def _ended(place: Place, asker: Asker) -> None:
    """The supervisor, killed at every undo of a workload that has ended by itself."""
    undo = asker.undo(0)
    wanted = _wanted(("undo",), undo)
    for number in range(len(undo) + 1):
        with place.up(wanted) as gateway, _asked(place, asker) as client:
            moment = gateway.advance(number)
            assert number == len(undo) or _same(moment, undo[number]), moment
            place.stray(gateway.pid)
            place.case("supervisor", moment)
            place.dies(gateway)
            assert client.wait() == 0, place.said()
    with place.up(
        wanted
    ) as gateway:  # the main thread is at it: who is killed now is mourned later
        for who in PARTS:
            with _asked(place, asker) as client:
                place.case(who, gateway.advance(1))
                assert place.kill_part(gateway, who)
                gateway.go()
                while gateway.stands(0.5):
                    gateway.advance(0)
                    gateway.go()
                assert client.wait() == 0, place.said()
        gateway.free()
        place.recovers(gateway)


@contextmanager
def _asked(place: Place, asker: Asker) -> Iterator[Mortal]:
    client = ask(place, asker)
    try:
        yield client
    finally:
        client.kill()


def _wanted(plans: tuple[str, ...], steps: tuple[Step, ...]) -> Wanted:
    """Before each of the steps, and after the last one; again for each who asks."""
    seen = 0  # in the supervisor

    def wanted(moment: Moment) -> bool:
        nonlocal seen
        if moment.plan not in plans:
            return False
        if moment.when == "before":
            first = moment.step.startswith(("AttachNamespace", "OpenNamespace"))
            seen = 1 if first or seen == len(steps) else seen + 1
            return True
        return seen == len(steps)

    return wanted


def _same(moment: Moment, step: Step) -> bool:
    """By the kind of the step, and the end of its description."""
    told, known = (UNKNOWN.sub("…", text).split() for text in (moment.step, describe(step)))
    return (told[0], told[-4:]) == (known[0], known[-4:])
