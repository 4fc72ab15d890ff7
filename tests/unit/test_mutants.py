"""The table of mutants in docs/mutation.md is that of the plan as it is now."""

from __future__ import annotations

import pytest

from mutants import mutants
from mutation import REPORT, known


@pytest.mark.promise("P12")
def test_every_guard_is_in_the_table_and_none_survived() -> None:
    """Else a guard was added, or changed, without a test that needs it: run tests/mutation.py."""
    assert list(known()) == [mutant.name for mutant in mutants()]
    assert "**survived**" not in REPORT.read_text()


def test_each_mutant_names_its_guard_once() -> None:
    """Two with one name would be one row of the table."""
    names = [mutant.name for mutant in mutants()]
    assert len(names) == len(set(names)) > 100
