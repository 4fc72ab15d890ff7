"""Circuits of different workloads, and of one workload before and after a refresh.

Judged by Tor's own STREAM events, not by the exit's address: two isolated workloads may well
have the same exit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab

SITE, OTHER_SITE = "http://11.200.0.80/", "http://11.200.0.81/"
SOCKS = "socks5h://127.0.0.1:9050"
DIRECT = ("--noproxy", "*")  # as redirected, whatever ALL_PROXY says

# Fetches once for every line on standard input, which has curl's arguments; says when it is done
FETCHER = """
import subprocess, sys
print("up", flush=True)
for line in sys.stdin:
    subprocess.run(["curl", "-sSf", "-m20", *line.split()], stdout=subprocess.DEVNULL, check=True)
    print("done", flush=True)
"""


class Fetcher:
    """A workload that fetches when told to."""

    def __init__(self, lab: Lab, name: str, *options: str) -> None:
        self.lab, self.name = lab, name
        run = lab.command(TTP, "run", "-g", lab.name, "--name", name, *options, "--")
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

    def fetch(self, *arguments: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(arguments or (SITE,)) + "\n")
        self.process.stdin.flush()
        assert self._line() == "done\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def fetcher(lab: Lab, name: str, *options: str) -> Iterator[Fetcher]:
    made = Fetcher(lab, name, *options)
    try:
        yield made
    finally:
        made.close()


@dataclass
class Streams:
    """What Tor did while it was watched: (identity, target, circuit) of every stream."""

    seen: list[tuple[str, str, str]] = field(default_factory=list)

    def circuits(self, identity: str = "", target: str = "") -> set[str]:
        return {
            circuit
            for who, where, circuit in self.seen
            if identity in ("", who) and target in ("", where)
        }

    def targets(self, identity: str) -> set[str]:
        return {where for who, where, _ in self.seen if who == identity}

    @property
    def identities(self) -> set[str]:
        return {who for who, _, _ in self.seen}


@contextmanager
def streams(lab: Lab) -> Iterator[Streams]:
    """The streams while the block runs; filled in at its end."""
    control = f"{lab.gateway()['runtime']}/tor/control"
    watch = lab.inside("host", sys.executable, "-m", "nsrun.leak.circuits", control)
    found = Streams()
    with subprocess.Popen(
        watch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        yield found
        answer = json.loads(watcher.communicate("", timeout=20)[0])
        found.seen += [(who, where, circuit) for who, where, circuit in answer]


@pytest.mark.promise("P7")
def test_workloads_share_no_circuit_and_a_refresh_gives_new_ones(lab: Lab) -> None:
    """Two workloads; one is refreshed; the other keeps what it has."""
    with streams(lab) as found, fetcher(lab, "one") as one, fetcher(lab, "two") as two:
        for each in (one, one, two, two):
            each.fetch()
        first, other = one.identity, two.identity
        done = lab.ttp("refresh", "-g", lab.name, "one")
        assert done.returncode == 0, done.stderr
        second = one.identity
        assert done.stdout.split()[-1] == second
        assert two.identity == other
        for each in (one, two):
            each.fetch()
    assert found.identities == {first, second, other}
    sets = [found.circuits(identity) for identity in (first, second, other)]
    assert all(sets)
    assert sum(map(len, sets)) == len(set.union(*sets)), found
    assert len(found.circuits(other)) < 3, "control: a workload's own connections share a circuit"


@pytest.mark.promise("P7")
def test_exec_is_the_same_to_tor(lab: Lab) -> None:
    """A command that joins a workload has its identity, and its circuits."""
    with streams(lab) as found:
        host = Fetcher(lab, "host")
        try:
            host.fetch()
            done = lab.ttp("exec", "-g", lab.name, "host", "curl", "-sS", PLAIN_ORACLE)
            assert done.returncode == 0, done.stderr
        finally:
            host.close()
    assert len(found.identities) == 1
    assert len({where for _, where, _ in found.seen}) > 1, "control: both were seen"
    assert len(found.circuits()) < 3


@pytest.mark.promise("P7")
def test_identities_of_ended_workloads_do_not_come_back(lab: Lab) -> None:
    """One after the other, each command is somebody new to Tor."""
    with streams(lab) as found:
        for _ in range(4):
            assert lab.run("curl", "-sS", SITE).returncode == 0
    assert len(found.identities) == 4
    used = [circuit for identity in found.identities for circuit in found.circuits(identity)]
    assert len(used) == len(set(used)), found


@pytest.mark.promise("P7")
@pytest.mark.parametrize("proxy", [DIRECT, ("-x", SOCKS)], ids=["redirect", "socks"])
def test_by_destination_two_places_share_no_circuit(lab: Lab, proxy: tuple[str, ...]) -> None:
    """Two addresses, two ports of one address; the same place again may share."""
    places = (SITE, SITE, OTHER_SITE, OTHER_SITE.replace("http", "https"))
    options = ("--isolate", "destination", "--socks")
    with streams(lab) as found, fetcher(lab, "by", *options) as by, fetcher(lab, "not") as plain:
        by.fetch("-4", *DIRECT, "http://check.torproject.org/")  # a lookup, too
        for place in places:
            by.fetch("-k", *proxy, place)
            plain.fetch("-k", place)
        who, other = by.identity, plain.identity
    targets = found.targets(who)
    sets = [found.circuits(who, target) for target in targets]
    assert len(targets) == 4  # the name looked up, and three places, of which one is its address
    assert sum(map(len, sets)) == len(set.union(*sets)), found
    # Tor may try one stream on several circuits, so that their number alone says nothing
    shared = [found.circuits(other, target) for target in found.targets(other)]
    assert sum(map(len, shared)) > len(set.union(*shared)), f"control: they share some: {found}"


@pytest.mark.promise("P7")
def test_by_connection_no_two_share_a_circuit(lab: Lab) -> None:
    """To one place, looked up or not, by redirect and by proxy; of two workloads at once."""
    options = ("--isolate", "connection", "--socks")
    with streams(lab) as found, fetcher(lab, "by", *options) as by, fetcher(lab, "too", *options):
        for _ in range(3):
            by.fetch(*DIRECT, SITE)
            by.fetch("-x", SOCKS, SITE)
        by.fetch("-4", *DIRECT, "http://check.torproject.org/")
        refreshed = lab.ttp("refresh", "-g", lab.name, "by")
    assert "240.0.0.0/5" in refreshed.stdout
    assert len(found.identities) == 8  # seven connections, one lookup
    used = [found.circuits(identity) for identity in found.identities]
    assert sum(map(len, used)) == len(set.union(*used)), found


@pytest.mark.promise("P7")
def test_socks_has_the_workloads_identity_and_isolates_by_user(lab: Lab) -> None:
    """A proxy's user and password isolate further (IsolateSOCKSAuth); ttp refresh renews it."""
    with streams(lab) as found, fetcher(lab, "socks", "--socks") as one:
        first = one.identity
        for user in ("", "a:x@", "b:x@", "a:x@", ""):
            one.fetch("-x", SOCKS.replace("//", f"//{user}"), SITE)
        one.fetch(*DIRECT, SITE)
        assert lab.ttp("refresh", "-g", lab.name, "socks").returncode == 0
        second = one.identity
        one.fetch(SITE)
    assert found.identities == {first, second}
    assert 3 <= len(found.circuits(first)) < 6, "three users; redirected like one without"
    assert not found.circuits(first) & found.circuits(second)


# What it was asked for, by a libcurl that refuses .onion names (from 8.1 on), and its error
ONION_FETCH = """
import pycurl, sys
curl = pycurl.Curl()
curl.setopt(pycurl.URL, sys.argv[1])
curl.setopt(pycurl.TIMEOUT, 40)
curl.perform()
"""


@pytest.mark.promise("P1")
def test_a_curl_that_refuses_onion_names_reaches_them_by_socks(lab: Lab) -> None:
    """By ALL_PROXY, as every program on libcurl has it; and by HTTP CONNECT."""
    url = f"http://{lab.status()['onion']}/"
    fetch = (sys.executable, "-c", ONION_FETCH, url)
    refused = lab.run(*fetch)
    assert "RFC 7686" in refused.stderr, "control: it does refuse"
    done = lab.run(*fetch, options=("--socks",))
    assert done.returncode == 0, done.stderr
    tunnel = ("curl", "-sSf", "-m40", "--proxytunnel", "-x", "http://127.0.0.1:8118", url)
    done = lab.run(*tunnel, options=("--socks",))
    assert done.returncode == 0, done.stderr
    assert lab.run(*tunnel).returncode == 7, "without --socks nobody listens there"


@pytest.mark.promise("P8")
def test_nothing_remains_of_a_workload(lab: Lab) -> None:
    """Its link, its elements and its namespace are gone once it has ended."""
    fetcher = Fetcher(lab, "gone")
    inode, others = 0, dict[Path, int]()
    if lab.who == "root":
        inode = Path(f"/proc/{fetcher.process.pid}/ns/net").stat().st_ino
        others = spaces(Path("/proc").glob("[0-9]*/ns/net"))
        assert inode in others.values()
    before = len(json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout))
    fetcher.close()
    eventually(
        lambda: len(json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)) == before - 1,
        "the workload to be forgotten",
        10,
    )
    # only who was there: the next namespace that anybody makes has the number that is free now
    assert inode not in spaces(others).values()


def spaces(paths: Iterable[Path]) -> dict[Path, int]:
    """The numbers of network namespaces, of processes that live."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = path.stat().st_ino
    return found
