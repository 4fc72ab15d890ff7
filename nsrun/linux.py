"""The system calls that Python 3.11 lacks: namespaces, mounts, capabilities, no_new_privs.

On the hot path of ``ttp run``, where ``import ctypes`` would cost 2.4 ms of about 10, so this
uses the extension module below it, ``_ctypes`` (unchanged from CPython 3.11 to 3.14).
Functions keep the kernel's names and raise OSError; man pages are in section 2.
"""

from __future__ import annotations

import posix
from _ctypes import CFuncPtr, _SimpleCData, addressof, dlopen, dlsym, get_errno

CLONE_FS = 0x00000200
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2

EINVAL = 22

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# capabilities(7), by number
CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_NICE": 23,
    "SYS_RESOURCE": 24,
    "LEASE": 28,
    "AUDIT_WRITE": 29,
}


class _Long(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Char(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(CFuncPtr):
    _flags_ = 0x1 | 0x8  # FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_LIBC = dlopen(None, 0)  # type: ignore[arg-type]  # the running program itself
_FUNCTIONS: dict[str, _Function] = {}


def _call(name: str, *args: int | bytes | None, path: str = "") -> int:
    function = _FUNCTIONS.get(name)
    if function is None:
        function = _FUNCTIONS[name] = _Function(dlsym(_LIBC, name))
    # ctypes would pass an int as C int; the kernel reads longs and pointers
    result: int = function(*[_Long(arg) if isinstance(arg, int) else arg for arg in args])
    if result < 0:
        errno = get_errno()
        raise OSError(errno, posix.strerror(errno), path or name)
    return result


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def unshare(flags: int) -> None:
    _call("unshare", flags)


def setns(fd: int, kind: int = 0) -> None:
    """Join the namespace that ``fd`` refers to; only the calling thread moves (CLONE_NEWNET)."""
    _call("setns", fd, kind)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    _call(
        "mount",
        _bytes(source),
        _bytes(target),
        _bytes(kind),
        flags,
        _bytes(data),
        path=target,
    )


def umount(target: str, flags: int = MNT_DETACH) -> None:
    _call("umount2", _bytes(target), flags, path=target)


def mount_setattr_readonly(target: str) -> None:
    """Make the mount at ``target`` and every mount below it read-only (mount_setattr(2), 5.12)."""
    number, at_fdcwd, at_recursive = 442, -100, 0x8000
    attributes = MS_RDONLY.to_bytes(8, "little") + bytes(24)  # struct mount_attr: set, and no more
    arguments = (number, at_fdcwd, _bytes(target), at_recursive, attributes, len(attributes))
    _call("syscall", *arguments, path=target)


def prctl(option: int, arg2: int = 0, arg3: int = 0) -> None:
    _call("prctl", option, arg2, arg3, 0, 0)


def set_seccomp_filter(program: bytes, number: int = 0) -> int:
    """Filter this thread's system calls, and its children's, by a BPF program (seccomp(2)).

    Needs no_new_privs. ``program`` is an array of struct sock_filter. With ``number``, that of
    seccomp(2) on this machine, a descriptor is returned on which the calls are heard that the
    program answers with SECCOMP_RET_USER_NOTIF (seccomp_unotify(2)); else 0.
    """
    mode_filter, set_mode_filter, new_listener, wait_killable = 2, 1, 8, 32
    code = (_Char * len(program)).from_buffer_copy(program)
    # struct sock_fprog: a length, padding, a pointer
    fields = (len(program) // 8).to_bytes(8, "little") + addressof(code).to_bytes(8, "little")
    header = (_Char * len(fields)).from_buffer_copy(fields)
    if number:
        flags = new_listener | wait_killable
        return _call("syscall", number, set_mode_filter, flags, addressof(header), path="seccomp")
    prctl(PR_SET_SECCOMP, mode_filter, addressof(header))
    return 0


def capset(kept: tuple[str, ...]) -> None:
    """Have the capabilities ``kept``, effective and permitted, and no other."""
    mask = sum(1 << CAPABILITIES[name] for name in kept)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    version = 0x20080522  # _LINUX_CAPABILITY_VERSION_3; then the pid, 0 for the caller
    words = (low, low, 0, high, high, 0)  # effective, permitted, inheritable, twice
    _call(
        "capset",
        version.to_bytes(8, "little"),
        b"".join(word.to_bytes(4, "little") for word in words),
    )


def setdomainname(name: str) -> None:
    _call("setdomainname", _bytes(name), len(_bytes(name)))


def signalfd(numbers: set[int]) -> int:
    """A descriptor to read blocked signals from, as struct signalfd_siginfo (128 bytes)."""
    mask = sum(1 << (number - 1) for number in numbers)
    return _call("signalfd", -1, mask.to_bytes(128, "little"), 0o2000000)  # SFD_CLOEXEC


def pidfd_open(pid: int, flags: int = 0) -> int:
    return _call("syscall", 434, pid, flags, path="pidfd_open")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of another process's descriptor; needs the right to trace it."""
    return _call("syscall", 438, pidfd, fd, 0, path="pidfd_getfd")


def connect(fd: int, address: bytes) -> None:
    """connect(2) with any address, not only those that Python knows how to write."""
    _call("connect", fd, address, len(address))


def set_thread_id(number: int, *ids: int | bytes) -> None:
    """setresuid(2) and its like, by number: libc's own change all threads, this one changes one."""
    _call("syscall", number, *ids, path="setresuid")


def setfsids(uid: int, gid: int) -> None:
    """Be ``uid`` and ``gid`` for the file system, in this thread; setfsuid(2) tells no failure."""
    _call("setfsgid", gid)
    _call("setfsuid", uid)


def drop_bounding(keep: tuple[str, ...] | list[str] = ()) -> None:
    """Drop every capability but those in ``keep`` from the bounding set, for good."""
    kept = {CAPABILITIES[name] for name in keep}
    for capability in range(64):
        if capability not in kept:
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                return  # past the last capability of this kernel
