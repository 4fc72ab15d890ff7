"""Write the man pages of ttp into a directory: ``python3 .ci/man.py DIRECTORY``.

One for the program and one for each of its commands, a group's with all that are in it. What they
say is what `--help` says, read from the commands themselves; so it runs where ttp is installed, and
no page can be out of date. The date is that of SOURCE_DATE_EPOCH, if set, else today.

Sources: man-pages(7), groff_man_style(7); https://reproducible-builds.org/specs/source-date-epoch/
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from nsrun import __version__
from nsrun.cli.commands import app
from nsrun.errors import ExitCode

EXIT_CODES = {
    ExitCode.OK: "success; of ttp run and ttp wait, the command's own code",
    ExitCode.FAILED: "ttp failed; standard error tells why, and what to do",
    ExitCode.USAGE: "the request is wrong, and nothing was changed",
    ExitCode.UNVERIFIED: "behind Tor, but nobody has confirmed it: of ttp start, restart, check",
    ExitCode.RUN_FAILED: "ttp run, exec, shell or wait itself failed",
    ExitCode.NOT_EXECUTABLE: "the command was found, but cannot be executed",
    ExitCode.NOT_FOUND: "the command was not found",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}
VARIABLES = {
    "TTP_CONFIG": "A file with defaults of options, read in place of the user's own.",
    "TTP_RUNTIME_DIR": "Directory of what runs.",
    "TTP_STATE_DIR": "Directory of what gateways keep between runs.",
}
FILES = {
    "/etc/ttp/config.toml": "Defaults of options.",
    "~/.config/ttp/config.toml": "The same, of one user; root has none.",
    "/run/ttp, $XDG_RUNTIME_DIR/ttp": "What runs: sockets, locks, logs. Root's, and a user's.",
    "/var/lib/ttp, ~/.local/state/ttp": "What is kept: Tor's guards, logs of gateways.",
}


def text(words: str) -> str:
    """Words as roff: nothing in them is a macro or an escape; `…` is what one types."""
    words = words.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    words = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", words)
    return re.sub(r"^(?=[.'])", r"\\&", words, flags=re.MULTILINE)


def paragraphs(words: str) -> Iterator[str]:
    for number, part in enumerate(words.split("\n\n")):
        yield from [".PP"] * (number > 0)
        yield text(" ".join(part.split()))


def listed(entries: dict[str, str]) -> Iterator[str]:
    for term, meaning in entries.items():
        yield from (".TP", f".B {text(term)}", text(meaning))


def parameters(command: Any, context: Any) -> Iterator[str]:
    """Options and arguments, with what is said of them."""
    for parameter in command.get_params(context):
        name, meaning = parameter.get_help_record(context) or ("", "")
        meaning = meaning.replace("[required]", "").strip()
        if meaning:
            name = re.sub(r"(?<![\w-])(--?[\w-]+)", r"`\1`", name).replace(" range>", ">")
            yield from (".TP", text(name), text(meaning))


def synopsis(command: Any, context: Any) -> str:
    pieces = [re.sub(r"^\{(.*)\}$", r"\1", one) for one in command.collect_usage_pieces(context)]
    return f"\\fB{text(context.command_path)}\\fR {text(' '.join(pieces))}"


def children(command: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """Commands of a group that are not hidden."""
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield child, child.context_class(child, info_name=name, parent=context)


def described(group: Any, context: Any) -> Iterator[str]:
    """Each command of a group, and of groups in it."""
    for child, inner in children(group, context):
        yield f".SS {text(inner.command_path)}"
        yield from paragraphs(child.help)
        if not hasattr(child, "commands"):
            yield from (".PP", synopsis(child, inner), *parameters(child, inner))
        yield from described(child, inner)


def page(name: str, summary: str, *sections: tuple[str, Iterator[str]]) -> str:
    date = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    day = time.strftime("%Y-%m-%d", date)
    summary = re.split(r"\.(?:\s|$)", summary)[0]
    lines = [
        f'.TH {name.upper()} 1 {day} "ttp {__version__}" "User Commands"',
        ".SH NAME",
        f"{text(name)} \\- {text(summary[:1].lower() + summary[1:])}",
    ]
    for title, body in sections:
        lines += [f".SH {title}", *body]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of each page."""
    program = get_command(app)
    context = program.context_class(program, info_name="ttp")
    commands = list(children(program, context))
    summaries = {f"ttp-{inner.info_name}(1)": child.help for child, inner in commands}
    yield (
        "ttp",
        page(
            "ttp",
            str(program.help),
            ("SYNOPSIS", iter([synopsis(program, context)])),
            ("DESCRIPTION", described_program()),
            ("COMMANDS", listed({k: v.partition("\n\n")[0] for k, v in summaries.items()})),
            ("OPTIONS", parameters(program, context)),
            ("EXIT STATUS", listed({str(int(c)): f"{EXIT_CODES[c]}." for c in ExitCode})),
            ("ENVIRONMENT", listed(VARIABLES)),
            ("FILES", listed(FILES)),
            ("SEE ALSO", iter([".BR tor (1),", ".BR nft (8),", ".BR network_namespaces (7)"])),
        ),
    )
    for child, inner in commands:
        name = f"ttp-{inner.info_name}"
        written = page(
            name,
            child.help,
            ("SYNOPSIS", iter([synopsis(child, inner)])),
            ("DESCRIPTION", paragraphs(child.help)),
            ("OPTIONS", parameters(child, inner)),
            *([("COMMANDS", described(child, inner))] if hasattr(child, "commands") else []),
            ("SEE ALSO", iter([".BR ttp (1)"])),
        )
        yield name, written


def described_program() -> Iterator[str]:
    yield from paragraphs(
        "A command runs in a network namespace of its own, a container in that of Docker's, with "
        "one link, to a gateway in which Tor runs. TCP and DNS go through Tor, and all else is "
        "refused at once. A whole host is led to Tor by a table of rules.\n\n"
        "Each command has a page of its own. An option that names a variable has its default from "
        "there, if it is set, or from a file below."
    )


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, written in pages():
        (directory / f"{name}.1").write_text(written)


if __name__ == "__main__":
    main()
