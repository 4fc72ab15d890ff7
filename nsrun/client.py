"""The hot path of ``ttp run``: ask the supervisor for a workload, join it, become the command.

The supervisor, which has the whole command line interface loaded, parses the arguments and answers
with operations to perform; this process performs them and execs, so that no wrapper stays behind.
Whenever the supervisor cannot be asked, or finds that the request is not for it, the full
interface takes over in this same process: there is one definition of every option.
Imports are counted here: no json, socket, re or pathlib (5 to 6 ms each).
"""

from __future__ import annotations

import _json
import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys

from nsrun import __version__, paths

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs 6 ms
    from typing import Any, NoReturn

    from nsrun.detach import Leaver

ENTERING = ("run", "exec", "shell")  # the commands that end as another program
# Seconds. A supervisor that is at work says so every five, but not while it starts a new Tor.
PATIENCE = 30

RUN_FAILED, NOT_EXECUTABLE, NOT_FOUND, INTERRUPTED = 125, 126, 127, 130


class RefusedError(Exception):
    """The supervisor refused: what was being done, why not, what to do, and the exit code."""

    def __init__(self, doing: str, cause: str, hint: str, code: int) -> None:
        super().__init__(doing, cause, hint, code)
        self.doing, self.cause, self.hint, self.code = doing, cause, hint, code


class NotHereError(Exception):
    """No supervisor answers, or this request is not for it."""


def main() -> NoReturn:
    """Entry point of the ``ttp`` command."""
    entering = sys.argv[1:2] and sys.argv[1] in ENTERING
    try:
        if entering:
            try:
                given = defaults()
                become(sys.argv[2:], _gateway(sys.argv[1:], given), given, sys.argv[1])
            except NotHereError:
                pass
            except RefusedError as failure:
                fail(failure)
        import site  # the launcher starts Python without it, to save 3 ms

        site.main()
        from nsrun.cli import main as full

        full()
    except KeyboardInterrupt:
        complain("ttp: interrupted" + ("; the command was not run" if entering else "") + "\n")
        raise SystemExit(INTERRUPTED) from None
    raise AssertionError("the command line interface returned")


def become(
    arguments: list[str],
    gateway: str,
    defaults: dict[str, Any],
    verb: str = "run",
    leaver: Leaver | None = None,
) -> NoReturn:
    """Carry out ``ttp run ARGUMENTS``, or another verb of ENTERING, on a gateway that is there.

    ``defaults`` are what defaults() returns. A ``leaver`` has left its caller (detach.py). Raises
    NotHereError when there is no gateway to ask, and RefusedError when it refuses. After that
    there is no way back: an error ends the process with 125, 126 or 127.
    """
    request = wish(verb, arguments, gateway, defaults)
    if leaver:
        request["kept"] = leaver.keeps(gateway)
    server = send(reach(gateway), request)
    from nsrun import enter  # noqa: F401  now: it takes a millisecond, and so does the supervisor

    answer, descriptors = receive(server)
    if "detach" in answer:
        from nsrun import detach, status

        status.check(answer["status_fd"], descriptors.values())
        os.close(descriptors["supervisor"])
        detach.leave(arguments, gateway, answer["status_fd"])
    outside = 0
    if recorded := answer.get("record"):
        os.close(descriptors["supervisor"])
        from nsrun import parent

        outside = os.getpid()
        # from here on we are a child, who asks again
        files = parent.record(recorded, leaver.ready if leaver else -1)
        answer, descriptors = receive(send(reach(gateway), request, files))
    if warning := answer["warning"]:
        complain("ttp: {}\nhint: {}\n".format(*warning))
    if "status" in answer:
        from nsrun import status

        status.check(answer["status_fd"], descriptors.values())
    if leaver:
        leaver.name(gateway, answer["name"], answer["owner"], answer["status"])
    verbose = answer["verbose"]
    environment = _environment()  # now: later /proc/self is not ours to read
    changes: list[tuple[str, str | None]] = []
    if "env" in answer:
        from nsrun.environment import asked

        changes = asked(answer["env"]["files"], answer["env"]["settings"], environment)
    for effect in answer["effects"] if verbose else ():
        echo(effect)
    if "sockets" in answer:  # of a strict command, those that it may use
        from nsrun import strict

        environment = strict.without_doors(environment, answer["sockets"])
    outside = _enter(answer["enter"], descriptors, verbose, outside)
    environment |= answer["environment"]
    for name, value in changes:
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    if outside:
        parent.die_with(outside)
    if "status" in answer:
        status.tell(answer["status_fd"], answer["status"])
    if leaver:
        leaver.begin()
    _exec(answer["command"], environment)


def wish(verb: str, arguments: list[str], gateway: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The request to carry out ``ttp VERB ARGUMENTS``."""
    return {
        "do": verb,
        "version": __version__,
        "gateway": gateway,
        "shell": os.environ.get("SHELL") or "/bin/sh",
        "arguments": arguments,
        "defaults": defaults,
        "caller": caller(),
    }


def ask(server: _socket.socket, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Send one request to a supervisor; wait for its answer and the descriptors that go with it.

    Raises NotHereError or RefusedError.
    """
    return receive(send(server, request))


def send(
    server: _socket.socket, request: dict[str, Any], files: dict[str, int] | None = None
) -> _socket.socket:
    """Send one request, and open ``files`` by name, to a supervisor.

    Raises NotHereError or RefusedError.
    """
    try:
        if files:
            request = {**request, "descriptors": list(files)}
            rights = b"".join(fd.to_bytes(4, "little") for fd in files.values())
            server.sendmsg([b" "], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        server.sendall((_encode(request) + "\n").encode())
    except BlockingIOError:
        raise _silent(server) from None
    except ConnectionError:  # it has ended, or refused us without a look at what we ask
        try:
            said = server.recv(1, _socket.MSG_PEEK)
        except ConnectionError:
            said = b""
        if not said:
            server.close()
            raise NotHereError from None
    return server


def receive(server: _socket.socket) -> tuple[dict[str, Any], dict[str, int]]:
    """The answer to a request, and the descriptors that go with it.

    Raises NotHereError or RefusedError. Progress on the way is shown on a terminal, and what the
    supervisor wants to be done ahead of its answer is done.
    """
    received, fds, answered = b"", [], False
    try:
        while True:
            try:
                data, ancillary, _, _ = server.recvmsg(65536, _socket.CMSG_SPACE(32), _CLOEXEC)
            except BlockingIOError:
                raise _silent(server) from None
            except ConnectionError:
                data, ancillary = b"", []
            for _level, _kind, content in ancillary:
                fds += [
                    int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)
                ]
            received += data
            if not data:
                raise RefusedError("reach the gateway", "its supervisor ended", _AGAIN, RUN_FAILED)
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                answer, _end = _SCAN(line.decode(), 0)
                if "progress" in answer:
                    show_progress(answer["progress"], answer["summary"])
                elif "perform" in answer:
                    _perform(answer["perform"], {}, answer["verbose"])
                    try:
                        server.sendall(b"\n")
                    except ConnectionError:
                        pass  # it has ended, as the next look will tell
                elif "error" in answer:
                    error = answer["error"]
                    raise RefusedError(error["doing"], error["cause"], error["hint"], error["code"])
                elif "elsewhere" in answer:
                    raise NotHereError
                elif answer:  # else it only says that it is at work
                    found = dict(zip(answer["descriptors"], fds, strict=True))
                    answered = True  # the connection may be of use still
                    return answer, {**found, "supervisor": server.detach()}
    finally:
        if not answered:
            server.close()


def reach(gateway: str, patience: int = 0) -> _socket.socket:
    """A connection to a gateway: our own, else root's, if it is shared with us.

    ``patience``: seconds of silence to bear from it, by default PATIENCE. Raises NotHereError or
    RefusedError.
    """
    for path in paths.sockets(gateway):
        try:
            return connect(path, patience)
        except NotHereError:
            pass
    raise NotHereError


def connect(path: str, patience: int = 0) -> _socket.socket:
    """A connection to a supervisor. Raises NotHereError or RefusedError."""
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    limit = (patience or PATIENCE).to_bytes(8, sys.byteorder) + bytes(8)  # struct timeval
    try:
        server.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
        server.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, limit)
        server.connect(path)
        server = _above_standard(server)
        user = owner(server)
    except BlockingIOError:
        raise _silent(server) from None  # so many wait for it that there is no place
    except OSError:
        server.close()
        raise NotHereError from None
    if user not in (os.geteuid(), 0):  # we do what it says
        server.close()
        hint = "remove its directory, or set XDG_RUNTIME_DIR"
        raise RefusedError(f"use {path}", "it belongs to another user", hint, RUN_FAILED)
    return server


def owner(server: _socket.socket) -> int:
    """The user at the other end (SO_PEERCRED, unix(7))."""
    return int.from_bytes(
        server.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder
    )


def _silent(server: _socket.socket) -> RefusedError:
    limit = server.getsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, 16)
    peer = server.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    server.close()
    seconds, pid = (int.from_bytes(field, sys.byteorder) for field in (limit[:8], peer[:4]))
    cause = f"its supervisor (process {pid}) is silent for {seconds} s"
    hint = f"if it is stopped: kill -CONT {pid}; kill -9 {pid} ends it, and opens nothing"
    return RefusedError("reach the gateway", cause, hint, RUN_FAILED)


def _above_standard(server: _socket.socket) -> _socket.socket:
    """With a standard stream closed, the socket would be in its place, and be written to."""
    if server.fileno() > 2:
        return server
    import fcntl

    fd = fcntl.fcntl(server.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    server.close()
    return _socket.socket(fileno=fd)


def show_progress(percent: int, summary: str) -> None:
    """Show how far Tor's bootstrap is, in one line of the terminal, if there is one."""
    if os.isatty(2):
        end = "\r\033[K" if percent >= 100 else ""
        os.write(2, f"\r\033[Kttp: Tor {percent:3} % {visible(summary)}{end}".encode())


def _enter(ops: list[list[Any]], descriptors: dict[str, int], verbose: bool, outside: int) -> int:
    """Perform ``ops``. Returns whom the command must die with: ``outside``, if it is its parent."""
    umask = os.umask(0o022)  # what is made for the command, it must be able to read
    for op in ops:
        if outside and op[0] == "stay_outside":  # which is for us; the command's parent is another
            from nsrun import parent

            parent.die_with(outside)
            outside = 0
        _perform(op, descriptors, verbose)
    os.umask(umask)
    return outside


def _perform(op: list[Any], descriptors: dict[str, int], verbose: bool) -> None:
    from nsrun import enter

    if verbose:
        echo(f"{op[0]} {' '.join(str(argument) for argument in op[1:])}")
    try:
        enter.perform(op, descriptors)
    except Exception as error:
        if op[0] in ("come_back", "work_in") and isinstance(error, OSError):
            fail(RefusedError(f"work in {error.filename}", str(error.strerror), _WHERE, RUN_FAILED))
        if op[0] == "hold_sockets" and isinstance(error, OSError):
            where = f"allow the socket {error.filename}"
            fail(RefusedError(where, str(error.strerror), _SOCKET, RUN_FAILED))
        fail(RefusedError(f"isolate the command ({op[0]})", str(error), _DOCTOR, RUN_FAILED))


def echo(effect: str) -> None:
    """Show one effect, as ``-v`` does."""
    os.write(
        2, "".join(f"[#] {visible(line)}\n" for line in effect.rstrip("\n").split("\n")).encode()
    )


def visible(text: str) -> str:
    """``text`` with control and other unprintable characters as escapes: a terminal would obey
    them, and a log would show lines that nobody wrote.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(failure: RefusedError) -> NoReturn:
    lines = visible(f"ttp: cannot {failure.doing}: {failure.cause}") + "\n"
    if failure.hint:
        lines += visible(f"hint: {failure.hint}") + "\n"
    complain(lines)
    raise SystemExit(failure.code)


def caller() -> dict[str, Any]:
    """Who we are, for the supervisor to decide whom the command runs as."""
    sudo = os.environ.get("SUDO_UID", "")
    bus = os.environ.get("DBUS_SESSION_BUS_ADDRESS", "")
    return {
        "uid": os.geteuid(),
        "gid": os.getegid(),
        "groups": os.getgroups(),
        "sudo_uid": int(sudo) if sudo.isdigit() and os.geteuid() == 0 else -1,
        "bus": bus.partition("unix:path=")[2].split(",")[0].split(";")[0],
        "runtime_dir": os.environ.get("XDG_RUNTIME_DIR", ""),
        "own": [paths.runtime(), paths.state()],
        "user_namespace": os.stat("/proc/self/ns/user").st_ino,
    }


def defaults() -> dict[str, Any]:
    """Where defaults of options come from: configuration files, with their text, and variables.

    They are sent as they are; nsrun/cli/settings.py makes sense of them. Raises RefusedError.
    """
    files = []
    for path in paths.configuration():
        try:
            with open(path, "rb") as file:
                files.append((path, file.read().decode("utf-8", "surrogateescape")))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise RefusedError(f"read {path}", str(error.strerror), "", RUN_FAILED) from None
    environment = {name: text for name, text in os.environ.items() if name.startswith("TTP_")}
    return {"files": files, "environment": environment}


_DOCTOR = "the command was not run; ttp doctor tells what this machine lacks"
_WHERE = "it is gone, or hidden inside, or closed to root: go elsewhere, or give --workdir"
_SOCKET = "the command was not run; --allow-socket takes the path of a socket that is there"
_AGAIN = "run the same command again: it starts a new one"
_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC


def _gateway(arguments: list[str], defaults: dict[str, Any]) -> str:
    """The gateway's name, by a glance: the supervisor parses properly, and may say "not mine"."""
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument in ("--gateway", "-g"):
            return "".join(arguments[index + 1 : index + 2])
        if argument.startswith("--gateway="):
            return argument[10:]
    if arguments[0] == "exec":  # it is looked for on every gateway, if there are several
        return _only_gateway()
    name = defaults["environment"].get("TTP_GATEWAY", "")
    for _path, text in reversed(defaults["files"]):
        section = ""
        for line in () if name else text.splitlines():
            key, _, value = line.partition("#")[0].partition("=")
            if key.startswith("["):
                section = key.strip()
            elif section == "[run]" and key.strip() == "gateway":
                name = value.strip(" \t\"'")
    return name or "default"


def _only_gateway() -> str:
    """The one gateway that may be up. Raises NotHereError when there is none, or several."""
    try:
        names = os.listdir(os.path.dirname(paths.gateway("any")))
    except OSError:
        names = []
    if len(names) != 1:
        raise NotHereError
    return names[0]


def _exec(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Like execvpe(3), with the exit codes of env(1)."""
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores these; a command must not
        _signal.signal(number, _signal.SIG_DFL)
    program = command[0]
    directories = environment.get("PATH", os.defpath).split(":")
    beside = [f"{entry or '.'}/{program}" for entry in directories]
    candidates = [program] if "/" in program else beside
    code, cause = NOT_FOUND, "not found"
    for path in candidates if program else ():
        try:
            os.execve(path, command, environment)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            code, cause = NOT_EXECUTABLE, error.strerror or str(error)
            if error.errno == 8:  # ENOEXEC: a script without a first line is the shell's
                os.execve("/bin/sh", ["sh", path, *command[1:]], environment)
    complain(visible(f"ttp: cannot run {program}: {cause}") + "\n")
    raise SystemExit(code)


def complain(text: str) -> None:
    try:
        os.write(2, text.encode())
    except OSError:
        pass  # who closed standard error does not want to hear it


def _environment() -> dict[str, str]:
    """The environment that we were given: Python may have added LC_CTYPE to it (PEP 538)."""
    environment = dict(os.environ)
    if environment.get("LC_CTYPE") == "C.UTF-8":
        with open("/proc/self/environ", "rb") as original:
            if b"LC_CTYPE=" not in original.read():
                del environment["LC_CTYPE"]
    return environment


class _Context:
    """What json.JSONDecoder gives the C scanner; importing json itself takes 6 ms."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, float


_SCAN = _json.make_scanner(_Context)  # type: ignore[arg-type]


def _encode(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_encode(k)}:{_encode(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_encode(item) for item in value) + "]"
    # of a bool, which is an int, JSON has the name in small letters
    return (
        str(value).lower() if isinstance(value, int) else _json.encode_basestring_ascii(str(value))
    )


if __name__ == "__main__":
    main()
