"""Where ttp keeps its files. On the hot path: plain strings, no pathlib.

runtime  sockets, locks, logs, volatile torrc: gone at reboot     /run/ttp
state    guards and cached consensus of each gateway's Tor        /var/lib/ttp
cache    what can be made again (the lab's bake)                  /var/cache/ttp

For a user other than root: $XDG_RUNTIME_DIR/ttp, $XDG_STATE_HOME/ttp and $XDG_CACHE_HOME/ttp
with the defaults of the XDG Base Directory Specification 0.8.
"""

from __future__ import annotations

import os

SYSTEM = "/run/ttp"  # the runtime directory of root, and of gateways that root shares


def runtime() -> str:
    """Directory of running gateways and labs; $TTP_RUNTIME_DIR puts it elsewhere."""
    if directory := os.environ.get("TTP_RUNTIME_DIR"):
        return directory
    uid = os.geteuid()
    if uid == 0:
        return SYSTEM
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    if os.path.isdir(base):
        return f"{base}/ttp"
    return f"/tmp/ttp-{uid}"  # noqa: S108  made 0700 and its owner checked by private_directory()


def state() -> str:
    """Directory of what gateways keep between runs; $TTP_STATE_DIR puts it elsewhere."""
    if directory := os.environ.get("TTP_STATE_DIR"):
        return directory
    return "/var/lib/ttp" if os.geteuid() == 0 else _home("XDG_STATE_HOME", ".local/state")


def cache() -> str:
    return "/var/cache/ttp" if os.geteuid() == 0 else _home("XDG_CACHE_HOME", ".cache")


def gateway(name: str) -> str:
    """Runtime directory of a gateway: ``api`` (the supervisor's socket), ``tor/``."""
    return f"{runtime()}/gateways/{name}"


def sockets(name: str) -> list[str]:
    """Where a gateway may be asked: our own first, then root's, which may be shared with us."""
    directories = [gateway(name)]
    if os.geteuid() != 0:
        directories.append(f"{SYSTEM}/gateways/{name}")
    return [f"{directory}/api" for directory in directories]


def log(state_directory: str) -> str:
    """Log of a gateway's last run: the supervisor's lines, Tor's and the uplink's."""
    return f"{state_directory}/log"


def configuration() -> list[str]:
    """Files with defaults of options, the strongest last. Root has the system's only: sudo may keep
    the HOME of somebody else. $TTP_CONFIG is read in place of the user's own.
    """
    own = "" if os.geteuid() == 0 else f"{_home('XDG_CONFIG_HOME', '.config')}/config.toml"
    own = os.environ.get("TTP_CONFIG") or own
    return ["/etc/ttp/config.toml", own] if own else ["/etc/ttp/config.toml"]


def private_directory(path: str) -> None:
    """Make ``path`` for us alone, or check that it is. Root's can be passed through, by Tor's user.

    Raises PermissionError when somebody else owns it or may write to it.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    own = (runtime(), state(), cache())
    parent = os.path.dirname(path)
    if any(parent == root or parent.startswith(f"{root}/") for root in own):
        private_directory(parent)  # a foreign one above it could be exchanged at any time
    os.makedirs(path, mode=mode, exist_ok=True)
    found = os.lstat(path)
    plain = found.st_mode & 0o170022 == 0o040000  # a directory, and no write bit for others
    if found.st_uid != os.geteuid() or not plain:
        raise PermissionError(1, "owned or writable by another user", path)


def make_private(path: str) -> None:
    """The same, but raises NsrunError, which a person can read."""
    try:
        private_directory(path)
    except OSError as error:
        from nsrun.errors import NsrunError  # hardly ever needed

        hint = f"make it yours alone: {error.filename}"
        raise NsrunError(f"use the directory {path}", error.strerror, hint) from error


def _home(variable: str, default: str) -> str:
    base = os.environ.get(variable)
    if not base or not base.startswith("/"):  # the specification: ignore a relative path
        base = os.path.join(os.path.expanduser("~"), default)
    return f"{base}/ttp"
