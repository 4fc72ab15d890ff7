"""connect(2) of a strict workload, carried out for it: to no socket file of the host's.

The kernel hands every connect() to us (seccomp_unotify(2)). We never say "continue", since the
address, the path and the descriptor could all be others by the time the kernel looked at them. We
take a duplicate of the socket and a copy of the address, and connect one to the other ourselves.

A path is opened as its caller would (same root, directory and user) but without following it to
a socket; what was opened is judged, and what was judged is connected to, by /proc/self/fd. It may
be a socket that is allowed by name, or one in a file system that was made for this workload, in
which nobody else can have bound one. (unix_diag(7) tells only 32 bits of an inode's number, and on
btrfs not the subvolume: too little to recognise the workload's own sockets elsewhere.)
"""

from __future__ import annotations

import _socket
import _thread
import fcntl
import os
import select

from nsrun import linux

# linux/seccomp.h: ioctls, and the sizes of struct seccomp_notif and its answer
RECEIVE, SEND, VALID = 0xC0502100, 0xC0182101, 0x40082102
NOTIFICATION = 80
PIDFD_THREAD = 0o200  # from Linux 6.9 on
EAGAIN, EACCES, EFAULT, EINVAL = 11, 13, 14, 22
LONGEST, LONGEST_UNIX = 128, 110  # struct sockaddr_storage, sockaddr_un


class Ids:
    """Who a thread is, in our user namespace: effective and file system ids, groups."""

    def __init__(self, thread: int) -> None:
        status = _status(thread)
        _, self.uid, _, self.fsuid = map(int, status[b"Uid"].split())
        _, self.gid, _, self.fsgid = map(int, status[b"Gid"].split())
        self.groups = [int(group) for group in status[b"Groups"].split()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and vars(self) == vars(other)

    def be_for_files(self, set_ids: tuple[int, ...]) -> None:
        """Have the rights of these ids; only this thread does, and keeps its other powers."""
        array = b"".join(group.to_bytes(4, "little") for group in self.groups)
        linux.set_thread_id(set_ids[0], len(self.groups), array)
        linux.setfsids(self.fsuid, self.fsgid)

    def be(self, set_ids: tuple[int, ...]) -> None:
        """Be known by these ids too, which ends those powers."""
        linux.set_thread_id(set_ids[1], -1, self.gid, -1)
        linux.set_thread_id(set_ids[2], -1, self.uid, -1)


class Rules:
    """Where a workload may connect to: ``devices`` are those of its own file systems, ``sockets``
    are (device, inode) of what is allowed beyond. ``set_ids`` is not empty if it has many users.
    """

    def __init__(
        self,
        devices: frozenset[int],
        sockets: frozenset[tuple[int, int]],
        set_ids: tuple[int, ...],
    ) -> None:
        self.devices, self.sockets, self.set_ids = devices, sockets, set_ids
        self.root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        self.ids = Ids(os.getpid())

    def allow(self, found: os.stat_result) -> bool:
        return found.st_dev in self.devices or (found.st_dev, found.st_ino) in self.sockets


def serve(listener: int, rules: Rules) -> None:
    """Answer every notification, each in a thread of its own, as connect(2) may block.

    Returns when no process is left to be heard from.
    """
    ready = select.poll()
    ready.register(listener, select.POLLIN)
    while ready.poll()[0][1] & select.POLLIN:  # else POLLHUP
        call = bytearray(NOTIFICATION)
        try:
            fcntl.ioctl(listener, RECEIVE, call)
        except FileNotFoundError:
            continue  # who called was killed
        try:
            _thread.start_new_thread(_answer, (listener, bytes(call), rules))
        except RuntimeError:  # as many threads as there may be
            _respond(listener, call[:8], EAGAIN)


def _answer(listener: int, call: bytes, rules: Rules) -> None:
    error = EACCES
    try:
        _connect(listener, call, rules)
        error = 0
    except OSError as failure:
        error = failure.errno or EACCES
    finally:
        _respond(listener, call[:8], error)


def _respond(listener: int, identity: bytes | bytearray, error: int) -> None:
    # struct seccomp_notif_resp: id, value, negative error number, flags
    answer = bytes(identity) + bytes(8) + (-error).to_bytes(4, "little", signed=True) + bytes(4)
    try:
        fcntl.ioctl(listener, SEND, answer)
    except FileNotFoundError:
        pass  # who called was killed


def _connect(listener: int, call: bytes, rules: Rules) -> None:
    """Do what ``call`` asks for, if it may be done. Raises OSError with the number to answer."""
    # struct seccomp_notif: id, thread, flags, then struct seccomp_data, whose arguments come last
    thread = int.from_bytes(call[8:12], "little")
    fd = int.from_bytes(call[32:36], "little")
    pointer = int.from_bytes(call[40:48], "little")
    length = int.from_bytes(call[48:52], "little", signed=True)
    opened: list[int] = []

    def held(descriptor: int) -> int:
        opened.append(descriptor)
        return descriptor

    try:
        memory, root, cwd = (
            held(os.open(f"/proc/{thread}/{name}", flags | os.O_CLOEXEC))
            for name, flags in (("mem", os.O_RDONLY), ("root", os.O_PATH), ("cwd", os.O_PATH))
        )
        ids = Ids(thread) if rules.set_ids else rules.ids
        pidfd = held(_pidfd(thread))
        fcntl.ioctl(listener, VALID, call[:8])  # all of this was its, not a successor's
        taken = held(linux.pidfd_getfd(pidfd, fd))
        address = _copy(memory, pointer, length)
        path = _path(address) if _family(taken) == _socket.AF_UNIX else b""
        if ids != rules.ids:
            ids.be_for_files(rules.set_ids)
        if path:
            entry = held(_open_as(thread, root, cwd, path, rules.root))
            _judge(os.fstat(entry), rules)
            address = address[:2] + b"/proc/self/fd/%d\0" % entry
        if ids != rules.ids:
            ids.be(rules.set_ids)  # the server is told who connects (SO_PEERCRED)
        linux.connect(taken, address)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _status(thread: int) -> dict[bytes, bytes]:
    """proc_pid_status(5)."""
    with open(f"/proc/{thread}/status", "rb", 0) as file:
        return dict(line.split(b":\t", 1) for line in file.read().splitlines() if b":\t" in line)


def _pidfd(thread: int) -> int:
    try:
        return linux.pidfd_open(thread, PIDFD_THREAD)
    except OSError as error:
        if error.errno != EINVAL:
            raise
        # the process then, whose table of descriptors a thread shares as a rule
        return linux.pidfd_open(int(_status(thread)[b"Tgid"]))


def _copy(memory: int, pointer: int, length: int) -> bytes:
    if not 0 <= length <= LONGEST:
        raise OSError(EINVAL, "")
    try:
        address = os.pread(memory, length, pointer) if length else b""
    except (OSError, OverflowError):
        address = b""
    if len(address) < length:
        raise OSError(EFAULT, "")
    return address


def _family(fd: int) -> int:
    """Of our own duplicate: no other thread can make it another. Raises OSError if no socket."""
    taken = _socket.socket(fileno=fd)
    family = taken.family
    taken.detach()
    return int(family)


def _path(address: bytes) -> bytes:
    """The path of an address, if it has one (unix(7)): neither abstract, nor unnamed, nor wrong."""
    is_unix = address[:2] == _socket.AF_UNIX.to_bytes(2, "little")
    return address[2:].partition(b"\0")[0] if is_unix and len(address) <= LONGEST_UNIX else b""


def _open_as(thread: int, root: int, cwd: int, path: bytes, home: int) -> int:
    """Open ``path`` as its caller would, by O_PATH, symbolic links followed."""
    for own in (b"/proc/self/", b"/proc/thread-self/"):
        if path.startswith(own):
            path = b"/proc/%d/" % thread + path[len(own) :]
    linux.unshare(linux.CLONE_FS)  # root and directory of this thread alone
    try:
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(cwd)
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.fchdir(home)
        os.chroot(".")


def _judge(found: os.stat_result, rules: Rules) -> None:
    """Raises PermissionError for a socket outside; what is no socket, the kernel refuses."""
    if found.st_mode & 0o170000 == 0o140000 and not rules.allow(found):
        raise PermissionError(EACCES, "")
