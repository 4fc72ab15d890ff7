"""Circuits of different workloads, and of one workload before and after a refresh.

Judged by Tor's own STREAM events, not by the exit's address: two isolated workloads may well
have the same exit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import ROOT
from lab_helpers import TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab

# Fetches once for every line on standard input, and says when it is done
FETCHER = """
import sys, urllib.request
print("up", flush=True)
for line in sys.stdin:
    urllib.request.urlopen("http://11.200.0.80/", timeout=20).read()
    print("done", flush=True)
"""


class Fetcher:
    """A workload that fetches when told to."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        run = lab.command(TTP, "run", "-g", lab.name, "--name", name, "--")
        self.process = subprocess.Popen(
            [*run, "/usr/bin/python3", "-c", FETCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "up\n"

    @property
    def identity(self) -> str:
        found = json.loads(self.lab.ttp("ps", "-g", self.lab.name, "--json").stdout)
        return next(str(w["identity"][0]) for w in found if w["name"] == self.name)

    def fetch(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("once\n")
        self.process.stdin.flush()
        assert self._line() == "done\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def circuits(lab: Lab) -> Iterator[dict[str, list[str]]]:
    """What Tor did while the block ran; filled in at its end."""
    control = f"{lab.gateway()['runtime']}/tor/control"
    watch = lab.inside("host", sys.executable, str(ROOT / "tests" / "circuits.py"), control)
    found: dict[str, list[str]] = {}
    with subprocess.Popen(
        watch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        yield found
        found.update(json.loads(watcher.communicate("", timeout=20)[0]))


@pytest.mark.promise("P7")
def test_workloads_share_no_circuit_and_a_refresh_gives_new_ones(lab: Lab) -> None:
    """Two workloads; one is refreshed; the other keeps what it has."""
    with circuits(lab) as found:
        one, two = Fetcher(lab, "one"), Fetcher(lab, "two")
        try:
            for fetcher in (one, one, two, two):
                fetcher.fetch()
            first, other = one.identity, two.identity
            done = lab.ttp("refresh", "-g", lab.name, "one")
            assert done.returncode == 0, done.stderr
            second = one.identity
            assert done.stdout.split()[-1] == second
            assert two.identity == other
            for fetcher in (one, two):
                fetcher.fetch()
        finally:
            one.close()
            two.close()
    assert set(found) == {first, second, other}
    sets = [set(found[identity]) for identity in (first, second, other)]
    assert all(sets)
    assert sum(map(len, sets)) == len(set.union(*sets)), found
    assert len(found[other]) < 3, "control: a workload's own connections do share a circuit"


@pytest.mark.promise("P7")
def test_identities_of_ended_workloads_do_not_come_back(lab: Lab) -> None:
    """One after the other, each command is somebody new to Tor."""
    with circuits(lab) as found:
        for _ in range(4):
            assert lab.run("curl", "-sS", "http://11.200.0.80/").returncode == 0
    assert len(found) == 4
    used = [circuit for identity in found.values() for circuit in identity]
    assert len(used) == len(set(used)), found


@pytest.mark.promise("P8")
def test_nothing_remains_of_a_workload(lab: Lab) -> None:
    """Its link, its elements and its namespace are gone once it has ended."""
    fetcher = Fetcher(lab, "gone")
    space = Path(f"/proc/{fetcher.process.pid}/ns/net")
    inode = space.stat().st_ino if lab.who == "root" else None
    before = len(json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout))
    fetcher.close()
    eventually(
        lambda: len(json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)) == before - 1,
        "the workload to be forgotten",
        10,
    )
    spaces = {
        path.stat().st_ino for path in Path("/proc").glob("[0-9]*/ns/net") if lab.who == "root"
    }
    assert inode is None or inode not in spaces
