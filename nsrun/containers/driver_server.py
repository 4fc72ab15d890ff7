"""Docker's network driver at work: HTTP on a Unix socket, a state that survives, links.

A handler never calls Docker, which waits for it, and would for ever. What connects a container is
written down before it is done, what disconnects it after: so all that a kill -9 leaves is known.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import socketserver
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from nsrun import __version__, paths
from nsrun.client import visible
from nsrun.containers import driver
from nsrun.containers.driver_engine import Peer
from nsrun.errors import AbsentError, NsrunError, UsageError
from nsrun.gateway import control
from nsrun.spec import Plug, RunSpec

log = logging.getLogger(__name__)

SOCKET = "/run/docker/plugins/ttp.sock"  # dockerd looks there for the driver of that name
STATUS = "ttp.Status"  # a method of our own, for `ttp docker driver status`
LONGEST = 1 << 20  # bytes of a request; those of Docker have one or two thousand
TYPE = "application/vnd.docker.plugins.v1.2+json"
FIRST_FD = 3  # of sockets that a service manager passes on: sd_listen_fds(3)


def state_file() -> Path:
    return Path(paths.state(), "docker-driver.json")


class Driver:
    """The state, here and on disk, and what requests do: one at a time.

    ``bootstrap`` is how long, in seconds, a container may wait for the Tor of its gateway.
    """

    def __init__(self, file: Path, bootstrap: float) -> None:
        """Raises NsrunError when the state cannot be read."""
        self._file, self._bootstrap = file, bootstrap
        self._lock = threading.Lock()
        self._state = read_state(file)
        self._engine = Peer(os.getpid())  # whose files are Docker's, as long as it has not called

    def answer(self, method: str, request: Any, peer: Peer) -> dict[str, Any] | None:
        """What to say; None if there is no such method. Raises NsrunError and OSError."""
        if method == STATUS:
            return self._status()
        found = driver.Engine()
        if method == "NetworkDriver.Join" and isinstance(request, dict):
            self._wait_for_tor(request)
            found = peer.look(str(request.get("SandboxKey") or ""))
        with self._lock:
            if peer != self._engine or method == "Plugin.Activate":  # one of us has just begun
                self._engine = peer
                self._sweep()
            answer = driver.answer(self._state, method, request, found)
            if answer is None:
                return None
            before, (after, effects, said) = self._state, answer
            connects = any(isinstance(effect, driver.Connect) for effect in effects)
            if connects:
                self._keep(after)
            try:
                for effect in effects:
                    self._do(effect)
            except BaseException:
                self._keep(before)
                raise
            self._keep(after)
            return said

    def _wait_for_tor(self, request: dict[str, Any]) -> None:
        """Before the lock, since others need not wait. Raises GatewayError."""
        network = self._state.networks.get(str(request.get("NetworkID")))
        if network is not None:
            control.ask(network.gateway, {"do": "wait", "timeout": self._bootstrap})

    def _do(self, effect: driver.Effect) -> None:
        match effect:
            case driver.Connect():
                self._connect(effect)
                log.info("connected %s, %s, to %s", effect.name, effect.address, effect.gateway)
            case driver.Disconnect(gateway, name):
                with suppress(AbsentError):  # then its links are gone as well
                    listed = control.ask(gateway, {"do": "ps"}, control.QUICK)["workloads"]
                    if name in [one["name"] for one in listed]:
                        control.unplug(gateway, name)
                        log.info("disconnected %s from %s", name, gateway)

    def _connect(self, effect: driver.Connect) -> None:
        spec = RunSpec(
            ("docker",), effect.gateway, effect.name, isolate=effect.isolate, bootstrap_timeout=0
        )
        network = self._engine.network()
        try:
            control.plug(network, spec, Plug(effect.link, effect.address))
        finally:
            os.close(network)

    def _sweep(self) -> None:
        """Take out what ended while nobody listened; if that fails, the next time will do."""
        swept, effects = driver.gone(self._state, self._engine.keeps)
        try:
            for effect in effects:
                self._do(effect)
        except NsrunError as error:
            log.warning("%s", error)
        else:
            self._keep(swept)

    def _keep(self, state: driver.State) -> None:
        if state != self._state:
            write_state(self._file, state)
            self._state = state

    def _status(self) -> dict[str, Any]:
        """For each container that has joined, the links in it: it should have one."""
        state = self._state
        engine = self._engine if self._engine.lives() else Peer(os.getpid())
        return {
            "version": __version__,
            "pid": os.getpid(),
            "networks": driver.as_json(state)["networks"],
            "containers": [
                {
                    "name": driver.workload(key),
                    "network": one.network,
                    "address": one.address,
                    "links": engine.links(one.sandbox),
                }
                for key, one in state.endpoints.items()
                if one.sandbox
            ],
        }


def read_state(file: Path) -> driver.State:
    """Raises NsrunError when it is damaged: what Docker told once, nobody can find out again."""
    try:
        return driver.from_json(json.loads(file.read_text()))
    except FileNotFoundError:
        return driver.State()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        hint = f"remove {file}, and the networks of the driver: docker network ls -f driver=ttp"
        raise NsrunError(f"read the driver's state {file}", cause, hint) from error


def write_state(file: Path, state: driver.State) -> None:
    """All of it or nothing, also when the machine stops. Raises OSError."""
    paths.private_directory(str(file.parent))
    draft = file.with_suffix(".new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as out:
        json.dump(driver.as_json(state), out, indent=1)
        out.flush()
        os.fsync(fd)
    draft.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves requests on a socket that listens already."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, listening: socket.socket, answers: Driver) -> None:
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.answers = listening, answers

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Whether it is root who asks. Who else could, by the mode of the socket, is cut off."""
        return _credentials(request)[1] == os.geteuid()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Who asked went away, or there is a fault of ours: that is one for the log."""
        error = sys.exception()
        log.log(logging.INFO if isinstance(error, OSError) else logging.ERROR, "%r", error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        """One request. An error in it is Docker's to show: ``Err`` is what its user reads."""
        method = self.path.removeprefix("/")
        peer = Peer(_credentials(self.connection)[0])
        try:
            request = self._request()
            said = self.server.answers.answer(method, request, peer)
        except ValueError as error:
            self._say(HTTPStatus.BAD_REQUEST, {"Err": f"not a request: {error}"})
        except NsrunError as error:
            self._fail(method, f"{error}; {error.hint}" if error.hint else str(error))
        except OSError as error:
            self._fail(method, f"cannot answer {method}: {error.strerror}")
        else:
            if said is None:
                # how Docker learns that a method, which it can do without, is not there
                self._say(HTTPStatus.NOT_FOUND, {"Err": f"there is no {method}"})
            else:
                self._say(HTTPStatus.OK, said)

    def _request(self) -> Any:
        """The object that was sent; none is an empty one. Raises ValueError."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= LONGEST or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise ValueError(f"its length is {length}, or not told")
        return json.loads(self.rfile.read(length) or b"{}")

    def _fail(self, method: str, error: str) -> None:
        log.warning("%s: %s", visible(method), visible(error))
        self._say(HTTPStatus.OK, {"Err": error})

    def _say(self, status: HTTPStatus, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Not each request: what is done is logged where it is done."""


def _credentials(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, by the kernel's word: SO_PEERCRED, unix(7)."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", told)
    return pid, uid


def serve(path: str, bootstrap: float) -> None:
    """Be the driver, until a signal ends it: on a service manager's socket, else at ``path``.

    Raises NsrunError.
    """
    with _only_one():
        answers = Driver(state_file(), bootstrap)
        inherited = inherited_socket()
        listening = inherited or listen(path)
        try:
            with Server(listening, answers) as server:
                server.serve_forever()
        finally:
            if inherited is None:  # that of a manager stays, so that we are started again
                Path(path).unlink(missing_ok=True)


def inherited_socket() -> socket.socket | None:
    """The socket that a service manager listens on for us (sd_listen_fds(3)), if there is one.

    Raises UsageError when it is another kind of socket, or not one.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return None
    doing = "take the service manager's socket"
    if count != "1":
        raise UsageError(doing, f"there are {count}, not one")
    found = socket.socket(fileno=FIRST_FD)
    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (found.family, found.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        raise UsageError(doing, "it is not a Unix stream socket that listens")
    os.set_inheritable(FIRST_FD, False)
    return found


def listen(path: str) -> socket.socket:
    """A socket at ``path``, for root alone, in the place of one on which nobody listens.

    Raises UsageError when somebody does, or something else is there; OSError.
    """
    doing = f"listen on {path}"
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(doing, "there is something else, no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            try:
                other.connect(path)
            except ConnectionRefusedError:  # its owner was killed
                Path(path).unlink(missing_ok=True)
            else:
                raise UsageError(doing, "another one listens there", "ttp docker driver status")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(mask)
    server.listen(Server.request_queue_size)
    return server


@contextmanager
def _only_one() -> Iterator[None]:
    """Two drivers would overwrite each other's state. Raises UsageError for the second."""
    file = state_file()
    paths.private_directory(str(file.parent))
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("start the driver", "it runs", "ttp docker driver status") from None
        yield
