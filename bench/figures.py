"""Figures: measured values, the median that speaks for them, what it should be, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """One line of the table: the median of some values, and the most or least it should be.

    Figures with the same ``plot`` are drawn together, each under its ``label``; those of others
    than ``ours`` in grey.
    """

    what: str
    values: Sequence[float]
    unit: str
    most: float | None = None
    least: float | None = None
    plot: str = ""
    label: str = ""
    ours: bool = True

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def text(self) -> str:
        return f"{rounded(self.value)}{f' {self.unit}' if self.unit else ''}"

    def cells(self) -> tuple[str, ...]:
        low, high = min(self.values), max(self.values)
        spread = f"{rounded(low)}–{rounded(high)}" if len(self.values) > 1 else ""
        return (self.what, self.text, spread, str(len(self.values)), *self._target())

    def _target(self) -> tuple[str, str]:
        unit = f" {self.unit}" if self.unit else ""
        if self.most is not None:
            return f"≤ {self.most:g}{unit}", "met" if self.value <= self.most else "**not met**"
        if self.least is not None:
            return f"≥ {self.least:g}{unit}", "met" if self.value >= self.least else "**not met**"
        return "", ""


def ratio(what: str, better: Figure, worse: Figure, label: str) -> Figure:
    """Of values that were measured in turns, pair by pair."""
    pairs = zip(better.values, worse.values, strict=True)
    return Figure(what, [a / b for a, b in pairs], "", least=1, plot="traffic", label=label)


def table(figures: Sequence[Figure]) -> str:
    """Markdown that can be read as it is."""
    heads = ("what", "median", "range", "n", "target", "")
    rows = [heads, *(figure.cells() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"| {line} |\n" for line in lines)


def rounded(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
