"""compose/gateway: a gateway of containers alone, and what is left when a part of it is gone.

    app ──w0══w0── gateway, tor ──uplink0══ host: dockerd ──eth0══p-host── router ── internet

Only Tor's connections may be on the host's wire. The control is a container on Docker's own bridge.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from composed import Example, client, example, host_is_silent, relays_forget
from docker_host import IMAGE, Dockerd
from driver_host import Host, loopback_resolver
from harness import ROOT
from lab_helpers import PLAIN_ORACLE, TTP
from nsrun import paths
from nsrun.lab import control, topology
from nsrun.leak.battery import scene
from nsrun.leak.bench import Bench, decoys, make
from nsrun.leak.probes import Expect, Needs, Outcome
from nsrun.leak.probes.table import PROBES
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

ASK = ("curl", "-sS", "--max-time", "20", PLAIN_ORACLE)
BRIEFLY = ("curl", "-sS", "--max-time", "2", PLAIN_ORACLE)
FAILED = (6, 7, 28)  # of curl: no address, no connection, no time
KNOWN = {"power-ring"}  # docs/known-issues.md: Docker's filter of system calls is Docker's
NO_IPV6 = {"dns-udp6", "dns-site6", "tcp6"}  # nor anything that could leak by it
LINK = "10.64.1"
STRAY = f"""
import socket, time
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for payload, whom in ((b"stray", ("{topology.WEB}", 7)), (b"stray", ("{topology.LAN_WEB}", 7))):
        try:
            udp.sendto(payload, whom)
        except OSError:
            pass  # a refusal of the one before
    time.sleep(0.002)  # 1000 a second would fill the taps
"""


@pytest.fixture(scope="module")
def gateway(built: Dockerd) -> Iterator[Example]:
    """The example is up, with the package in its app."""
    variables = {"IMAGE": IMAGE, "URL": PLAIN_ORACLE, "TORRC_D": str(client(built))}
    with example(Example(built, "gateway", variables)) as made:
        yield made


def told(made: Example) -> dict[str, object]:
    """What the oracle says to the app."""
    done = made.run("app", *ASK)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def inside(made: Example, *argv: str) -> list[str]:
    """A command in the gateway's network, with all power over it."""
    return made.engine.lab.inside("host", "nsenter", "-t", str(made.pid("gateway")), "-n", *argv)


@contextmanager
def stray(made: Example, network: str) -> Iterator[None]:
    """Somebody on this network sends datagrams to the internet and to the LAN, all the time."""
    behind = ("--cap-drop", "ALL", "--sysctl", "net.ipv6.conf.all.disable_ipv6=1")
    line = ("run", "--detach", "--name", "stray", "--network", network, *behind, IMAGE)
    done = made.engine.docker(*line, "python3", "-c", STRAY)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        made.engine.docker("rm", "--force", "stray")


def behind(made: Example, *argv: str) -> tuple[str, ...]:
    """``docker run`` of one more workload, as the example's app is started."""
    app = made.engine.inspect(made.container("app"))["HostConfig"]
    return (
        *("run", "--rm", "--network", f"{made.project}_workloads"),
        *(word for server in app["Dns"] for word in ("--dns", server)),
        *("--dns-search", *app["DnsSearch"], "--cap-drop", *app["CapDrop"]),
        *("--security-opt", *app["SecurityOpt"]),
        *(word for key, value in app["Sysctls"].items() for word in ("--sysctl", f"{key}={value}")),
        *argv,
    )


@pytest.mark.promise("P1", "P2", "P3", "P5", "P6", "P12")
def test_no_probe_of_an_app_is_on_any_wire(gateway: Example) -> None:
    """Every probe of `ttp leaktest` that needs no raw socket, as root in the app's container."""
    engine = gateway.engine
    assert told(gateway)["IsTor"] is True
    app = gateway.container("app")
    python = Path(sys.executable)
    place = f"mkdir -p /probe {python.parent}; ln -sf /usr/bin/python3 {python}"
    assert gateway.run("app", "sh", "-c", place).returncode == 0
    assert engine.docker("cp", str(ROOT / "nsrun"), f"{app}:/probe").returncode == 0
    prefix = ("docker", "--host", engine.host, "exec", "--workdir", "/probe")
    networks = engine.inspect(app)["NetworkSettings"]["Networks"]
    [own] = [one["IPAddress"] for one in networks.values()]
    uplink = engine.inspect(gateway.container("gateway"))["NetworkSettings"]["Networks"]
    plain = [probe for probe in PROBES if probe.needs is Needs.NOTHING]
    bench = Bench(control.describe(engine.lab.name), TTP, engine.directory)
    with (
        scene(bench, engine.lab.name) as here,
        decoys(bench.within(f"/proc/{gateway.pid('gateway')}/ns/net")),
    ):
        world = replace(
            here.world,
            own=own,
            interface="w0",
            gateway=f"{LINK}.2",
            uplink=uplink[f"{gateway.project}_outside"]["IPAddress"],
        )
        made = make((*prefix, "--env", "PYTHONPATH=/probe", app), world, plain)
        tor = engine.lab.rules(topology.HOST, topology.HOST6)
        verdicts = replace(here, allowed={**here.allowed, "host": tor}).judged(expect_some=False)
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    wrong = {
        probe.name: made[probe.name]
        for probe in plain
        if (made[probe.name].outcome is Outcome.ANSWERED) != (probe.expect is Expect.TOR)
    }
    assert wrong.keys() <= KNOWN | NO_IPV6, wrong


@pytest.mark.promise("P10")
def test_nobody_has_power(gateway: Example) -> None:
    """No process has a capability, Tor has a user of its own, and nothing can be written."""
    for service, uid in (("gateway", "0"), ("tor", "61042")):
        status = Path(f"/proc/{gateway.pid(service)}/status").read_text()
        fields = {key: value.split() for key, _, value in map(_halves, status.splitlines())}
        powers = [fields[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
        assert powers == [["0" * 16]] * 5
        assert (fields["NoNewPrivs"], set(fields["Uid"])) == (["1"], {uid})
        assert "Read-only" in gateway.run(service, "sh", "-c", "echo >/etc/x").stderr


def _halves(line: str) -> tuple[str, str, str]:
    return line.partition(":")


@pytest.mark.promise("P1", "P2", "P3", "P5", "P12")
def test_the_image_of_probes_finds_nothing(gateway: Example) -> None:
    """Behind the gateway all is contained. On Docker's own bridge, the control, it is not."""
    bundle = f"{paths.runtime()}/labs/{gateway.engine.lab.name}/ca-bundle.pem"
    certificates = ("-v", f"{bundle}:/ca.pem:ro", "--env", "SSL_CERT_FILE=/ca.pem")
    done = gateway.engine.docker(*behind(gateway, *certificates, "ttp/probe"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" contained, 0 inconclusive, 0 leak")
    briefly = ("timeout", "3", "check-leak")  # its first line tells
    done = gateway.engine.docker("run", "--rm", *certificates, "ttp/probe", *briefly)
    assert done.returncode != 0
    assert "IsTor false" in done.stdout


@pytest.mark.promise("P4", "P12")
def test_what_is_not_closed_is_not_a_gateway(built: Dockerd) -> None:
    """With forwarding on, or without power, it ends; and where no Tor is, none is healthy."""
    run = ("run", "--rm", "--user", "0:0")
    guard = ("ttp/gateway", "guard", "eth0", "10.64.1.2")
    done = built.docker(*run, "--cap-add", "NET_ADMIN", "--sysctl", "net.ipv4.ip_forward=1", *guard)
    assert "--sysctl net.ipv4.ip_forward=0" in done.stderr
    assert done.returncode == 1
    done = built.docker(*run, "--sysctl", "net.ipv4.ip_forward=0", *guard)
    assert "Operation not permitted" in done.stderr
    assert done.returncode == 1
    done = built.docker("run", "--rm", "ttp/gateway", "healthy")
    assert "no answer of Tor" in done.stderr
    assert done.returncode == 1


@pytest.mark.promise("P2", "P6")
def test_no_resolver_of_the_host_is_asked(gateway: Example) -> None:
    """Docker's resolver in the app asks Tor, also where the host's own is on loopback."""
    lookup = ("getent", "ahostsv4", "check.torproject.org")
    with loopback_resolver(Host(gateway.engine)) as asked, host_is_silent(gateway.engine):
        done = gateway.engine.docker(*behind(gateway, IMAGE, *lookup))
        assert topology.WEB in done.stdout, done.stderr
    assert asked == []


@pytest.mark.promise("P4")
def test_when_a_part_is_killed_nothing_opens(gateway: Example) -> None:
    """Rules flushed, Tor killed, the namespace's first process killed, while somebody sends."""
    engine = gateway.engine
    with engine.lab.tap("router", "p-host") as host, stray(gateway, "bridge"):
        eventually(lambda: engine.docker("logs", "stray").returncode == 0, "the stray")
        engine.docker("exec", "stray", "sleep", "1")  # it has sent
        verdict = judge("host", host.stop(), engine.lab.rules(topology.HOST, topology.HOST6))
    assert verdict.value is Value.LEAK  # control
    with stray(gateway, f"{gateway.project}_workloads"):
        with host_is_silent(engine):
            engine.lab.do(*inside(gateway, "nft", "flush", "ruleset"))
            assert gateway.run("app", *BRIEFLY).returncode in FAILED
        before = gateway.pid("tor")
        with host_is_silent(engine):
            os.kill(before, signal.SIGKILL)
            eventually(lambda: gateway.pid("tor") not in (0, before), "Tor to be started again", 20)
        with host_is_silent(engine), relays_forget(gateway):
            os.kill(gateway.pid("gateway"), signal.SIGKILL)
            eventually(lambda: gateway.pid("gateway") == 0, "its end")
            assert gateway.run("app", *BRIEFLY).returncode in FAILED
        with host_is_silent(engine):
            done = gateway.compose("up", "-d", "--force-recreate", "-t", "0")
            assert done.returncode == 0, done.stderr
            assert told(gateway)["IsTor"] is True
