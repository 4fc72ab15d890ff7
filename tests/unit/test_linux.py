"""System calls through _ctypes do what their man pages say, for a user in a user namespace too.

Each test runs in a process of its own: most of these calls cannot be taken back.
"""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

from harness import ROOT

PROLOGUE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from nsrun import linux
uid, gid = os.geteuid(), os.getegid()

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def become_root():
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWNET)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")

def status(field):
    with open("/proc/thread-self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(field + ":"))

def errno_of(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.errno, error.filename
"""


def run(prefix: list[str], code: str) -> None:
    program = PROLOGUE + dedent(code)
    command = [*prefix, sys.executable, "-IS", "-c", program, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


def test_importing_it_leaves_ctypes_out() -> None:
    """It is on the hot path, where ctypes would cost 2.4 ms."""
    run([], "assert 'nsrun.linux' in sys.modules and 'ctypes' not in sys.modules")


def test_a_user_gets_a_network_namespace_with_nothing_but_loopback(as_user: list[str]) -> None:
    """unshare(2): a user namespace carries the right to make the others."""
    run(
        as_user,
        """
        assert uid != 0
        before = os.readlink("/proc/self/ns/net")
        become_root()
        assert os.geteuid() == 0
        assert os.readlink("/proc/self/ns/net") != before
        with open("/proc/self/net/dev") as file:
            assert [line.split(":")[0].strip() for line in file if ":" in line] == ["lo"]
        """,
    )


def test_setns_returns_to_a_namespace_held_by_a_descriptor(as_user: list[str]) -> None:
    """setns(2)."""
    run(
        as_user,
        """
        become_root()
        name = os.readlink("/proc/self/ns/net")
        held = os.open("/proc/self/ns/net", os.O_RDONLY)
        linux.unshare(linux.CLONE_NEWNET)
        assert os.readlink("/proc/self/ns/net") != name
        linux.setns(held, linux.CLONE_NEWNET)
        assert os.readlink("/proc/self/ns/net") == name
        """,
    )


def test_a_mount_comes_and_goes_and_stays_private(as_user: list[str]) -> None:
    """mount(2), umount2(2): tmpfs over the home directory, which shows its files again after."""
    run(
        as_user,
        """
        become_root()
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        home = os.environ["HOME"]
        assert os.listdir(home) == ["run"]
        linux.mount("tmpfs", home, "tmpfs", data="mode=0700,size=64k")
        assert os.listdir(home) == []
        write(home + "/file", "")
        linux.umount(home)
        assert os.listdir(home) == ["run"]
        """,
    )


def test_a_bind_mount_becomes_read_only_with_what_is_below(as_user: list[str]) -> None:
    """mount_setattr(2), recursive: EROFS (30) where writing worked before."""
    run(
        as_user,
        """
        become_root()
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        top = os.environ["HOME"]
        linux.mount("tmpfs", top, "tmpfs")
        os.mkdir(top + "/below")
        linux.mount("tmpfs", top + "/below", "tmpfs")
        write(top + "/file", "")
        write(top + "/below/file", "")
        linux.mount_setattr_readonly(top)
        assert errno_of(write, top + "/file", "")[0] == 30
        assert errno_of(write, top + "/below/file", "")[0] == 30
        """,
    )


def test_drop_bounding_keeps_exactly_what_was_asked_for(as_user: list[str]) -> None:
    """PR_CAPBSET_DROP: every capability that this kernel has, but those to keep."""
    run(
        as_user,
        """
        become_root()
        assert int(status("CapBnd"), 16) > 1 << 40
        linux.drop_bounding(["KILL", "AUDIT_WRITE"])
        assert int(status("CapBnd"), 16) == 1 << 5 | 1 << 29  # linux/capability.h
        linux.drop_bounding()
        assert int(status("CapBnd"), 16) == 0
        """,
    )


def test_no_new_privs_is_set_for_good(as_user: list[str]) -> None:
    """prctl(2)."""
    run(
        as_user,
        """
        assert status("NoNewPrivs") == "0"
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        assert status("NoNewPrivs") == "1"
        assert errno_of(linux.prctl, linux.PR_SET_NO_NEW_PRIVS, 0)[0] == 22
        """,
    )


@pytest.mark.parametrize(
    ("call", "errno", "name"),
    [
        ("linux.mount, '/none', '/no/where', '', linux.MS_BIND", 2, "/no/where"),
        ("linux.umount, '/no/where'", 2, "/no/where"),
        ("linux.setns, 9999, linux.CLONE_NEWNET", 9, "setns"),
        ("linux.unshare, -1", 22, "unshare"),
    ],
)
def test_a_failure_names_the_file_or_the_call(
    as_user: list[str], call: str, errno: int, name: str
) -> None:
    """OSError with the kernel's number: ENOENT, EBADF, EINVAL."""
    inside = "become_root()" if "mount" in call else ""
    run(as_user, f"{inside}\nassert errno_of({call}) == ({errno}, {name!r})")
