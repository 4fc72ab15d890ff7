"""Plug a container into a gateway: its network opened, a link plugged in, and looked at."""

from __future__ import annotations

import os

from nsrun.containers import inside
from nsrun.containers.engine import Engine
from nsrun.gateway import control
from nsrun.spec import Plug, RunSpec


def plug(
    engine: Engine,
    container: str,
    spec: RunSpec,
    resolver: str,
    *,
    pinned: bool,
    files: dict[str, int] | None = None,
) -> None:
    """Put a running container behind Tor. Raises NsrunError, and then it is as before.

    ``pinned`` says that it was made with the gateway, at ``resolver``, as its only resolver;
    ``files`` are descriptors for a recording, if ``spec`` asks for one.
    """
    network, pid = engine.network(container)
    try:
        told = control.plug(network, spec, Plug(), pid, files)
        try:
            inside.verify(network, pid, told["address"], resolver, ipv6=spec.ipv6, pinned=pinned)
        except BaseException:
            control.unplug(spec.gateway, str(spec.name))
            raise
    finally:
        os.close(network)
