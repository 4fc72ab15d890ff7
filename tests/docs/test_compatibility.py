"""``docs/compatibility.md`` names only tests that there are, and every row has one or says so."""

from __future__ import annotations

import ast
import re

import pytest

from harness import ROOT

ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "compatibility.md").read_text())
TESTS = {
    node.name: ast.get_docstring(node) or ""
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def named(test: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", test))


def test_every_interface_has_a_test_or_is_said_not_to() -> None:
    """What is said to work, works somewhere in the tests."""
    assert len(ROWS) > 30
    for interface, here, _, test in ROWS:
        if interface in ("interface", "defect", "---"):
            continue
        names = named(test)
        assert names <= TESTS.keys(), f"{interface}: {names - TESTS.keys()}"
        assert names or test == "not yet", interface
        assert names or not here.startswith("yes"), f"{interface}: works, but is not tested"


@pytest.mark.parametrize("defect", [f"T{number}" for number in range(1, 13)])
def test_every_defect_of_the_peer_has_a_test_that_names_it(defect: str) -> None:
    """In its row, and by its number in what the test says of itself."""
    rows = [row for row in ROWS if row[0].split()[0] == defect]
    assert len(rows) == 1, defect
    said = [TESTS[name] for name in named(rows[0][3])]
    assert any(re.search(rf"\b{defect}\b", words) for words in said), defect
