"""Where files go, as root, as a user, with XDG variables; and directories that are ours alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT
from nsrun import paths

ALL = "paths.runtime(), paths.state(), paths.cache(), paths.gateway('g')"


def ask(prefix: list[str], expression: str = ALL, **variables: str) -> list[str]:
    """Evaluate an expression over ``paths`` as another user, a line per value."""
    changes = [f"{name}={value}" for name, value in variables.items()]
    code = "import sys; sys.path.insert(0, sys.argv[1]); from nsrun import paths"
    code = f"{code}; print(*({expression}), sep='\\n')"
    command = [*prefix, "env", *changes, sys.executable, "-IS", "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.root
def test_root_uses_the_directories_of_the_system(as_root: list[str]) -> None:
    """File Hierarchy Standard 3.0; root's XDG variables, which sudo may keep, count for nothing."""
    expected = ["/run/ttp", "/var/lib/ttp", "/var/cache/ttp", "/run/ttp/gateways/g"]
    assert ask(as_root, XDG_RUNTIME_DIR="/else", XDG_STATE_HOME="/else") == expected


def test_a_user_has_everything_at_home_and_in_the_runtime_directory(
    as_user: list[str], user_home: Path
) -> None:
    """The defaults of the XDG Base Directory Specification."""
    assert ask(as_user) == [
        f"{user_home}/run/ttp",
        f"{user_home}/.local/state/ttp",
        f"{user_home}/.cache/ttp",
        f"{user_home}/run/ttp/gateways/g",
    ]


def test_xdg_variables_count_if_absolute(as_user: list[str], user_home: Path) -> None:
    """The specification: a relative path is invalid and is to be ignored."""
    found = ask(as_user, XDG_STATE_HOME="/s", XDG_CACHE_HOME="relative")
    assert found[1:3] == ["/s/ttp", f"{user_home}/.cache/ttp"]


def test_without_a_runtime_directory_a_user_gets_one_in_tmp(as_user: list[str]) -> None:
    """As on a machine without logind; private_directory() checks whose it is."""
    uid = ask(as_user, "[__import__('os').geteuid()]")[0]
    found = ask(as_user, XDG_RUNTIME_DIR="/does/not/exist")[0]
    assert found == f"/tmp/ttp-{uid}"


def test_a_private_directory_is_made_closed(tmp_path: Path) -> None:
    """With its parents; a second call changes nothing. Tor's user passes through those of root."""
    wanted = tmp_path / "a" / "b"
    mode = 0o700 if os.geteuid() else 0o711
    for _ in range(2):
        paths.private_directory(str(wanted))
        assert wanted.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Others could put a socket of theirs where ours is expected."""
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="owned or writable by another user"):
        paths.private_directory(str(tmp_path))


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    """Whoever made the link could point it elsewhere later."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(PermissionError):
        paths.private_directory(str(tmp_path / "link"))


def test_a_directory_of_somebody_else_is_refused(as_user: list[str]) -> None:
    """In /tmp, anybody can be there first."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from nsrun import paths\n"
        "try: paths.private_directory('/usr')\n"
        "except PermissionError as error: print(error)"
    )
    command = [*as_user, sys.executable, "-IS", "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert "owned or writable by another user" in done.stdout
