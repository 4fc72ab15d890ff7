"""Completion by the shell's Tab key: the script that asks for it, and names that are in use now.

Nothing is started for it, and what does not answer has no names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import StrEnum
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
    """Names of gateways that are up."""
    from nsrun.gateway import control

    with suppress(NsrunError, OSError):
        return control.running()
    return []


def workloads() -> list[str]:
    """Names of workloads of any gateway."""
    from nsrun.gateway import control

    with suppress(NsrunError, OSError):
        return [str(one["name"]) for found in control.inspect_all() for one in found["workloads"]]
    return []


def labs() -> list[str]:
    """Names of labs that are up."""
    from nsrun.lab import control

    with suppress(NsrunError, OSError):
        return control.names()
    return []
