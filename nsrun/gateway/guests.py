"""Guests: members of the group with whom root shares a gateway. They are not trusted.

Who they are is what the kernel says (SO_PEERCRED, SO_PEERGROUPS: unix(7)), never what they say.
Each has bounds, so that the others are served as well. Of what they send, only text is taken:
no file of theirs is opened, and no descriptor accepted, since either could be made to block.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nsrun.errors import GatewayError, UsageError

MOST_REQUESTS = 64  # of one guest, at the same time
MOST_WORKLOADS = 256  # the same
LONGEST = 1 << 21  # bytes of a request: execve(2) takes no more by default
LONGEST_DEFAULTS = 1 << 16  # bytes of configuration files, which take time to parse
PATIENCE = 10.0  # seconds to say what is wanted, to take the answer, to do what was asked for

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
MOST_GROUPS = 256  # what Python's getsockopt can receive


def group_number(name: str) -> int:
    """The number of a group, given by name or number. Raises UsageError when there is none."""
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"share the gateway with the group {name}",
            "there is no such group",
            f"groupadd --system {name}; then: usermod --append --groups {name} USER",
        ) from None


def groups_of(connection: socket.socket) -> tuple[int, ...]:
    """Supplementary groups of the peer when it connected; none if they are too many to tell."""
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MOST_GROUPS * 4)
    except OSError:
        return ()
    return tuple(memoryview(found).cast("I"))


def check_words(request: dict[str, Any]) -> None:
    """Raises UsageError when arguments and defaults of options are not as client.py sends them."""
    files = request["defaults"].get("files")
    variables = request["defaults"].get("environment")
    if not (
        isinstance(files, list)
        and all(isinstance(file, list) and len(file) == 2 and _texts(file) for file in files)
        and isinstance(variables, dict)
        and _texts(variables.values())
        and _texts(request["arguments"])
        and isinstance(request.get("kept", []), list)
        and _texts(request.get("kept", []))
    ):
        raise UsageError("understand the request", "it is not made of words")
    if sum(len(text) for _, text in files) > LONGEST_DEFAULTS:
        raise UsageError("read your defaults", f"they are longer than {LONGEST_DEFAULTS} bytes")


def _texts(found: Iterable[object]) -> bool:
    return all(isinstance(text, str) for text in found)


def caller(uid: int, gid: int, groups: tuple[int, ...], said: dict[str, Any]) -> dict[str, Any]:
    """Who calls, as user.resolve() takes it. Of what the guest ``said`` only paths are kept, which
    nobody but the guest will use. Raises UsageError when they are none.
    """
    own = said.get("own")
    paths = [said.get("bus"), said.get("runtime_dir"), *(own if isinstance(own, list) else [None])]
    if not _texts(paths):
        raise UsageError("understand the request", "it does not say who calls")
    bus, runtime_dir, *own = paths
    return {
        "uid": uid,
        "gid": gid,
        "groups": groups,
        "sudo_uid": -1,
        "bus": bus,
        "runtime_dir": runtime_dir,
        "own": own,
    }


class Guests:
    """Who may be one, and how much each may ask for at once."""

    def __init__(self, group: int | None) -> None:
        self._group = group
        self._seats: Counter[int] = Counter()
        self._turns: dict[int, asyncio.Lock] = {}

    def welcome(self, gid: int, groups: tuple[int, ...]) -> bool:
        """Whether a user with these groups may use a gateway of ours."""
        return os.geteuid() == 0 and self._group is not None and self._group in (gid, *groups)

    @contextmanager
    def seat(self, uid: int) -> Iterator[asyncio.Lock]:
        """For the time of one request. The lock is for what one guest may do once at a time.

        Raises GatewayError when the guest has too many already.
        """
        if self._seats[uid] >= MOST_REQUESTS:
            cause = f"you are asking for {MOST_REQUESTS} things at once already"
            raise GatewayError("use this gateway", cause, "wait until one is done")
        self._seats[uid] += 1
        try:
            yield self._turns.setdefault(uid, asyncio.Lock())
        finally:
            self._seats[uid] -= 1
            if not self._seats[uid]:
                del self._seats[uid], self._turns[uid]
