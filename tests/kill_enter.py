"""A client, and others, killed at every operation by which the client becomes its command."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

# what a client loads when it needs it, and a guest may not be able to reach
import nsrun.init
import nsrun.parent
import nsrun.strict
from kill_place import (
    GROUP,
    PESTER,
    Place,
    become_guest,
    dead,
    descendants,
    eventually,
    recorders,
)
from kill_plans import Command
from mortal import Moment, Mortal
from nsrun import client
from nsrun.user import resolve

LAZY = (nsrun.init, nsrun.parent, nsrun.strict)
FOREVER, SHORT = "60", "0.3"  # seconds of pestering


def enter(place: Place, command: Command, *victims: str) -> None:
    """All clients of one gateway stand at an operation each when somebody is killed.

    Who is killed is outside: what it has forked by then has to end by itself.
    """
    nested = os.geteuid() != 0
    if command.guest:
        place.spec = replace(place.spec, group=GROUP)
    caller, _ = resolve(command.spec, _caller(command.guest), nested)
    ops = command.enter(place.spec, place.facts, caller, nested)
    planned = [str(op[0]) for op in ops]

    def wanted(moment: Moment) -> bool:
        after = moment.when == "after" and moment.step.startswith(planned[-1])
        return moment.plan == "enter" and (moment.when == "before" or after)

    files = map(str, (place.home / f"{number}.pcap" for number in count()))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path := str(place.home / "socket"))
        for who in victims:
            with place.up() as gateway, ExitStack() as stack:
                if command.verb == "exec":
                    stack.enter_context(place.busy(guest=command.guest))
                clients: list[Mortal] = []
                for number in range(len(planned) + 1):
                    pester = (*PESTER, FOREVER if who == "client" else SHORT)
                    words = command.words(*pester, file=next(files), socket=path)
                    clients.append(place.client(*words, wanted=wanted, guest=command.guest))
                    stack.callback(clients[-1].kill)
                    moment = clients[-1].advance(number)
                    assert number == len(planned) or moment.step.split()[0] == planned[number]
                    place.case(who, moment)
                _kill_all(place, who, gateway, clients, command)
    place.nothing_left()


def _kill_all(
    place: Place, who: str, gateway: Mortal, clients: list[Mortal], command: Command
) -> None:
    match who:
        case "client":
            inner = [pid for client in clients for pid in descendants(client.pid)]
            for one in clients:
                one.kill()
            eventually(partial(_all_dead, inner), "the end of all of it")
        case "supervisor":
            place.dies(gateway)
        case "recorder":
            there = recorders(gateway.pid)
            assert there
            for pid in there:
                os.kill(pid, 9)
            eventually(partial(_all_dead, there), "the end of the recorders")
        case _:
            assert place.kill_part(gateway, who)
    for one in clients:
        one.free()
    codes = [os.waitstatus_to_exitcode(one.wait()) for one in clients]
    match who:
        case "client":
            assert set(codes) == {-9}
            others = {"busy"} if command.verb == "exec" else set()
            eventually(lambda: set(place.workloads()) == others, "their end")
        case "supervisor":
            assert set(codes) <= {0, 125}, codes  # 125: some operations need it
        case _:
            assert set(codes) == {0}, codes
            place.recovers(gateway)


def _caller(guest: bool) -> dict[str, object]:
    """Who asks, as a client of that user would say it."""
    if not guest:
        return client.caller()
    reading, writing = os.pipe()
    if os.fork() == 0:
        become_guest()
        os.write(writing, repr(client.caller()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        found: dict[str, object] = eval(told.read())  # noqa: S307  of our own fork
    os.wait()
    return found


def _all_dead(pids: list[int]) -> bool:
    return all(map(dead, pids))
