"""The log of the whole host: lines of one form in one file, and what is in them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from nsrun.host import log, session

RFC3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(session, "LOG", str(tmp_path / "ttp.log"))
    return tmp_path / "ttp.log"


def test_a_line_is_text_or_json_and_tells_the_same(file: Path) -> None:
    """As docs/whole-host.md has the keys; who does not say how, goes on as the file begins."""
    log.write(logging.INFO, "one")
    log.write(logging.INFO, "two", "text")
    assert re.fullmatch(f"{RFC3339} INFO one\n{RFC3339} INFO two\n", file.read_text())
    log.write(logging.INFO, 'a "word"\n', "json")
    log.write(logging.INFO, "and another")
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one.pop("message") for one in told] == ['a "word"\n', "and another"]
    for one in told:
        assert re.fullmatch(RFC3339, one.pop("timestamp"))
        assert one == {"level": "INFO", "logger": "ttp"}


def test_lines_of_another_form_begin_another_file(file: Path) -> None:
    """So that whoever reads JSON reads nothing else; the file of before is kept, and is root's."""
    log.write(logging.INFO, "one", "json")
    log.write(logging.INFO, "two", "text")
    assert json.loads(file.with_name("ttp.log.1").read_text())["message"] == "one"
    assert file.read_text().endswith(" INFO two\n")
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_log_is_roots_alone_also_when_it_begins_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line too many for one file begins another one."""
    monkeypatch.setattr(log, "BYTES", 60)
    log.write(logging.INFO, "one that fills it, and more")
    log.write(logging.INFO, "two")
    old = file.with_name("ttp.log.1")
    assert [one.stat().st_mode & 0o777 for one in (file, old)] == [0o600] * 2
