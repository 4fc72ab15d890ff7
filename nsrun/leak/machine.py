"""What a machine has that a workload must not reach: looked at outside, tried from inside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsrun import facts
from nsrun.plan import RUN_KEPT, SESSION_KEPT

LISTENS = 0x10000  # __SO_ACCEPTCON, the flags of /proc/net/unix (proc_net(5))


@dataclass(frozen=True)
class Machine:
    """Addresses, sockets (``@`` for an abstract one) and the inode of the network namespace.

    Nothing is known of it where the check itself is started in a workload.
    """

    resolvers: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    network: int = 0


def look() -> Machine:
    """Look, change nothing."""
    return Machine(
        tuple(_resolvers()),
        tuple(_routers()),
        tuple(sorted(address for found in addresses().values() for address in found)),
        tuple(_sockets()),
        network(),
    )


def network() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def addresses() -> dict[str, list[str]]:
    """Of each interface but loopback, as this process sees them."""
    return {
        link["ifname"]: [info["local"] for info in link["addr_info"]]
        for link in _ip("address")
        if link["ifname"] != "lo"
    }


def _resolvers() -> Iterator[str]:
    for line in Path("/etc/resolv.conf").read_text(errors="replace").splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                yield address


def _routers() -> Iterator[str]:
    for family in ("-4", "-6"):
        for route in _ip(family, "route", "show", "default"):
            if router := route.get("gateway"):
                yield f"{router}%{route['dev']}" if router.startswith("fe80:") else router


def _sockets() -> Iterator[str]:
    """Those that somebody listens on, abstract or where no socket but a few may be seen (P6)."""
    session = os.environ.get("XDG_RUNTIME_DIR") or "/nowhere"
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not int(fields[3], 16) & LISTENS:
            continue
        path = fields[7]
        for directory, kept in ((session, SESSION_KEPT), ("/run", RUN_KEPT)):
            if path.startswith(f"{directory}/"):
                if path.removeprefix(f"{directory}/").split("/")[0] not in kept:
                    yield path
                break
        if path.startswith("@"):
            yield path


def _ip(*arguments: str) -> Any:
    environment = {**os.environ, "PATH": facts.search_path()}
    done = subprocess.run(
        ("ip", "-j", *arguments), check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout or "[]")
