"""Name services that some users may no longer ask: access lists on their sockets.

Who connects to a socket file must be allowed to write to it (unix(7)). The list of a directory is
inherited by what is made in it (acl(5)), so that a service that is started again is closed as well.
These users may still read there: resolv.conf often lies beside the socket.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

NSSWITCH = "/etc/nsswitch.conf"
# Of these no packet comes, or the rules see it (dns), or the socket of whom they ask is closed.
KNOWN = re.compile(r"files|dns|myhostname|mymachines|resolve|mdns[46]?(_minimal)?")

# linux/posix_acl.h, linux/posix_acl_xattr.h
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
READ, ENTER, ALL = 4, 5, 7
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NO_LIST = (errno.ENODATA, errno.ENOTSUP)  # the second: the file system has none at all

Entries = dict[tuple[int, int], int]
"""Permissions of each tag and number of a user or a group."""


def strangers(nsswitch: str) -> list[str]:
    """Who else looks up names of hosts, by nsswitch.conf(5): nobody knows whom that asks."""
    lines = re.findall(r"^\s*hosts:([^#\n]*)", nsswitch, re.MULTILINE)
    words = re.sub(r"\[[^\]]*\]", " ", " ".join(lines)).split()
    return [word for word in words if not KNOWN.fullmatch(word)]


def bar(directories: Iterable[str], users: Sequence[int]) -> None:
    """Close what is there, and what will be made there, to ``users``. Raises OSError."""
    everything = {(tag, NO_ID): ALL for tag in (USER_OBJ, GROUP_OBJ, OTHER)}
    for directory in _there(directories):
        _write(directory, DEFAULT, _with(_read(directory, DEFAULT) or everything, users, ENTER))
        for path, mode in _below(directory):
            if stat.S_ISSOCK(mode):
                _write(path, ACCESS, _with(_access(path, mode), users, READ))


def free(directories: Iterable[str], users: Sequence[int]) -> None:
    """Take back what bar() did; other entries stay. Raises OSError."""
    for directory in _there(directories):
        left = _without(_read(directory, DEFAULT), users)
        if set(left.values()) <= {ALL}:  # as bar() made it
            _remove(directory, DEFAULT)
        else:
            _write(directory, DEFAULT, left)
        for path, mode in _below(directory):
            found = _access(path, mode)
            if (left := _without(found, users)) != found:
                _write(path, ACCESS, left)


def _there(directories: Iterable[str]) -> list[Path]:
    return [path for path in map(Path, directories) if path.is_dir()]


def _below(directory: Path) -> Iterator[tuple[Path, int]]:
    """What is there but for links, with its mode; by paths that lead to these very files.

    The directories are not root's: who puts a link in the place of a socket meanwhile must not
    have us write a list elsewhere.
    """
    for _, directories, files, parent in os.fwalk(directory):
        for name in (*directories, *files):
            with suppress(FileNotFoundError):  # it has just gone
                place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                try:
                    if not stat.S_ISLNK(mode := os.fstat(place).st_mode):
                        yield Path(f"/proc/self/fd/{place}"), mode
                finally:
                    os.close(place)


def _with(entries: Entries, users: Sequence[int], allowed: int) -> Entries:
    found = entries | {(USER, user): allowed for user in users}
    mask = entries.get((MASK, NO_ID), entries[GROUP_OBJ, NO_ID])
    return found | {(MASK, NO_ID): mask | allowed}


def _without(entries: Entries, users: Sequence[int]) -> Entries:
    """Without a mask, too, if that is for nobody any more; it limits what the group may."""
    ours = {(USER, user) for user in users}
    found = {key: allowed for key, allowed in entries.items() if key not in ours}
    if (MASK, NO_ID) in found and not any(tag in (USER, GROUP) for tag, _ in found):
        found[GROUP_OBJ, NO_ID] &= found.pop((MASK, NO_ID))
    return found


def _access(path: Path, mode: int) -> Entries:
    """As the mode has it, where there is no list."""
    if found := _read(path, ACCESS):
        return found
    shifts = {USER_OBJ: 6, GROUP_OBJ: 3, OTHER: 0}
    return {(tag, NO_ID): mode >> shift & ALL for tag, shift in shifts.items()}


def _read(path: Path, name: str) -> Entries:
    """Empty if there is no list."""
    try:
        packed = os.getxattr(path, name)
    except OSError as error:
        if error.errno not in NO_LIST:
            raise
        return {}
    return {(tag, who): allowed for tag, allowed, who in struct.iter_unpack("<HHI", packed[4:])}


def _write(path: Path, name: str, entries: Entries) -> None:
    packed = (struct.pack("<HHI", tag, entries[tag, who], who) for tag, who in sorted(entries))
    os.setxattr(path, name, struct.pack("<I", 2) + b"".join(packed))


def _remove(path: Path, name: str) -> None:
    try:
        os.removexattr(path, name)
    except OSError as error:
        if error.errno not in NO_LIST:
            raise
