"""Many workloads: each is somebody of its own, and nothing of them stays behind."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from lab_helpers import TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab

AT_ONCE, STARTS = 25, 200


@dataclass(frozen=True)
class Traces:
    """What workloads leave in a gateway and its supervisor while they live."""

    workloads: int
    links: int
    elements: int
    descriptors: int


def asked(lab: Lab) -> Any:
    return json.loads(lab.ttp("gateway", "inspect", lab.name).stdout)


def traces(lab: Lab) -> Traces:
    found = asked(lab)
    user = () if lab.who == "root" else ("--user", "--preserve-credentials")
    inside = ("nsenter", f"--target={found['tor']['pid']}", *user, "--net", "--")
    links = lab.do(*inside, "ip", "-oneline", "link").stdout
    rules = lab.do(*inside, "/usr/sbin/nft", "list", "table", "inet", "ttp").stdout
    assert "sources4" in rules
    return Traces(
        len(found["workloads"]),
        len(re.findall(r"^\d+: w\d+", links, re.MULTILINE)),
        len(re.findall(r'"w\d+"', rules)),
        len(lab.do("ls", f"/proc/{found['pid']}/fd").stdout.split()),
    )


def at_rest(lab: Lab) -> Traces:
    """The traces of nobody: the ready workloads, which are made again after each start."""
    seen = [traces(lab)]

    def same() -> bool:
        seen.append(traces(lab))
        return seen[-1].workloads == 0 and seen[-1] == seen[-2]

    eventually(same, "the end of every workload", 20)
    return seen[-1]


@pytest.mark.promise("P7")
@pytest.mark.promise("P8")
def test_many_at_once_are_many_and_leave_nothing(lab: Lab) -> None:
    """No two have an identity in common; after kill -9 of all there is no trace of them."""
    before = at_rest(lab)
    command = lab.command(TTP, "run", "--gateway", lab.name, "--", "sleep", "600")
    running = [subprocess.Popen(command) for _ in range(AT_ONCE)]
    try:
        eventually(lambda: len(asked(lab)["workloads"]) == AT_ONCE, "all of them", 30)
        workloads = asked(lab)["workloads"]
        identities = {address for one in workloads for address in one["identity"]}
        assert len(identities) == 2 * AT_ONCE
        assert len({one["link"] for one in workloads}) == AT_ONCE
        during = traces(lab)
        assert during.links >= before.links + AT_ONCE - 3
        assert during.elements > before.elements
        for one in workloads:
            assert lab.do("kill", "-9", str(one["pid"])).returncode == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert at_rest(lab) == before


@pytest.mark.promise("P8")
def test_many_starts_leave_nothing(lab: Lab) -> None:
    """Neither link nor set element nor descriptor of the supervisor."""
    before = at_rest(lab)
    run = f"{TTP} run --gateway {lab.name} -- true"
    done = lab.do("sh", "-c", f"seq {STARTS} | xargs -P 4 -I% {run}", seconds=100)
    assert done.returncode == 0, done.stderr
    assert at_rest(lab) == before
