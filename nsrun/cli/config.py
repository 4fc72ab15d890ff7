"""``ttp config``: what the defaults of options are, and who says so."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from nsrun import paths
from nsrun.cli import settings
from nsrun.cli.settings import DEFAULT, GATEWAY, SECTIONS, Setting

app = typer.Typer(help="Defaults of options: configuration files and the environment.")

Rows = dict[tuple[str, str], Setting]


@app.command()
def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print every setting, its value, and where that comes from: a file, a variable, default."""
    found = settings.here()
    rows: Rows = {}
    for section in SECTIONS:
        for name in ["", *found.gateways] if section == GATEWAY else [""]:
            heading = f"{section}.{name}" if name else section
            given = found.all(section, name)
            rows |= {(heading, found.key(section, one)): value for one, value in given.items()}
    rows |= _directories()
    if as_json:
        print(json.dumps([{"section": s, "key": k, **asdict(one)} for (s, k), one in rows.items()]))
        return
    width = max(len(key) for _, key in rows)
    values = max(len(_toml(one.value)) for one in rows.values())
    last = ""
    for (section, key), one in rows.items():
        if section != last:
            print("\n" * bool(last) + f"[{section}]")
        last = section
        print(f"{key:<{width}} = {_toml(one.value):<{values}}  # {one.source}")


@app.command()
def path() -> None:
    """Print the files that are read if they are there, the strongest last."""
    print(*paths.configuration(), sep="\n")


def _directories() -> Rows:
    """Where ttp keeps its files: by the environment only, as they are needed before any file."""
    found = {"runtime": paths.runtime(), "state": paths.state(), "cache": paths.cache()}
    rows = {}
    for key, value in found.items():
        variable = f"TTP_{key.upper()}_DIR"
        source = variable if key != "cache" and os.environ.get(variable) else DEFAULT
        rows["directories", key] = Setting(value, source)
    return rows


def _toml(value: object) -> str:
    """As it would be written in a file; empty for what is not set."""
    return "" if value is None else json.dumps(value, ensure_ascii=False)
