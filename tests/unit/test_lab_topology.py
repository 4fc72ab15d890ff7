"""The lab's plan: what each test of a leak relies on without saying so."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest

from nsrun.facts import search_path
from nsrun.lab import topology, torrcs
from nsrun.lab.topology import AUTHORITIES, EXITS, NODES, Role
from nsrun.lab.torrcs import Authority, FirstVote

KNOWN = tuple(Authority(node, "A" * 40, "B" * 40) for node in AUTHORITIES)

# What TestingTorNetwork changes in a client, so that tests of it would prove nothing.
TESTING_ONLY = ("Testing", "RejectInternal", "EnforceDistinctSubnets", "AllowPrivate")


def options(torrc: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in torrc.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


def test_there_are_enough_relays_for_onion_services() -> None:
    """Eleven, of which several are exits."""
    assert len(NODES) >= 11
    assert len(EXITS) >= 3


def test_no_two_nodes_share_a_name_or_an_address() -> None:
    """Else a capture could not tell them apart."""
    addresses = [address for node in NODES for address in node.addresses]
    addresses += [topology.WEB, topology.WEB6, topology.DNS, topology.DNS6, topology.SERVICE]
    addresses += [topology.ISP, topology.ISP6, topology.WAN, topology.WAN6]
    assert len(set(addresses)) == len(addresses)
    assert len({node.name for node in NODES}) == len(NODES)


def test_relays_are_in_distinct_networks() -> None:
    """Tor uses no two relays of one /16, or of one IPv6 /32, in a circuit."""
    networks = {IPv4Network(f"{node.address}/16", strict=False) for node in NODES}
    networks6 = {IPv6Network(f"{node.address6}/32", strict=False) for node in NODES}
    assert len(networks) == len(networks6) == len(NODES)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_relays_have_public_addresses(node: topology.Node) -> None:
    """Tor with production defaults refuses to use others."""
    assert all(ip_address(address).is_global for address in node.addresses)


def test_servers_see_exits_at_addresses_where_no_relay_listens() -> None:
    """So that the address oracle tells a stream's exit from a relay that connects by itself."""
    listening = {address for node in NODES for address in (node.address, node.address6)}
    assert len(topology.EXIT_ADDRESSES) == 2 * len(EXITS)
    assert not topology.EXIT_ADDRESSES & listening
    assert not {topology.WAN, topology.WAN6} & topology.EXIT_ADDRESSES


def test_the_lan_is_private_and_holds_its_machines() -> None:
    """Leaks to the LAN must be leaks to private addresses."""
    lan, lan6 = ip_network(topology.LAN_PREFIX), ip_network(topology.LAN_PREFIX6)
    assert lan.is_private
    machines = (topology.ROUTER, topology.HOST, topology.GATEWAY, topology.RESOLVER)
    assert all(ip_address(address) in lan for address in (*machines, topology.LAN_WEB))
    machines6 = (topology.ROUTER6, topology.HOST6, topology.GATEWAY6, topology.RESOLVER6)
    assert all(ip_address(address) in lan6 for address in (*machines6, topology.LAN_WEB6))


def test_a_client_is_told_the_authorities_and_nothing_else() -> None:
    """Its defaults must be those of the real network."""
    assert set(options(torrcs.client_torrc(KNOWN))) == {"DirAuthority"}
    assert len(torrcs.client_torrc(KNOWN).splitlines()) == len(AUTHORITIES)


def test_the_onion_service_has_production_defaults() -> None:
    """A service in testing mode is not found by a client that is not."""
    names = options(torrcs.service_torrc("/d", KNOWN))
    assert not [name for name in names if any(word in name for word in TESTING_ONLY)]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_each_role_gets_its_options(node: topology.Node) -> None:
    """Exits exit, from an address of their own; authorities are authorities; others neither."""
    found = options(torrcs.node_torrc(node, "/d", KNOWN))
    assert ("AuthoritativeDirectory" in found) == (node.role is Role.AUTHORITY)
    assert ("ExitRelay" in found) == (node.role is Role.EXIT)
    assert found["ExitPolicyRejectPrivate"] == ["1"]
    if node.role is Role.EXIT:
        bound = found["OutboundBindAddressExit"]
        assert bound == [node.outbound, f"[{node.outbound6}]"]


def test_only_authorities_without_a_consensus_hurry() -> None:
    """A restored network must not vote before the next full hour."""
    first = torrcs.node_torrc(AUTHORITIES[0], "/d", KNOWN, FirstVote(5, 3))
    later = torrcs.node_torrc(AUTHORITIES[0], "/d", KNOWN)
    assert options(first)["TestingV3AuthVotingStartOffset"] == ["3"]
    assert not [name for name in options(later) if name.startswith("TestingV3AuthInitial")]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_tor_accepts_the_torrc(node: topology.Node, tmp_path: Path) -> None:
    """Every option exists, in this version of Tor, with these values."""
    defaults = tmp_path / "defaults"
    defaults.touch()
    torrc = tmp_path / "torrc"
    torrc.write_text(torrcs.node_torrc(node, str(tmp_path / "data"), KNOWN, FirstVote(5, 0)))
    command = ("tor", "--verify-config", "--hush", "--defaults-torrc", defaults, "-f", torrc)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("text", [topology.inet_dns(), topology.lan_dns()])
def test_dnsmasq_accepts_its_configuration(text: str, tmp_path: Path) -> None:
    """Its syntax differs between versions."""
    path = tmp_path / "dnsmasq.conf"
    path.write_text(text)
    command = ("dnsmasq", "--test", f"--conf-file={path}")
    environment = {**os.environ, "PATH": search_path()}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_bake_of_another_topology_is_not_mistaken_for_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fingerprint is part of the archive's name."""
    before = torrcs.fingerprint()
    assert torrcs.fingerprint() == before
    monkeypatch.setattr(torrcs, "NODES", (*NODES[:-1], replace(NODES[-1], number=0x2F)))
    assert torrcs.fingerprint() != before


@pytest.mark.parametrize("name", ["lab", "a1", "my-lab-2", "abcdefghijkl"])
def test_names_of_labs(name: str) -> None:
    """The gateway's port in the lab, gw-NAME, must fit an interface name."""
    assert topology.check_name(name)
    assert len(f"gw-{name}") <= 15


@pytest.mark.parametrize(
    "name", ["", "a", "Lab", "../x", "a b", "-a", "a-", "abcdefghijklm", "a\n"]
)
def test_names_that_are_refused(name: str) -> None:
    """They become directories and interface names."""
    assert not topology.check_name(name)
