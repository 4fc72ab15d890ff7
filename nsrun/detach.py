"""``ttp run --detach``: a command without a terminal, and somebody who waits for it.

    ttp   the caller's: makes a record, prints the workload's name, ends
     sh   in a session of its own, the monitor: waits for the command, writes down how it ended
      ttp asks for a workload, enters it, and becomes the command

A shell waits, and not we, since it takes a tenth of a megabyte where Python takes four. It is no
part of the workload. Loaded only when it is needed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nsrun import client, records

# $1: the descriptor that locks the record. Standard input is that of --json-status-fd; output is
# the pipe by which the caller learns what becomes of the command, error is the caller's, and the
# shell lets go of both. The name below /proc holds whatever the record is called meanwhile.
MONITOR = """\
held=$1; shift
"$@" & cd /; exec >/dev/null 2>&1
wait $!
end="{\\"exit_code\\": $?}"
echo "$end" 1<>/proc/$$/fd/$held
echo "$end" >&0
"""
UNTOLD = 1  # exit code when the command runs, but its name could not be told
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from nsrun.detach import main; main()"


def leave(arguments: list[str], gateway: str, status_fd: int) -> NoReturn:
    """Start a monitor, and print the workload's name when the command has begun.

    Else end with the code of a client that fails, and say what it said. Raises RefusedError.
    """
    for fd in (0, 1, 2):  # else what we open would become one of these
        with suppress(OSError):
            os.fstat(fd)
            continue
        os.open(os.devnull, os.O_RDWR)
    try:
        record, held = records.new()
    except OSError as error:
        doing = f"keep a record in {error.filename or records.directory()}"
        raise client.RefusedError(doing, str(error.strerror), "", client.RUN_FAILED) from None
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null if status_fd < 0 else status_fd, 0)
        os.dup2(writing, 1)
        os.set_inheritable(held, True)
        root = Path(__file__).parents[1]
        again = (START, str(root), str(record.path), str(held), gateway, *arguments)
        os.execv("/bin/sh", ["sh", "-c", MONITOR, "ttp", str(held), sys.executable, "-ISc", *again])
    os.close(writing)
    os.close(held)
    with os.fdopen(reading) as pipe:
        said = dict(line.split() for line in pipe)
    if "name" in said and "failed" not in said:
        try:
            os.write(1, f"{said['name']}\n".encode())
        except OSError as error:
            doing = f"say that the workload {said['name']} runs"
            raise client.RefusedError(doing, str(error.strerror), "", UNTOLD) from None
        raise SystemExit(0)
    if "name" in said:
        record = records.Record(records.directory(gateway) / said["name"])
    with suppress(FileNotFoundError):
        client.complain(record.log.read_text(errors="surrogateescape"))  # the client's last words
    record.remove()
    raise SystemExit(int(said.get("failed", client.RUN_FAILED)))


def main() -> NoReturn:
    """What the monitor starts: a client, in another session, that becomes the command."""
    path, held, gateway, *arguments = sys.argv[1:]
    os.close(int(held))
    ready = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGQUIT):  # which a shell ignores for what it starts by &
        signal.signal(number, signal.SIG_DFL)
    try:
        try:
            defaults = client.defaults()
            client.become(arguments, gateway, defaults, leaver=Leaver(Path(path), ready))
        except client.NotHereError:
            fail("reach the gateway", "it has just ended")
        except client.RefusedError as failure:
            client.fail(failure)
    except SystemExit as end:
        with suppress(BrokenPipeError):
            os.write(ready, f"failed {end.code}\n".encode())
        raise


class Leaver:
    """A client that has left its caller; its record is at ``path`` until there is a name.

    ``ready`` is a pipe to the caller, which is closed by exec.
    """

    def __init__(self, path: Path, ready: int) -> None:
        self._record, self.ready = records.Record(path), ready
        self._log = os.open(self._record.log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def keeps(self, gateway: str) -> list[str]:
        """Names that another workload should not be given by chance."""
        return records.names(gateway)

    def name(self, gateway: str, name: str, owner: list[int] | None, status: str) -> None:
        """Keep the record as that of the workload ``name``, in place of one that has ended.

        If the command will be another user's, so is the log: some programs open /dev/stderr.
        """
        doing = f"keep a record of the workload {name}"
        try:
            if owner:
                os.fchown(self._log, owner[0], owner[1])
            self._record = self._record.begin(name, gateway, status)
        except FileExistsError:
            fail(doing, "a detached one of that name still runs", f"ttp kill {name}, or --name")
        except OSError as error:
            fail(doing, str(error.strerror))
        try:
            os.write(self.ready, f"name {name}\n".encode())
        except BrokenPipeError:  # the caller was killed, and would never learn the name
            self._record.remove()
            raise SystemExit(client.RUN_FAILED) from None

    def begin(self) -> None:
        """Let standard output and error be the log's. Then there is only exec."""
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)


def fail(doing: str, cause: str, hint: str = "") -> NoReturn:
    client.fail(client.RefusedError(doing, cause, hint, client.RUN_FAILED))
