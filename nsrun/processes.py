"""The processes of a workload: found by their namespaces, signalled without a race.

A process belongs to a workload if it is in its network namespace, or in a user namespace below
that of one that is: a browser's sandbox, for instance, in networks of its own. None can leave it.
Sources: namespaces(7), ioctl_ns(2), pidfd_open(2).
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from nsrun.errors import NsrunError

NS_GET_USERNS, NS_GET_PARENT = 0xB701, 0xB702
SECONDS = 5.0  # to kill it in
CHASES = 50


def members(network: int, guest: int | None) -> list[int]:
    """Process ids of the workload whose network namespace has this inode number.

    Of a guest's workload, those of that user only: he owns the namespace, and could let its number
    become another one's. Whom we may not look into (ptrace(2), access mode checking) is left out.
    """
    found = set()
    for pid, pidfd in _held(network, guest):
        os.close(pidfd)
        found.add(pid)
    return sorted(found)


def send(network: int, guest: int | None, number: int) -> None:
    """Send a signal to every process of a workload, once, and to those forked meanwhile."""
    sent: dict[int, int] = {}
    try:
        before = -1
        while len(sent) > before:
            before = len(sent)
            for pid, pidfd in _held(network, guest):
                if pid in sent and _lives(sent[pid]):
                    os.close(pidfd)
                    continue
                sent[pid] = pidfd
                with suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(pidfd, number)
    finally:
        for pidfd in sent.values():
            os.close(pidfd)


def end(network: int, guest: int | None, gone: Callable[[], bool]) -> None:
    """Kill every process of a workload until it is ``gone``. Raises NsrunError if it stays."""
    deadline = time.monotonic() + SECONDS
    while not gone():
        send(network, guest, signal.SIGKILL)
        if time.monotonic() > deadline:
            hint = "do it again; ttp inspect shows its processes"
            raise NsrunError("kill it", f"it still has some after {SECONDS:g} s", hint)


def _held(network: int, guest: int | None) -> Iterator[tuple[int, int]]:
    """Each process of a workload with a pidfd, which the caller must close.

    The pidfd is taken first: what is then read under /proc/PID is of that process, or of one that
    took its number after its end, and then the pidfd signals nobody.
    """
    spaces: dict[int, bool] = {}  # user namespaces: is it below one of the workload's?
    others = []
    for pid, pidfd in _opened(_pids(), guest):
        with suppress(OSError):  # ended, or not for us to see
            if _inode(pid, "net") == network:
                _learn(pid, spaces)
                yield pid, pidfd
                continue
            others.append(pid)
        os.close(pidfd)
    for pid, pidfd in _opened(others if spaces else (), guest):
        with suppress(OSError):
            if _is_below(pid, spaces):
                yield pid, pidfd
                continue
        os.close(pidfd)


def _opened(pids: Iterable[int], guest: int | None) -> Iterator[tuple[int, int]]:
    for pid in pids:
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            if guest is None or _owner(pid) == guest:
                yield pid, pidfd
            else:
                os.close(pidfd)


def _owner(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def _learn(pid: int, spaces: dict[int, bool]) -> None:
    """Note the user namespace of ``pid`` as the workload's, unless it owns the network too.

    Then it is that of a client which has not come so far as to make its own: the gateway's.
    """
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        owner = fcntl.ioctl(network, NS_GET_USERNS)
    except OSError:
        return  # an ancestor of ours owns it: nothing is known of what is below
    finally:
        os.close(network)
    above = [os.fstat(owner).st_ino, *_parents(owner)]
    own = _inode(pid, "user")
    if own not in above:
        spaces[own] = True


def _is_below(pid: int, spaces: dict[int, bool]) -> bool:
    own = _inode(pid, "user")
    if own not in spaces:
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        spaces[own] = any(spaces.get(parent, False) for parent in _parents(fd))
    return spaces[own]


def _parents(user: int) -> list[int]:
    """Inode numbers of the user namespaces above the one of descriptor ``user``, which is closed.

    As far as they are below our own.
    """
    found = []
    try:
        while True:
            above = fcntl.ioctl(user, NS_GET_PARENT)
            os.close(user)
            user = above
            found.append(os.fstat(user).st_ino)
    except OSError:
        return found  # EPERM: the last one is our own
    finally:
        os.close(user)


def _lives(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    return True


def _inode(pid: int, kind: str) -> int:
    """That of a namespace of process ``pid``. Raises OSError if it has ended, or is not ours."""
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino


def _pids() -> Iterator[int]:
    """Those in /proc, then those made just now: a process that forks and ends all the time is in
    no list, but it has the last number that was given, which is in proc_loadavg(5).
    """
    with os.scandir("/proc") as entries:
        yield from [int(entry.name) for entry in entries if entry.name.isdigit()]
    for _ in range(CHASES):
        yield int(Path("/proc/loadavg").read_text().split()[-1])
