"""``python -m nsrun.gateway``: the supervisor's process.

Reads one JSON object, the gateway's spec, from standard input; writes lines of JSON to standard
output ({"effect"}, then {"ready"} or {"error"}). With ``"detach": true`` it leaves its parent at
once and closes its output when it is ready; otherwise it stays in the foreground.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsrun import paths
from nsrun.cli.run import parse
from nsrun.errors import ExitCode, GatewayError, NsrunError
from nsrun.facts import search_path
from nsrun.gateway.supervisor import Supervisor, Tell
from nsrun.gateway.uplink import veth_name
from nsrun.gateway.uplink_veth import sweep_veth
from nsrun.spec import GatewaySpec, LabUplink
from nsrun.userns import own_user_namespace


class BusyError(GatewayError):
    """Another supervisor of this gateway lives; whoever wanted one can use that."""


def main() -> int:
    try:
        request = json.load(sys.stdin)
    except ValueError:  # who wanted a gateway ended before saying which
        return int(ExitCode.FAILED)
    detach = request.pop("detach", False)
    if detach and os.fork():
        return 0
    if detach:
        os.setsid()
        os.chdir("/")
    uplinks = [one if isinstance(one, str) else LabUplink(**one) for one in request["uplinks"]]
    spec = GatewaySpec(**{**request, "uplinks": tuple(uplinks)})
    try:
        serve(spec, *((Parent(), os.dup(1)) if detach else (_print, None)))
    except NsrunError as error:
        failure = {"doing": error.doing, "cause": error.cause, "hint": error.hint}
        _print({"error": {**failure, "busy": isinstance(error, BusyError)}})
        return int(error.code)
    return 0


def serve(spec: GatewaySpec, tell: Tell, starter: int | None = None) -> None:
    """Be the supervisor of a gateway, from nothing to its end. Raises NsrunError.

    For ``starter`` see Supervisor.
    """
    for name in [name for name in os.environ if name.startswith("TTP_")]:
        if name not in ("TTP_RUNTIME_DIR", "TTP_STATE_DIR"):
            del os.environ[name]  # a default of options, which each client sends itself
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request has one, or several
    os.environ["PATH"] = search_path()  # a user's lacks nft on some distributions
    logging.raiseExceptions = False  # a full disk must not be the end, nor a screen full of it
    try:
        lock = _claim(spec.runtime)
        try:
            _serve(spec, tell, starter)
        finally:
            shutil.rmtree(spec.runtime, ignore_errors=True)
            os.close(lock)
    except NsrunError as error:
        if logging.root.handlers:  # else it failed before there was a log
            logging.error("%s", error)
        raise
    except OSError as error:  # a full disk, most of all
        where = f": {error.filename}" if error.filename else ""
        raise NsrunError("start the gateway", f"{error.strerror}{where}", "ttp doctor") from error


def _serve(spec: GatewaySpec, tell: Tell, starter: int | None) -> None:
    if spec.group is not None:
        _open_way(Path(spec.runtime))
    _sweep(Path(spec.runtime).parent)
    paths.make_private(spec.state)
    _empty(paths.log(spec.state))
    logging.basicConfig(
        filename=paths.log(spec.state),  # to append: Tor and the uplink write there too
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("stem").propagate = False
    if os.geteuid() == 0:
        sweep_veth(veth_name(spec.name))  # what a killed gateway left on the host
    else:
        own_user_namespace()
    asyncio.run(Supervisor(spec, parse, tell, starter).run())


class Parent:
    """Who starts us, and is told how far we are until we are ready; Tor may not be."""

    def __init__(self) -> None:
        self._gone = False

    def __call__(self, message: dict[str, Any]) -> None:
        """Raises GatewayError, once, when it has gone before: then nobody wants the gateway."""
        if self._gone or "progress" in message:  # told on request; from a callback none can fail
            return
        try:
            os.write(1, (json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            self._gone = True  # what is undone now has nobody to hear of it
            raise GatewayError("start the gateway", "who wanted it has gone") from None
        if "ready" in message:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)


def _print(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(1, (json.dumps(message) + "\n").encode())


def _claim(runtime: str) -> int:
    """Lock the runtime directory, and remove what a killed predecessor left in it.

    Raises GatewayError when another supervisor holds it.
    """
    paths.make_private(runtime)
    fd = os.open(f"{runtime}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError("start the gateway", "it is being started or already up") from None
    if not Path(f"{runtime}/lock").exists():
        raise BusyError("start the gateway", "another one was just ending", "try again")
    Path(f"{runtime}/api").unlink(missing_ok=True)
    return fd


def _open_way(runtime: Path) -> None:
    """Let others see which gateways there are, and come as far as this one's socket."""
    runtime.chmod(0o711)
    runtime.parent.chmod(0o755)
    runtime.parents[1].chmod(0o711)


def _sweep(gateways: Path) -> None:
    """Remove the runtime directories of gateways that were killed: nobody holds their locks."""
    for lock in gateways.glob("*/lock"):
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            continue  # it lives, or has gone meanwhile


def _empty(log: str) -> None:
    """A new log, which nobody else may read: it tells what was run."""
    Path(log).unlink(missing_ok=True)
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


if __name__ == "__main__":
    sys.exit(main())
