"""``ttp doctor`` on this machine, and on one that lacks something: taken away in namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT, SBIN
from lab_helpers import TTP
from users import lacking

NO_TUN = "mount -t tmpfs none /dev/net"
NO_USERNS = "echo 0 >/proc/sys/user/max_user_namespaces"


def without(program: str) -> str:
    """Shell commands that take a program of the system away: what is left cannot be executed."""
    found = f"$(PATH=$PATH{SBIN} which -a {program})"
    return f'for path in {found}; do mount --bind /dev/null "$path"; done'


def ask(prefix: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, "env", *words, TTP, "doctor"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def checks(prefix: list[str], *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    command = [*prefix, "env", *words, TTP, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout
    found = json.loads(done.stdout)
    assert found["ok"] is (code == 0)
    return {one["name"]: one for one in found["checks"]}


def test_this_machine_is_fit(as_user: list[str]) -> None:
    """Every test after this one needs that; what was tried is listed, aligned and in order."""
    done = ask(as_user)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {state for state, _ in rows} <= {"ok", "warning", "do:"}
    tried = "python tor nft ip setpriv dnsmasq openssl user seccomp overlay network sysfs sysctls"
    then = "ipv6 nftables tun pasta slirp4netns nat, veth configuration runtime state clock"
    assert [row[1].split()[0] for row in rows] == f"{tried} {then}".split()
    assert len({line.index(line.split()[-1]) for line in done.stdout.splitlines()[:1]}) == 1


@pytest.mark.root
def test_root_s_machine_is_fit_as_well(as_root: list[str]) -> None:
    """Others' gateways and labs may be listed too."""
    done = subprocess.run([*as_root, TTP, "doctor", "--json"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "name", "found", "do"),
    [
        (NO_USERNS, "user namespaces", "user.max_user_namespaces=0", "sudo sysctl -w user.max"),
        (without("tor"), "tor", "not run", "apt-get install tor"),
        (without("nft"), "nft", "not installed", "apt-get install nftables"),
        (NO_TUN, "tun", "No such file", "modprobe tun"),
        (
            f"{without('pasta')}; {without('slirp4netns')}",
            "pasta",
            "pasta cannot be executed",
            "apt-get install passt",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    as_user: list[str], script: str, name: str, found: str, do: str
) -> None:
    """And the exit code is 1."""
    one = checks(lacking(as_user, script), code=1)[name]
    assert one["state"] == "missing"
    assert found in one["found"]
    assert do in one["do"]


def test_one_uplink_is_enough(as_user: list[str]) -> None:
    """Without the other it is a warning."""
    found = checks(lacking(as_user, without("slirp4netns")))
    assert (found["pasta"]["state"], found["slirp4netns"]["state"]) == ("ok", "warning")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Tor version 0.4.6.9 (git-1).", "its version is 0.4.6, and 0.4.7 is the oldest"),
        ("no idea", "does not say its version, but 'no idea"),
    ],
)
def test_a_tor_that_is_too_old(as_user: list[str], user_home: Path, said: str, found: str) -> None:
    """By what it says: an old tor cannot be had here, so a script says it."""
    (user_home / "tor").write_text(f"#!/bin/sh\necho '{said}'\n")
    (user_home / "tor").chmod(0o755)
    tor = checks(as_user, f"PATH={user_home}:{os.environ['PATH']}", code=1)["tor"]
    assert found in tor["found"]


def test_a_full_disk(as_user: list[str], user_home: Path) -> None:
    """Too little room for what a gateway keeps."""
    small = f"mkdir {user_home}/s && mount -t tmpfs -o size=1m none {user_home}/s"
    found = checks(lacking(as_user, small), f"TTP_STATE_DIR={user_home}/s/ttp", code=1)
    assert "is full: 1 MB are free" in found["state directory"]["found"]
    assert found["runtime directory"]["state"] == "ok"


def test_a_directory_of_somebody_else(as_user: list[str]) -> None:
    """/usr is never a user's own."""
    found = checks(as_user, "TTP_RUNTIME_DIR=/usr", "TTP_STATE_DIR=/usr/none", code=1)
    assert "owned or writable by another user" in found["runtime directory"]["found"]
    assert found["state directory"]["found"] == "/usr cannot be written to"


def test_a_clock_that_is_behind(as_user: list[str], user_home: Path) -> None:
    """A consensus from the future can only mean that."""
    consensus = user_home / "state" / "gateways" / "g" / "tor" / "cached-microdesc-consensus"
    consensus.parent.mkdir(parents=True)
    consensus.touch()
    there = time.time() + 90000
    os.utime(consensus, (there, there))
    where = f"TTP_STATE_DIR={user_home}/state"
    os.chown(user_home / "state", user_home.stat().st_uid, -1)
    clock = checks(as_user, where)["clock"]
    assert clock["state"] == "warning"
    assert "yet there are files of" in clock["found"]


def test_what_a_killed_gateway_left(as_user: list[str], user_home: Path) -> None:
    """Its directory, while nobody holds the lock in it."""
    lock = user_home / "run" / "ttp" / "gateways" / "gone" / "lock"
    subprocess.run([*as_user, "mkdir", "-p", "-m", "700", str(lock.parent)], check=True)
    subprocess.run([*as_user, "chmod", "700", str(lock.parents[1]), str(lock.parents[2])])
    subprocess.run([*as_user, "touch", str(lock)], check=True)
    left = checks(as_user)["left by gateway gone"]
    assert left["state"] == "warning"
    assert str(lock.parent) in left["found"]
    holder = subprocess.Popen(
        [*as_user, "flock", "--no-fork", str(lock), "sh", "-c", "echo; exec sleep 60"], stdout=-1
    )
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        assert "left by gateway gone" not in checks(as_user)
    finally:
        holder.kill()
        holder.communicate()


def test_a_mistake_in_the_configuration(as_user: list[str], user_home: Path) -> None:
    """A file that stops `ttp run` is reported; a variable that means nothing is a warning."""
    file = user_home / "config.toml"
    file.write_text("[run]\nidel = 3\n")
    found = checks(as_user, f"TTP_CONFIG={file}", code=1)["configuration"]
    assert "[run] idel: no such setting" in found["found"]
    found = checks(as_user, "TTP_IDEL=3")["configuration"]
    assert (found["state"], found["do"]) == ("warning", "unset TTP_IDEL")


def test_a_start_without_user_namespaces(as_user: list[str], user_home: Path) -> None:
    """`ttp gateway up` names the setting, as the doctor does, and leaves nothing."""
    apart = [*as_user, "unshare", "--user", "--map-current-user", "--keep-caps", "--net"]
    command = [*lacking(apart, NO_USERNS), TTP, "gateway", "up", "--bootstrap-timeout", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ttp: cannot make a user namespace: forbidden by user.max_user_namespaces=0",
        "hint: sudo sysctl -w user.max_user_namespaces=10000",
    ]
    assert list((user_home / "run" / "ttp" / "gateways").iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kernel.unprivileged_userns_clone", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
    ],
)
def test_settings_of_debian_and_ubuntu_are_told_apart(
    as_user: list[str], setting: str, value: str
) -> None:
    """This kernel has neither: a file stands in for the setting, and EPERM for the refusal."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from nsrun.userns import refusal\n"
        "why = refusal(OSError(1, 'Operation not permitted'))\n"
        "print(why.cause, why.hint, sep='\\n')"
    )
    name = setting.removeprefix("kernel.")
    stand_in = (
        f"mount -t tmpfs none /proc/sys/kernel && echo {value} >/proc/sys/kernel/{name} && cd /"
    )
    command = [*lacking(as_user, stand_in), sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    cause, hint = done.stdout.splitlines()
    assert cause == f"forbidden by {setting}={value}"
    assert hint.startswith(f"sudo sysctl -w {setting}={1 - int(value)}")
