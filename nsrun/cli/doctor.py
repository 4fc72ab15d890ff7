"""``ttp doctor``: try what ttp needs, and say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsrun import __version__, paths
from nsrun.cli import settings
from nsrun.errors import UsageError

if TYPE_CHECKING:
    from nsrun.doctor import Finding

LONGEST = 60  # seconds that all trials together may take; about one is usual


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Try each thing that ttp needs, and say what to do. Exit code 1: something is missing.

    Nothing is changed, and no packet is sent.
    """
    from nsrun.doctor import MISSING, files, programs

    found = [*programs.look(), *_trials(), *_configuration(), *files.look()]
    ok = all(one.state != MISSING for one in found)
    if as_json:
        checks = [asdict(one) for one in found]
        print(json.dumps({"version": __version__, "ok": ok, "checks": checks}, indent=2))
    else:
        width = max(len(one.name) for one in found)
        for one in found:
            print(f"{one.state:<7}  {one.name:<{width}}  {one.found}")
            if one.do:
                print(f"{'':<7}  {'':<{width}}  do: {one.do}")
    raise typer.Exit(not ok)


def _trials() -> Iterator[Finding]:
    """Those of a process of its own, whose namespaces, links and mounts go with it."""
    from nsrun.doctor import MISSING, Finding

    command = (sys.executable, "-P", "-m", "nsrun.doctor")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        yield Finding("trials", MISSING, f"they did not end within {LONGEST} s")
        return
    yield from (Finding(**json.loads(line)) for line in done.stdout.splitlines())
    if done.returncode:
        last = [f"exit code {done.returncode}", *done.stderr.splitlines()][-1]
        yield Finding("trials", MISSING, f"they broke off: {last}", "report this")


def _configuration() -> Iterator[Finding]:
    from nsrun.doctor import MISSING, OK, WARNING, Finding

    there = [path for path in paths.configuration() if Path(path).exists()]
    try:
        found = settings.here()
        for section in settings.SECTIONS:
            for name in ["", *found.gateways]:
                found.all(section, name)
    except UsageError as error:
        yield Finding("configuration", MISSING, str(error).removeprefix("cannot "), error.hint)
    else:
        yield Finding("configuration", OK, ", ".join(there) or "no file")
        for name in found.unknown_variables():
            yield Finding(
                "configuration", WARNING, f"{name} is no variable of ttp", f"unset {name}"
            )
