"""A user namespace of one's own, and why there may be none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nsrun import linux
from nsrun.errors import MissingError

# Settings that forbid them to users, with the value that does and the one that does not. The
# first is Debian's, the second Ubuntu's (24.04: user namespaces exist, but give no power).
FORBIDDEN_BY = (
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)
MOST = "user.max_user_namespaces"


def own_user_namespace() -> None:
    """Become root of a user namespace of our own: all power over what we make, none beyond.

    Raises MissingError, which names the setting that is in the way.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        linux.unshare(linux.CLONE_NEWUSER)
        linux.prctl(linux.PR_SET_DUMPABLE, 1)  # else /proc/self would be root's
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError as error:
        raise refusal(error) from error


def refusal(error: OSError) -> MissingError:
    """Why the kernel refused a user namespace with ``error`` (user_namespaces(7)), and what to do.

    ENOSPC: as many as are allowed, or 32 nested. EINVAL: the kernel has none. EPERM: a setting, or
    a filter of system calls, as Docker's, or a chroot.
    """
    doing = "make a user namespace"
    if error.errno == errno.ENOSPC:
        if sysctl(MOST) == "0":
            return MissingError(doing, f"forbidden by {MOST}=0", f"sudo sysctl -w {MOST}=10000")
        return MissingError(doing, f"there are {MOST}={sysctl(MOST)} already, or 32 nested")
    if error.errno == errno.EINVAL:
        return MissingError(doing, "this kernel has none (CONFIG_USER_NS)", "use sudo")
    for name, forbids, allows in FORBIDDEN_BY:
        if sysctl(name) == forbids:
            hint = f"sudo sysctl -w {name}={allows}, or use sudo"
            return MissingError(doing, f"forbidden by {name}={forbids}", hint)
    hint = "in a container: run it with --security-opt seccomp=unconfined; else use sudo"
    return MissingError(doing, f"{error.strerror} (a filter of system calls, or a chroot)", hint)


def sysctl(name: str) -> str:
    """Its value; empty if this kernel does not have it."""
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return ""
