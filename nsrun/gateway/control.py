"""Start a gateway's supervisor, talk to it, find those that run. For the full interface."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from nsrun import __version__, client, paths
from nsrun.errors import AbsentError, GatewayError
from nsrun.spec import GatewaySpec, Plug, RunSpec

QUICK = 5  # seconds of silence that a list of what runs is worth
STOP = 15.0  # seconds that a supervisor may take to end
#: What a supervisor keeps of the shell that happened to start it; not LD_PRELOAD (torsocks sets
#: it), nor a default of options, which each client sends itself.
KEPT = (
    *("HOME", "PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE"),
    *("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME", "TTP_RUNTIME_DIR", "TTP_STATE_DIR"),
)


def default_spec(name: str) -> GatewaySpec:
    """The spec of a gateway that is started on demand."""
    return GatewaySpec(name, paths.gateway(name), f"{paths.state()}/gateways/{name}")


def start(spec: GatewaySpec, echo: Callable[[str], None] | None = None) -> IO[str]:
    """Start a supervisor and return once it answers; Tor may still be bootstrapping.

    The file that comes back is to be held open until Tor is ready: when it is closed before, by
    our death too, the gateway ends, unless somebody else waits for it.
    Losing a race against another start is no error. Raises NsrunError with the supervisor's own.
    """
    request = {**asdict(spec), "detach": True}
    process = subprocess.Popen(
        (sys.executable, "-P", "-m", "nsrun.gateway"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for us; when we go, it ends by itself
        env=_environment(),
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        json.dump(request, process.stdin)
    process.wait()  # the supervisor is its child
    for line in process.stdout:
        message = json.loads(line)
        if "effect" in message and echo is not None:
            echo(message["effect"])
        elif "error" in message:
            error = message["error"]
            if error["busy"]:
                break
            raise GatewayError(error["doing"], error["cause"], error["hint"])
        elif "ready" in message:
            break
    else:
        raise GatewayError(
            "start the gateway", "its supervisor ended", f"see {paths.log(spec.state)}"
        )
    return process.stdout


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[2])}


def ask(
    name: str,
    request: dict[str, Any],
    patience: int = 0,
    files: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Send a request, and open ``files`` by name, to the supervisor of gateway ``name``.

    ``patience`` is as for client.reach(). Raises AbsentError when it is not up, and GatewayError.
    """
    try:
        server = client.send(client.reach(name, patience), request, files)
        answer, descriptors = client.receive(server)
    except client.NotHereError:
        hint = f"ttp gateway up {name}"
        raise AbsentError(f"reach the gateway {name}", "it is not up", hint) from None
    except client.RefusedError as error:
        raise GatewayError(error.doing, error.cause, error.hint) from None
    os.close(descriptors["supervisor"])
    return answer


def plug(network: int, spec: RunSpec, at: Plug, pid: int = 0) -> dict[str, Any]:
    """Have a link plugged into the network namespace of descriptor ``network``: Workloads.plug().

    Waits until Tor is ready. Returns the workload, as ``ttp ps --json`` has it. Raises as ``ask``.
    """
    request = {
        "do": "plug",
        "version": __version__,
        "name": spec.name or "",
        "command": spec.command,
        "isolate": spec.isolate,
        "ipv6": spec.ipv6,
        "link": at.link,
        "address": at.address,
        "pid": pid,
        "timeout": spec.bootstrap_timeout,
    }
    return ask(spec.gateway, request, files={"network": network})


def unplug(gateway: str, name: str) -> None:
    """Remove the link of a workload that was plugged in, wherever it is. Raises as ``ask``."""
    ask(gateway, {"do": "unplug", "name": name})


def stop(name: str) -> None:
    """Stop a gateway and wait until its supervisor has gone. Raises GatewayError."""
    pid = ask(name, {"do": "inspect"})["pid"]
    process = os.pidfd_open(pid)
    try:
        ask(name, {"do": "down"})
        if not select.select([process], [], [], STOP)[0]:
            raise GatewayError(
                f"stop the gateway {name}", f"process {pid} still runs after {STOP:.0f} s"
            )
    finally:
        os.close(process)


def inspect_all() -> list[dict[str, Any]]:
    """What every running gateway says of itself; of one that is silent, name and problem.

    One that ends meanwhile is left out.
    """
    found = []
    for name in running():
        try:
            found.append(ask(name, {"do": "inspect"}, QUICK))
        except AbsentError:
            continue
        except GatewayError as error:
            found.append({"name": name, "problem": error.cause})
    return found


def workloads(gateway: str | None) -> list[dict[str, Any]]:
    """The workloads of a gateway, or of all of this user's, each with its gateway's name.

    Raises GatewayError if the gateway is not up.
    """
    found = []
    for name in running() if gateway is None else [gateway]:
        with suppress(*((AbsentError,) if gateway is None else ())):  # it ends meanwhile
            listed = ask(name, {"do": "ps"}, QUICK)["workloads"]
            found += [{"gateway": name, **one} for one in listed]
    return found


def running() -> list[str]:
    """Names of the gateways that this user may use and whose supervisor answers."""
    found = {entry.name for path in paths.sockets("*") for entry in Path(path).parents[1].glob("*")}
    return sorted(name for name in found if owner(name) is not None)


def owner(name: str) -> int | None:
    """The user of the gateway that ``name`` stands for: ourselves, or root who shares it.

    None if there is none.
    """
    try:
        connection = client.reach(name)
    except client.NotHereError:
        return None
    try:
        return client.owner(connection)
    finally:
        connection.close()
