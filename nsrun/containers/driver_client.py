"""Ask the driver that serves, as its status does."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from nsrun import __version__
from nsrun.containers.driver_server import SOCKET, STATUS
from nsrun.errors import NsrunError, UsageError
from nsrun.gateway import control

PATIENCE = 10.0  # seconds of silence to bear: it answers at once, unless it is stopped

_DOING = "ask the driver"


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(SOCKET)


def status() -> dict[str, Any]:
    """Networks, and containers with the ``state`` of each. Raises NsrunError if nobody answers."""
    connection = _Connection("localhost")
    try:
        connection.request("POST", f"/{STATUS}")
        found: dict[str, Any] = json.load(connection.getresponse())
    except (FileNotFoundError, ConnectionRefusedError) as error:
        hint = "ttp docker driver install, or without systemd: ttp docker driver serve"
        raise UsageError(_DOING, "it does not run", hint) from error
    except PermissionError as error:
        raise UsageError(_DOING, "only root can", "use sudo") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = "systemctl restart ttp-docker-driver, or stop and start what serves it"
        raise NsrunError(_DOING, f"it does not answer: {error}", hint) from error
    finally:
        connection.close()
    if found.get("version") != __version__:
        cause = f"it is of version {found.get('version')}, this ttp of {__version__}"
        hint = "restart it: systemctl restart ttp-docker-driver; containers run on"
        raise NsrunError(_DOING, cause, hint)
    listed, silent = control.all_workloads()
    known = {(one["gateway"], one["name"]) for one in listed}
    for one in found["containers"]:
        one["gateway"] = found["networks"][one["network"]]["gateway"]
        if one["gateway"] in silent:
            raise silent[one["gateway"]]
        one["state"] = state(one["links"], (one["gateway"], one["name"]) in known)
    return found


def state(links: list[str] | None, plugged: bool) -> str:
    """What is true of a container, by its links but loopback and by what its gateway knows."""
    if links is None:
        return "ended"
    others = links[1:] if plugged else links
    if others:
        return f"LEAKS: it has another network ({' '.join(links)})"
    return "connected" if plugged else "cut off"
