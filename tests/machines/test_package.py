"""The Debian package: built from this checkout, and installed and removed in a machine, by apt."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import roots
from harness import ROOT, SBIN
from lab_helpers import PLAIN_ORACLE
from machine import Machine
from nsrun.lab import topology

INSTALL = (
    *("apt-get", "install", "--yes", "-qq", "--no-install-recommends"),
    # the machine's own configuration leaves both out
    "--option=DPkg::Options::=--path-include=/usr/share/man/man1/*",
    "--option=DPkg::Options::=--path-include=/usr/share/doc/ttp/*",
)
PURGE = ("apt-get", "purge", "--yes", "-qq", "ttp")
CURL = ("curl", "-sS4", "--max-time", "20", PLAIN_ORACLE)
SITE = "/usr/lib/ttp/lib/python3/site-packages"


def build(to: Path) -> Path:
    """A package, made without a network."""
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(roots.wheels())}
    done = subprocess.run(
        (".ci/package", to),
        cwd=ROOT,
        env=os.environ | wheels,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return next(to.glob("ttp_*_all.deb"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("package"))


@pytest.fixture
def plain(machine: Machine) -> Iterator[Machine]:
    """The machine without the ttp of `make install`."""
    machine.run("rm", "-rf", "/run/ttp")  # the log of tests before this one
    outside = machine.state()
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "none", "/usr/local", check=True)
    machine.run("systemctl", "daemon-reload", check=True)
    yield machine
    machine.run(*PURGE)
    machine.run("umount", "/usr/local", check=True)
    machine.run("systemctl", "daemon-reload", check=True)
    assert machine.changes(outside) == ""


def test_lintian_finds_nothing_and_it_is_the_same_each_time(package: Path, tmp_path: Path) -> None:
    """No error and no warning of Debian's policy; byte for byte what was built before."""
    lint = ("lintian", "--fail-on", "error,warning")
    found = subprocess.run((*lint, package), capture_output=True, text=True, timeout=200)
    assert (found.returncode, found.stdout) == (0, "")
    assert build(tmp_path).read_bytes() == package.read_bytes()


@pytest.mark.promise("P8")
def test_it_is_installed_used_and_removed_by_apt(plain: Machine, package: Path) -> None:
    """With a gateway as a service, and the whole host behind Tor, when it is purged."""
    before = plain.state()
    shutil.copy(package, plain.path("/var/tmp/ttp.deb"))
    plain.run(*INSTALL, "/var/tmp/ttp.deb", seconds=200, check=True)
    plain.run("rm", "/var/tmp/ttp.deb", check=True)

    told = plain.run("sh", "-c", "command -v ttp; ttp --version", user="alice", check=True)
    assert told.stdout.startswith("/usr/bin/ttp\nttp ")
    assert list(plain.path(f"{SITE}/nsrun/__pycache__").glob("client.*.pyc"))
    page = gzip.decompress(plain.path("/usr/share/man/man1/ttp-run.1.gz").read_bytes())
    assert page.startswith(b".TH TTP-RUN 1 ")
    assert plain.path("/usr/share/doc/ttp/copyright").exists()
    loads = ". /usr/share/bash-completion/completions/ttp && complete -p ttp"
    assert plain.run("bash", "-c", loads, check=True).stdout.endswith(" ttp\n")

    assert json.loads(plain.run(*CURL, check=True).stdout) == {"IsTor": False, "IP": topology.WAN}
    plain.run("systemctl", "enable", "--now", "ttp-gateway@default", check=True, seconds=120)
    assert json.loads(plain.run("ttp", "run", "--", *CURL, check=True).stdout)["IsTor"] is True
    plain.run("systemctl", "enable", "ttp.service", check=True)  # for the next boot
    plain.run("ttp", "start", "--torrc", "/etc/ttp/lab.torrc", check=True, seconds=120)
    assert json.loads(plain.run(*CURL, user="alice", check=True).stdout)["IsTor"] is True
    refused = plain.run("ttp", "uninstall")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, "hint: apt remove ttp")
    plain.run(*PURGE, check=True)
    assert json.loads(plain.run(*CURL, check=True).stdout) == {"IsTor": False, "IP": topology.WAN}
    for path in ("/usr/lib/ttp", "/usr/bin/ttp", "/var/lib/ttp", "/var/lib/tor/ttp", "/run/ttp"):
        assert not plain.path(path).exists(), path
    assert plain.changes(before) == ""


def test_pip_installs_a_wheel_as_pipx_does(tmp_path: Path) -> None:
    """In a virtual environment of its own, with a link to it on the PATH."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(roots.wheels())}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}{SBIN}"}
    shutil.copytree(ROOT / "nsrun", tmp_path / "source/nsrun")  # a build writes into its tree
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")

    def do(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    do(sys.executable, "-m", "venv", "venv")
    pip = (tmp_path / "venv/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    do(*pip, "wheel", "--no-deps", "--wheel-dir", "made", "./source")
    do(*pip, "install", *(tmp_path / "made").iterdir())
    (tmp_path / "ttp").symlink_to("venv/bin/ttp")
    assert do("ttp", "--version").startswith("ttp ")
    assert "P1 TCP goes to Tor" in do("ttp", "plan", "--", "true")
