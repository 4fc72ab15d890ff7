"""Who a command of a test runs as, and what a test must leave as it found it.

As a program, ``harness.py UID[+GROUP…] HOME COMMAND [ARGUMENT …]`` becomes COMMAND as an
unprivileged user. Run by root, it does so in a private mount namespace, where this checkout and the
interpreter can be reached although a directory above them may be closed (/root, ``mktemp -d``),
and where anybody may open /dev/net/tun, as on a machine with udev.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # not in a user's PATH on Debian


# ---- as an unprivileged user -------------------------------------------------------------------


def become(uid: int, groups: list[int], home: str, argv: list[str]) -> None:
    """Exec ``argv`` as ``uid``, who needs no entry in /etc/passwd; keep our own uid if not root."""
    foreign = re.compile(r"SUDO_|XDG_|DBUS_|LOGNAME$|USER$|MAIL$")
    environment = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    environment |= {"HOME": home, "XDG_RUNTIME_DIR": f"{home}/run"}
    if os.geteuid() == 0:
        sys.path.insert(0, str(ROOT))
        from nsrun import linux

        directory = Path.cwd()
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        open_ways([ROOT, Path(sys.prefix), Path(sys.base_prefix)])
        open_tun()
        os.chdir("/")  # the directory that we are in may be on the far side of a mount of ours
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if directory.is_dir() and os.access(directory, os.X_OK):
            os.chdir(directory)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python; inherited through exec
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], argv, environment)


def open_ways(wanted: list[Path]) -> None:
    """Make ``wanted`` reachable for others: a tmpfs over the closed directory on the way, and the
    wanted ones bound back into it under their own paths.
    """
    from nsrun import linux

    binds: dict[Path, list[Path]] = {}
    for directory in dict.fromkeys(path.resolve() for path in wanted):
        if closed := _closed(directory):
            shut = directory.stat().st_mode & 0o005 != 0o005
            binds.setdefault(closed, []).extend(directory.iterdir() if shut else [directory])
    for closed, paths in binds.items():
        # held by descriptors, as the tmpfs hides them
        held = {path: os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in paths}
        linux.mount("tmpfs", str(closed), "tmpfs", data="mode=0755")
        for path, fd in held.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = os.fstat(fd).st_mode
            if stat.S_ISLNK(kind):
                path.symlink_to(os.readlink("", dir_fd=fd))
                continue
            if stat.S_ISDIR(kind):
                path.mkdir(exist_ok=True)
            else:
                path.touch()
            source = f"/proc/self/fd/{fd}"
            linux.mount(source, str(path), flags=linux.MS_BIND | linux.MS_REC)


def open_tun() -> None:
    from nsrun import linux

    tun = Path("/dev/net/tun")
    if not tun.exists() or tun.stat().st_mode & 0o006 != 0o006:
        linux.mount("tmpfs", str(tun.parent), "tmpfs", data="mode=0755")
        os.mknod(tun, stat.S_IFCHR, os.makedev(10, 200))
        tun.chmod(0o666)


def _closed(directory: Path) -> Path | None:
    """The topmost directory on the way to ``directory`` that others cannot pass."""
    for ancestor in reversed(directory.parents):
        if not ancestor.stat().st_mode & 0o001:
            return ancestor
    return None if directory.stat().st_mode & 0o005 == 0o005 else directory


# ---- the host, before and after ----------------------------------------------------------------


def host_state() -> str:
    """What no test may change, as text: links, routes, rules, firewall, mounts, resolver.

    Without counters and remaining lifetimes, which change by themselves.
    """
    commands = [
        "ip -o link",
        "ip -o address",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip -4 rule",
        "ip -6 rule",
    ]
    if os.geteuid() == 0:
        commands.append("nft -s list ruleset")
    parts = [f"# {command}\n{_output(command)}" for command in commands]
    switches = map(str, Path("/proc/sys/net").glob("ipv?/conf/*/*forwarding"))
    files = ("/proc/self/mountinfo", "/proc/sys/net/ipv4/ip_forward", *sorted(switches))
    parts += [f"# {name}\n{Path(name).read_text()}" for name in files]
    resolver = Path("/etc/resolv.conf")
    content = resolver.read_bytes() if resolver.exists() else b""
    parts.append(f"# {resolver.resolve()}\nsha256 {hashlib.sha256(content).hexdigest()}\n")
    return "".join(parts)


def host_changes(before: str, seconds: float = 5) -> str:
    """Differences between the host and ``before``, as a diff; empty if there are none.

    The kernel takes dead namespaces and their links apart in the background: it gets ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while (after := host_state()) != before and time.monotonic() < deadline:
        time.sleep(0.05)  # the interval of the poll
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1
    )
    return "\n".join(lines)


def _output(command: str) -> str:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + SBIN, "LC_ALL": "C"}
    done = subprocess.run(
        command.split(), capture_output=True, text=True, check=True, timeout=10, env=environment
    )
    return re.sub(r" (expires|valid_lft|preferred_lft) \d+sec", "", done.stdout)


if __name__ == "__main__":
    user, *others = map(int, sys.argv[1].split("+"))
    become(user, others, sys.argv[2], sys.argv[3:])
