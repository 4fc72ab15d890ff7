"""Parts killed under traffic: nothing leaves, what can be repaired is, nothing remains.

The gateway is a second one, on the simulated host, behind pasta; its traffic and the strays are on
the host's wire, where only TCP to relays may be.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun.client import PATIENCE
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from probe import TOKEN
from town import eventually

pytestmark = pytest.mark.lab

CURL_TIMED_OUT = 28

# TCP through Tor and UDP that must not pass, without a pause, until it is killed
TRAFFIC = f"""
import socket, time
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for send in (
        lambda: udp.sendto({TOKEN!r}, ("11.200.0.80", 7)),
        lambda: socket.create_connection(("11.200.0.80", 80), 0.2).close(),
    ):
        try:
            send()
        except OSError:
            pass
    time.sleep(0.02)
"""


def inspect(lab: Lab, name: str) -> dict[str, object]:
    done = lab.do(*lab.inside_argv("host", TTP, "gateway", "inspect", name))
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def fetch(lab: Lab, name: str) -> subprocess.CompletedProcess[str]:
    run = (TTP, "run", "-g", name, "--", "curl", "-sS", "--max-time", "20", PLAIN_ORACLE)
    return lab.do(*lab.inside_argv("host", *run))


def kill(lab: Lab, pid: object) -> None:
    assert lab.do("kill", "-9", str(pid)).returncode == 0


@contextmanager
def traffic(lab: Lab, name: str) -> Iterator[subprocess.Popen[bytes]]:
    run = (TTP, "run", "-g", name, "--name", "busy", "--", "/usr/bin/python3", "-c", TRAFFIC)
    with subprocess.Popen(lab.inside("host", *run), stderr=subprocess.PIPE) as process:
        try:
            eventually(
                lambda: any(w["name"] == "busy" for w in inspect(lab, name).get("workloads", [])),  # type: ignore[attr-defined]
                "the traffic to begin",
                20,
            )
            yield process
        finally:
            process.kill()


@contextmanager
def judged(lab: Lab, *others: str) -> Iterator[None]:
    """``others``: addresses that the host has as well."""
    with lab.tap("router", "p-host") as host:
        yield
        rules = lab.rules(topology.HOST, topology.HOST6, *others)
        verdict = judge("host", host.stop(), rules, expect_some=True)
    assert verdict.value is Value.CONTAINED, as_text([verdict])


@pytest.mark.promise("P4")
def test_tor_dies_and_comes_back(lab: Lab) -> None:
    """Until the new one is ready nothing passes; then the same workloads go on."""
    with judged(lab), lab.other_gateway("pasta") as name, traffic(lab, name):
        before = inspect(lab, name)["tor"]
        assert isinstance(before, dict)
        kill(lab, before["pid"])

        def revived() -> bool:
            tor = inspect(lab, name)["tor"]
            return isinstance(tor, dict) and tor["pid"] != before["pid"] and tor["percent"] == 100

        eventually(revived, "another Tor", 30)
        assert json.loads(fetch(lab, name).stdout)["IsTor"] is True


def test_commands_that_come_while_tor_is_started_again_wait(lab: Lab) -> None:
    """And run as soon as it is ready."""
    for _ in range(3):
        tor = lab.gateway()["tor"]
        assert isinstance(tor, dict)
        kill(lab, tor["pid"])
        begin = time.monotonic()
        assert lab.run("true").returncode == 0
        assert time.monotonic() - begin < PATIENCE  # after which the supervisor is given up


@pytest.mark.promise("P4")
def test_tor_stopped_for_a_while_carries_nothing_and_goes_on(lab: Lab) -> None:
    """As a suspended machine, a debugger or the cgroup freezer does: it lives, and is silent."""
    with judged(lab), lab.other_gateway("pasta") as name, traffic(lab, name):
        tor = inspect(lab, name)["tor"]
        assert isinstance(tor, dict)
        run = (TTP, "run", "-g", name, "--", "curl", "-sS", "--max-time", "2", PLAIN_ORACLE)
        assert lab.do("kill", "-STOP", str(tor["pid"])).returncode == 0
        try:
            done = lab.do(*lab.inside_argv("host", *run))
        finally:
            lab.do("kill", "-CONT", str(tor["pid"]))
        assert (done.returncode, done.stdout) == (CURL_TIMED_OUT, ""), done.stderr
        assert json.loads(fetch(lab, name).stdout)["IsTor"] is True
        again = inspect(lab, name)["tor"]
        assert isinstance(again, dict)
        assert again["pid"] == tor["pid"], "it is the same one"


@pytest.mark.promise("P4")
def test_the_uplink_dies_and_comes_back(lab: Lab) -> None:
    """Another pasta, on the same gateway, and traffic again."""
    with judged(lab), lab.other_gateway("pasta") as name, traffic(lab, name):
        before = inspect(lab, name)["uplink"]
        assert isinstance(before, dict)
        kill(lab, before["pid"])

        def revived() -> bool:
            uplink = inspect(lab, name)["uplink"]
            return isinstance(uplink, dict) and uplink["pid"] not in (None, before["pid"])

        eventually(revived, "another pasta", 30)
        done = fetch(lab, name)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["IsTor"] is True


def readdress(lab: Lab, old: str, new: str) -> None:
    """The host leaves a network and joins another one, as by DHCP."""
    commands = (
        f"address delete {old}/24 dev eth0",
        f"address add {new}/24 dev eth0",
        f"route replace default via {topology.ROUTER}",
    )
    for command in commands:
        done = lab.do(*lab.inside_argv("host", "ip", *command.split()))
        assert done.returncode == 0, done.stderr


@pytest.mark.promise("P4")
def test_the_host_moves_to_another_network(lab: Lab) -> None:
    """Tor's connections lead nowhere, and it would not know for minutes: it starts anew at once."""
    elsewhere = "192.168.77.12"
    with judged(lab, elsewhere), ExitStack() as stack:
        # last of all: relays would go on speaking to an address that is gone, in the next test too
        stack.callback(readdress, lab, elsewhere, topology.HOST)
        name = stack.enter_context(lab.other_gateway("pasta"))
        process = stack.enter_context(traffic(lab, name))
        before = inspect(lab, name)["tor"]
        assert isinstance(before, dict)
        readdress(lab, topology.HOST, elsewhere)

        def revived() -> bool:
            tor = inspect(lab, name)["tor"]
            return isinstance(tor, dict) and tor["pid"] != before["pid"]

        eventually(revived, "another Tor", 10)
        assert json.loads(fetch(lab, name).stdout)["IsTor"] is True
        assert process.poll() is None


@pytest.mark.promise("P4", "P8")
def test_the_supervisor_dies_and_takes_all_along(lab: Lab) -> None:
    """Tor and pasta end with it, its workload has no link any more; the next start cleans up."""
    with judged(lab), lab.other_gateway("pasta") as name:
        with traffic(lab, name) as process:
            found = inspect(lab, name)
            pids = [found["pid"], *(found[part]["pid"] for part in ("tor", "uplink"))]  # type: ignore[index]
            kill(lab, pids[0])
            eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their end")
            assert process.poll() is None
            links = f"/proc/{process.pid}/net/dev"
            eventually(lambda: "eth0" not in Path(links).read_text(), "the link to go", 10)
        done = fetch(lab, name)
        assert done.returncode == 125
        assert "it is not up" in done.stderr
        up = (
            TTP,
            "gateway",
            "up",
            name,
            "--uplink",
            "pasta",
            "--torrc",
            str(lab.home / "fragment"),
        )
        again = lab.do(*lab.inside_argv("host", *up))
        assert again.returncode == 0, again.stderr
        assert json.loads(fetch(lab, name).stdout)["IsTor"] is True


@pytest.mark.promise("P8")
def test_clients_killed_at_any_moment_leave_nothing(lab: Lab) -> None:
    """From the first instruction to the running command: no workload, link or element stays."""
    for delay in range(0, 40, 2):
        client = subprocess.Popen(lab.command(TTP, "run", "-g", lab.name, "--", "sleep", "60"))
        time.sleep(delay / 1000)  # the moment that is tested
        client.kill()
        client.wait()
    eventually(
        lambda: json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout) == [],
        "no workload to remain",
        10,
    )
    assert lab.run("true").returncode == 0


@pytest.mark.promise("P4")
def test_before_tor_is_ready_nothing_runs(lab: Lab) -> None:
    """Without a network Tor does not bootstrap: the command is never started, and we say why."""
    name = f"{lab.name}-dark"
    up = (TTP, "gateway", "up", name, "--uplink", "slirp4netns", "--bootstrap-timeout", "1")
    with lab.tap("router", "p-host") as host:
        try:
            done = lab.do(*lab.inside_argv("host", *up))
            assert done.returncode == 1
            assert "cannot reach the Tor network: 1 s passed" in done.stderr
            run = (TTP, "run", "-g", name, "--bootstrap-timeout", "1", "--", "echo", "started")
            done = lab.do(*lab.inside_argv("host", *run))
            assert done.returncode == 125
            assert not done.stdout
        finally:
            lab.do(*lab.inside_argv("host", TTP, "gateway", "down", name))
        capture = host.stop()
    assert not any(TOKEN in frame.data for frame in capture.frames)
