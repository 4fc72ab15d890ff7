"""Whom Tor sees, on which of its listeners, and who may use its proxies.

    app ─eth0══w2─┐
                  ├─ gateway ─uplink══eth0─ world
    new ─eth0══w4─┘

``new`` is a workload with options; ``app`` is one without, for comparison.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import get_args

import pytest

from nsrun.ruleset import (
    DNS_PORT,
    DNS_PORT_BY_DESTINATION,
    HTTP_AT,
    HTTP_PORT,
    HTTP_PORT_BY_DESTINATION,
    SOCKS_AT,
    SOCKS_PORT,
    SOCKS_PORT_BY_DESTINATION,
    TRANS_PORT,
    TRANS_PORT_BY_DESTINATION,
)
from nsrun.spec import Isolation, RunSpec
from town import BLOCK, GATEWAY4, GATEWAY6, SITE4, SITE6, Actor, Town

pytestmark = pytest.mark.root  # or root of a user namespace: see test_rootless.py

ONION4, ONION6 = "10.192.0.7", "fd74:7470:1:1000::7"


def fetch(actor: Actor, host: str, port: int) -> None:
    with actor.connect(host, port) as connection:
        assert b"stand-in" in connection.recv(100)


# ---- proxies -----------------------------------------------------------------------------------


@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    ("isolate", "socks", "http"),
    [
        ("workload", SOCKS_PORT, HTTP_PORT),
        ("destination", SOCKS_PORT_BY_DESTINATION, HTTP_PORT_BY_DESTINATION),
        ("connection", SOCKS_PORT, HTTP_PORT),
    ],
)
def test_who_asked_for_proxies_finds_them_on_loopback(
    town: Town, isolate: Isolation, socks: int, http: int
) -> None:
    """Where programs look for them, and with the isolation that was asked for."""
    new = town.arrive(RunSpec(("true",), isolate=isolate, socks=True))
    with town.world_hears() as frames:
        fetch(new, "127.0.0.1", SOCKS_AT)
        fetch(new, "127.0.0.1", HTTP_AT)
    assert town.ports == [socks, http]
    assert not frames


@pytest.mark.promise("P5")
@pytest.mark.parametrize("port", [SOCKS_AT, HTTP_AT])
def test_who_did_not_ask_reaches_no_proxy(town: Town, port: int) -> None:
    """Neither on loopback, nor at the gateway's address, nor by the way of those who asked."""
    new = town.arrive(RunSpec(("true",), socks=True))
    for host in ("127.0.0.1", GATEWAY4, GATEWAY6):
        with pytest.raises(ConnectionRefusedError):
            town.app.connect(host, port)
    way = f"to 127.0.0.1/32 ipproto tcp dport {port} lookup 53"
    town.app.run("ip", "rule", "add", "pref", "0", *way.split())
    with pytest.raises(OSError):
        town.app.connect("127.0.0.1", port)
    assert not town.heard
    fetch(new, "127.0.0.1", port)  # control


@pytest.mark.promise("P5")
@pytest.mark.parametrize("port", [SOCKS_PORT, HTTP_PORT, SOCKS_PORT_BY_DESTINATION, TRANS_PORT])
def test_listeners_are_reached_by_redirect_only(town: Town, port: int) -> None:
    """Not even by who may use one: on the wrong one the isolation would be another."""
    new = town.arrive(RunSpec(("true",), isolate="destination", socks=True))
    with pytest.raises(ConnectionRefusedError):
        new.connect(GATEWAY4, port)
    assert not town.heard
    fetch(new, "127.0.0.1", SOCKS_AT)  # control


@pytest.mark.promise("P5")
def test_a_server_on_the_proxies_ports_is_the_workloads_own(town: Town) -> None:
    """Without --socks 127.0.0.1:9050 is not ours to take: a workload may run its own tor."""
    with town.app.open(2, 1) as own:
        own.bind(("127.0.0.1", SOCKS_AT))
        own.listen()
        town.app.connect("127.0.0.1", SOCKS_AT).close()
        own.accept()[0].close()
    assert not town.heard


@pytest.mark.promise("P5", "P8")
def test_the_right_to_proxies_ends_with_the_workload(town: Town) -> None:
    """Its elements go; that links are never named twice is depth behind it."""

    def rules() -> str:
        return town.gateway.run("nft", "list", "table", "inet", "ttp")

    before = rules()
    for isolate in get_args(Isolation):
        new = town.arrive(RunSpec(("true",), isolate=isolate, socks=True))
        assert new.live is not None
        link = new.live.workload.link
        assert rules() != before
        new.space.close()
        assert town.workloads.ended(link) is new.live
        assert rules() == before


# ---- isolation ---------------------------------------------------------------------------------


@pytest.mark.promise("P7")
@pytest.mark.parametrize("host", [SITE4, SITE6, ONION4, ONION6])
def test_by_destination_has_listeners_of_its_own(town: Town, host: str) -> None:
    """Tor isolates by destination on these; a neighbour stays on the others."""
    new = town.arrive(RunSpec(("true",), isolate="destination"))
    for actor in (new, town.app):
        fetch(actor, host, 80)
        actor.ask("9.9.9.9", "example.test")
        actor.ask("2620:fe::fe", "example.test")
    by_destination = [TRANS_PORT_BY_DESTINATION, *[DNS_PORT_BY_DESTINATION] * 2]
    assert town.ports == [*by_destination, TRANS_PORT, DNS_PORT, DNS_PORT]
    assert len({heard[0] for heard in town.heard[:1] + town.heard[3:4]}) == 2


@pytest.mark.promise("P7")
@pytest.mark.parametrize(("host", "resolver"), [(SITE4, "9.9.9.9"), (SITE6, "2620:fe::fe")])
def test_by_connection_each_is_somebody_else_to_tor(town: Town, host: str, resolver: str) -> None:
    """Connections and lookups, to one place too; of two such workloads no two are the same."""
    new = town.arrive(RunSpec(("true",), isolate="connection"))
    other = town.arrive(RunSpec(("true",), isolate="connection"))
    for actor in (new, other, new):
        fetch(actor, host, 443)
        fetch(actor, host, 443)
        actor.ask(resolver, "example.test")
    seen = [heard[0] for heard in town.heard]
    assert len(seen) == len(set(seen)) == 9
    ranges = (BLOCK.connections, BLOCK.connections6)
    assert all(any(ip_address(one) in network for network in ranges) for one in seen)
    assert [heard[1:] for heard in town.heard[:2]] == [(host, 443)] * 2
    town.heard.clear()
    for _ in range(2):
        fetch(town.app, host, 443)
    assert len({heard[0] for heard in town.heard}) == 1, "control: a neighbour has one identity"


@pytest.mark.promise("P7")
def test_by_connection_the_proxy_sees_somebody_else_each_time(town: Town) -> None:
    """SOCKS is a connection like any other."""
    new = town.arrive(RunSpec(("true",), isolate="connection", socks=True))
    for _ in range(3):
        fetch(new, "127.0.0.1", SOCKS_AT)
    assert len({heard[0] for heard in town.heard}) == 3


@pytest.mark.promise("P7")
def test_a_connection_keeps_its_identity(town: Town) -> None:
    """The number is taken once for each connection, not for each packet."""
    new = town.arrive(RunSpec(("true",), isolate="connection"))
    for _ in range(3):
        fetch(new, SITE4, 443)
    numbers = [int(ip_address(heard[0])) for heard in town.heard]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


@pytest.mark.promise("P7")
def test_a_renewed_identity_applies_to_the_proxies(town: Town) -> None:
    """What ttp refresh renews is the workload, by whatever way it goes."""
    new = town.arrive(RunSpec(("true",), socks=True, name="new"))
    for _ in range(2):
        fetch(new, "127.0.0.1", SOCKS_AT)
        fetch(new, SITE4, 443)
        town.workloads.refresh("new")
    seen = [heard[0] for heard in town.heard]
    assert seen[0] == seen[1] != seen[2] == seen[3]
