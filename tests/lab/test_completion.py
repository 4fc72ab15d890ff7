"""The Tab key, in the shells themselves: commands, options, and names of what is up."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab_helpers import TTP, Lab

pytestmark = pytest.mark.lab

BASH = """
source <("$1" completion bash)
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p ttp | sed 's/.*-F \\([^ ]*\\).*/\\1/') ttp
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
autoload -U compinit; compinit -D -u
source <("$1" completion zsh)
shift
words=("$@") CURRENT=$#
compadd() { print -l -- "$@" }
_arguments() { print -l -- "$@" }
_describe() { print -l -- ${(P)@[-1]} }
$_comps[ttp]
"""
FISH = '"$argv[1]" completion fish | source; complete --do-complete "$argv[2..-1]"'


def completed(lab: Lab, shell: str, *words: str) -> str:
    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    path = f"PATH={Path(TTP).parent}:/usr/bin:/bin"
    name = [] if shell == "fish" else ["test"]
    done = lab.do("env", path, shell, "-c", script, *name, TTP, *words)
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_completes_what_there_is(lab: Lab, shell: str) -> None:
    """By really being read by the shell."""
    assert "gateway" in completed(lab, shell, "ttp", "gat")
    assert "--bootstrap-timeout" in completed(lab, shell, "ttp", "run", "--boot")
    assert lab.name in completed(lab, shell, "ttp", "run", "--gateway", lab.name[:2])
    assert lab.name in completed(lab, shell, "ttp", "lab", "down", lab.name[:2])


def test_what_is_not_up_can_be_completed_too(lab: Lab) -> None:
    """A gateway that a configuration file describes, as it starts on demand; programs of PATH."""
    file = lab.home / "completion.toml"
    file.write_text("[gateway.workplace]\n")
    script = ("env", f"TTP_CONFIG={file}", "bash", "-c", BASH, "test", TTP, "ttp", "run")
    path = f"PATH={Path(TTP).parent}:/usr/bin:/bin"
    assert lab.do("env", path, *script, "-g", "work").stdout == "workplace\n"
    assert lab.do("env", path, *script, "--", "setpr").stdout == "setpriv\n"
    assert lab.do("env", path, *script, "--", "cat", "setpr").stdout == "\n"  # files, by the shell


def test_nothing_is_started_for_it(lab: Lab) -> None:
    """Where no gateway is up there is no name, and none comes up."""
    command = ("env", f"TTP_RUNTIME_DIR={lab.home}/none", "bash", "-c", BASH, "test", TTP)
    path = f"PATH={Path(TTP).parent}:/usr/bin:/bin"
    done = lab.do("env", path, *command, "ttp", "gateway", "down", "")
    assert not done.stdout.strip()
    assert not Path(f"{lab.home}/none").exists()
