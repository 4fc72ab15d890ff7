"""Our file over /etc/resolv.conf, and back: what its manager wrote meanwhile is not lost.

A symlink is covered itself, not what it leads to: a rename over a mount is refused (EBUSY,
rename(2)), and systemd-resolved, resolvconf and NetworkManager rename. Where the file is no link,
nothing but a mount could cover it. Then what others write into it arrives in ours, and is handed
on; and NetworkManager, whose rename was refused, keeps a copy of what it meant to write.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from nsrun import linux
from nsrun.host.steps import ASK_MANAGER

#: NetworkManager.conf(5), rc-manager: written always, also where /etc/resolv.conf cannot be.
MANAGERS_COPY = "/run/NetworkManager/resolv.conf"


def cover(target: str, source: str) -> None:
    """Privately: else what somebody mounts over ``target`` would cover ``source`` as well, which
    could not be removed then (mount_namespaces(7))."""
    place = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        linux.mount(source, f"/proc/self/fd/{place}", flags=linux.MS_BIND)
    finally:
        os.close(place)
    linux.mount("none", target, flags=linux.MS_PRIVATE)


def uncover(target: str, source: str, text: str) -> None:
    """Take away mounts of ``source``, as many as there are, and none of others'.

    Where it is no longer ``text``, somebody has written to ``target``, and meant what is beneath.
    """
    written = b""
    while _covers(target, source):
        written = Path(target).read_bytes()
        linux.umount(target)
    if written not in (b"", text.encode()) and not Path(target).is_symlink():
        with suppress(PermissionError):  # chattr +i: then it was not to be changed
            Path(target).write_bytes(written)


def has_manager(target: str) -> bool:
    """Whether ``target`` is as NetworkManager wants it, and so is its to change."""
    try:
        return Path(target).read_bytes() == Path(MANAGERS_COPY).read_bytes()
    except OSError:
        return False


def ask_manager(target: str) -> None:
    """NetworkManager writes what it could not while ``target`` was covered, if it is another text.

    If it has ended meanwhile, nobody is asked; it writes when it starts again.
    """
    if not has_manager(target):
        subprocess.run(ASK_MANAGER, capture_output=True)


def is_covered(target: str, source: str) -> bool:
    """Whether ``source`` itself is what is read there."""
    try:
        return Path(target).samefile(source)
    except OSError:
        return False


def _covers(target: str, source: str) -> bool:
    """Whether what is mounted last at ``target`` is the file ``source`` (proc_pid_mountinfo(5))."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    roots = [fields[3] for fields in mounts if fields[4] == target]
    return bool(roots) and roots[-1].removesuffix("//deleted").endswith(_within_mount(source))


def _within_mount(path: str) -> str:
    """``path`` below the mount point that it is on: as the root of a mount of it is told."""
    above = Path(path).parent
    while not above.is_mount():
        above = above.parent
    return "/" + str(Path(path).relative_to(above))
