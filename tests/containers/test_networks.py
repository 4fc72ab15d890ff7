"""Docker's network driver, asked by a real dockerd, and judged on the wires of its host.

    container ══ gateway ─uplink══gw-NAME─┐
                                          ├ router ── internet with Tor in it
    host: dockerd, driver ─eth0══p-host───┤
                                    LAN ──┘

The host's wire must stay silent. A container on a bridge of the same dockerd is the control.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

from docker_host import IMAGE
from driver_host import CURL, Host, by_tor, container, create, loopback_resolver
from lab_helpers import PLAIN_ORACLE, TTP
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from probe import PROBES, TOKEN
from town import eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

PROBE = ("python3", "/tests/probe.py")
RESOLVE = ("python3", "-c", "import socket, sys; print(socket.gethostbyname(sys.argv[1]))")


@pytest.mark.promise("P1", "P2", "P3", "P5", "P12")
def test_nothing_of_a_container_is_on_any_wire(docker: Host) -> None:
    """Every probe, and traffic by Tor around them: only Tor's is on a wire."""
    lab = docker.lab
    gateway = (topology.GATEWAY, topology.GATEWAY6)
    host_and_lan = (topology.HOST, topology.HOST6, topology.RESOLVER, topology.LAN_WEB)
    with lab.tap("router", f"gw-{lab.name}") as uplink, lab.tap("router", "p-host") as host:
        assert by_tor(docker.run("tor", *CURL, PLAIN_ORACLE))
        sent = json.loads(docker.run("tor", *PROBE))
        assert by_tor(docker.run("tor", *CURL, PLAIN_ORACLE))
        verdicts = [
            judge("uplink", uplink.stop(), lab.rules(*gateway), expect_some=True),
            # whom a container without a guard asked before, on the LAN, the host looks for again
            judge("host", host.stop(), [lab.neighbours(*host_and_lan)]),
        ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)
    assert set(sent) == set(PROBES)
    for name in ("lan-tcp", "metadata"):
        assert "Refused" in sent[name], sent


@pytest.mark.promise("P12")
def test_control_a_container_on_a_bridge_is_seen(docker: Host) -> None:
    """By the same tap, and by the oracle."""
    with docker.lab.tap("router", "p-host") as host:
        assert not by_tor(docker.run("plain", *CURL, PLAIN_ORACLE))
        docker.run("plain", *PROBE)
        verdict = judge("host", host.stop(), [])
    assert verdict.value is Value.LEAK, as_text([verdict])
    assert any(TOKEN in leak.frame.data for leak in verdict.leaks)


@pytest.mark.promise("P5", "P7")
def test_each_container_is_a_workload_of_its_own(docker: Host) -> None:
    """Its identity is its own, and used once, though Docker gives its address out again."""
    with container(docker, "one"), container(docker, "two"):
        first = docker.workloads()
        assert len({tuple(one["identity"]) for one in first}) == 2
        address = docker.docker(
            "inspect", "-f", "{{.NetworkSettings.Networks.tor.IPAddress}}", "two"
        )
        knock = docker.ask("exec", "one", *CURL, f"http://{address}/")
        assert (
            knock.returncode,
            "Connection refused" in knock.stderr or "connect" in knock.stderr,
        ) == (7, True)
        assert docker.lab.about("refresh", first[0]["name"]).returncode == 0
        assert [one["identity"] for one in docker.workloads()] != [one["identity"] for one in first]
    assert docker.workloads() == []
    with container(docker, "three"):
        [third] = docker.workloads()
        assert third["address"][0] in [one["address"][0] for one in first]
        assert third["identity"] not in [one["identity"] for one in first]


@pytest.mark.promise("P8")
def test_a_container_leaves_nothing(docker: Host) -> None:
    """No link on the host, and none in the gateway: killed, stopped or removed from the network."""
    links = ("ip", "-o", "link")
    before = docker.inside(*links)
    with container(docker, "one"):
        docker.docker("kill", "one")
        eventually(lambda: not docker.workloads(), "the end of the workload")
        docker.docker("start", "one")
        assert docker.is_behind_tor("one")
        docker.docker("network", "disconnect", "tor", "one")
        assert docker.workloads() == []
        docker.docker("network", "connect", "tor", "one")
        assert docker.is_behind_tor("one")
    assert docker.workloads() == []
    assert docker.states() == []
    assert docker.inside(*links) == before


@pytest.mark.promise("P1", "P5")
@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("network", "create", "--driver", "ttp", "open"), "add --internal"),
        (("network", "create", "--driver", "ttp", "--internal", "-o", "ttp.x=1", "x"), "ttp.x"),
        (("run", "--publish", "8080:80", "--network", "tor", IMAGE, "true"), "--publish"),
    ],
)
def test_docker_shows_why_it_is_refused(docker: Host, argv: tuple[str, ...], why: str) -> None:
    """What could leak is not made, nor started."""
    done = docker.ask(*argv)
    assert done.returncode != 0
    assert why in done.stderr, done.stderr
    assert docker.workloads() == []
    if argv[0] == "run":
        docker.docker("rm", docker.docker("ps", "--latest", "--quiet"))


@pytest.mark.promise("P1")
def test_a_second_network_is_refused_or_told_of(docker: Host) -> None:
    """Docker lets no driver forbid another's network; whoever asks for the status is told."""
    with container(docker, "plain-first", network="plain"):
        done = docker.ask("network", "connect", "tor", "plain-first")
        assert "it has another network already (eth0)" in done.stderr
    with container(docker, "tor-first"):
        assert docker.status()[0] == 0
        docker.docker("network", "connect", "plain", "tor-first")
        code, told = docker.status()
        assert (code, told["containers"][0]["links"]) == (1, ["eth0", "eth1"])
        assert "LEAKS by its other network: plain" in docker.dockerd.do(TTP, "docker", "ps").stdout
        docker.docker("network", "disconnect", "plain", "tor-first")
        assert docker.status()[0] == 0


@pytest.mark.promise("P2", "P6")
def test_the_host_s_own_resolver_is_not_asked(docker: Host) -> None:
    """This Docker would ask it from the host. The control is a container on a bridge."""
    name = b"\x05docks\x07example".hex()
    pinned = ("--network", "name=tor,driver-opt=ttp.dns=pinned", "--dns", "192.0.2.53")
    with loopback_resolver(docker) as asked:
        done = docker.ask("run", "--rm", "--network", "tor", IMAGE, "true")
        assert "this Docker would ask the host's resolver 127.0.0.53" in done.stderr
        said = docker.docker("run", "--rm", *pinned, IMAGE, *RESOLVE, "check.torproject.org")
        assert said == topology.WEB
    assert asked == []
    with loopback_resolver(docker) as asked:
        command = ("run", "--rm", "--network", "plain", IMAGE)
        docker.ask(*command, "timeout", "2", *RESOLVE, "docks.example")
    assert any(name in question for question in asked)


@pytest.mark.promise("P4", "P8")
def test_without_its_driver_docker_starts_nothing(docker: Host) -> None:
    """What runs, runs on behind Tor, and with a new driver is known as before."""
    with container(docker, "one"):
        docker.stop_driver(signal.SIGKILL)
        assert docker.is_behind_tor("one")
        begun = time.monotonic()
        done = docker.ask("run", "--rm", "--network", "tor", IMAGE, "true")
        assert done.returncode == 125
        assert "connection refused" in done.stderr
        assert time.monotonic() - begun < 40
        docker.start_driver()
        assert docker.is_behind_tor("one")
    assert docker.workloads() == []


@pytest.mark.promise("P4", "P8")
def test_a_driver_killed_over_a_request_leaves_nothing(docker: Host) -> None:
    """Docker asks the next one again, but its second request is empty: the user is told."""
    supervisor = str(docker.lab.gateway()["pid"])
    docker.lab.do("kill", "-STOP", supervisor)
    try:
        argv = ("docker", "run", "--network", "tor", "--name", "one", IMAGE, "true")
        environment = docker.dockerd.environment
        started = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment)
        known = ("cat", "/run/lab/state/docker-driver.json")
        eventually(lambda: "172." in docker.inside(*known).partition("endpoints")[2], "a request")
        docker.stop_driver(signal.SIGKILL)
    finally:
        docker.lab.do("kill", "-CONT", supervisor)
    docker.start_driver()
    errors = started.communicate(timeout=40)[1]
    assert started.returncode == 125
    assert "the driver ended over the first one; do it again" in errors
    assert (docker.workloads(), docker.states()) == ([], [])
    docker.docker("start", "one")
    docker.docker("rm", "--force", "one")


@pytest.mark.promise("P1", "P8")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_docker_starts_again(docker: Host, number: int) -> None:
    """Containers that it starts again are behind Tor; of those that it killed nothing is left."""
    docker.begin("tor", "always", "--restart", "always")
    docker.begin("tor", "once")
    docker.stop(number)
    docker.dockerd.start()
    eventually(lambda: "always" in docker.docker("ps", "--format", "{{.Names}}"), "restart", 30)
    assert docker.is_behind_tor("always")
    docker.docker("rm", "--force", "once")
    eventually(lambda: len(docker.workloads()) == 1, "the end of what was killed", 20)
    docker.docker("rm", "--force", "always")
    assert docker.workloads() == []
    assert docker.states() == []


@pytest.mark.promise("P1")
def test_containers_outlive_docker(docker: Host) -> None:
    """With live-restore: they are behind Tor before, without dockerd, and after."""
    docker.stop()
    docker.dockerd.options = ("--live-restore",)
    docker.dockerd.start()
    try:
        docker.begin("tor", "one")
        pid = docker.docker("inspect", "--format", "{{.State.Pid}}", "one")
        docker.stop()
        # Docker's resolver has ended with it
        known = ("--resolve", f"check.torproject.org:80:{topology.WEB}")
        seen = subprocess.run(
            docker.lab.command("nsenter", "-t", pid, "-n", "-m", *CURL, *known, PLAIN_ORACLE),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert by_tor(seen.stdout), seen.stderr
        docker.dockerd.start()
        assert docker.states() == ["connected"]
        assert docker.is_behind_tor("one")
        docker.docker("rm", "--force", "one")
        assert docker.workloads() == []
    finally:
        docker.stop()
        docker.dockerd.options = ()
        docker.dockerd.start()


@pytest.mark.promise("P1", "P8")
def test_the_machine_starts_again(docker: Host) -> None:
    """All is killed and /run is empty, but for the gateway's: networks are known as before."""
    docker.begin("tor", "always", "--restart", "always")
    pid = docker.docker("inspect", "--format", "{{.State.Pid}}", "always")
    docker.stop(signal.SIGKILL)
    docker.stop_driver(signal.SIGKILL)
    run = str(docker.dockerd.directory / "exec")
    docker.inside("sh", "-c", "kill -9 $0; umount $1/netns/*; rm -rf $1 /run/docker*", pid, run)
    docker.start_driver()
    docker.dockerd.start()
    eventually(lambda: docker.docker("ps", "--quiet"), "restart", 30)
    assert docker.is_behind_tor("always")
    assert len(docker.workloads()) == 1
    docker.docker("rm", "--force", "always")
    assert docker.workloads() == []


@pytest.mark.torture
@pytest.mark.promise("P4", "P8")
def test_docker_starts_without_its_driver(docker: Host) -> None:
    """It is late, but comes; and starts nothing that would have no network, or another one."""
    docker.begin("tor", "always", "--restart", "always")
    docker.stop(signal.SIGKILL)
    docker.stop_driver(signal.SIGKILL)
    begun = time.monotonic()
    docker.dockerd.start()
    assert time.monotonic() - begun < 25
    assert docker.docker("ps", "--quiet") == ""
    docker.start_driver()
    docker.docker("start", "always")
    assert docker.is_behind_tor("always")
    assert len(docker.workloads()) == 1


@pytest.mark.promise("P4")
def test_without_its_gateway_a_container_has_no_network(docker: Host) -> None:
    """The wire tells; when the gateway is there again, so is the network of the next start."""
    lab = docker.lab
    with lab.other_gateway("pasta", stays=False) as name:
        docker.docker(*create(lab), "--opt", f"ttp.gateway={name}", "other")
        try:
            with container(docker, "one", network="other"):
                assert docker.is_behind_tor("one")
                assert lab.ttp("gateway", "down", name).returncode == 0
                with lab.tap("router", "p-host") as host:
                    eventually(lambda: docker.states() == ["cut off"], "the link's end", 10)
                    assert docker.ask("exec", "one", *CURL, PLAIN_ORACLE).returncode in (6, 7)
                    verdict = judge("host", host.stop(), lab.rules(topology.HOST, topology.HOST6))
                assert verdict.value is Value.CONTAINED, as_text([verdict])
                done = docker.ask("restart", "--time", "0", "one")
                assert f"cannot reach the gateway {name}: it is not up" in done.stderr
        finally:
            docker.docker("network", "rm", "other")
