"""``python3 -m nsrun.host.watchdog SECONDS``: see to it that a session stays as it was made.

The kernel tells of every change to rules, links, addresses, routes and mounts, and to the files
that lead to the resolver; and every so many seconds all is looked at without being told. There are
four kinds of trouble:

tampering  the rules are not as they were loaded: everything is closed, and people are told; what
           is closed is watched as well
failure    Tor has ended, or the resolver is another one, which opens nothing: it is mended
a move     the host wakes up in another network: connections of Tor's from addresses that it has no
           longer are ended, as nobody answers them, and Tor takes minutes to give them up
its end    of a Tor that is somebody else's, and so not ours to start: whoever listens in its place
           would get what is for it, so that everything is closed

While another command changes the host, its lock is held, and nobody is suspected. An interface that
goes down is no trouble: no rule names one.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nsrun import netlink
from nsrun.errors import NsrunError
from nsrun.host import control, cover, external, facts, flows, machine, session
from nsrun.host.plan import locked_rules
from nsrun.host.session import Session
from nsrun.host.steps import (
    AddListeners,
    CloseHost,
    CoverFile,
    HostStep,
    LeadResolved,
    StartUnit,
    UncoverFile,
)
from nsrun.steps import WriteFile

UNSEEN = 1.0  # seconds to the next look while there is no Tor whose end could be told
PAUSE = 0.2  # seconds from one look to the next at least, however much is changed meanwhile
NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
ROUTES = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # rtnetlink(7): links; addresses, routes; of IPv6
# closed after writing, moved, made, deleted: inotify(7)
CHANGES = 0x8 | 0x40 | 0x80 | 0x100 | 0x200
TAMPERED, REPLACED = "the rules of the host were changed", "Tor no longer listens where it was"

log = logging.getLogger("ttp")


class Watch:
    """What the kernel tells, by descriptors to wait on."""

    def __init__(self, directories: Sequence[str], interval: float) -> None:
        self._interval = interval
        rules = netlink.connect(netlink.NETLINK_NETFILTER)
        rules.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        links = netlink.connect(netlink.NETLINK_ROUTE)
        links.bind((0, ROUTES))
        self._sockets = (rules, links)
        self._mounts = Path("/proc/self/mountinfo").open()  # noqa: SIM115  for as long as we live
        libc = ctypes.CDLL(None, use_errno=True)
        self._files = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for directory in directories:
            if libc.inotify_add_watch(self._files, os.fsencode(directory), CHANGES) < 0:
                why = os.strerror(ctypes.get_errno())
                log.warning("%s is looked at every %g s: %s", directory, interval, why)

    def wait(self, tor: int) -> None:
        """Until something has changed, or ``tor`` has ended, or it is time to look anyway."""
        seconds = self._interval
        with ExitStack() as held:
            told: list[Any] = [self._files, *self._sockets]
            try:
                told.append(os.pidfd_open(tor))
                held.callback(os.close, told[-1])
            except OSError:  # it has ended since the last look, or is about to be started
                seconds = min(seconds, UNSEEN)
            # a change of mounts is an exceptional condition (proc_pid_mountinfo(5))
            select.select(told, [], [self._mounts], seconds)
        self._read()

    def _read(self) -> None:
        for one in self._sockets:
            with suppress(OSError):  # nothing more, or too much to be kept: it has changed
                while one.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass
        with suppress(BlockingIOError):
            os.read(self._files, 1 << 16)
        self._mounts.seek(0)
        self._mounts.read()


def verdict(
    found: Session | None, rules: str, *, replaced: bool = False
) -> Literal["end", "wait", "close", "mend"]:
    """What is to be done about a session, where the kernel's table has this fingerprint.

    ``replaced`` says that a Tor that is somebody else's no longer listens where it was.
    """
    if found is None:
        return "end"
    if found.state not in ("up", "locked"):
        return "wait"  # who changed it last was killed, and has left it closed
    if rules != found.rules or (replaced and found.state == "up"):
        return "close"
    return "mend" if found.state == "up" else "wait"


def look() -> bool:
    """Look once, and do what is to be done. False when there is no session any more."""
    with control.lock(math.inf):
        found = control.current()
        rules, replaced = machine.fingerprint(), found is not None and _is_replaced(found)
        wanted = verdict(found, rules, replaced=replaced)
        if found is not None and wanted == "close":
            _close(found, TAMPERED if rules != found.rules else REPLACED)
        elif found is not None and wanted == "mend":
            _mend(found)
    return wanted != "end"


def _is_replaced(found: Session) -> bool:
    return found.spec.external and not external.is_as_it_was(found)


def _close(found: Session, why: str) -> None:
    """Whoever is killed after the first of it finds the rules changed, and closes again."""
    host = machine.HostMachine(log.info)
    host.do(CloseHost(locked_rules(found)))
    control.write_record(found.at("locked", rules=host.rules))
    words = f"{why}: all is closed, until `ttp restart` or `ttp stop`"
    log.critical("<0>ttp: %s", words)  # journald tells it on every terminal
    control.note(words)


def _mend(found: Session) -> None:
    """Steps of the session's own plan, again."""
    if not found.facts.resolv_conf and os.path.lexists(session.RESOLVER):
        found = replace(found, facts=replace(found.facts, resolv_conf=True))
        control.write_record(found)
    for step in control.steps_of(found):
        try:
            _mend_step(step)
        except NsrunError as error:
            log.warning("%s", error)
    if not found.spec.external:
        _give_up(found.facts.tor_uid)


def _give_up(tor_uid: int) -> None:
    """Without a network nothing is given up: it may soon be back in the one before."""
    try:
        count = flows.give_up(tor_uid) if facts.default_route() else 0
    except OSError as error:
        log.warning("connections of before are left to Tor: %s", error.strerror)
        return
    if count:
        log.warning("the host has moved: %d connections of Tor's are ended", count)


def _mend_step(step: HostStep) -> None:
    """Tor's unit is started as it is: nobody waits for it, as rules are to be looked at."""
    host = machine.HostMachine(log.warning)
    match step:
        case StartUnit() if step.name == session.TOR_UNIT and not machine.is_active(step.name):
            log.warning("%s has ended: it is started again", step.name)
            machine.restart(step.name, wait=False)
        case LeadResolved(path, text) if _text(path) != text:
            host.do(step)
        case AddListeners(addresses) if not machine.loopback().issuperset(addresses):
            host.do(step)
        case WriteFile(session.RESOLV_CONF, text) if _text(session.RESOLV_CONF) != text:
            host.do(step)
        case CoverFile(target, source, text) if os.path.lexists(target) and not cover.is_covered(
            target, source
        ):
            # one of ours that is written over, and so another one by now
            host.do(UncoverFile(target, source, text, manager=False))
            host.do(step)
        case _:
            pass


def _text(path: str) -> str:
    """Empty if it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _tor() -> int:
    """A process of Tor's; 0 if there is none."""
    with suppress(NsrunError):  # as look() has said
        found = control.current()
        if found is not None and found.spec.external:
            return found.facts.tor_pid
    return machine.main_process(session.TOR_UNIT)


def main(interval: float) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    found = control.current()
    if found is None:
        return
    resolved = (session.RESOLVED,) if found.facts.resolved else ()
    files = (session.RESOLVER, session.RESOLV_CONF, *resolved)
    watch = Watch(sorted({str(Path(one).parent) for one in files}), interval)
    while True:
        try:
            if not look():
                return
        except NsrunError as error:
            log.warning("%s", error)
        time.sleep(PAUSE)  # what changes in it is still there to be told
        watch.wait(_tor())


if __name__ == "__main__":
    main(float(sys.argv[1]))
