"""The prompt of ``ttp shell``: it says where you are, without a change to any file. Pure."""

from __future__ import annotations

from pathlib import PurePosixPath


def variables(shell: str, workload: str) -> dict[str, str]:
    """What to set for a shell, so that its prompt names the workload.

    What start-up files say about PS1 stands: bash adds the mark when it is about to show a prompt,
    zsh shows one at the right. Other shells have no better than PS1 itself.
    """
    mark = f"(ttp {workload})"
    match PurePosixPath(shell).name:
        case "bash":
            command = f'case $PS1 in "{mark}"*) ;; *) PS1="{mark} $PS1" ;; esac'
            return {"PROMPT_COMMAND": command}
        case "zsh":
            return {"RPROMPT": mark}
        case _:
            return {"PS1": f"{mark} $ "}
