"""``python3 -m nsrun.host.watchdog``: see to it that a session stays as it was made.

The kernel tells of every change to rules and links, and to the files that lead to the resolver; and
every fifteen seconds all is looked at without being told. Two kinds of trouble are told apart:

tampering  the rules are not as they were loaded: everything is closed, and people are told
failure    Tor has ended, or the resolver's file was exchanged, which opens nothing: it is mended

While another command changes the host, its lock is held, and nobody is suspected.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsrun import netlink
from nsrun.errors import NsrunError
from nsrun.host import control, facts, machine, session
from nsrun.host.rules import render_closed
from nsrun.host.session import Session
from nsrun.host.steps import CloseHost, CoverFile, LeadResolved, StartUnit
from nsrun.steps import WriteFile

INTERVAL = 15.0  # seconds between two looks that nobody asked for
SETTLE = 0.2  # seconds in which changes come together: a transaction tells of every rule
NFNLGRP_NFTABLES, RTMGRP_LINK = 7, 1  # linux/netfilter/nfnetlink.h; rtnetlink(7)
CHANGES = (
    0x8 | 0x40 | 0x80 | 0x100 | 0x200
)  # closed after writing, moved, made, deleted: inotify(7)

log = logging.getLogger("ttp")


class Watch:
    """What the kernel tells, by descriptors to wait on."""

    def __init__(self, directories: Sequence[str]) -> None:
        rules = netlink.connect(netlink.NETLINK_NETFILTER)
        rules.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        links = netlink.connect(netlink.NETLINK_ROUTE)
        links.bind((0, RTMGRP_LINK))
        self._sockets = (rules, links)
        self._mounts = Path("/proc/self/mountinfo").open()  # noqa: SIM115  for as long as we live
        libc = ctypes.CDLL(None, use_errno=True)
        self._files = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for directory in directories:
            if libc.inotify_add_watch(self._files, os.fsencode(directory), CHANGES) < 0:
                raise OSError(ctypes.get_errno(), "cannot be watched", directory)

    def wait(self, seconds: float) -> None:
        """Until something has changed, and no more does for a moment, or for so many seconds.

        Tor's end is such a change as well.
        """
        with ExitStack() as held:
            told: list[Any] = [self._files, *self._sockets]
            if pid := machine.main_process(session.TOR_UNIT):
                with suppress(ProcessLookupError):
                    told.append(os.pidfd_open(pid))
                    held.callback(os.close, told[-1])
            # a change of mounts is an exceptional condition (proc_pid_mountinfo(5))
            while any(select.select(told, [], [self._mounts], seconds)):
                self._read()
                told, seconds = [self._files, *self._sockets], SETTLE

    def _read(self) -> None:
        for one in self._sockets:
            with suppress(OSError):  # nothing more, or too much to be kept: it has changed
                while one.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass
        with suppress(BlockingIOError):
            os.read(self._files, 1 << 16)
        self._mounts.seek(0)
        self._mounts.read()


def look() -> bool:
    """Look once, and do what is to be done. False when there is no session any more."""
    with control.lock(wait=True):
        found = control.current()
        if found is None:
            return False
        if found.state == "up":
            try:
                machine.verify(found.rules)
            except NsrunError as error:
                _close(found, error)
            else:
                _mend(found)
    return True


def _close(found: Session, error: NsrunError) -> None:
    machine.HostMachine(log.info).do(CloseHost(render_closed()))
    control.write_record(found.at("locked"))
    words = "ttp: the rules of the host were changed: all is closed, until `ttp restart` or `stop`"
    log.critical("<0>%s (%s)", words, error.cause)  # journald tells it on every terminal


def _mend(found: Session) -> None:
    """Steps of the session's own plan, again; Tor's unit is started as it is."""
    path = facts.resolv_conf()
    if path not in found.facts.resolv_confs and Path(path).exists():
        known = (*found.facts.resolv_confs, path)
        found = replace(found, facts=replace(found.facts, resolv_confs=known))
        control.write_record(found)
    host = machine.HostMachine(log.warning)
    for step in control.steps_of(found):
        match step:
            case StartUnit() if step.name == session.TOR_UNIT and not machine.is_active(step.name):
                log.warning("%s has ended: it is started again", step.name)
                machine.restart(step.name)
            case LeadResolved(path) if not Path(path).exists():
                host.do(step)
            case WriteFile(session.RESOLV_CONF) if not Path(session.RESOLV_CONF).exists():
                host.do(step)
            case CoverFile(target, source) if Path(target).exists() and not machine.covers(
                target, source
            ):
                host.do(step)
            case _:
                pass


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    found = control.current()
    if found is None:
        return
    watch = Watch(sorted({"/etc", *(str(Path(one).parent) for one in found.facts.resolv_confs)}))
    while True:
        try:
            if not look():
                return
        except NsrunError as error:
            log.warning("%s", error)
        watch.wait(INTERVAL)


if __name__ == "__main__":
    main()
