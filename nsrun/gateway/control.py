"""Start a gateway's supervisor, talk to it, find those that run. For the full interface."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from nsrun import __version__, client, paths
from nsrun.errors import AbsentError, GatewayError
from nsrun.spec import GatewaySpec, Plug, RunSpec

QUICK = 5  # seconds of silence that a list of what runs is worth
START = 60.0  # seconds that a supervisor which starts may be silent: Tor alone may take 20
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


def start(spec: GatewaySpec, echo: Callable[[str], None] | None = None) -> IO[bytes]:
    """Start a supervisor and return once it answers; Tor may still be bootstrapping.

    The file that comes back is to be held open until Tor is ready: when it is closed before, by
    our death too, the gateway ends, unless somebody else waits for it.
    Losing a race against another start is no error; who loses against an end starts anew. Raises
    NsrunError with the supervisor's own.
    """
    deadline = time.monotonic() + START
    while True:
        said, alone = _launch(spec, echo)
        if alone or _other_listens(spec.runtime, deadline):
            return said


def _launch(spec: GatewaySpec, echo: Callable[[str], None] | None) -> tuple[IO[bytes], bool]:
    """Start a supervisor; False if there is another one, which keeps it from being made."""
    request = {**asdict(spec), "detach": True}
    process = subprocess.Popen(
        (sys.executable, "-P", "-m", "nsrun.gateway"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for us; when we go, it ends by itself
        env=_environment(),
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        process.stdin.write(json.dumps(request).encode())
    process.wait()  # the supervisor is its child
    for message in _messages(process.stdout, f"see {paths.log(spec.state)}"):
        if "effect" in message and echo is not None:
            echo(message["effect"])
        elif "error" in message:
            error = message["error"]
            if not error["busy"]:
                raise GatewayError(error["doing"], error["cause"], error["hint"])
            return process.stdout, False
        elif "ready" in message:
            break
    return process.stdout, True


def _messages(pipe: IO[bytes], hint: str) -> Iterator[dict[str, Any]]:
    """What a supervisor says while it starts. Raises GatewayError at its end, or its silence."""
    cause, said = f"its supervisor is silent for {START:g} s", b""
    while select.select([pipe], [], [], START)[0]:
        data = pipe.read(1 << 16)
        if not data:
            cause = "its supervisor ended"
            break
        *lines, said = (said + data).split(b"\n")
        yield from map(json.loads, lines)
    raise GatewayError("start the gateway", cause, hint)


def _other_listens(runtime: str, deadline: float) -> bool:
    """Wait until the supervisor that was there before listens; False once it has gone."""
    while time.monotonic() < deadline:
        try:
            client.connect(f"{runtime}/api").close()
        except client.NotHereError:
            try:
                if Path(runtime, "lock").stat().st_ino not in locked():
                    return False
            except FileNotFoundError:
                return False
        except client.RefusedError:
            break
        else:
            break
        time.sleep(0.02)  # until its socket is there: it cannot be waited for
    return True


def locked() -> set[int]:
    """Inodes that flock(2) holds, by /proc/locks: to try a lock would be in a starter's way."""
    lines = Path("/proc/locks").read_text().splitlines()
    rows = [line.replace("->", "").split() for line in lines]
    return {int(row[5].rpartition(":")[2]) for row in rows if row[1] == "FLOCK"}


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


def plug(
    network: int, spec: RunSpec, at: Plug, pid: int = 0, files: dict[str, int] | None = None
) -> dict[str, Any]:
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
        "socks": spec.socks,
        "pcap": spec.pcap or "",
        "link": at.link,
        "address": at.address,
        "pid": pid,
        "timeout": spec.bootstrap_timeout,
    }
    return ask(spec.gateway, request, files={"network": network, **(files or {})})


def unplug(gateway: str, name: str) -> None:
    """Remove the link of a workload that was plugged in, wherever it is. Raises as ``ask``."""
    ask(gateway, {"do": "unplug", "name": name})


def resolver(name: str, timeout: float) -> str:
    """The address of a gateway, which answers lookups, once its Tor is ready.

    Raises AbsentError and GatewayError, also when that took more than ``timeout`` seconds.
    """
    request = {"do": "wait", "version": __version__, "timeout": timeout}
    return str(ask(name, request)["address"])


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
    return [
        {"name": name, "problem": found.cause} if isinstance(found, GatewayError) else found
        for name, found in ask_all({"do": "inspect"})
    ]


def workloads(gateway: str) -> list[dict[str, Any]]:
    """The workloads of a gateway. Raises AbsentError if it is not up, and GatewayError."""
    return _listed(gateway, ask(gateway, {"do": "ps"}, QUICK))


def all_workloads() -> tuple[list[dict[str, Any]], dict[str, GatewayError]]:
    """The workloads of every gateway of this user's; and of those that are silent, by name, why."""
    found, silent = [], {}
    for name, answer in ask_all({"do": "ps"}):
        if isinstance(answer, GatewayError):
            silent[name] = answer
        else:
            found += _listed(name, answer)
    return found, silent


def _listed(gateway: str, answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"gateway": gateway, **one} for one in answer["workloads"]]


def ask_all(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | GatewayError]]:
    """What each gateway that this user may use answers within QUICK, or why it does not.

    One that ends meanwhile is left out.
    """
    for name in _names():
        try:
            yield name, ask(name, request, QUICK)
        except AbsentError:
            continue
        except GatewayError as error:
            yield name, error


def running() -> list[str]:
    """Names of the gateways that this user may use and whose supervisor listens."""
    return [name for name in _names() if owner(name) is not None]


def _names() -> list[str]:
    """Of the gateways that this user may use, and perhaps of some that were killed."""
    found = {entry.name for path in paths.sockets("*") for entry in Path(path).parents[1].glob("*")}
    return sorted(found)


def owner(name: str) -> int | None:
    """The user of the gateway that ``name`` stands for: ourselves, or root who shares it.

    None if there is none. Raises GatewayError.
    """
    try:
        connection = client.reach(name, QUICK)
    except client.NotHereError:
        return None
    except client.RefusedError as error:
        raise GatewayError(error.doing, error.cause, error.hint) from None
    try:
        return client.owner(connection)
    finally:
        connection.close()
