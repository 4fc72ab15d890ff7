"""The documents keep up with the program: promises, options, targets, and what README shows.

README's ``console`` blocks are transcripts: a line ``$ COMMAND``, then its output. They run in
order in one shell session per block, and the output must be as shown, where ``…`` stands for
anything (a line of its own: for any lines) and every IP address for any address of its family.
"""

from __future__ import annotations

import ast
import ipaddress
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

README = ROOT / "README.md"
PROMISES = [f"P{number}" for number in range(1, 13)]
TARGETS = (
    "demo",
    "test",
    "check",
    "stories",
    "lab",
    "torture",
    "bench",
    "golden",
    "clean",
    "install",
    "deb",
)
PROMPT = "$ "
END_OF_OUTPUT = "-- end of the output of a README command --"


def documents() -> str:
    return "\n".join(file.read_text() for file in [README, *sorted((ROOT / "docs").glob("*.md"))])


def mentioned(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


# ---- promises ----------------------------------------------------------------------------------


def promises_with_a_test() -> set[str]:
    """Arguments of every ``pytest.mark.promise(…)`` in the tests."""
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
                found |= {ast.literal_eval(argument) for argument in node.args}
    return found


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_stands_in_the_threat_model_and_has_a_story(promise: str) -> None:
    """A promise without a test is a hope."""
    assert mentioned(promise, (ROOT / "docs" / "threat-model.md").read_text())
    assert promise in promises_with_a_test(), f'no test is marked pytest.mark.promise("{promise}")'


def test_tests_name_only_promises_that_exist() -> None:
    """A typing error in a marker would hide a promise without a test."""
    assert promises_with_a_test() <= set(PROMISES)


# ---- everyday programs -------------------------------------------------------------------------


def programs_with_a_test() -> list[str]:
    """First arguments of ``pytest.mark.program(…)`` and of test_everyday's ``program(…)``."""
    tree = ast.parse((ROOT / "tests" / "lab" / "test_everyday.py").read_text())
    return [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("program", "pytest.mark.program")
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]


def test_readme_lists_the_programs_that_are_tested() -> None:
    """Its table has no entry without a test, and no test is without an entry."""
    section = README.read_text().partition("## Everyday programs")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", section, re.MULTILINE)
    listed = ", ".join(cells).replace("`", "").split(", ")
    assert sorted(listed) == sorted(programs_with_a_test())


# ---- commands and options ----------------------------------------------------------------------


def commands(command: Any, path: tuple[str, ...] = ("ttp",)) -> Iterator[tuple[str, Any]]:
    """Every command of the program with its full name, hidden ones left out."""
    if command.hidden:
        return
    yield " ".join(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def test_every_command_and_option_is_documented() -> None:
    """In README.md or docs/, by its long name."""
    from typer.main import get_command

    from nsrun.cli.commands import app

    text = documents()
    missing = []
    for name, command in commands(get_command(app)):
        if not mentioned(name, text):
            missing.append(name)
        options = [
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
            if option.startswith("--")
        ]
        missing += [f"{name} {option}" for option in options if not mentioned(option, text)]
    assert not missing, f"not in README.md or docs/: {', '.join(missing)}"


def test_every_exit_code_is_documented() -> None:
    """Scripts rely on them."""
    from nsrun.errors import ExitCode

    text = documents()
    missing = [code.name for code in ExitCode if not re.search(rf"`{code.value}`", text)]
    assert not missing, f"exit codes not in README.md or docs/: {', '.join(missing)}"


def test_bare_make_lists_its_targets() -> None:
    """``make`` alone is the index of what can be done."""
    listed = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert [line.split()[1] for line in listed.stdout.splitlines()] == list(TARGETS)


# ---- transcripts -------------------------------------------------------------------------------


def transcripts() -> list[str]:
    """The ``console`` blocks of README.md."""
    text = README.read_text() if README.exists() else ""
    return re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def steps(block: str) -> list[tuple[str, list[str]]]:
    """Each command of a block with the lines of output that follow it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith(PROMPT):
            found.append((line.removeprefix(PROMPT), []))
        else:
            assert found, f"a console block begins with output: {line}"
            found[-1][1].append(line)
    return found


def without_addresses(text: str) -> str:
    """``<IPv4>`` and ``<IPv6>`` for addresses; not for versions of tor, such as 0.4.9.11."""

    def family(match: re.Match[str]) -> str:
        try:
            return f"<IPv{ipaddress.ip_address(match[0]).version}>"
        except ValueError:
            return match[0]

    text = re.sub(r"(?<![\w.])[1-9]\d*(?:\.\d+){3}(?!\w|\.\d)", family, text)
    return re.sub(r"(?<![\w:])[0-9a-fA-F]*:[0-9a-fA-F:]+(?![\w:])", family, text)


def pattern(shown: list[str]) -> str:
    """A regular expression for what a transcript shows."""
    lines = []
    for line in shown:
        if line.strip() == "…":
            lines.append(r"(?:.*\n)*?")
        else:
            parts = without_addresses(line.rstrip()).split("…")
            lines.append(".*".join(map(re.escape, parts)) + r"[ \t]*\n")
    return "".join(lines)


def run_block(block: str, home: Path) -> list[tuple[str, list[str], str]]:
    """Run the commands of a block in one shell: command, output shown, output seen."""
    wanted = steps(block)
    script = "".join(f"{command}\nprintf '%s\\n' '{END_OF_OUTPUT}'\n" for command, _ in wanted)
    changes = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "XDG_RUNTIME_DIR": f"{home}/run",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["sh", "-s"],
        input=script,
        cwd=ROOT,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    seen = done.stdout.split(f"{END_OF_OUTPUT}\n")
    assert len(seen) == len(wanted) + 1, f"the shell ended early:\n{done.stdout}"
    return [(*step, output) for step, output in zip(wanted, seen, strict=False)]


@pytest.mark.parametrize(
    ("shown", "seen", "same"),
    [
        ("exit 11.5.0.7", "exit 11.9.0.7\n", True),
        ("exit 11.5.0.7", "exit 2001:db8::7\n", False),
        ("up in … s", "up in 2.4 s\n", True),
        ("up in … s", "up in 2.4 s, but leaks\n", False),
        ("a\n…\nz", "a\nb\nc\nz\n", True),
        ("a\nz", "a\nb\nz\n", False),
        ("11.5.0.7:443, [2001:db8::7]:443", "11.5.0.8:443, [2001:db8::8]:443\n", True),
        ("11.5.0.7:443", "11.5.0.7:80\n", False),
        ("at 12:30:45", "at 12:30:46\n", False),
        ("tor 0.4.9.11", "tor 0.4.8.1\n", False),
    ],
)
def test_a_transcript_matches_what_it_should(shown: str, seen: str, same: bool) -> None:
    """The comparison itself: too lax, and README could show anything."""
    found = re.fullmatch(pattern(shown.splitlines()), without_addresses(seen))
    assert bool(found) is same


@pytest.mark.lab
@pytest.mark.timeout(420)
def test_readme_transcripts_are_true(user_home: Path) -> None:
    """Every command that README shows is run, and prints what README says it prints."""
    blocks = transcripts()
    assert blocks, "README.md shows no console block"
    try:
        for block in blocks:
            for command, shown, seen in run_block(block, user_home):
                assert re.fullmatch(pattern(shown), without_addresses(seen)), (
                    f"$ {command}\nREADME shows:\n" + "\n".join(shown) + f"\nit prints:\n{seen}"
                )
    finally:  # also after a failure in the middle
        run_block("$ ttp lab down", user_home)
