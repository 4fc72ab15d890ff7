"""``--json-status-fd``: a descriptor of the caller's, to tell programs what runs.

Not on the hot path: the client loads this when the option was given.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from nsrun.client import RUN_FAILED, RefusedError


def check(fd: int, ours: Collection[int]) -> None:
    """Raises RefusedError for a descriptor that is not open, or is one of ``ours``; -1 is none."""
    try:
        if fd in ours:
            raise OSError
        if fd >= 0:
            os.fstat(fd)
    except (OSError, OverflowError):  # the latter: more than a C int
        doing, hint = f"use --json-status-fd {fd}", f"open it, for instance: ttp run … {fd}>FILE"
        raise RefusedError(doing, "it is not open", hint, RUN_FAILED) from None


def tell(fd: int, status: str) -> None:
    """Say what is about to run, and close the descriptor, which is not for the command.

    Raises RefusedError.
    """
    if fd < 0:
        return
    try:
        os.write(fd, f"{status}\n".encode())
    except OSError as error:
        doing = f"write to --json-status-fd {fd}"
        raise RefusedError(doing, str(error.strerror), "", RUN_FAILED) from None
    if fd > 2:
        os.close(fd)
