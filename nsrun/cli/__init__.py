"""The command line interface: the only place that prints. Imported off the hot path."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from nsrun import __version__, client, enter
from nsrun.cli import completion
from nsrun.errors import ExitCode, NsrunError, UsageError

UNREAD = (errno.EPIPE, errno.ENOSPC)  # of what has no name, as standard output
CHECK_LEAK = "check-leak"  # what may be used inside a workload
LOGGED = ("restart", "start")  # where --log-format is an option, which may stand before, too
GROUPS = ("config", "docker", "gateway", "lab", "watchdog")  # each a module, with its own commands
ABOUT_WORKLOADS = ("inspect", "kill", "logs", "ps", "refresh", "rm", "wait")  # a module together


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ttp {__version__}")
        raise typer.Exit


def _main(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001  acts by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[  # noqa: ARG001  main() looks for it before anything can fail
        bool, typer.Option("--debug", help="Show a traceback when ttp itself fails.")
    ] = False,
    log_format: Annotated[
        str | None,
        typer.Option("--log-format", metavar="FORMAT", help="Of ttp start and ttp restart."),
    ] = None,
) -> None:
    verb = context.invoked_subcommand or ""
    if log_format is not None:
        if verb not in LOGGED:
            cause = "a session's log keeps the form that it begins with"
            raise UsageError(f"use --log-format with {verb}", cause, "ttp start --log-format json")
        context.default_map = {verb: {"log_format": log_format}}
    if Path(enter.WORKLOAD_MARK).exists() and verb != CHECK_LEAK:
        raise UsageError(
            "use ttp inside a workload",
            "this process is behind Tor already, and so is what it starts",
            "leave out `ttp run`",
        )


def root() -> typer.Typer:
    """The program itself, still without its commands."""
    app = typer.Typer(
        name="ttp",
        help="Put a command, a container or a whole host behind Tor, and prove that nothing leaks.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_main)
    return app


def _app(verb: str) -> typer.Typer:
    """With all commands; but what is started often need not take 40 ms more for the others."""
    app = root()
    if verb in GROUPS:
        app.add_typer(import_module(f"nsrun.cli.{verb}").app, name=verb)
    elif verb in ABOUT_WORKLOADS:
        import_module("nsrun.cli.workload").register(app)
    else:
        app = import_module("nsrun.cli.commands").app
    return app


def main() -> NoReturn:
    """Run the command line. Every failure is one line, a hint and an exit code."""
    debug = "--debug" in sys.argv[1:2]
    verb = " ".join(sys.argv[1 + debug : 2 + debug])
    of_docker = sys.argv[1 + debug : 3 + debug] == ["docker", "run"]
    passing = of_docker or verb in (*client.ENTERING, "wait")  # other codes are a command's own
    completion.answer_if_asked()
    try:
        code = _app(verb)(prog_name="ttp", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # now: at the end of Python it would be too late to say why not
    except NsrunError as error:
        if debug:
            traceback.print_exc()
        code = _fail(str(error), error.hint, error.code, passing)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "ttp"
        message = error.format_message().rstrip(".").replace("\n", " ")
        hint = f"{path} --help"
        code = _fail(message[:1].lower() + message[1:], hint, ExitCode.USAGE, passing)
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and not error.filename and error.errno in UNREAD:
            sys.exit(_unread(error, passing))
        hint = "run with --debug for a traceback, and report it"
        cause = f"{type(error).__name__}: {error}"
        code = _fail(f"an unforeseen error: {cause}", hint, ExitCode.FAILED, passing)
    if code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt  # nsrun/client.py has the last word
    sys.exit(code)


def _unread(error: OSError, passing: bool) -> int:
    """What we print is not read, or not kept. A reader who has seen enough needs no word on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would complain at its end, once more
    if error.errno == errno.EPIPE:
        return ExitCode.FAILED
    return _fail(f"cannot print: {error.strerror}", "", ExitCode.FAILED, passing)


def _fail(message: str, hint: str, code: int, passing: bool) -> int:
    if sys.stderr is not None:  # closed by who started us
        lines = [f"ttp: {message}", *([f"hint: {hint}"] if hint else [])]
        print(*map(client.visible, lines), sep="\n", file=sys.stderr)
    return ExitCode.RUN_FAILED if passing else code
