"""A LAN behind a machine: ``ttp start --gateway-for``, with the machine's own wire watched.

    web, DNS, Tor ══ router ═p-host═ eth0 the machine br0 ══ eth0 of a client

The client is a namespace behind a bridge, as a virtual machine, or somebody on a second port of the
machine, is: it forwards and masquerades nothing that the machine does not.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import pytest

from host_machine import (
    CURL,
    SHOUT,
    START,
    Idle,
    all_the_time,
    as_seen,
    contained,
    idle,
    is_closed,
    is_killed,
    speak,
    state_of,
    to,
    watched,
)
from lab_helpers import ORACLE
from machine import Machine
from nsrun.address import LISTENER6
from nsrun.lab import topology
from nsrun.leak.frames import Icmp, Tcp, Udp
from town import eventually

HOST4, HOST6, CLIENT4, CLIENT6 = "10.5.0.1", "fd05::1", "10.5.0.2", "fd05::2"
CLIENT = f"""set -e
ip netns add client
mkdir -p /etc/netns/client
echo nameserver 9.9.9.9 >/etc/netns/client/resolv.conf
echo hosts: files dns >/etc/netns/client/nsswitch.conf # not by a socket of the machine's resolved
ip link add m1 type veth peer name eth0 netns client
ip link set m1 addrgenmode none up
ip -n client link set lo up
ip -n client link set eth0 addrgenmode none up
ip -n client address add {CLIENT4}/24 dev eth0
ip -n client address add {CLIENT6}/64 dev eth0 nodad
ip -n client address add fe80::52/64 dev eth0 nodad
ip -n client route add default via {HOST4}
ip -n client route add default via fe80::51 dev eth0
"""
BRIDGE = f"""set -e
ip link add br0 address 02:00:00:00:05:01 type bridge mcast_snooping 0
ip link set br0 addrgenmode none
ip link set m1 master br0
ip address add {HOST4}/24 dev br0
ip address add {HOST6}/64 dev br0 nodad
ip address add fe80::51/64 dev br0 nodad
ip link set br0 up
"""
NO_LAN = """ip netns del client; ip link del br0
rm -r /etc/netns; umount /run/netns; rmdir /run/netns"""
# As a router that has never heard of Tor.
ROUTING = """set -e
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
nft 'add table inet nat { chain c { type nat hook postrouting priority 100; }; }'
nft 'add rule inet nat c oifname eth0 masquerade'
"""
NO_ROUTING = """nft delete table inet nat
sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
"""
RESET = "Connection reset by peer\n"


@dataclass
class Client:
    """What runs behind the machine."""

    machine: Machine

    def command(self, *argv: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", "client", *argv)

    def run(self, *argv: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        return self.machine.run(*self.command(*argv), seconds=seconds)

    def seen(self, *options: str) -> dict[str, object]:
        """What the lab's oracle says to it."""
        done = self.run(*CURL, *options, ORACLE)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {"error": done.stderr}

    def idle(self, target: str) -> AbstractContextManager[Idle]:
        """A connection to the web, see host_machine.idle()."""
        return idle(self.machine, target, *self.command(), user="root")

    def in_clear(self) -> bool:
        """Whether it reaches the web past Tor, by its address, within some seconds."""
        page = f"http://{topology.WEB}/api/ip"
        return '"IsTor":false' in self.run(*CURL, "--max-time", "5", page).stdout


@pytest.fixture
def client(host: Machine) -> Iterator[Client]:
    """Behind a machine that forwards nothing."""
    host.run("sh", "-c", CLIENT + BRIDGE, check=True)
    try:
        yield Client(host)
    finally:
        host.run("ttp", "stop")
        host.run("sh", "-c", NO_LAN, check=True)


@pytest.fixture
def routed(client: Client) -> Iterator[Client]:
    """Behind a machine that forwards everything; so it is seen what it is kept from."""
    client.machine.run("sh", "-c", ROUTING, check=True)
    try:
        yield client
    finally:
        client.machine.run("ttp", "stop")
        client.machine.run("sh", "-c", NO_ROUTING, check=True)


def send_everything(client: Client) -> None:
    """By UDP, ICMP, DNS of both kinds, and TCP; of both versions of IP."""
    client.run("python3", "-c", SHOUT, topology.WEB, topology.WEB6, "0.2")
    for address in (topology.WEB, topology.WEB6):
        client.run("ping", "-c1", "-W1", address)
        client.run(*CURL, "--max-time", "3", f"http://{bracketed(address)}/api/ip")
    for address in (topology.RESOLVER, topology.RESOLVER6):
        for way in ("+notcp", "+tcp"):
            client.run("dig", way, "+tries=1", "+time=2", f"@{address}", "www.test")


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.promise("P1", "P2", "P3", "P4", "P8")
def test_a_lan_and_its_gateway_go_through_tor(routed: Client) -> None:
    """Where all was forwarded: from before the start to after the stop, whatever is sent."""
    host = routed.machine
    with watched(host) as control:
        send_everything(routed)
    for kind, addresses in (
        (Udp, (topology.WEB, topology.WEB6, topology.RESOLVER, topology.RESOLVER6)),
        (Tcp, (topology.WEB, topology.WEB6, topology.RESOLVER, topology.RESOLVER6)),
        (Icmp, (topology.WEB, topology.WEB6)),
    ):
        for address in addresses:
            assert to(control[0], kind, address), (kind, address)
    shouting = routed.command("python3", "-c", SHOUT, topology.WEB, topology.WEB6, "120")
    up = host.run(*START, "--gateway-for", "br0")
    assert up.returncode == 0, up.stderr
    with watched(host) as seen, all_the_time(host, *shouting):
        for version in ("-4", "-6"):
            assert routed.seen(version)["IsTor"] is True
            assert as_seen(host, version)["IsTor"] is True
        send_everything(routed)
        for resolver in ("9.9.9.9", HOST4, HOST6):
            found = routed.run("dig", "+short", f"@{resolver}", "www.test").stdout
            assert found == f"{topology.WEB}\n", resolver
        host.run("ttp", "restart", *START[2:], "--gateway-for", "br*", check=True)
        host.run("sh", "-c", "ip link del br0", check=True)
        host.run("sh", "-c", BRIDGE, check=True)
        assert routed.seen("-4")["IsTor"] is True
        assert routed.seen("-6")["IsTor"] is True
    contained(host, seen[0])
    for address in (HOST4, topology.HOST):
        asked = routed.run("bash", "-c", f"head -c4 </dev/tcp/{address}/22")
        assert asked.stdout == "SSH-", asked.stderr
    assert routed.run("bash", "-c", f"exec 3<>/dev/tcp/{HOST4}/9041").returncode == 1
    told = host.run("ttp", "status").stdout
    assert "caught     all, and behind br*\n" in told
    idle4, idle6 = map(routed.idle, (topology.WEB, topology.WEB6))
    with idle4 as flow4, idle6 as flow6, watched(host) as after:
        host.run("ttp", "stop", check=True)
        assert speak(*flow4) == RESET
        assert speak(*flow6) == RESET
    assert not to(after[0], Tcp, topology.WEB, topology.WEB6)
    assert routed.in_clear()


@pytest.mark.promise("P1", "P2", "P4", "P5", "P9")
def test_a_gateway_alone_leaves_its_own_traffic_alone(routed: Client) -> None:
    """Rules, resolver and connections of the machine itself are as before; the LAN's are ended."""
    host = routed.machine
    names = host.run("cat", "/etc/resolv.conf").stdout
    options = ("--gateway-for", "br0", "--gateway-only")
    with ExitStack() as stack:
        own = stack.enter_context(idle(host, topology.WEB))
        theirs = stack.enter_context(routed.idle(topology.WEB6))
        up = host.run(*START, *options, "--watchdog")
        assert up.returncode == 0, up.stderr
        with watched(host) as seen:
            assert speak(*theirs) == RESET
            assert routed.seen("-4")["IsTor"] is True
        contained(host, seen[0])
        assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}
        assert host.run("cat", "/etc/resolv.conf").stdout == names
        for words, code in (
            (("check",), 0),
            (("bypass", "true"), 2),
            (("check-leak",), 2),
            ((*START[1:], *options), 0),
            ((*START[1:], "--gateway-for", "br0"), 2),
        ):
            assert host.run("ttp", *words).returncode == code, words
        host.run("ip", "address", "flush", "dev", "lo", "to", "10.192.0.0", check=True)
        host.run("ip", "-6", "address", "flush", "dev", "lo", "to", str(LISTENER6), check=True)
        for version in ("-4", "-6"):
            eventually(partial(is_tor, routed, version), "listeners to be there again", 20)
        assert state_of(host) == "up"
        host.run("nft", "insert", "rule", "inet", "ttp", "filter_arriving", "accept", check=True)
        eventually(lambda: state_of(host) == "locked", "a lock", 5)
        assert "error" in routed.seen("-4", "--max-time", "3")
        assert not routed.in_clear()
        assert not is_closed(host)
        host.run("ttp", "stop", check=True)
        assert speak(*own) == "sent\n"
    assert routed.in_clear()


def is_tor(client: Client, version: str) -> bool:
    return client.seen(version, "--max-time", "5").get("IsTor") is True


@pytest.mark.promise("P4", "P8")
def test_whoever_is_killed_leaves_the_lan_closed(routed: Client) -> None:
    """kill -9 before each step of a start, and of a stop; the next one takes it back."""
    host, steps = routed.machine, 0
    options = ("--gateway-for", "br0", "--gateway-only")
    while is_killed(host, steps, *START[1:], *options):
        assert routed.in_clear() is (steps == 0), steps
        host.run("ttp", "stop", check=True)
        steps += 1
    assert steps > 5
    steps = 0
    while is_killed(host, steps, "stop"):
        assert not routed.in_clear(), steps
        steps += 1
    assert steps > 5
    assert routed.in_clear()


@pytest.mark.promise("P1", "P3")
def test_without_forwarding_a_lan_is_served_and_not_sent_on(client: Client) -> None:
    """Forwarding stays off; what is refused is refused at once. An interface may come later; a
    bridge's port, at which rules see nothing arrive, is refused."""
    host = client.machine
    for name in ("m1", "m*"):
        port = host.run(*START, "--gateway-for", name, "--gateway-only")
        assert port.returncode == 2, port.stderr
        assert "m1 is a port of br0" in port.stderr
    host.run("ip", "link", "del", "br0", check=True)
    up = host.run(*START, "--gateway-for", "br0", "--no-lan-bypass")
    assert up.returncode == 0, up.stderr
    assert "br0 is not there yet" in up.stderr
    host.run("sh", "-c", BRIDGE, check=True)
    with watched(host) as seen:
        for version in ("-4", "-6"):
            assert client.seen(version)["IsTor"] is True
        for address in (topology.WEB, topology.LAN_WEB, topology.WEB6, topology.LAN_WEB6):
            told = client.run("ping", "-c1", "-W3", address).stdout
            assert "filtered" in told or "prohibited" in told, told
    contained(host, seen[0])
    for switch in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        assert host.run("sysctl", "-n", switch).stdout == "0\n"


# ---- what tells a LAN of it ----------------------------------------------------------------------

SERVERS = {  # a check of its own grammar, of each
    "dnsmasq": ("dnsmasq", "--test", "-C", "/run/lan/dnsmasq"),
    "dhcpd": ("dhcpd", "-t", "-cf", "/run/lan/dhcpd"),
    "kea": ("kea-dhcp4", "-t", "/run/lan/kea"),
    "radvd": ("radvd", "-c", "-C", "/run/lan/radvd"),
}
DNSMASQ = ("dnsmasq", "-k", "-C", "/run/lan/dnsmasq", "-l", "/run/lan/leases", "-u", "root")
ASK = """set -e
printf '#!/bin/sh\nenv >/run/lan/told\n' >/run/lan/script; chmod 755 /run/lan/script
timeout 20 dhclient -4 -1 -d -sf /run/lan/script -lf /run/lan/lease -pf /run/lan/pid eth0 &
until grep -q new_ip_address /run/lan/told; do sleep 0.1; done
kill $!
. /run/lan/told 2>/dev/null
ip address add $new_ip_address/24 dev eth0
ip route add default via $new_routers
echo $new_domain_name_servers
"""


@pytest.mark.promise("P1")
def test_a_lan_is_told_of_its_gateway(crowded: Machine) -> None:
    """Each server takes the lines for it; by those of dnsmasq a client finds its way, twice."""
    host, client = crowded, Client(crowded)
    host.run("sh", "-c", CLIENT + BRIDGE, check=True)
    try:
        for words in ("-4 address flush", "-6 address flush", "-6 route flush"):
            host.run("ip", "-n", "client", *words.split(), "dev", "eth0", check=True)
        host.run(*START, "--gateway-for", "br0", check=True)
        host.run("mkdir", "/run/lan", check=True)
        for server, check in SERVERS.items():
            lines = host.run("ttp", "rules", "--gateway-for", "br0", "--format", server, check=True)
            host.run("sh", "-c", f"cat >/run/lan/{server}", text=lines.stdout, check=True)
            host.run(*check, check=True)
        switch = "sed -n 's/^# as root: //p' /run/lan/radvd | sh"
        host.run("sh", "-c", switch, check=True)
        client.run("sh", "-c", "ip link set eth0 down; ip link set eth0 addrgenmode eui64 up")
        with all_the_time(host, *DNSMASQ):
            told = client.run("sh", "-c", ASK)
            assert told.stdout == f"{HOST4}\n", told.stderr
            assert client.seen("-4")["IsTor"] is True
            eventually(partial(is_tor, client, "-6"), "a way by IPv6", 20)
        assert "fe80::51" in client.run("ip", "-6", "route", "show", "default").stdout
    finally:
        host.run("ttp", "stop")
        host.run("sh", "-c", f"rm -r /run/lan; {NO_LAN}", check=True)
