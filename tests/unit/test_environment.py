"""``--env`` and ``--env-file``: the format of docker's files, and what wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsrun.environment import change, changes, lines


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        (b"A=1\nB=2\n", ["A=1", "B=2"]),
        (b"# no\n\n  \n  # no\nA=1", ["A=1"]),
        (b"A=# yes", ["A=# yes"]),
        (b'A="x y"\n', ['A="x y"']),
        (b"A= x \n", ["A= x "]),
        (b"  A=1\n\tB\n", ["A=1", "B"]),
        (b"A=1\r\nB=\r\n", ["A=1", "B="]),
        (b"A=b=c\n", ["A=b=c"]),
        (b"\xef\xbb\xbfA=1\n", ["A=1"]),
        (b"A=\xff\n", ["A=\udcff"]),
        (b"", []),
    ],
)
def test_a_line_is_a_setting(content: bytes, settings: list[str]) -> None:
    """Comments and blank lines are none; a value is taken as it stands."""
    assert list(lines(content, "f")) == settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"A=1\n=2\n", "f:2: ''"),
        (b"A B=1\n", "f:1: 'A B'"),
        (b"export A=1\n", "f:1: 'export A'"),
        (b"A =1\n", "f:1: 'A '"),
        (b"A=\0\n", "f: it is not a text"),
    ],
)
def test_what_is_no_setting_is_named_by_its_line(content: bytes, words: str) -> None:
    """As docker does: a shell script is not an environment file."""
    with pytest.raises(ValueError, match=f"^{words}"):
        list(lines(content, "f"))


def test_a_name_alone_stands_for_our_own_value() -> None:
    """Or for none, if we have none."""
    assert change("A", {"A": "1"}) == ("A", "1")
    assert change("B", {"A": "1"}) == ("B", None)
    assert change("A=", {"A": "1"}) == ("A", "")


def test_the_last_one_wins(tmp_path: Path) -> None:
    """Files in order, then what the command line says."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("A=1\nB=1\nC=1\n")
    second.write_text("B=2\nC=2\n")
    found = dict(changes([str(first), str(second)], ["C=3"], {}))
    assert found == {"A": "1", "B": "2", "C": "3"}
