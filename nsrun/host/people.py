"""Users and groups of this machine, by name or as numbers."""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Iterable
from contextlib import suppress

from nsrun.errors import UsageError
from nsrun.facts import TOR_USERS

NO_SHELLS = ("/nologin", "/false", "/sync")  # of users for services (nologin(8), base-passwd)


def users(doing: str, words: Iterable[str]) -> tuple[int, ...]:
    """Numbers of users; each word may be several, with commas between. Raises UsageError."""
    return tuple(_number(doing, word, "user") for word in _single(words))


def groups(doing: str, words: Iterable[str]) -> tuple[int, ...]:
    return tuple(_number(doing, word, "group") for word in _single(words))


def exempt_users(doing: str, words: Iterable[str]) -> tuple[int, ...]:
    """Raises UsageError for root, too, for whom there is an option."""
    return _but_root(doing, users(doing, words))


def exempt_groups(doing: str, words: Iterable[str]) -> tuple[int, ...]:
    return _but_root(doing, groups(doing, words))


def tor_user() -> int | None:
    """Whom the distribution's package made for Tor."""
    for name in TOR_USERS:
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    return None


def name_of(uid: int) -> str:
    """A user's name, or its number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_of(uid: int) -> int:
    """A user's own group; of one without a name it has the same number."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid


def logs_in(uid: int) -> str:
    """The name of a user who has a shell to log in with; else empty."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return ""
    return "" if user.pw_shell.endswith(NO_SHELLS) else user.pw_name


def _but_root(doing: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in numbers:
        raise UsageError(doing, "root is exempt by another option", "--allow-root")
    return numbers


def _single(words: Iterable[str]) -> list[str]:
    return [one for word in words for one in word.split(",")]


def _number(doing: str, word: str, kind: str) -> int:
    # -1 stands for nobody; int() refuses thousands of digits
    if re.fullmatch(r"[0-9]{1,10}", word) and int(word) < 2**32 - 1:
        return int(word)
    try:
        return pwd.getpwnam(word).pw_uid if kind == "user" else grp.getgrnam(word).gr_gid
    except KeyError:
        database = "passwd" if kind == "user" else "group"
        hint = f"getent {database} lists them"
        raise UsageError(doing, f"there is no {kind} {word!r}", hint) from None
