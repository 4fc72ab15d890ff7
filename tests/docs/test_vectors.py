"""``docs/leak-vectors.md`` names only probes and tests that there are, and all probes."""

from __future__ import annotations

import re
from fnmatch import filter as matching

from harness import ROOT
from nsrun.leak.inside import CHECKS
from nsrun.leak.probes.table import PROBES

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "leak-vectors.md").read_text())
NAMES = [probe.name for probe in PROBES]
OTHERS = {
    "--strict",
    "ttp check-leak",
    "nf_conntrack_tcp_loose",
}  # what is in this type and is neither


def written() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {
        name
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }


def test_every_way_is_tried_or_said_not_to_be() -> None:
    """By a probe, a check or a test that there is; numbered without a gap."""
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 122))
    known = written() | {check.name for check in CHECKS}
    for number, way, tried_by in ROWS:
        names = set(re.findall(r"`([^`]+)`", tried_by)) - OTHERS
        unknown = {name for name in names if name not in known and not matching(NAMES, name)}
        assert not unknown, f"row {number}, {way}"
        assert names or re.search("does not apply|not tried|the same", tried_by), f"row {number}"


def test_every_probe_is_in_a_row() -> None:
    """One that is in none tries what nobody thought of: then it belongs there."""
    patterns = re.findall(r"`([^`]+)`", " ".join(tried_by for _, _, tried_by in ROWS))
    listed = {name for pattern in patterns for name in matching(NAMES, pattern)}
    missing = set(NAMES) - listed
    assert not missing
