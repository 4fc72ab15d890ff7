"""Tables and JSON, as several commands print them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from nsrun.client import visible


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows below their heads, in columns."""
    shown = [tuple(map(visible, row)) for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def text(content: str) -> None:
    """Print a file as it is. Like print(), nothing where standard output is closed."""
    if sys.stdout is not None:
        sys.stdout.write(content)


def as_json(value: object) -> None:
    print(json.dumps(value, indent=2))
