"""What is on this machine: the only reader of the outside that plans are made from."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
from pathlib import Path

from nsrun.errors import MissingError
from nsrun.plan import Facts

PROGRAMS = {"tor": "tor", "nft": "nftables", "ip": "iproute2", "setpriv": "util-linux"}
OLDEST_TOR = (0, 4, 7)  # of the older ones, none is maintained or still served by the network
TOR_USERS = ("debian-tor", "tor", "_tor", "toranon")


def probe() -> Facts:
    """Look, change nothing. Raises MissingError when a needed program is not installed."""
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=search_path()) is None:
            raise MissingError(
                "set up a gateway",
                f"the program {program} is not installed",
                f"sudo apt-get install {package} (on Debian and Ubuntu)",
            )
    tor_version()
    uid, gid = _tor_user()
    found, ipv6 = networks()
    return Facts(
        supervisor=os.getpid(),
        tor_uid=uid,
        tor_gid=gid,
        networks=found,
        ipv6=ipv6,
        nsswitch=_text("/etc/nsswitch.conf"),
        machine=os.uname().machine,
    )


def networks() -> tuple[tuple[str, ...], bool]:
    """This machine's own addresses with their networks, and whether one is global and of IPv6."""
    addresses = [
        (info["local"], info["prefixlen"], info["scope"])
        for link in json.loads(_output("ip", "-j", "address"))
        for info in link.get("addr_info", ())
        if link["ifname"] != "lo"
    ]
    return (
        tuple(f"{local}/{length}" for local, length, _ in addresses),
        any(":" in local and scope == "global" for local, _, scope in addresses),
    )


def tor_version() -> str:
    """What `tor --version` says. Raises MissingError when it is too old, or does not say."""
    doing, install = "use tor", "sudo apt-get install tor, or a newer one from deb.torproject.org"
    try:
        said = _output("tor", "--version")
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(doing, f"it does not run: {error}", install) from error
    found = re.search(r"Tor version (\d+\.\d+\.\d+)([\w.-]*)", said)
    if found is None:
        raise MissingError(doing, f"it does not say its version, but {said[:60]!r}", install)
    if tuple(map(int, found[1].split("."))) < OLDEST_TOR:
        oldest = ".".join(map(str, OLDEST_TOR))
        raise MissingError(doing, f"its version is {found[1]}, and {oldest} is the oldest", install)
    return (found[1] + found[2]).rstrip(".")


def search_path() -> str:
    """PATH with the directories of administration programs, which users' PATHs often lack."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def _tor_user() -> tuple[int, int]:
    """The distribution's own user for Tor; where only one user is mapped (rootless), that one."""
    if os.geteuid() != 0:
        return 0, 0  # who is not root maps itself to 0 in a user namespace of its own
    mapped = [line.split() for line in _text("/proc/self/uid_map").splitlines()]
    for name in TOR_USERS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        if any(0 <= user.pw_uid - int(first) < int(count) for first, _, count in mapped):
            return user.pw_uid, user.pw_gid
    if len(mapped) == 1 and mapped[0][2] == "1":
        return 0, 0
    raise MissingError(
        "set up a gateway",
        f"there is no user for Tor (looked for {', '.join(TOR_USERS)})",
        "install the distribution's tor package, which makes one",
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _output(*command: str) -> str:
    environment = {**os.environ, "PATH": search_path()}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
