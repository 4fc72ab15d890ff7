"""Whom a command runs as, and what that changes in its environment."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from typing import Any

from nsrun.errors import UsageError
from nsrun.ruleset import SOCKS_AT
from nsrun.spec import Caller, RunSpec

# curl and others read the lower case; with "h" the proxy looks names up, .onion ones too. Not
# HTTP_PROXY: Tor's HTTP proxy knows only CONNECT, and many who read that variable know no SOCKS.
PROXY_VARIABLES, PROXY = ("ALL_PROXY", "all_proxy"), f"socks5h://127.0.0.1:{SOCKS_AT}"
MAXIMUM = 2**32 - 2  # of a uid; the last one means "none"


def resolve(spec: RunSpec, asked: dict[str, Any], nested: bool) -> tuple[Caller, dict[str, str]]:
    """The user of the command, and the variables to set in its environment.

    ``asked`` is what client.caller() found. Root's command runs as ``--user``, else as whoever
    called sudo, else as root. Raises UsageError when there is no such user, or no right to it.
    """
    caller = Caller(
        uid=asked["uid"],
        gid=asked["gid"],
        groups=tuple(asked["groups"]),
        bus=asked["bus"],
        runtime_dir=asked["runtime_dir"],
        own=tuple(asked["own"]),
    )
    wanted = spec.user if spec.user is not None else asked["sudo_uid"]
    environment = dict.fromkeys(PROXY_VARIABLES, PROXY) if spec.socks else {}
    if wanted == -1:
        return caller, environment
    if nested or caller.uid != 0:
        raise UsageError(f"run as the user {wanted}", "only root can", "use sudo")
    try:
        number = int(wanted)
    except ValueError:
        number = -1
    if number > MAXIMUM:
        raise UsageError(f"run as the user {wanted}", f"the largest number is {MAXIMUM}")
    try:
        user = pwd.getpwnam(str(wanted)) if number < 0 else pwd.getpwuid(number)
    except KeyError:
        if number < 0:
            raise UsageError(f"run as the user {wanted}", "there is no such user") from None
        # a number without a name will do, as it does for containers
        user = pwd.struct_passwd((str(number), "x", number, number, "", "/", ""))
    groups = tuple(os.getgrouplist(user.pw_name, user.pw_gid))
    caller = replace(
        caller,
        uid=user.pw_uid,
        gid=user.pw_gid,
        groups=groups,
        bus="",
        runtime_dir=f"/run/user/{user.pw_uid}",
        switched=True,
    )
    environment |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    return caller, environment
