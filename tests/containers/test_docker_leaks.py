"""What leaves a container: every probe of `ttp leaktest`, with every wire of the lab watched.

    container ══ gateway ─uplink══gw-NAME─┐
                                          ├ router ── internet with Tor in it
    host: dockerd ───────eth0══p-host─────┤
                                    LAN ──┘

The control is a container of the same daemon on Docker's own bridge.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from container_probes import FEW, KNOWN, LINK, PLAIN, RAW, as_meant
from docker_host import IMAGE, Dockerd, keepers
from harness import ROOT
from lab_helpers import PLAIN_ORACLE, TTP
from nsrun.lab import control, topology
from nsrun.leak.battery import scene
from nsrun.leak.bench import Bench, make
from nsrun.leak.probes import World
from nsrun.leak.probes.table import PROBES
from nsrun.leak.results import seen
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

ASK = ("curl", "-sS", "--max-time", "20", PLAIN_ORACLE)


def idle(name: str) -> tuple[str, ...]:
    """The end of a line that runs a container in which probes can be made."""
    program = ("-v", f"{ROOT}/nsrun:/probe/nsrun:ro", "--name", name)
    return ("-d", "--stop-signal", "KILL", *program, IMAGE, "sleep", "1000")


def prober(engine: Dockerd, name: str) -> tuple[str, ...]:
    """The prefix of a command in that container; where our Python is, it finds its own."""
    assert engine.docker("exec", name, "sh", "-c", LINK).returncode == 0
    command = ("docker", "--host", engine.host, "exec", "--workdir", "/probe")
    return (*command, "--env", "PYTHONPATH=/probe", name)


def world_of(engine: Dockerd, name: str, world: World) -> World:
    [told] = [one for one in engine.listed() if one["name"] == name]
    own, own6 = told["address"]
    return replace(world, own=own, own6=own6)


@pytest.mark.promise("P1", "P2", "P3", "P5", "P6", "P10", "P12")
def test_no_probe_of_a_container_is_on_any_wire(engine: Dockerd) -> None:
    """As root in it, with what Docker gives; and raw packets, in one that kept that capability."""
    assert engine.run(*idle("boxed")).returncode == 0
    engine.docker("run", "--network", "none", *idle("raw"))
    engine.do(TTP, "docker", "attach-network", "-g", engine.lab.name, "raw")
    bench = Bench(control.describe(engine.lab.name), TTP, engine.directory)
    with scene(bench, engine.lab.name) as here:
        made = make(prober(engine, "boxed"), world_of(engine, "boxed", here.world), PLAIN)
        made |= make(prober(engine, "raw"), world_of(engine, "raw", here.world), RAW)
        verdicts = here.judged(expect_some=True)
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    wrong = {probe.name: made[probe.name] for probe in (*PLAIN, *RAW) if not as_meant(probe, made)}
    assert wrong.keys() <= KNOWN, wrong


@pytest.mark.promise("P12")
def test_control_on_dockers_bridge_they_are_on_the_wire(engine: Dockerd) -> None:
    """A few of the same probes, the same taps: they get to the host's wire, by its forwarding."""
    engine.docker("run", *idle("bridged"))
    few = [probe for probe in PROBES if probe.name in FEW]
    bench = Bench(control.describe(engine.lab.name), TTP, engine.directory)
    with scene(bench, engine.lab.name) as here:
        make(prober(engine, "bridged"), here.world, few)
        [verdict] = [one for one in here.judged(expect_some=False) if one.wire == "host"]
    assert verdict.value is Value.LEAK
    leaked = {one.name for one in few if any(seen(one, leak.frame) for leak in verdict.leaks)}
    assert leaked == FEW


@contextmanager
def silent_host(engine: Dockerd) -> Iterator[None]:
    """While the block runs, the wire of the host carries no more than Tor's own connections."""
    with engine.lab.tap("router", "p-host") as host:
        yield
        own = (topology.HOST, topology.HOST6)
        # who answered before, on the LAN, is looked for again
        known = engine.lab.neighbours(*own, topology.RESOLVER, topology.LAN_WEB)
        verdict = judge("host", host.stop(), [*engine.lab.rules(*own), known])
    assert verdict.value is Value.CONTAINED, as_text([verdict])


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block ends."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.promise("P2", "P6")
def test_the_hosts_resolver_on_loopback_hears_nothing(engine: Dockerd, tmp_path: Path) -> None:
    """Docker asks it for containers on networks of their own; of ours it never learns a name."""
    script = (
        "import socket, sys\n"
        "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "udp.bind(('127.0.0.53', 53)); print('there', flush=True)\n"
        "while True: print(udp.recvfrom(512)[0].hex(), flush=True)\n"
    )
    heard = tmp_path / "heard"
    command = engine.lab.inside("host", sys.executable, "-c", script)
    lookup = "import socket; socket.getaddrinfo('{}', 80)"
    with heard.open("w") as file, subprocess.Popen(command, stdout=file) as decoy, killed(decoy):
        eventually(lambda: "there" in heard.read_text(), "the decoy")
        ask = engine.lab.inside("host", "dig", "+tries=1", "+time=1", "@127.0.0.53", "seen.test")
        subprocess.run(ask, capture_output=True, timeout=20)
        with silent_host(engine):
            name = ("getent", "ahostsv4", "check.torproject.org")
            assert engine.run("--rm", IMAGE, *name).returncode == 0
            engine.run("--rm", IMAGE, "python3", "-c", lookup.format("unseen.test"))
    told = heard.read_text()
    assert b"\x04seen".hex() in told  # control
    assert b"unseen".hex() not in told
    assert b"torproject".hex() not in told


@pytest.mark.promise("P4")
def test_when_the_gateway_is_killed_it_closes(engine: Dockerd) -> None:
    """kill -9 of its supervisor: the link goes, and all that is tried stays inside."""
    with engine.lab.other_gateway("pasta", stays=False) as name:
        inside = engine.lab.do(*engine.lab.inside_argv("host", TTP, "gateway", "inspect", name))
        pid = json.loads(inside.stdout)["pid"]
        line = ("docker", "run", "-g", name, "--", *idle("cut"))
        command = engine.lab.inside("host", TTP, *line)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=engine.environment
        )
        assert done.returncode == 0, done.stderr
        asked = engine.docker("exec", "cut", *ASK)
        assert json.loads(asked.stdout)["IsTor"] is True, asked.stderr  # control
        os.kill(pid, signal.SIGKILL)
        links = ("exec", "cut", "ls", "/sys/class/net")
        eventually(lambda: engine.docker(*links).stdout.split() == ["lo"], "the link to go", 20)
        with silent_host(engine):
            assert engine.docker("exec", "cut", *ASK).returncode != 0
        assert "cut off" in engine.do(TTP, "docker", "ps").stdout


@pytest.mark.promise("P4")
def test_when_dockerd_is_restarted_nothing_opens(engine: Dockerd) -> None:
    """All containers end; one of a restart policy comes back behind Tor, after its holder."""
    engine.run("--restart", "always", *idle("always"))
    with silent_host(engine):
        engine.stop()
        engine.start()
        eventually(lambda: engine.workloads() == ["always"], "the keeper to plug it in", 20)
        eventually(
            lambda: engine.inspect("always")["State"]["Running"], "the container to start", 10
        )
    asked = engine.docker("exec", "always", *ASK)
    assert json.loads(asked.stdout)["IsTor"] is True, asked.stderr


@pytest.mark.promise("P4")
def test_without_keeper_and_gateway_it_stays_closed(engine: Dockerd) -> None:
    """Nobody plugs it in: what is started by hand has loopback only, until it is attached."""
    engine.run("--restart", "always", *idle("alone"))
    for pid in keepers(engine):
        os.kill(pid, signal.SIGKILL)
    with silent_host(engine):
        engine.stop()
        engine.start()
        assert engine.inspect("alone")["State"]["Running"] is False
        engine.docker("start", "ttp-alone")
        engine.docker("start", "alone")
        assert engine.docker("exec", "alone", *ASK).returncode != 0
    done = engine.do(TTP, "docker", "attach-network", "-g", engine.lab.name, "alone")
    assert done.returncode == 0, done.stderr
    asked = engine.docker("exec", "alone", *ASK)
    assert json.loads(asked.stdout)["IsTor"] is True, asked.stderr


@pytest.mark.promise("P1")
def test_with_live_restore_a_container_outlives_dockerd(engine: Dockerd) -> None:
    """While the daemon is away, and when it is back, it is behind Tor as before."""
    before, engine.options = engine.options, ("--live-restore",)
    try:
        engine.stop()
        engine.start()
        engine.run(*idle("living"))
        told = engine.listed()
        with silent_host(engine):
            engine.stop()
            assert engine.listed() == told
            engine.start()
            asked = engine.docker("exec", "living", *ASK)
        assert json.loads(asked.stdout)["IsTor"] is True, asked.stderr
        engine.clear()
    finally:
        engine.stop()
        engine.options = before
        engine.start()
