"""``docs/compatibility.md`` names only tests that there are, and every row has one or says so."""

from __future__ import annotations

import re

from harness import ROOT

ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "compatibility.md").read_text())


def test_every_interface_has_a_test_or_is_said_not_to() -> None:
    """What is said to work, works somewhere in the tests."""
    files = (ROOT / "tests").rglob("test_*.py")
    known = {
        name
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(ROWS) > 30
    for interface, here, _, test in ROWS:
        if interface in ("interface", "---"):
            continue
        names = set(re.findall(r"`(test_\w+)`", test))
        assert names <= known, f"{interface}: {names - known}"
        assert names or test == "not yet", interface
        assert names or not here.startswith("yes"), f"{interface}: works, but is not tested"
