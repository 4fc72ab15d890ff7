"""Links for containers: what root, or the gateway's own user, asks for in their name.

Who asks brings a descriptor of the network namespace, of the container or of its engine.
"""

from __future__ import annotations

from typing import Any

from nsrun.errors import UsageError
from nsrun.spec import Plug, RunSpec, check_seconds

DOING = "plug in a container"


def wanted(request: dict[str, Any], gateway: str) -> tuple[RunSpec, Plug, int]:
    """What a request to plug asks for: the workload, its link, and its main process.

    Raises UsageError when it makes no sense.
    """
    match request:
        case {
            "name": str() as name,
            "command": [str(), *_] as command,
            "isolate": "workload" | "destination" | "connection" as isolate,
            "ipv6": bool() as ipv6,
            "socks": bool() as socks,
            "pcap": str() as pcap,
            "link": str() as link,
            "address": str() as address,
            "pid": int() as pid,
            "timeout": str() | float() | int() as timeout,
        }:
            pass
        case _:
            raise UsageError("understand the request", "it does not say what to plug in")
    if address and not ipv6:
        raise UsageError(DOING, "its engine sets its network up")
    spec = RunSpec(
        tuple(map(str, command)),
        gateway,
        name or None,
        ipv6=ipv6,
        isolate=isolate,
        socks=socks,
        pcap=pcap,
        bootstrap_timeout=check_seconds("the timeout", float(timeout)),
    )
    return spec, Plug(link, address), pid


def descriptors(spec: RunSpec) -> list[str]:
    """The names of those that come along with a request, in their order."""
    return ["network", *(["pcap", "report"] if spec.pcap else [])]
