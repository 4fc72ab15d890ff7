"""A process of ttp that stops before and after every step, so that it can be killed right there.

A fork of the present process runs the real thing: the supervisor's ``main``, or the client's. Where
a step is carried out (``Machine.do``, ``enter.perform``) it says so, and waits to be told to go on.
With ``deep`` it also stops before each program that it starts and each file that it opens to write
(audit events, PEP 578): the moments inside a step. Of functions that are no plan, but a list of
statements, each of these is a moment (``lines``). Everything else is as in production.
"""

from __future__ import annotations

import ast
import faulthandler
import json
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from types import CodeType, FrameType
from typing import Any

from nsrun import enter
from nsrun.apply import Machine
from nsrun.steps import (
    AttachNamespace,
    DropElements,
    DropLink,
    DropNamespace,
    OpenNamespace,
    RemoveFile,
    SetElements,
    Step,
    StopProcess,
)

UNDO = (DropNamespace, DropElements, DropLink, RemoveFile, StopProcess)
PATIENCE = 20.0  # seconds for the next moment: a Tor may have to start before it


@dataclass(frozen=True)
class Moment:
    """``plan``: gateway, workload, guest, plug, option, refresh, undo, enter, deep or line;
    ``when``: before or after.
    """

    plan: str
    when: str
    step: str

    def __str__(self) -> str:
        return f"{self.plan}: {self.when} {self.step}"


Wanted = Callable[[Moment], bool]


class Mortal:
    """``main`` in a child process that stops at every wanted moment."""

    def __init__(
        self,
        main: Callable[[], object],
        wanted: Wanted,
        standard: tuple[int, str],
        *,
        deep: bool = False,
        lines: tuple[Any, ...] = (),
    ) -> None:
        """``standard``: a descriptor to be standard input, and a file for what it prints. It stops
        before each statement of the functions ``lines``.
        """
        self._reports, report = os.pipe()
        go, self._go = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reports)
            os.close(self._go)
            _live(main, _Stage(report, go, wanted), standard, deep, lines)
        os.close(report)
        os.close(go)
        self.pidfd = os.pidfd_open(self.pid)
        self._unread = b""
        self.status: int | None = None

    def moment(self, seconds: float = PATIENCE) -> Moment | None:
        """Wait for the next moment, at which it stands still; None if it ended, or became another
        program, before that.
        """
        while b"\n" not in self._unread:
            assert select.select([self._reports], [], [], seconds)[0], f"no moment in {seconds} s"
            data = os.read(self._reports, 4096)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return Moment(*json.loads(line))

    def go(self) -> None:
        """Let it go on from the moment at which it stands."""
        os.write(self._go, b".")

    def stands(self, seconds: float) -> bool:
        """Whether it comes to a moment, or its end, within so many seconds."""
        return b"\n" in self._unread or bool(select.select([self._reports], [], [], seconds)[0])

    def free(self) -> None:
        """Let it go on, and stop no more."""
        if self.status is None:
            with suppress(BrokenPipeError):  # it has ended by itself
                os.write(self._go, b"!")

    def advance(self, number: int) -> Moment:
        """Go on to the moment of this number, from 0, and stand there."""
        for _ in range(number):
            assert self.moment() is not None, "it ended before its moment"
            self.go()
        found = self.moment()
        assert found is not None, "it ended before its moment"
        return found

    def kill(self) -> None:
        """SIGKILL, wherever it is; no error if it has ended.

        A fork of its own that stands in its place goes on, if nobody else ends it.
        """
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.free()
            self.wait()

    def tell(self) -> None:
        """Have it write down where each of its threads is, if it is ours and lives."""
        if self.status is None:
            os.kill(self.pid, signal.SIGUSR1)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status, as of waitpid(2)."""
        if self.status is None:
            assert select.select([self.pidfd], [], [], seconds)[0], f"no end in {seconds} s"
            self.status = os.waitpid(self.pid, 0)[1]
            for fd in (self.pidfd, self._reports, self._go):
                os.close(fd)
        return self.status


@dataclass
class _Stage:
    """The child's side: says where it is, and waits."""

    report: int
    go: int
    wanted: Wanted

    def __post_init__(self) -> None:
        self._one = threading.Lock()  # workloads are made in a thread

    def at(self, moment: Moment) -> None:
        with self._one:
            if not self.wanted(moment):
                return
            line = json.dumps([moment.plan, moment.when, moment.step])
            os.write(self.report, f"{line}\n".encode())
            match os.read(self.go, 1):
                case b"":  # nobody is there to watch any more
                    os.kill(os.getpid(), signal.SIGKILL)
                case b"!":
                    self.wanted = lambda _: False


def _live(
    main: Callable[[], object],
    stage: _Stage,
    standard: tuple[int, str],
    deep: bool,
    lines: tuple[Any, ...],
) -> None:
    code = 99
    try:
        output = os.open(standard[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number, fd in enumerate((standard[0], output, output)):
            os.dup2(fd, number)
        os.close(output)
        sys.stdin = os.fdopen(0, closefd=False)
        faulthandler.register(signal.SIGUSR1)
        _stop_at_steps(stage)
        _stop_at_operations(stage)
        if deep:
            sys.addaudithook(_Deep(stage))
        if lines:
            sys.settrace(_Lines(stage, lines))
        answer = main()
        code = answer if isinstance(answer, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stop_at_steps(stage: _Stage) -> None:
    original = Machine.do

    def do(self: Machine, step: Step) -> None:
        name = describe(step)
        plan = _plan(self, step)
        stage.at(Moment(plan, "before", name))
        original(self, step)
        stage.at(Moment(plan, "after", name))

    Machine.do = do  # type: ignore[method-assign]


def describe(step: Step) -> str:
    """One line for a step: its kind, and the end of its description, which tells it from others."""
    lines = step.describe().removesuffix("EOF").split()
    return f"{type(step).__name__} … {' '.join(lines)[-60:]}"


def _plan(machine: Machine, step: Step) -> str:
    match step:
        case _ if isinstance(step, UNDO):
            return "undo"
        case AttachNamespace():
            machine.__dict__["made_for"] = "guest"
        case OpenNamespace():
            machine.__dict__["made_for"] = "plug"
    if "tor" in machine.starters:
        return "gateway"
    if "recorder" in machine.starters:  # it may be asked for one
        return "option"
    if isinstance(step, SetElements) and "workload" not in machine.namespaces:
        return "refresh"  # given out long ago
    return str(machine.__dict__.get("made_for", "workload"))


def _stop_at_operations(stage: _Stage) -> None:
    original = enter.perform

    def perform(op: list[Any], descriptors: dict[str, int]) -> None:
        name = " ".join(str(word) for word in op)[:60]
        stage.at(Moment("enter", "before", name))
        original(op, descriptors)
        stage.at(Moment("enter", "after", name))

    enter.perform = perform


class _Deep:
    """An audit hook. Events: https://docs.python.org/3/library/audit_events.html"""

    QUESTION = re.compile(r" -j(son)? |^nft list ")  # changes nothing; some are repeated
    CHANGES = ("os.mkdir", "os.chown", "os.chmod", "os.remove", "os.rmdir", "os.kill")

    def __init__(self, stage: _Stage) -> None:
        self._stage, self._pid = stage, os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            text = " ".join(str(word) for word in arguments[1])
            if self.QUESTION.search(text):
                return
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & 3:
            text = f"open {arguments[0]}"
        elif event in (*self.CHANGES, "socket.bind", "shutil.rmtree"):
            text = f"{event} {arguments[-1 if event == 'socket.bind' else 0]}"
        else:
            return
        if os.getpid() == self._pid:  # and not a fork that is about to be another program
            self._stage.at(Moment("deep", "before", text[:100]))


class _Lines:
    """A trace function (sys.settrace): before each statement of some functions, once each."""

    def __init__(self, stage: _Stage, functions: tuple[Any, ...]) -> None:
        self._stage = stage
        self._statements: dict[CodeType, dict[int, str]] = {}
        for function in functions:
            self._learn(function.__code__, statements(function))

    def _learn(self, code: CodeType, found: dict[int, str]) -> None:
        self._statements[code] = found
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self._learn(inner, found)

    def __call__(self, frame: FrameType, event: str, _argument: object) -> _Lines | None:
        if frame.f_code not in self._statements:
            return None
        if event == "line" and (text := self._statements[frame.f_code].pop(frame.f_lineno, "")):
            self._stage.at(Moment("line", "before", f"{frame.f_code.co_name}: {text}"))
        return self


def statements(function: Any) -> dict[int, str]:
    """The first lines of a function's simple statements that call something, by their numbers in
    its file: others have no effect outside.
    """
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    begin = code.co_firstlineno - 1
    numbers = {
        node.lineno + begin
        for node in ast.walk(ast.parse(dedent(getsource(function))))
        if isinstance(node, ast.Expr | ast.Assign | ast.Return | ast.Assert)
        and any(isinstance(part, ast.Call) for part in ast.walk(node))
    }
    return {number: lines[number - 1].strip() for number in numbers}
