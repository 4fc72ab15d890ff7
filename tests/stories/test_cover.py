"""Our file over /etc/resolv.conf: mounted on what is there, be it a link, and taken away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from harness import ROOT

pytestmark = pytest.mark.root

PROLOGUE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[2])
from nsrun.host import cover
OURS = "ours\\n"
here = Path.cwd()
file, target, source = here / "file", str(here / "resolv.conf"), str(here / "ours")
file.write_text("theirs\\n")
Path(source).write_text(OURS)

def replace(path, text):
    Path("new").write_text(text)
    os.rename("new", path)
"""


def run(directory: Path, code: str) -> None:
    """In a mount namespace of its own."""
    program = PROLOGUE + dedent(code)
    alone = ("unshare", "--mount", "--propagation", "private")
    command = [*alone, sys.executable, "-IS", "-c", program, str(ROOT), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


@pytest.mark.promise("P9")
def test_a_link_is_covered_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Who manages the target renames over it, and that is read when the link is free again."""
    run(
        tmp_path,
        """
        os.symlink("file", target)
        cover.cover(target, source)
        assert cover.is_covered(target, source)
        assert Path(target).read_text() == OURS
        replace("file", "new\\n")
        assert Path(target).read_text() == OURS
        cover.uncover(target, source, OURS)
        assert os.readlink(target) == "file"
        assert Path(target).read_text() == "new\\n"
        """,
    )


def test_a_link_to_nowhere_is_covered_as_well(tmp_path: Path) -> None:
    """Its manager has not come up yet, and finds its way when it does."""
    run(
        tmp_path,
        """
        os.symlink("later", target)
        cover.cover(target, source)
        assert Path(target).read_text() == OURS
        Path("later").write_text("came up\\n")
        cover.uncover(target, source, OURS)
        assert Path(target).read_text() == "came up\\n"
        """,
    )


@pytest.mark.promise("P8", "P9")
def test_what_is_written_into_the_cover_of_a_file_is_handed_on(tmp_path: Path) -> None:
    """In place, by dhclient for instance; else the file is not touched. A rename is refused."""
    run(
        tmp_path,
        """
        replace(target, "theirs\\n")
        before = os.stat(target)
        cover.cover(target, source)
        try:
            replace(target, "refused\\n")
        except OSError as error:
            assert error.errno == 16, error  # EBUSY
        else:
            raise AssertionError("a mount was renamed over")
        cover.uncover(target, source, OURS)
        after = os.stat(target)
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)

        cover.cover(target, source)
        Path(target).write_text("written\\n")
        assert Path(source).read_text() == "written\\n"
        cover.uncover(target, source, OURS)
        assert Path(target).read_text() == "written\\n"
        assert os.stat(target).st_ino == before.st_ino
        """,
    )


@pytest.mark.promise("P9")
def test_only_our_own_mounts_are_taken_away(tmp_path: Path) -> None:
    """One whose file has been removed as well; and none that others have made."""
    run(
        tmp_path,
        """
        from nsrun import linux
        replace(target, "theirs\\n")
        linux.mount(str(file), target, flags=linux.MS_BIND)
        cover.cover(target, source)
        os.unlink(source)
        cover.uncover(target, source, OURS)
        assert not cover.is_covered(target, source)
        assert Path(target).samefile(file)
        """,
    )
