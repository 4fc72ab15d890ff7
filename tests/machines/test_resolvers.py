"""Whoever manages /etc/resolv.conf: names go to Tor, and what it wrote meanwhile is kept.

In each story the manager learns of another resolver while the host is behind Tor. What it writes
then must change nothing on the wire, and must be what libc reads when ttp has stopped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from host_machine import START, contained, to, watched
from machine import MAC, Machine
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Ip, Udp
from town import eventually

RESOLV_CONF = "/etc/resolv.conf"
OTHER = topology.DNS  # what the manager learns of: a resolver that is asked in clear
RESOLVERS = (topology.RESOLVER, topology.RESOLVER6, OTHER)
# A link that was down has lost its addresses by IPv6 and its routes.
ETH0 = (
    "ip link set eth0 down && ip address flush dev eth0 && systemctl restart lab-network"
    f" && rm -f {RESOLV_CONF}"
)
# A lease is renewed after two seconds, not after half of it.
DHCLIENT = """request subnet-mask, routers, domain-name-servers;
supersede dhcp-renewal-time 2;
supersede dhcp-rebinding-time 60;
"""

Learn = Callable[[], object]
Manage = Callable[[Machine], AbstractContextManager[Learn]]


class Leases:
    """The machine asks for its address, and for its renewal (RFC 2131)."""

    name = "DHCP"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(body=Udp(source_port=source, target_port=target)):
                return {source, target} == {67, 68}
        return False


@contextmanager
def plain(machine: Machine) -> Iterator[Learn]:
    """A file that somebody wrote by hand, and writes to, which the watchdog sees."""
    machine.run("sh", "-c", f"echo nameserver {topology.RESOLVER} >{RESOLV_CONF}", check=True)
    yield lambda: machine.run("sh", "-c", f"echo nameserver {OTHER} >{RESOLV_CONF}", check=True)
    machine.run("rm", RESOLV_CONF, check=True)


@contextmanager
def elsewhere(machine: Machine) -> Iterator[Learn]:
    """A link to a file of a directory that is somebody's own, and renamed there."""
    machine.run("mkdir", "/run/theirs", check=True)
    write = "echo nameserver {} >/run/theirs/new && mv /run/theirs/new /run/theirs/resolv.conf"
    machine.run("sh", "-c", write.format(topology.RESOLVER), check=True)
    machine.run("ln", "-s", "/run/theirs/resolv.conf", RESOLV_CONF, check=True)
    yield lambda: machine.run("sh", "-c", write.format(OTHER), check=True)
    machine.run("rm", "-r", RESOLV_CONF, "/run/theirs", check=True)


@contextmanager
def resolvconf(machine: Machine) -> Iterator[Learn]:
    """Debian's: an interface with a resolver more comes up."""
    machine.run("ln", "-s", "/run/resolvconf/resolv.conf", RESOLV_CONF, check=True)
    machine.run("resolvconf", "-u", check=True)
    told = f"nameserver {OTHER}\n"
    yield lambda: machine.run("resolvconf", "-a", "eth0.test", text=told, check=True)
    machine.run("resolvconf", "-d", "eth0.test", check=True)
    machine.run("rm", RESOLV_CONF, check=True)


@contextmanager
def leases(machine: Machine, resolver: str) -> Iterator[None]:
    """A DHCP server on the machine's link, which tells it of one resolver."""
    options = (
        *("--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=lan0", "--user=root"),
        *("--bind-dynamic", "--dhcp-authoritative", "--leasefile-ro", "--pid-file="),
        *(
            f"--dhcp-range={topology.HOST},{topology.HOST},120",
            f"--dhcp-host={MAC},{topology.HOST}",
        ),
        f"--dhcp-option=option:router,{topology.ROUTER}",
        f"--dhcp-option=option:dns-server,{resolver}",
    )
    command = machine.lab.inside("router", "dnsmasq", *options)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()


@contextmanager
def dhclient(machine: Machine) -> Iterator[Learn]:
    """ISC's client, with a script that writes the file itself; the renewal tells of another one."""
    hook = "/etc/dhcp/dhclient-enter-hooks.d/resolvconf"
    known = machine.path("/var/lib/dhcp/dhclient.leases")
    machine.run("mv", hook, "/root/hook", check=True)
    machine.run("sh", "-c", f"ip address flush dev eth0; : >{RESOLV_CONF}", check=True)
    with leases(machine, topology.RESOLVER):
        files = ("-cf", "/root/dhclient.conf", "-pf", "/run/dhclient.pid")
        machine.run("sh", "-c", f"cat >{files[1]}", text=DHCLIENT, check=True)
        machine.run("dhclient", "-4", *files, "eth0", check=True)
    with leases(machine, OTHER):
        yield lambda: eventually(lambda: OTHER in known.read_text(), "the renewal", 20)
        machine.run("sh", "-c", "kill $(cat /run/dhclient.pid)", check=True)
    machine.run("sh", "-c", f"{ETH0} /var/lib/dhcp/*.leases; mv /root/hook {hook}", check=True)


def network_manager(*, link: bool) -> Manage:
    """It has the link, with a resolver given by hand; and the file, or a link to its own."""

    @contextmanager
    def manage(machine: Machine) -> Iterator[Learn]:
        conf = "/etc/NetworkManager/conf.d/test.conf"
        lines = "[main]\nrc-manager=symlink\n[device]\nmatch-device=*\n"
        machine.run("sh", "-c", f"cat >{conf}", text=lines, check=True)
        if link:
            machine.run("ln", "-s", "/run/NetworkManager/resolv.conf", RESOLV_CONF, check=True)
        machine.run("systemctl", "start", "NetworkManager", check=True)
        add = "nmcli connection add type ethernet ifname eth0 con-name test ipv4.method manual"
        static = f"{topology.HOST}/24 ipv4.gateway {topology.ROUTER} ipv4.dns {topology.RESOLVER}"
        machine.run(*f"{add} ipv4.addresses {static} ipv6.method ignore".split(), check=True)
        machine.run("nmcli", "connection", "up", "test", check=True)

        def learn() -> None:
            change = f"nmcli connection modify test ipv4.dns {OTHER}"
            machine.run("sh", "-c", f"{change} && nmcli device reapply eth0", check=True)

        yield learn
        machine.run("nmcli", "connection", "delete", "test", check=True)
        for unit in ("NetworkManager", "systemd-hostnamed", "polkit"):
            machine.run("systemctl", "stop", unit, check=True)
        machine.run("sh", "-c", f"{ETH0} {conf}; rm -rf /run/NetworkManager", check=True)

    return manage


MANAGERS: dict[str, Manage] = {
    "plain": plain,
    "elsewhere": elsewhere,
    "resolvconf": resolvconf,
    "dhclient": dhclient,
    "NetworkManager": network_manager(link=False),
    "NetworkManager-link": network_manager(link=True),
}

#: Each way of writing once: into the file, over a link's target, over the file.
SHORT = ("dhclient", "resolvconf", "NetworkManager")
TORTURE = pytest.mark.torture


def resolves(machine: Machine, name: str) -> None:
    found = machine.run("getent", "ahostsv4", name, user="alice")
    assert found.stdout.startswith(topology.WEB), (name, found)


def is_ours(machine: Machine) -> bool:
    return "nameserver 127.0.0.1\n" in machine.run("cat", RESOLV_CONF).stdout


def asked(machine: Machine, name: str) -> set[str]:
    """Whom libc asks in clear for a name of the lab."""
    with watched(machine) as seen:
        resolves(machine, f"{name}.test")
    return {one for one in RESOLVERS if to(seen[0], Udp, one)}


@pytest.mark.promise("P2", "P8", "P9")
@pytest.mark.parametrize(
    "manager", [name if name in SHORT else pytest.param(name, marks=TORTURE) for name in MANAGERS]
)
def test_names_go_to_tor_and_the_manager_is_heard(crowded: Machine, manager: str) -> None:
    """Before and after, its resolver is seen to be asked; meanwhile nobody, whatever it writes."""
    machine = crowded
    options = ("--watchdog",) if manager == "plain" else ()
    machine.run("mv", RESOLV_CONF, "/root/was.conf", check=True)
    with MANAGERS[manager](machine) as learn:
        assert asked(machine, "before") == {topology.RESOLVER}
        with watched(machine) as seen:
            machine.run(*START, *options, check=True)
            resolves(machine, "first.test")
            learn()
            if options:
                eventually(lambda: is_ours(machine), "ours to be back", 5)
            resolves(machine, "second.test")
            assert machine.run("ttp", "check").returncode == 0
            machine.run("ttp", "stop", check=True)
        contained(machine, seen[0], Leases())
        assert f"nameserver {OTHER}\n" in machine.run("cat", RESOLV_CONF, check=True).stdout
        assert OTHER in asked(machine, "after")
        assert "resolv.conf" not in machine.run("cat", "/proc/self/mountinfo").stdout
    machine.run("mv", "/root/was.conf", RESOLV_CONF, check=True)
