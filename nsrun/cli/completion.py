"""Completion by the shell's Tab key: the script that asks for it, and names that are in use now.

Nothing is started for it, and what does not answer has no names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nsrun.errors import NsrunError

VARIABLE = "_TTP_COMPLETE"  # the script sets it, with the name of the shell


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell to print it for.", show_default=False)],
) -> None:
    """Print a script that completes commands, options and names, to be read by your shell.

    bash: source <(ttp completion bash). zsh: the same, after compinit. fish: ttp completion fish |
    source.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name="ttp", complete_var=VARIABLE, shell=shell))


def answer_if_asked() -> None:
    """Let typer answer the script, if that is who runs us."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()


def gateways() -> list[str]:
    """Names of gateways that are up, and of those that a configuration file describes."""
    from nsrun.cli import settings
    from nsrun.gateway import control

    found = set()
    with suppress(NsrunError, OSError):
        found |= {*control.running()}
    with suppress(NsrunError):  # the command itself will say what is wrong with a file
        found |= {*settings.here().gateways}
    return sorted(found)


def workloads() -> list[str]:
    """Names of workloads of any gateway, and of detached ones that have ended."""
    from nsrun import inventory

    with suppress(NsrunError, OSError):
        return [one.name for one in inventory.every(None)[0]]
    return []


def programs(context: typer.Context) -> list[str]:
    """Programs of PATH, for the first word of a command; for the others the shell offers files."""
    found: set[str] = set()
    for directory in () if context.params.get("command") else os.get_exec_path():
        with suppress(OSError):
            found |= {entry.name for entry in Path(directory).iterdir()}
    return sorted(found)


def labs() -> list[str]:
    """Names of labs that are up."""
    from nsrun.lab import control

    with suppress(NsrunError, OSError):
        return control.names()
    return []
