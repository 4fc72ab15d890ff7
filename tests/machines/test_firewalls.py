"""Firewalls of others beside ours, each by its real program: neither overrules the other.

Each lets out what ours forbids, which stays forbidden; and forbids what ours lets pass (the LAN,
and who connects from it), which stays forbidden as well. Its rules are byte for byte the same
beside ours, after it has loaded them anew meanwhile, and when ours are gone.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from docker_host import IMAGE, archive
from docker_machine import STRAY
from host_machine import CURL, ECHO, START, as_seen, rules_of_others, state_of, to, watched
from machine import Machine
from nsrun.lab import topology
from nsrun.leak.frames import Udp
from town import eventually

Reload = Callable[[], object]

OPEN, SHUT = 2222, 2223  # ports of this machine that theirs lets the LAN reach, and does not
SERVE = "exec socat TCP-LISTEN:{},reuseaddr,fork SYSTEM:'echo hello'"


@contextmanager
def kept(machine: Machine, directory: str) -> Iterator[None]:
    """What a firewall keeps below /etc, as before when the block ends."""
    machine.run("cp", "--archive", directory, "/root/kept", check=True)
    yield
    machine.run("rm", "--recursive", directory, check=True)
    machine.run("mv", "/root/kept", directory, check=True)


@contextmanager
def ufw(machine: Machine) -> Iterator[Reload]:
    """Ubuntu's, with rules of iptables; it lets everything out, but what it is told not to."""
    with kept(machine, "/etc/ufw"):
        machine.run("ufw", "reject", "out", "to", topology.LAN_WEB, check=True)
        machine.run("ufw", "allow", f"{OPEN}/tcp", check=True)
        machine.run("ufw", "--force", "enable", check=True)
        yield lambda: machine.run("ufw", "reload", check=True)
        machine.run("ufw", "--force", "disable", check=True)
    machine.run("nft", "flush", "ruleset", check=True)  # it leaves its chains


FIREWALLD = f"""
firewall-cmd --permanent --add-port={OPEN}/tcp
firewall-cmd --permanent --new-policy own
firewall-cmd --permanent --policy own --add-ingress-zone HOST
firewall-cmd --permanent --policy own --add-egress-zone ANY
firewall-cmd --permanent --policy own --add-rich-rule \\
    'rule family=ipv4 destination address={topology.LAN_WEB} reject'
firewall-cmd --reload
"""


@contextmanager
def firewalld(machine: Machine) -> Iterator[Reload]:
    """Fedora's, whose table nobody else may change (`flags owner`)."""
    with kept(machine, "/etc/firewalld"):
        machine.run("systemctl", "start", "firewalld", check=True)
        machine.run("sh", "-ec", FIREWALLD, check=True)

        def reload() -> None:
            machine.run("firewall-cmd", "--reload", check=True)
            machine.run("firewall-cmd", "--complete-reload", check=True)

        yield reload
        machine.run("systemctl", "stop", "firewalld", "polkit", check=True)


@pytest.mark.promise("P3", "P9")
@pytest.mark.parametrize("firewall", [ufw, firewalld])
def test_neither_firewall_overrules_the_other(
    crowded: Machine, firewall: Callable[[Machine], AbstractContextManager[Reload]]
) -> None:
    """UDP is stopped by ours alone, the LAN's web and a port by theirs alone: none passes."""
    machine = crowded
    with ExitStack() as held:
        for port in (OPEN, SHUT):
            held.enter_context(served(machine, port))
        assert passes(machine) == (True, True, True, True)  # the control of theirs
        reload = held.enter_context(firewall(machine))
        assert passes(machine) == (True, False, True, False)  # the control of ours
        before = rules_of_others(machine)
        with watched(machine) as seen:
            machine.run(*START, check=True)
            for change in (lambda: None, reload):
                change()
                assert passes(machine) == (False, False, True, False)
                assert rules_of_others(machine) == before
            for family in ("-4", "-6"):
                assert as_seen(machine, family)["IsTor"] is True
            assert machine.run("ttp", "check").returncode == 0
            machine.run("ttp", "stop", check=True)
        assert not to(seen[0], Udp, topology.WEB)
        assert rules_of_others(machine) == before
        assert passes(machine) == (True, False, True, False)


@contextmanager
def served(machine: Machine, port: int) -> Iterator[None]:
    """A port of the machine that anybody may connect to, but for firewalls."""
    with machine.start("sh", "-c", SERVE.format(port)) as server:
        try:
            machine.run(
                "sh", "-c", f"until ss -Hltn sport = {port} | grep -q .; do sleep 0.05; done"
            )
            yield
        finally:
            server.terminate()


def passes(machine: Machine) -> tuple[bool, bool, bool, bool]:
    """UDP to the internet, and to the LAN's web; from the LAN to the ports OPEN and SHUT."""
    udp = machine.run("sh", "-c", ECHO, user="alice").stdout == "word\n"
    page = (*CURL, "--max-time", "2", f"http://{topology.LAN_WEB}/")
    web = machine.run(*page, user="alice").returncode == 0
    return (udp, web, answers(machine, OPEN), answers(machine, SHUT))


def answers(machine: Machine, port: int) -> bool:
    """Whether somebody of the LAN is answered there."""
    ask = ("timeout", "2", "bash", "-c", f"head -1 </dev/tcp/{topology.HOST}/{port}")
    return machine.lab.do(*machine.lab.inside_argv("lan", *ask)).stdout == "hello\n"


# ---- Docker ------------------------------------------------------------------------------------

WEB = ("python3", "-m", "http.server", "80")
RUN = ("run", "--detach", "--init", "--restart=always", "--publish=8080:80", "--name=web", IMAGE)
# As it was before Docker came.
UNDO = f"""
docker rm --force web
docker rmi --force {IMAGE}
systemctl stop docker.socket docker containerd
ip link del docker0
nft flush ruleset
sysctl -qw net.ipv4.ip_forward=0
rmdir /run/systemd/transient
"""


@pytest.mark.promise("P3", "P9")
def test_docker_is_started_anew_beside_ours(crowded: Machine) -> None:
    """Its rules are as before each time; its container reaches nobody, and the LAN reaches it."""
    machine = crowded
    machine.run("systemctl", "start", "docker", check=True)
    try:
        with archive().open("rb") as image:
            load = machine.command("docker", "import", "-", IMAGE)
            subprocess.run(load, stdin=image, check=True, capture_output=True, timeout=60)
        machine.run("docker", *RUN, *WEB, check=True)
        machine.run("systemctl", "restart", "docker", check=True)  # which orders its rules
        eventually(lambda: is_published(machine), "the container")
        assert sends(machine)
        before = rules_of_others(machine)
        with watched(machine) as seen:
            machine.run(*START, check=True)
            assert rules_of_others(machine) == before
            assert not sends(machine)
            machine.run("systemctl", "restart", "docker", check=True)
            eventually(lambda: is_published(machine), "the container again")
            assert rules_of_others(machine) == before
            assert not sends(machine)
            assert machine.run("ttp", "check").returncode == 0
            assert as_seen(machine, "-4")["IsTor"] is True
            machine.run("ttp", "stop", check=True)
        assert not to(seen[0], Udp, topology.WEB)
        assert rules_of_others(machine) == before
        assert sends(machine)
    finally:
        machine.run("sh", "-c", UNDO)


def sends(machine: Machine) -> bool:
    """Whether a container's stray packet is answered from the internet."""
    stray = ("timeout", "1", "python3", "-c", STRAY)
    return machine.run("docker", "exec", "web", *stray).returncode == 0


def is_published(machine: Machine) -> bool:
    """Whether the LAN reaches the container's port."""
    page = (*CURL, "--max-time", "2", f"http://{topology.HOST}:8080/")
    return machine.lab.do(*machine.lab.inside_argv("lan", *page)).returncode == 0


# ---- who flushes everything --------------------------------------------------------------------


def told_of_rules(machine: Machine) -> str:
    return str(json.loads(machine.run("ttp", "status", "--json").stdout)["rules"])


@pytest.mark.promise("P4", "P12")
def test_debians_own_service_flushes_all_rules(crowded: Machine) -> None:
    """`systemctl restart nftables`: status and check tell; the watchdog closes."""
    machine = crowded
    machine.run(*START, check=True)
    assert told_of_rules(machine) == "as loaded"
    machine.run("systemctl", "restart", "nftables", check=True)
    assert told_of_rules(machine) == "changed"
    assert machine.run("ttp", "check").returncode == 1
    machine.run("ttp", "restart", *START[2:], "--watchdog", check=True)
    machine.run("systemctl", "restart", "nftables", check=True)
    eventually(lambda: state_of(machine) == "locked", "the watchdog to close", 2)
    machine.run("ttp", "stop", check=True)
    machine.run("systemctl", "stop", "nftables", check=True)
