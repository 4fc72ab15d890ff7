"""A network namespace without a name: held by a file descriptor, worked in by a thread.

A name under /run/netns would outlive a crash. These die with the last process or descriptor
that refers to them, so after ``kill -9`` the kernel cleans up.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from nsrun import linux, netlink
from nsrun.errors import NsrunError

P = ParamSpec("P")
T = TypeVar("T")


class Namespace:
    """A network namespace and the one thread that lives in it.

    Programs started by a function passed to ``call`` run inside the namespace, and a parent-death
    signal set by them fires when this object's thread ends.
    """

    def __init__(self, path: str | None = None) -> None:
        """Make a new namespace, or open the one at ``path``. Raises OSError."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns")
        self._sockets: dict[int, socket.socket] = {}
        try:
            self.fd = self._thread.submit(_join, path).result()
        except BaseException:
            self._thread.shutdown()
            raise

    @property
    def path(self) -> str:
        """A path that other processes of ours can open as long as this object lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` inside the namespace and return its result, or raise what it raised."""
        return self._thread.submit(function, *args, **kwargs).result()

    def tell(self, protocol: int, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` inside the namespace, with a socket of netlink, which is kept, first."""

        def tell() -> None:
            if protocol not in self._sockets:
                self._sockets[protocol] = netlink.connect(protocol)
            function(self._sockets[protocol], *args)

        self.call(tell)

    def close(self) -> None:
        """End the thread and let go of the namespace; it lives on while others are in it."""
        if self.fd >= 0:
            self._thread.shutdown()
            for kernel in self._sockets.values():
                kernel.close()
            os.close(self.fd)
            self.fd = -1


_USE = "plug a link into the network namespace"


def own_namespace_of(pid: int, owner: int) -> Namespace:
    """The network namespace of process ``pid``: one that user ``owner`` made, and still empty.

    Who gives us the host's, somebody else's, or one with a link to elsewhere has no link plugged
    in. Raises NsrunError, or OSError when the process has gone.
    """
    # opened by ourselves: a descriptor that we were sent could be of a file that blocks
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _maker(fd) != owner:
            raise NsrunError(_USE, "the user did not make it")
        return namespace_at(fd, empty=True)
    finally:
        os.close(fd)


def namespace_at(fd: int, empty: bool) -> Namespace:
    """The network namespace of descriptor ``fd``; if it is to be ``empty``, without a link.

    Raises NsrunError when it has one, or is no network namespace; OSError when we may not join it.
    """
    if not _is_network(fd):
        raise NsrunError(_USE, "the descriptor is not of one")
    space = Namespace(f"/proc/self/fd/{fd}")
    try:
        links = [name for _, name in space.call(socket.if_nameindex)]
        if empty and links != ["lo"]:
            raise NsrunError(_USE, f"it has links already: {' '.join(links)}")
    except BaseException:
        space.close()
        raise
    return space


def _is_network(fd: int) -> bool:
    ns_get_nstype = 0xB703
    try:
        return fcntl.ioctl(fd, ns_get_nstype) == linux.CLONE_NEWNET
    except OSError:  # ENOTTY: no namespace at all
        return False


def _maker(fd: int) -> int:
    """The user who made the user namespace that owns the namespace ``fd`` (ioctl_ns(2))."""
    ns_get_userns, ns_get_owner_uid = 0xB701, 0xB704
    users = fcntl.ioctl(fd, ns_get_userns)
    try:
        uid = bytearray(4)
        fcntl.ioctl(users, ns_get_owner_uid, uid)
        return int.from_bytes(uid, sys.byteorder)
    finally:
        os.close(users)


def _join(path: str | None) -> int:
    if path is None:
        linux.unshare(linux.CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    linux.setns(fd, linux.CLONE_NEWNET)
    return fd
