"""Two releases of Docker under a real systemd: both ways behind Tor, and every accident of a host.

In each machine systemd-resolved is the host's resolver, on loopback; what Docker, or anybody, asked
it for a container would be seen on the machine's wire.
"""

from __future__ import annotations

import json
from functools import partial

import pytest

from container_probes import KNOWN, LINK, PLAIN, as_meant
from docker_host import IMAGE
from docker_machine import ASK, BOTH, DNS, LIVES, LONG, SLEEP, STRAY, Docker
from driver_host import by_tor
from host_machine import START
from lab_helpers import PLAIN_ORACLE
from nsrun.leak.bench import make
from nsrun.leak.verdict import Value, judge
from town import eventually

NO_IPV6 = {"dns-udp6", "dns-site6", "tcp6"}  # containers of the driver have IPv4 only
GATEWAY, DRIVER = "ttp-gateway@default", "ttp-docker-driver"
ALWAYS = ("--restart", "always")


@LONG
def test_systemd_starts_the_driver_when_docker_asks(bare: Docker) -> None:
    """By its socket, and again after kill -9; the gateway is a service that says when it is up."""
    assert bare.active(GATEWAY)
    assert bare.active(f"{DRIVER}.socket")
    bare.machine.run("systemctl", "stop", DRIVER, check=True)
    bare.do("network", "create", "--driver", "ttp", "--internal", "another")
    assert bare.active(DRIVER)
    bare.machine.run("systemctl", "kill", "--signal=KILL", DRIVER, check=True)
    assert by_tor(bare.do("run", "--rm", "--network", "another", *DNS, IMAGE, *ASK))
    bare.do("network", "rm", "another")


@BOTH
@pytest.mark.promise("P1", "P2", "P3", "P6", "P7")
def test_both_ways_lead_to_tor_and_nowhere_else(bare: Docker) -> None:
    """With identities of their own; the control, on Docker's own bridge, is seen on the wire."""
    stray = ("python3", "-c", STRAY)
    with bare.silent():
        bare.do("run", *LIVES, *DNS, "--network", "tor", "--name", "driven", *SLEEP)
        held = bare.ttp("run", "--", *LIVES, "--name", "held", *SLEEP)
        assert held.returncode == 0, held.stderr
        for name in ("driven", "held"):
            assert bare.is_behind_tor(name)
            done = bare.machine.run("docker", "exec", name, *stray)
            assert "No route to host" in done.stderr
        listed = json.loads(bare.machine.run("ttp", "ps", "--json", check=True).stdout)
        assert len({tuple(one["identity"]) for one in listed}) == 2
        # Docker without --dns: not answered, and not asked of anybody
        done = bare.machine.run("docker", "run", "--rm", "--network", "tor", IMAGE, *ASK)
        assert done.returncode
    with bare.machine.lab.tap("router", "p-host") as wire:
        assert not by_tor(bare.do("run", "--rm", "--network", "plain", IMAGE, *ASK))
        verdict = judge("host", wire.stop(), bare.machine.rules())
    assert verdict.value is Value.LEAK


@BOTH
@pytest.mark.promise("P1", "P2", "P3", "P5", "P6", "P10", "P12")
@pytest.mark.parametrize("way", ["held", "driven"])
def test_no_probe_of_a_container_is_on_the_wire(bare: Docker, way: str) -> None:
    """Every one of `ttp leaktest`, as root in a container with what `ttp docker run` leaves it."""
    library = next(bare.machine.path("/usr/local/lib/ttp/lib").glob("python3*")).name
    program = f"/usr/local/lib/ttp/lib/{library}/site-packages/nsrun:/probe/nsrun:ro"
    for name in ("first", "second"):
        if way == "held":
            done = bare.ttp("run", "--", *LIVES, "-v", program, "--name", name, *SLEEP)
            assert done.returncode == 0, done.stderr
        else:
            less = ("--cap-drop", "NET_RAW", "--security-opt", "no-new-privileges")
            network = ("--network", "tor", *DNS, *less)
            bare.do("run", *LIVES, *network, "-v", program, "--name", name, *SLEEP)
    bare.do("exec", "first", "sh", "-c", LINK)
    enter = ("exec", "--workdir", "/probe", "--env", "PYTHONPATH=/probe", "first")
    with bare.silent():
        made = make(bare.machine.command("docker", *enter), bare.world("first", "second"), PLAIN)
    wrong = {probe.name: made[probe.name] for probe in PLAIN if not as_meant(probe, made)}
    assert wrong.keys() <= (KNOWN if way == "held" else KNOWN | NO_IPV6), wrong


@pytest.mark.promise("P4")
@BOTH
@pytest.mark.parametrize(
    "end", ["dockerd", pytest.param("keeper and dockerd", marks=pytest.mark.torture), "machine"]
)
def test_what_docker_starts_again_is_behind_tor(bare: Docker, end: str) -> None:
    """By a restart policy, both ways, after each end; and not a packet beside Tor meanwhile."""
    machine = bare.machine
    bare.do("run", *LIVES, *DNS, *ALWAYS, "--network", "tor", "--name", "driven", *SLEEP)
    assert bare.ttp("run", "--", *LIVES, *ALWAYS, "--name", "held", *SLEEP).returncode == 0
    with bare.silent():
        if end == "machine":
            machine.reboot()
        else:
            if end != "dockerd":
                machine.run("pkill", "-KILL", "-f", "nsrun.containers.keeper", check=True)
            bare.restart()
        for name in ("driven", "held"):
            eventually(partial(bare.runs, name), f"{name} to start", 30)
            assert bare.is_behind_tor(name)
    told = bare.ttp("ps").stdout
    assert "cut off" not in told
    assert "ttp-held" not in told


@LONG
@pytest.mark.promise("P4")
def test_without_a_gateway_nothing_is_started(bare: Docker) -> None:
    """And it is said which; when the gateway is back, one command starts it."""
    machine = bare.machine
    assert bare.ttp("run", "--", *LIVES, *ALWAYS, "--name", "held", *SLEEP).returncode == 0
    machine.run("systemctl", "stop", GATEWAY, check=True)
    bare.restart()
    done = bare.ttp("revive")
    assert done.returncode == 1
    assert done.stderr.startswith("ttp: cannot start held: cannot reach the gateway default: ")
    assert not bare.runs("held")
    machine.run("systemctl", "start", GATEWAY, check=True)
    done = bare.ttp("revive")
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
    assert bare.is_behind_tor("held")


@LONG
@pytest.mark.promise("P4")
def test_when_the_gateway_is_killed_both_are_cut_off(bare: Docker) -> None:
    """What runs stays closed until it is started again, or attached to the next gateway."""
    bare.do("run", *LIVES, *DNS, "--network", "tor", "--name", "driven", *SLEEP)
    assert bare.ttp("run", "--", *LIVES, "--name", "held", *SLEEP).returncode == 0
    machine = bare.machine
    with bare.silent():
        assert bare.is_behind_tor("held")
        machine.run("systemctl", "kill", "--signal=KILL", GATEWAY, check=True)
        for name in ("driven", "held"):
            eventually(partial(bare.is_cut_off, name), "the link to go", 20)
            assert machine.run("docker", "exec", name, *ASK).returncode
        machine.run("systemctl", "start", GATEWAY, check=True)  # as Restart= does in 5 s
        assert bare.ttp("attach-network", "held").returncode == 0
        bare.do("restart", "driven")
        for name in ("driven", "held"):
            assert bare.is_behind_tor(name)


@LONG
@pytest.mark.promise("P1", "P3")
def test_a_second_network_is_told_of_and_a_move_is_closed(bare: Docker) -> None:
    """`driver status` fails while there is one; taken off its network, a container has no link."""
    bare.do("run", *LIVES, *DNS, "--network", "tor", "--name", "driven", *SLEEP)
    assert bare.ttp("driver", "status").returncode == 0
    bare.do("network", "connect", "plain", "driven")
    told = bare.ttp("driver", "status")
    assert (told.returncode, "LEAKS" in told.stdout) == (1, True), told.stderr
    bare.do("network", "disconnect", "plain", "driven")
    with bare.silent():
        bare.do("network", "disconnect", "tor", "driven")
        assert bare.is_cut_off("driven")
        bare.do("network", "connect", "tor", "driven")
        assert bare.is_behind_tor("driven")
    assert bare.ttp("driver", "status").returncode == 0


@LONG
@pytest.mark.promise("P1", "P3")
def test_a_docker_with_ipv6_opens_nothing(bare: Docker) -> None:
    """Its own bridge has it, as the control shows; ours have it by Tor, or not at all."""
    file = bare.machine.path("/etc/docker/daemon.json")
    file.write_text('{"ipv6": true, "fixed-cidr-v6": "2001:db8:1::/64"}')
    try:
        bare.restart()
        addresses = ("ip", "-6", "address", "show", "scope", "global")
        assert "2001:db8:1:" in bare.do("run", "--rm", IMAGE, *addresses)
        with bare.silent():
            bare.do("run", *LIVES, *DNS, "--network", "tor", "--name", "driven", *SLEEP)
            assert bare.ttp("run", "--", *LIVES, "--name", "held", *SLEEP).returncode == 0
            by_ipv6 = ("curl", "-sS6", "--max-time", "20", PLAIN_ORACLE)
            assert bare.machine.run("docker", "exec", "driven", *by_ipv6).returncode
            assert by_tor(bare.do("exec", "held", *by_ipv6))
            assert bare.do("exec", "driven", *addresses) == ""
            assert bare.is_behind_tor("driven")
    finally:
        file.unlink()
        bare.restart()


@LONG
@pytest.mark.promise("P1", "P2", "P3")
def test_containers_on_a_host_behind_tor_go_through_tor_or_nowhere(bare: Docker) -> None:
    """On Docker's own networks: refused, until the host is to be their gateway."""
    host = bare.machine
    host.run("systemctl", "stop", GATEWAY, check=True)
    containers = ("--gateway-for", "docker0", "--gateway-for", "br-*")
    try:
        with bare.silent():
            host.run(*START, check=True)
            done = host.run("docker", "run", "--rm", "--network", "plain", IMAGE, *ASK)
            assert done.returncode
            host.run("ttp", "restart", *START[2:], *containers, check=True)
            for network in ("plain", "bridge"):
                run = ("run", "--rm", "--network", network, IMAGE)
                assert by_tor(bare.do(*run, *ASK))
                assert "No route" in host.run("docker", *run, "python3", "-c", STRAY).stderr
    finally:
        host.run("ttp", "stop")
        host.run("systemctl", "start", GATEWAY, check=True)
    assert not by_tor(bare.do("run", "--rm", "--network", "bridge", IMAGE, *ASK))
