"""Run commands and functions as workloads of a gateway, and keep the record of their links."""

from __future__ import annotations

import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from nsrun.errors import ExitCode, NsrunError

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 60.0
GRACE = 15.0  # seconds beyond a time limit, which ttp run itself keeps: TERM, then KILL
ENDED = (-signal.SIGTERM, -signal.SIGKILL)


def program() -> str:
    """The ``ttp`` of this installation."""
    beside = Path(sys.executable).with_name("ttp")
    return str(beside) if beside.exists() else "ttp"


@dataclass(frozen=True)
class Record:
    """What one command sent and received."""

    command: str
    file: Path
    flaw: str = ""
    """Why the record is not whole; empty if it is."""


@dataclass
class Torified:
    """Commands and functions behind Tor, each a workload with circuits of its own."""

    gateway: str
    directory: Path
    """Where the records go."""
    records: list[Record] = field(default_factory=list)

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = SECONDS,
        input: str | None = None,  # noqa: A002  as of subprocess.run
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` to its end; ``env`` are variables to add to the present ones.

        Raises NsrunError when it could not be started behind Tor, subprocess.TimeoutExpired, and
        subprocess.CalledProcessError with ``check``.
        """
        argv = [os.fspath(word) for word in command]
        given = None if input is None else input.encode()
        done = self._run(argv, shlex.join(argv), timeout, given, env, cwd)
        output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, argv, output, errors)
        return subprocess.CompletedProcess(argv, done.returncode, output, errors)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` in a new process behind Tor; return what it returns, raise what it
        raises.

        Function and arguments are pickled: it must be importable by its name. What it prints goes
        to standard error. Raises NsrunError when it cannot be sent, or its process dies, and
        RuntimeError instead of an exception that cannot be pickled.
        """
        __tracebackhide__ = True  # pytest shows the test, and by the note what was behind Tor
        name = f"{function.__module__}.{getattr(function, '__qualname__', function)}()"
        doing = f"call {name} behind Tor"
        try:
            request = pickle.dumps([entry or str(Path.cwd()) for entry in sys.path])
            request += pickle.dumps((function, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            hint = "the function must be at the top of a module, its arguments plain data"
            raise NsrunError(doing, error, hint) from error
        python = [sys.executable, "-P", "-m", "nsrun.leak.called"]
        search = os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
        )
        done = self._run(python, name, SECONDS, request, {"PYTHONPATH": search}, None)
        sys.stderr.write(done.stderr.decode(errors="replace"))
        if done.returncode or not done.stdout:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            last = f": {words[-1]}" if words else ""
            raise NsrunError(doing, f"its process ended with status {done.returncode}{last}")
        returned, raised, trace = pickle.loads(done.stdout)  # noqa: S301  of our own child
        if raised is not None:
            raised.add_note(f"\nbehind Tor, in {name}:\n{trace}")
            raise raised
        result: T = returned
        return result

    def _run(
        self,
        argv: Sequence[str],
        title: str,
        timeout: float,
        given: bytes | None,
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
    ) -> subprocess.CompletedProcess[bytes]:
        file = self.directory / f"link-{len(self.records)}.pcap"
        self.records.append(Record(title, file, "the command did not end by itself"))
        options = ["--gateway", self.gateway, "--pcap", str(file), "--timeout", str(timeout)]
        began = time.monotonic()
        try:
            done = subprocess.run(
                [program(), "run", *options, "--", *argv],
                input=given,
                stdin=subprocess.DEVNULL if given is None else None,
                capture_output=True,
                timeout=timeout + GRACE,
                env={**os.environ, **(env or {})},
                cwd=cwd,
            )
        except FileNotFoundError as error:
            raise NsrunError(f"run {title} behind Tor", error.strerror, "ttp doctor") from error
        errors = done.stderr.decode(errors="replace")
        if done.returncode == ExitCode.RUN_FAILED and (own := _own_words(errors)):
            self.records.pop()
            raise NsrunError(f"run {title} behind Tor", own[0], "\n".join(own[1:]))
        flaw = next((line for line in _own_words(errors) if str(file) in line), "")
        self.records[-1] = Record(title, file, flaw)
        if done.returncode in ENDED and time.monotonic() - began >= timeout:
            raise subprocess.TimeoutExpired(argv, timeout, done.stdout, done.stderr)
        return done


def _own_words(errors: str) -> list[str]:
    """From where ttp itself speaks on a command's standard error."""
    lines = errors.strip().splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith("ttp: ")), len(lines))
    return [line.removeprefix("ttp: ") for line in lines[start:]]
