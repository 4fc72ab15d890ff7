"""A VPN by wg-quick beside ours: its rules, marks and policy routing stay as they are.

    machine ═wg0══ p-host, p-lan ══peer0═ lan ── p-lan ── router ── relays

The machine's only way out is the tunnel, to a peer on the LAN, which sends on what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from host_machine import ECHO, START, as_seen, contained, rules_of_others, watched
from machine import Machine
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Ip, Udp
from nsrun.leak.verdict import Value, as_text, judge

AWAY, PORT = topology.RESOLVER, 51820  # the address that its peer sends from
TUNNEL = "192.0.2.2"
OURS = f"""[Interface]
PrivateKey = {{}}
Address = {TUNNEL}/24
[Peer]
PublicKey = {{}}
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = {AWAY}:{PORT}
"""
THEIRS = f"""[Interface]
PrivateKey = {{}}
ListenPort = {PORT}
[Peer]
PublicKey = {{}}
AllowedIPs = {TUNNEL}/32
"""
# On the LAN, by the programs in the machine's file system; it sends on what comes out.
PEER = """set -e
chroot "$1" wireguard-go --foreground peer0 </dev/null >/dev/null 2>&1 &
until chroot "$1" wg show peer0 >/dev/null 2>&1; do sleep 0.05; done # until it answers
chroot "$1" wg setconf peer0 /root/theirs.conf
ip address add 192.0.2.1/24 dev peer0
ip link set peer0 up
sysctl -qw net.ipv4.ip_forward=1
nft add table ip vpn
nft add chain ip vpn out '{ type nat hook postrouting priority 100; }'
nft add rule ip vpn out oifname eth0 masquerade
"""
NO_PEER = "ip link del peer0; nft delete table ip vpn; sysctl -qw net.ipv4.ip_forward=0"


class Tunnel:
    """What WireGuard sends to its peer, and is sent."""

    name = "the tunnel"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, body=Udp()):
                return {source, target} == {topology.HOST, AWAY}
        return False


@contextmanager
def peer(machine: Machine) -> Iterator[None]:
    """Another end of the tunnel, on the LAN; and /root/wg0.conf for the machine's."""
    keys = [machine.run("wg", "genkey", check=True).stdout.strip() for _ in range(2)]
    public = [machine.run("wg", "pubkey", text=key, check=True).stdout.strip() for key in keys]
    for name, text in (
        ("wg0", OURS.format(keys[0], public[1])),
        ("theirs", THEIRS.format(keys[1], public[0])),
    ):
        machine.run("sh", "-c", f"umask 77 && cat >/root/{name}.conf", text=text, check=True)
    root = str(machine.path("/"))
    up = machine.lab.do(*machine.lab.inside_argv("lan", "sh", "-c", PEER, "sh", root))
    try:
        assert up.returncode == 0, up.stderr
        yield
    finally:
        machine.lab.do(*machine.lab.inside_argv("lan", "sh", "-c", NO_PEER))
        machine.run("rm", "/root/wg0.conf", "/root/theirs.conf", check=True)


@pytest.mark.torture
@pytest.mark.promise("P3", "P4", "P9")
def test_nothing_passes_a_tunnel_of_wg_quick_but_tor(crowded: Machine) -> None:
    """On the wire is the tunnel alone, in it Tor alone; names are answered, TCP of IPv4 is not."""
    machine = crowded
    stray = ("sh", "-c", ECHO)
    with peer(machine):
        machine.run("wg-quick", "up", "/root/wg0.conf", check=True)
        try:
            assert machine.run(*stray, user="alice").stdout == "word\n"
            before = rules_of_others(machine)
            assert "wg-quick-wg0" in before
            assert f"lookup {PORT}" in before
            with watched(machine) as seen, machine.lab.tap("router", "p-lan") as tap:
                assert machine.run(*START).returncode in (0, 3)
                assert rules_of_others(machine) == before
                found = machine.run("getent", "ahostsv4", "a.test", user="alice").stdout
                assert found.startswith(topology.WEB)
                assert "error" in as_seen(machine, "-4", "--max-time", "2")  # docs/known-issues.md
                assert machine.run(*stray, user="alice").stdout == ""
                machine.run("ttp", "stop", check=True)
                inside = tap.stop()
            contained(machine, seen[0], Tunnel(), expect_some=False)
            tor = machine.lab.rules(AWAY)
            verdict = judge("p-lan", inside, [*tor, Tunnel()], expect_some=True)
            assert verdict.value is Value.CONTAINED, as_text([verdict])
            assert rules_of_others(machine) == before
            assert machine.run(*stray, user="alice").stdout == "word\n"
        finally:
            machine.run("wg-quick", "down", "/root/wg0.conf", check=True)
