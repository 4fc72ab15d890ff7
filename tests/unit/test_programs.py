"""Programs of a lab end with its holder, even those that it was just starting."""

from __future__ import annotations

import subprocess

from nsrun.lab.programs import bound


def test_a_program_whose_parent_has_died_is_not_begun() -> None:
    """The kernel sends the signal for deaths to come only: setpriv(1) may have asked too late."""
    command = list(map(str, bound(("echo", "begun"))))
    other_parent = ["sh", "-c", '"$@"; exit 0', "sh", *command]
    said = [
        subprocess.run(one, capture_output=True, text=True, timeout=10).stdout
        for one in (command, other_parent)
    ]
    assert said == ["begun\n", ""]
