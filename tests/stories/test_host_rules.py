"""What leaves a torified machine: Tor, what is exempt, and not one packet more.

    guest ─eth0══eth1─ host ─eth0══eth0─ world

Actors are in host_town.py. Each story is told for every form that the rules are written in; where
silence is expected, the same stimulus is heard once the rules are taken away.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from host_town import (
    ALICE,
    BOB,
    CGROUPS,
    FORMS,
    GUEST4,
    HOST4,
    HOST6,
    HOST_LAN4,
    LAN4,
    LAN6,
    OTHERS,
    TO_GUEST4,
    TO_GUEST6,
    TOR,
    Form,
    HostTown,
    host_town,
)
from nsrun.host import rules
from nsrun.host.policy import HostPolicy, Own
from town import SITE4, SITE6, Actor, eventually

pytestmark = pytest.mark.root

TOKEN = b"a story's own token"
ALL = HostPolicy(TOR)
ONION4, ONION6 = "10.202.82.1", "fd74:7470:1:1000::7"
DOH4, DOH6 = "1.1.1.1", "2620:fe::fe"


@pytest.fixture(params=FORMS)
def town(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HostTown]:
    form: Form = request.param
    with host_town(form, tmp_path) as it:
        yield it


@pytest.fixture
def nft_town(tmp_path: Path) -> Iterator[HostTown]:
    """For what the forms do not differ in, or is of nft only."""
    with host_town("nft", tmp_path) as it:
        yield it


def udp(actor: Actor, host: str = SITE4, port: int = 443) -> None:
    actor.send(host, port, TOKEN).close()


def tcp(actor: Actor, host: str = SITE4, port: int = 80) -> bytes:
    with actor.connect(host, port) as connection:
        return connection.recv(100)


def query(name: str) -> bytes:
    """A question of DNS for the address of ``name``."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def question(actor: Actor, name: str) -> None:
    actor.send(LAN4, 53, query(name)).close()


def by_tcp(actor: Actor, resolver: str, name: str) -> bytes:
    """Ask by TCP, of the world, which greets and then reads no more. Raises OSError if refused."""
    with actor.connect(resolver, 53) as connection:
        asked = query(name)
        found = connection.recv(100)
        for _ in range(3):
            connection.sendall(len(asked).to_bytes(2) + asked)
            time.sleep(0.02)  # the interval at which a reset is looked for
        return found


def knock(actor: Actor, host: str) -> None:
    """Begin a TCP connection, and do not wait for it."""
    with actor.open(socket.AF_INET6, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        connection.connect_ex((host, 80))


def multipath(actor: Actor) -> None:
    """MPTCP, whose sockets the kernel makes; none of them may lack its user."""
    with actor.open(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as connection:
        connection.connect((SITE4, 80))
        connection.sendall(TOKEN)


def ping(actor: Actor, host: str = SITE4) -> None:
    family, protocol, kind = socket.AF_INET, socket.IPPROTO_ICMP, 8
    if ":" in host:
        family, protocol, kind = socket.AF_INET6, socket.IPPROTO_ICMPV6, 128
    with actor.open(family, socket.SOCK_RAW, protocol) as icmp:
        icmp.sendto(struct.pack(">BBHHH", kind, 0, 0, 1, 1) + TOKEN, (host, 0))


def gre(actor: Actor) -> None:
    with actor.open(socket.AF_INET, socket.SOCK_RAW, 47) as tunnel:
        tunnel.sendto(TOKEN, (SITE4, 0))


def bare_ack(actor: Actor, port: int = 443) -> None:
    """A segment of no connection, and without a socket that the rules could ask for its user."""
    header = struct.pack(">HHIIBBHHH", 4000, port, 1, 1, 0x50, 0x10, 1000, 0, 0)
    with actor.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as segments:
        segments.sendto(header + TOKEN, (SITE4, 0))


def send_until_reset(connection: socket.socket) -> None:
    for _ in range(20):
        connection.sendall(TOKEN)
        time.sleep(0.02)  # the interval at which a reset is looked for


def refused(act: Callable[[], object]) -> None:
    """At once, and not by a time-out."""
    begin = time.monotonic()
    with pytest.raises(OSError) as error:
        act()
    assert not isinstance(error.value, TimeoutError)
    assert time.monotonic() - begin < 1


# ---- what goes to Tor ----------------------------------------------------------------------------


@pytest.mark.promise("P1")
@pytest.mark.parametrize("lan", [True, False], ids=["lan", "no-lan"])
def test_tcp_of_a_host_with_a_public_address_goes_to_tor(town: HostTown, lan: bool) -> None:
    """Tor's answers have that address as their destination, and come by loopback all the same."""
    town.load(replace(ALL, lan=lan))
    with town.world_hears() as frames:
        for site in (SITE4, SITE6):
            assert b"stand-in" in tcp(town.alice, site)
    assert not frames
    assert town.heard == [(HOST4, SITE4, 80), (HOST6, SITE6, 80)]


@pytest.mark.promise("P1")
def test_onion_addresses_go_to_tor_although_they_are_in_a_range_of_the_lan(town: HostTown) -> None:
    """By TCP; by anything else they are refused, before the LAN bypass."""
    town.load(ALL)
    with town.world_hears() as frames:
        for onion in (ONION4, ONION6):
            assert b"stand-in" in tcp(town.alice, onion)
            refused(partial(udp, town.alice, onion))
    assert not frames
    town.contained(*(partial(udp, town.alice, onion) for onion in (ONION4, ONION6)))


def test_services_of_this_machine_are_reached_from_it(town: HostTown) -> None:
    """At whatever address of its own: these are reached by loopback."""
    town.load(ALL)
    with town.root.open(socket.AF_INET6, socket.SOCK_STREAM) as service:
        service.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        service.bind(("::", 8080))
        service.listen()
        for host in (HOST4, HOST6, HOST_LAN4, "127.0.0.1", "::1"):
            town.alice.connect(host, 8080).close()
            service.accept()[0].close()
    assert not town.heard


@pytest.mark.promise("P2")
@pytest.mark.parametrize("lan", [True, False], ids=["lan", "no-lan"])
def test_dns_to_any_resolver_is_answered_by_tor(town: HostTown, lan: bool) -> None:
    """On loopback, where resolv.conf points to and local resolvers listen; elsewhere."""
    town.load(replace(ALL, lan=lan))
    resolvers = ("127.0.0.1", "127.0.0.53", LAN4, "9.9.9.9", "::1", LAN6, DOH6)
    with town.world_hears() as frames:
        for resolver in resolvers:
            assert b"example" in town.alice.ask(resolver, "example.test")
    assert not frames
    assert [heard[1] for heard in town.heard] == ["dns"] * len(resolvers)


@pytest.mark.promise("P2")
def test_a_flow_to_a_resolver_from_before_is_refused(town: HostTown) -> None:
    """Its address is not translated any more; by the LAN bypass it would leave."""
    town.nft("table inet other { chain c { type filter hook output priority 0; ct state new; }; }")
    query = b"\0\7\1\0\0\1" + bytes(6) + b"\4test\0\0\1\0\1"
    with town.alice.send(LAN4, 53, query) as flow:
        town.load(ALL)
        flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # forgets that nobody listens there
        with town.world_hears() as frames, pytest.raises(PermissionError):
            flow.send(query)
        assert not frames
        flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        town.unguarded()
        town.passes(partial(flow.send, query))


@pytest.mark.promise("P2")
def test_dns_by_tcp(town: HostTown) -> None:
    """To a resolver on the LAN it is refused, as Tor's DNSPort speaks UDP only; to one elsewhere it
    is TCP like any other; on loopback nobody listens."""
    town.load(ALL)
    with town.world_hears() as frames:
        for resolver in (LAN4, LAN6, "127.0.0.1"):
            refused(partial(tcp, town.alice, resolver, 53))
        assert b"stand-in" in tcp(town.alice, "9.9.9.9", 53)
    assert not frames
    town.contained(*(partial(tcp, town.alice, host, 53) for host in (LAN4, LAN6)))


@pytest.mark.promise("P2")
def test_dns_over_tls_and_https_is_refused_and_not_redirected(town: HostTown) -> None:
    """So that programs fall back to plain DNS, which goes to Tor."""
    town.load(ALL)
    acts = [partial(tcp, town.alice, host, 853) for host in (SITE4, SITE6, LAN4, LAN6)]
    acts += [partial(tcp, town.alice, host, 443) for host in (DOH4, DOH6)]
    for act in acts:
        refused(act)
    assert not town.heard
    assert b"stand-in" in tcp(town.alice, SITE4, 443)
    town.contained(*acts)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.promise("P3")
def test_nothing_but_tcp_and_dns_is_for_tor(town: HostTown) -> None:
    """QUIC, NTP, ping, tunnels, multicast, and TCP of no connection: of root, too."""
    town.load(ALL)
    acts = [
        *(partial(udp, town.root, site) for site in (SITE4, SITE6)),
        partial(udp, town.root, SITE4, 123),
        partial(udp, town.root, "224.0.0.251", 5353),
        *(partial(ping, town.root, site) for site in (SITE4, SITE6)),
        partial(gre, town.root),
    ]
    for act in acts:
        refused(act)
    town.contained(*acts, partial(bare_ack, town.root, 53), partial(bare_ack, town.root, 853))


@pytest.mark.promise("P3")
@pytest.mark.parametrize("lan", [True, False], ids=["lan", "no-lan"])
def test_the_lan_is_reached_directly_or_not_at_all(town: HostTown, lan: bool) -> None:
    """By any protocol but DNS. Shared address space (RFC 6598) is no LAN of ours."""
    town.load(replace(ALL, lan=lan))
    acts = [partial(act, town.alice, host) for host in (LAN4, LAN6) for act in (udp, tcp, ping)]
    for act in acts:
        if lan:
            town.passes(act)
        else:
            refused(act)
    assert not town.heard
    outside = [partial(act, town.alice, "100.64.1.1") for act in (udp, tcp)]
    for act in outside:
        refused(act)
    town.contained(*outside, *(() if lan else acts))


@pytest.mark.promise("P3")
def test_ipv6_is_refused_if_that_was_asked_for(town: HostTown) -> None:
    """Of those who are exempt as well, of the LAN and of Tor."""
    town.load(replace(ALL, ipv6=False, allow_root=True))
    sites = (SITE6, LAN6, ONION6)
    acts = [partial(act, who, to) for to in sites for who in (town.alice, town.root, town.tor)
            for act in (udp, tcp)]  # fmt: skip
    for act in acts:
        refused(act)
    assert b"stand-in" in tcp(town.alice, SITE4)
    town.heard.clear()
    town.contained(*acts)
    assert not town.heard


@pytest.mark.promise("P1")
def test_tor_itself_leaves_by_tcp_only(town: HostTown) -> None:
    town.load(ALL)
    for site in (SITE4, SITE6):
        assert b"world" in tcp(town.tor, site)
    refused(partial(udp, town.tor))
    town.contained(partial(udp, town.tor))


@pytest.mark.promise("P2")
def test_helpers_of_tor_ask_for_names_of_bridges(town: HostTown) -> None:
    """Those resolvers that are named, which know them before Tor has a connection; nobody else
    does, and they nobody else."""
    town.load(replace(ALL, tor_resolvers=(LAN4, LAN6)))
    for resolver in (LAN4, LAN6):
        town.passes(partial(udp, town.tor, resolver, 53))
    others = [partial(udp, town.tor, resolver, 53) for resolver in ("9.9.9.9", DOH6)]
    for act in others:
        refused(act)
    with town.world_hears() as frames:
        for resolver in (LAN4, LAN6):
            assert b"example" in town.alice.ask(resolver, "example.test")
    assert not frames
    town.contained(*others, *(partial(udp, town.alice, one, 53) for one in (LAN4, LAN6)))


@pytest.mark.promise("P3")
@pytest.mark.parametrize("lan", [True, False], ids=["lan", "no-lan"])
def test_helpers_of_tor_leave_by_udp_if_bridges_are_reached_so(town: HostTown, lan: bool) -> None:
    """To public addresses, as others name them; neither to the LAN, nor to resolvers."""
    town.load(replace(ALL, tor_udp=True, lan=lan))
    for site in (SITE4, SITE6):
        town.passes(partial(udp, town.tor, site))
    private = (LAN4, LAN6, "100.64.1.1", "224.0.0.251")
    acts = [partial(udp, town.tor, to) for to in private]
    acts += [partial(udp, town.tor, to, 53) for to in ("9.9.9.9", DOH6)]
    acts += [partial(udp, who, to) for who in (town.alice, town.root) for to in (SITE4, SITE6)]
    for act in acts:
        refused(act)
    town.contained(*acts, partial(ping, town.root))


def test_the_machine_keeps_its_address(town: HostTown) -> None:
    """A lease is renewed on a network that is no LAN of ours, too."""
    town.load(replace(ALL, lan=False))
    for host, source, port in (("203.0.113.1", 68, 67), ("2001:db8:7::1", 546, 547)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with town.root.open(family, socket.SOCK_DGRAM) as client:
            client.bind(("", source))
            town.passes(partial(client.sendto, TOKEN, (host, port)))


def test_neighbours_are_found(town: HostTown) -> None:
    """By IPv6 that takes ICMP: the guest's link has no fixed addresses."""
    town.load(ALL)
    town.root.run("ip", "-6", "neigh", "flush", "dev", "eth1")
    frames = b""
    with town.guest.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind(("eth0", 3))
        with suppress(OSError), town.tor.connect("2001:db8:5::2", 80, 1):
            pass
        tap.settimeout(0.2)
        with suppress(TimeoutError):
            while True:
                frames += tap.recv(2000)
    assert socket.inet_pton(socket.AF_INET6, "2001:db8:5::2") in frames


# ---- split tunnel --------------------------------------------------------------------------------


EXEMPT = {
    "root": replace(ALL, allow_root=True),
    "user": replace(ALL, bypass_users=(ALICE, BOB)),
    "group": replace(ALL, bypass_groups=(ALICE,)),
}


@pytest.mark.parametrize("by", EXEMPT)
def test_who_is_exempt_is_so_by_every_protocol(town: HostTown, by: str) -> None:
    """DNS as well, to a resolver of their own choice; on loopback there is only Tor's."""
    town.load(EXEMPT[by])
    exempt, other = (town.root, town.alice) if by == "root" else (town.alice, town.root)
    with town.world_hears() as frames:
        assert b"example" in exempt.ask("127.0.0.1", "example.test")
        assert b"stand-in" in tcp(other)
    assert not frames
    heard = len(town.heard)
    for site in (SITE4, SITE6):
        assert b"world" in tcp(exempt, site)
        for act in (udp, ping):
            town.passes(partial(act, exempt, site))
        town.passes(partial(udp, exempt, site, 53))
    assert len(town.heard) == heard
    town.contained(partial(udp, other), partial(ping, other))


def test_a_command_in_the_exempt_control_group_reaches_the_network(town: HostTown) -> None:
    """Whoever runs it; beside it, the same user goes through Tor."""
    group = Path(CGROUPS, f"ttp-story-{os.getpid()}.slice")
    group.mkdir()
    try:
        town.load(replace(ALL, bypass_cgroup=group.name))
        fetch = "import socket, sys; it = socket.create_connection((sys.argv[1], 80))"
        fetch += "; print(it.recv(100))"
        enter = f'echo $$ >{group}/cgroup.procs && exec "$@"'
        command = (sys.executable, "-c", fetch, SITE4)
        assert "world" in town.root.run("sh", "-c", enter, "sh", *command)
        assert b"stand-in" in tcp(town.root)
    finally:
        group.rmdir()


@pytest.mark.promise("P1", "P2")
def test_nobody_else_is_reached_at_the_ports_of_tor(nft_town: HostTown) -> None:
    """Who has bound them, beside Tor or in its place, gets nothing that is redirected there. The
    control: the same rules, if that is Tor's control group."""
    thieves, tor = (Path(CGROUPS, f"ttp-{who}-{os.getpid()}.slice") for who in ("thieves", "tor"))
    for group in (thieves, tor):
        group.mkdir()
    try:
        enter = f'echo $$ >{thieves}/cgroup.procs && exec "$@"'
        command = ("sh", "-c", enter, "sh", sys.executable, "-u", "-c", THIEF)
        with ExitStack() as held:
            thief = nft_town.root.space.call(subprocess.Popen, command, stdout=subprocess.PIPE)
            held.enter_context(thief)
            held.callback(thief.kill)
            assert thief.stdout is not None
            assert thief.stdout.readline() == b"bound\n"
            policy = replace(ALL, trans_port=4141, dns_port=5454)
            for group, gets in ((tor, False), (thieves, True)):
                nft_town.load(replace(policy, tor_cgroup=group.name))
                for site, resolver in ((SITE4, LAN4), (SITE6, LAN6)):
                    assert _is_robbed(tcp, nft_town.root, site) is gets, (group, site)
                    assert _is_robbed(_lookup, nft_town.root, resolver) is gets, (group, resolver)
    finally:
        for group in (thieves, tor):
            eventually(partial(_is_gone, group), f"{group} to be empty")


THIEF = """
import select, socket
sockets = []
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    for kind, port in ((socket.SOCK_STREAM, 4141), (socket.SOCK_DGRAM, 5454)):
        sockets.append(socket.socket(family, kind))
        sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sockets[-1].bind((host, port))
        if kind == socket.SOCK_STREAM:
            sockets[-1].listen()
print("bound")
while True:
    for one in select.select(sockets, (), ())[0]:
        if one.type == socket.SOCK_STREAM:
            one.accept()[0].send(b"stolen")
        else:
            one.sendto(b"stolen", one.recvfrom(600)[1])
"""


def _is_robbed(ask: Callable[[Actor, str], bytes], actor: Actor, host: str) -> bool:
    try:
        return ask(actor, host) == b"stolen"
    except OSError:
        return False


def _lookup(actor: Actor, resolver: str) -> bytes:
    with actor.send(resolver, 53, query("example.com")) as asking:
        return asking.recv(600)


def _is_gone(group: Path) -> bool:
    with suppress(OSError):  # who was in it is about to be
        group.rmdir()
    return not group.exists()


# ---- who connects to this machine ----------------------------------------------------------------


@pytest.mark.promise("P5")
@pytest.mark.parametrize("followed", [True, False], ids=["followed", "unknown"])
def test_inbound_connections_go_on_and_new_ones_are_taken(town: HostTown, followed: bool) -> None:
    """T8: from public addresses, whoever speaks first after the rules came, and whether or not the
    kernel followed connections before."""
    if followed:
        town.nft(
            "table inet other { chain c { type filter hook output priority 0; ct state new; }; }"
        )
    with town.root.open(socket.AF_INET, socket.SOCK_STREAM) as sshd:
        sshd.bind((HOST4, 22))
        sshd.listen()

        def come() -> tuple[socket.socket, socket.socket]:
            return town.world.connect(HOST4, 22), sshd.accept()[0]

        speaking, silent = come(), come()
        town.load(ALL)
        peer, session = speaking
        session.sendall(b"I speak first")
        assert peer.recv(100) == b"I speak first"
        for peer, session in (speaking, silent, come()):
            peer.sendall(b"hello")
            assert session.recv(100) == b"hello"
            session.sendall(b"hello, too")
            assert peer.recv(100) == b"hello, too"
            session.close()
            peer.close()


@pytest.mark.promise("P1")
@pytest.mark.parametrize("followed", [True, False], ids=["followed", "unknown"])
def test_outbound_connections_from_before_are_cut(town: HostTown, followed: bool) -> None:
    """Even if the other side speaks first, and so seems to have begun."""
    if followed:
        town.nft(
            "table inet other { chain c { type filter hook output priority 0; ct state new; }; }"
        )
    connection = town.alice.connect(SITE4, 80)
    connection.recv(100)
    eventually(lambda: town.met, "the world to take the connection")
    town.load(ALL)
    town.met[0].sendall(b"an answer, late")
    with town.world_hears() as frames, suppress(OSError):
        for _ in range(3):
            connection.sendall(TOKEN)
            time.sleep(0.1)  # a refusal is to reach the socket
    connection.close()
    assert not [frame for frame in frames if f"IP {HOST4}" in frame]


@pytest.mark.promise("P3")
def test_packets_that_conntrack_forgot_are_not_let_out(town: HostTown) -> None:
    """Data, FIN and RST of redirected connections: the leak of 2014."""
    town.load(ALL)
    connections = [town.alice.connect(SITE4, 443) for _ in range(3)]
    with town.world_hears() as frames:
        town.root.run("conntrack", "-F")
        data, fin, rst = connections
        with suppress(OSError):
            data.sendall(TOKEN)
        fin.close()
        rst.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rst.close()
        time.sleep(0.3)  # the kernel sends a FIN again after 0.2 s
        data.close()
    assert not frames


# ---- other machines' packets ---------------------------------------------------------------------


@pytest.mark.promise("P3")
def test_forwarded_packets_are_refused(town: HostTown) -> None:
    """Of containers and virtual machines; between hosts of the LAN they pass, but for DNS."""
    town.load(ALL)
    acts = [partial(act, town.guest, to) for to in (SITE4, SITE6) for act in (tcp, udp, ping)]
    acts += [partial(tcp, town.guest, LAN4, 853)]
    acts += [partial(act, town.guest, to, 53) for to in (LAN4, LAN6) for act in (tcp, udp)]
    acts += [partial(act, town.guest, to) for to in (ONION4, ONION6) for act in (tcp, udp)]
    for act in (partial(tcp, town.guest), partial(tcp, town.guest, SITE6)):
        refused(act)
    with town.guest.send(SITE4, 443, TOKEN) as flow:
        refused(partial(flow.recv, 100))
    for host in (LAN4, LAN6):
        assert b"world" in tcp(town.guest, host)
    town.contained(*acts)


@pytest.mark.promise("P3")
def test_without_the_lan_bypass_nothing_is_forwarded(nft_town: HostTown) -> None:
    nft_town.load(replace(ALL, lan=False))
    nft_town.contained(partial(tcp, nft_town.guest, LAN4), partial(udp, nft_town.guest, LAN4))


@pytest.mark.promise("P3")
def test_a_source_route_leads_nobody_out(town: HostTown) -> None:
    """Where the kernel obeys it: until it is sent on, it is for this machine, which is of a LAN."""
    for name in ("all", "eth1"):
        town.root.run("sysctl", "-qw", f"net.ipv4.conf.{name}.accept_source_route=1")
    town.load(ALL)
    loose_route = bytes([131, 7, 4]) + socket.inet_aton(SITE4) + b"\0"
    with town.guest.open(socket.AF_INET, socket.SOCK_RAW, 47) as tunnel:
        header = struct.pack(">BBHHHBBH", 0x47, 0, 0, 7, 0, 64, 47, 0)
        header += socket.inet_aton(GUEST4) + socket.inet_aton(TO_GUEST4) + loose_route
        tunnel.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        town.contained(partial(tunnel.sendto, header + TOKEN, (TO_GUEST4, 0)))


MIDDLEBOX = replace(ALL, own="none", gateway_for=("eth1",))


@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize("own", ["none", "all"])
def test_a_middlebox_sends_its_lan_through_tor(town: HostTown, own: str) -> None:
    """TCP and DNS, of both versions of IP, also DNS that asks itself; the rest is refused. Its own
    traffic goes through Tor, too, or is left alone."""
    town.load(replace(MIDDLEBOX, own="all" if own == "all" else "none"))
    with town.world_hears() as frames:
        for site in (SITE4, SITE6, ONION4, ONION6):
            assert b"stand-in" in tcp(town.guest, site)
        for resolver in (TO_GUEST4, TO_GUEST6, "9.9.9.9", DOH6, LAN4):
            assert b"example" in town.guest.ask(resolver, "example.test")
        for host, port in ((SITE4, 853), (DOH4, 443), (DOH6, 443), (LAN4, 53)):
            refused(partial(tcp, town.guest, host, port))
    assert not frames
    assert town.heard[0] == (GUEST4, SITE4, 80)
    heard = len(town.heard)
    for host in (LAN4, LAN6):
        assert b"world" in tcp(town.guest, host)
    assert len(town.heard) == heard
    assert (b"stand-in" if own == "all" else b"world") in tcp(town.alice)
    acts = [partial(act, town.guest, to) for to in (SITE4, SITE6) for act in (udp, ping)]
    town.contained(*acts)


@pytest.mark.promise("P3")
def test_a_middlebox_serves_its_lan_and_says_what_it_refuses(town: HostTown) -> None:
    """At whatever address of its own; an error reaches a LAN that is not to be bypassed, too."""
    town.load(replace(MIDDLEBOX, own="all", lan=False))
    with town.root.open(socket.AF_INET6, socket.SOCK_STREAM) as service:
        service.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        service.bind(("::", 8080))
        service.listen()
        for host in (HOST4, HOST6, TO_GUEST4, TO_GUEST6):
            town.guest.connect(host, 8080).close()
            service.accept()[0].close()
    assert not town.heard
    for site in (SITE4, SITE6):
        with town.guest.send(site, 443, TOKEN) as flow:
            refused(partial(flow.recv, 100))


@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize("own", ["users", "onion"])
def test_a_middlebox_beside_modes_that_leave_others_alone(nft_town: HostTown, own: Own) -> None:
    """Its LAN is caught as a whole; bob, who is not, is left alone."""
    town = nft_town
    town.load(replace(MIDDLEBOX, own=own, users=(ALICE,) if own == "users" else ()))
    with town.world_hears() as frames:
        for site in (SITE4, SITE6, ONION4, ONION6):
            assert b"stand-in" in tcp(town.guest, site)
        for resolver in ("9.9.9.9", DOH6, TO_GUEST4):
            assert b"example" in town.guest.ask(resolver, "example.test")
        refused(partial(tcp, town.guest, SITE4, 853))
    assert not frames
    assert b"world" in tcp(town.bob)


@pytest.mark.promise("P1", "P2", "P3")
def test_a_middlebox_need_not_forward(nft_town: HostTown) -> None:
    """What is refused is refused at once all the same; names are answered at link-local, too."""
    town = nft_town
    for switch in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        town.root.run("sysctl", "-qw", f"{switch}=0")
    town.load(replace(MIDDLEBOX, own="all"))
    (link,) = json.loads(town.guest.run("ip", "-j", "link", "show", "eth0"))
    with town.world_hears() as frames:
        for site in (SITE4, SITE6, ONION4, ONION6):
            assert b"stand-in" in tcp(town.guest, site)
        for resolver in ("9.9.9.9", DOH6, TO_GUEST4):
            assert b"example" in town.guest.ask(resolver, "example.test")
        with town.guest.open(socket.AF_INET6, socket.SOCK_DGRAM) as query:
            query.connect(("fe80::1", 53, 0, link["ifindex"]))
            query.send(b"\0\7\1\0\0\1" + bytes(6) + b"\4test\0\0\1\0\1")
            assert b"test" in query.recv(512)
        for site in (SITE4, SITE6):
            with town.guest.send(site, 443, TOKEN) as flow:
                refused(partial(flow.recv, 100))
        for host, port in ((SITE4, 853), (DOH4, 443), (DOH6, 443)):
            refused(partial(tcp, town.guest, host, port))
    assert not frames


@pytest.mark.promise("P1", "P3")
def test_a_middlebox_ends_what_was_forwarded_before(town: HostTown) -> None:
    """It does not go on in clear, and the LAN's host is told by a reset."""
    flows = [town.guest.connect(site, 80) for site in (SITE4, SITE6)]
    town.load(MIDDLEBOX)
    with town.world_hears() as frames:
        for flow in flows:
            refused(partial(send_until_reset, flow))
    assert not frames
    for flow in flows:
        flow.close()


@pytest.mark.promise("P3", "P5")
@pytest.mark.parametrize("own", ["none", "all"])
def test_a_middlebox_sends_nothing_to_forged_sources(town: HostTown, own: str) -> None:
    """Neither refusals, which would have its own address, nor answers of Tor's and of services."""
    forged = {4: "198.51.100.9", 6: "2001:db8:66::9"}
    for source in forged.values():
        town.guest.run("ip", "address", "add", source, "dev", "lo")

    def send(kind: socket.SocketKind, to: str, port: int) -> None:
        family, source = (socket.AF_INET6, forged[6]) if ":" in to else (socket.AF_INET, forged[4])
        with town.guest.open(family, kind) as it:
            it.bind((source, 0))
            it.setblocking(False)
            it.connect_ex((to, port))
            if kind == socket.SOCK_DGRAM:
                it.send(query("example.test"))
            time.sleep(0.1)  # for what the stand-in of Tor says

    with town.root.open(socket.AF_INET6, socket.SOCK_STREAM) as service:
        service.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        service.bind(("::", 8080))
        service.listen()
        town.load(replace(MIDDLEBOX, own="all" if own == "all" else "none"))
        town.contained(
            *(
                partial(send, socket.SOCK_DGRAM, to, port)
                for to in (SITE4, SITE6)
                for port in (53, 443)
            ),
            *(partial(send, socket.SOCK_STREAM, to, 80) for to in (SITE4, SITE6)),
            *(partial(send, socket.SOCK_STREAM, to, 8080) for to in (TO_GUEST4, TO_GUEST6)),
        )
    assert not town.heard


@pytest.mark.promise("P2", "P4")
@pytest.mark.parametrize("state", ["full", "lockdown"])
def test_no_resolver_of_a_middlebox_asks_for_its_lan(nft_town: HostTown, state: str) -> None:
    """By TCP and TLS; by UDP in a flow from before, and while nothing is redirected any more."""
    town = nft_town
    with ExitStack() as stack:
        resolver = stack.enter_context(town.root.open(socket.AF_INET6, socket.SOCK_DGRAM))
        ports = [town.root.open(socket.AF_INET6, socket.SOCK_STREAM) for _ in range(2)]
        for at, number in zip((resolver, *ports), (53, 53, 853), strict=True):
            stack.enter_context(at)
            at.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            at.bind(("::", number))
        for at in ports:
            at.listen()
        town.nft(
            "table inet other { chain c { type filter hook input priority 0; ct state new; }; }"
        )
        before = [town.guest.send(to, 53, TOKEN) for to in (TO_GUEST4, TO_GUEST6)]
        for _ in before:
            assert resolver.recv(100) == TOKEN
        town.load(MIDDLEBOX)
        if state == "lockdown":
            town.nft(rules.render_lockdown(MIDDLEBOX))
        for flow in before:
            stack.enter_context(flow)
            flow.send(TOKEN)
            refused(partial(flow.recv, 100))
        for to in (TO_GUEST4, TO_GUEST6):
            for number in (53, 853):
                refused(partial(town.guest.connect, to, number))
            if state == "lockdown":
                refused(partial(town.guest.ask, to, "example.test"))
        with pytest.raises(TimeoutError):
            resolver.recv(100)
        town.unguarded()
        for flow in before:
            flow.send(TOKEN)
            assert resolver.recv(100) == TOKEN
        for to in (TO_GUEST4, TO_GUEST6):
            for number in (53, 853):
                town.guest.connect(to, number).close()


@pytest.mark.promise("P4")
def test_lockdown_lets_tor_reset_who_came_from_the_lan(nft_town: HostTown) -> None:
    """Its connections are still translated, so that the reset is one of the site's; no new ones."""
    town = nft_town
    town.load(MIDDLEBOX)
    flow = town.guest.connect(SITE4, 443)
    town.nft(rules.render_lockdown(MIDDLEBOX))
    with town.world_hears() as frames:
        assert b"stand-in" in flow.recv(100)
        refused(partial(send_until_reset, flow))
        for site in (SITE4, SITE6, ONION4):
            refused(partial(tcp, town.guest, site))
        refused(partial(town.guest.ask, "9.9.9.9", "example.test"))
    assert not frames
    flow.close()


@pytest.mark.promise("P3")
def test_a_middlebox_without_ipv6_is_no_router_of_it(nft_town: HostTown) -> None:
    """It is not found; and who knows where it is, reaches neither Tor nor others of the LAN."""
    town = nft_town
    town.load(replace(MIDDLEBOX, own="all", ipv6=False))
    with pytest.raises(OSError):
        town.guest.connect(TO_GUEST6, 80, 0.5)
    (link,) = json.loads(town.root.run("ip", "-j", "link", "show", "eth1"))
    known = ("lladdr", link["address"], "dev", "eth0", "nud", "permanent")
    town.guest.run("ip", "neigh", "replace", TO_GUEST6, *known)
    guest, sites = town.guest, (SITE6, LAN6)
    acts: list[Callable[[], object]] = [
        partial(udp, guest, to, port) for to in sites for port in (53, 443)
    ]
    town.contained(*acts, *(partial(knock, guest, to) for to in sites))
    assert not town.heard


def test_a_middlebox_gives_its_lan_addresses(town: HostTown) -> None:
    """By DHCP of both versions and by announcing itself as a router; towards the LAN only."""
    town.load(replace(MIDDLEBOX, own="all", lan=False))
    for target, source, port in (("255.255.255.255", 67, 68), ("ff02::1", 547, 546)):
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with town.root.open(family, socket.SOCK_DGRAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", source))
            server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
            server.sendto(TOKEN, (target, port))
            server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            with pytest.raises(PermissionError):
                server.sendto(TOKEN, (target, port))
    with town.root.open(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as router:
        router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        router.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
        announcement = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 0, 0, 0)
        router.sendto(announcement, ("ff02::1", 0))


@pytest.mark.promise("P5")
def test_a_middlebox_is_no_open_tor(town: HostTown) -> None:
    """Its listeners take only what was redirected to them."""
    town.load(MIDDLEBOX)
    for at in OTHERS.addresses:
        refused(partial(tcp, town.guest, at, 9041))
        with town.guest.send(at, 9054, TOKEN) as query, pytest.raises(OSError):
            query.recv(100)
    assert not town.heard


# ---- other modes ---------------------------------------------------------------------------------


@pytest.mark.promise("P1", "P2")
def test_only_the_users_that_were_named_go_through_tor(town: HostTown) -> None:
    """All of theirs: their DNS, and nobody else's; of theirs, what is not for Tor is refused."""
    town.load(replace(ALL, own="users", users=(ALICE,)))
    with town.world_hears() as frames:
        for site in (SITE4, SITE6):
            assert b"stand-in" in tcp(town.alice, site)
        for resolver in (LAN4, "127.0.0.53", "9.9.9.9"):
            assert b"example" in town.alice.ask(resolver, "example.test")
        refused(partial(tcp, town.alice, DOH4, 443))
    assert not frames
    heard = len(town.heard)
    assert b"world" in tcp(town.bob)
    for act in (partial(udp, town.bob), partial(ping, town.bob), partial(udp, town.bob, LAN4, 53)):
        town.passes(act)
    assert len(town.heard) == heard
    acts = [partial(act, town.alice, site) for site in (SITE4, SITE6) for act in (udp, ping)]
    for act in acts:
        refused(act)
    town.contained(*acts, partial(multipath, town.alice))


@pytest.mark.promise("P2")
def test_a_resolver_on_loopback_does_not_ask_for_them(town: HostTown) -> None:
    """It is another user's, and would ask in clear: by TCP, TLS, or a flow from before."""
    town.nft("table inet other { chain c { type filter hook output priority 0; ct state new; }; }")
    served = {port: town.root.open(socket.AF_INET, socket.SOCK_STREAM) for port in (53, 853)}
    with ExitStack() as stack:
        for port, listener in served.items():
            stack.enter_context(listener).bind(("127.0.0.53", port))
            listener.listen()
        resolver = stack.enter_context(town.root.open(socket.AF_INET, socket.SOCK_DGRAM))
        resolver.bind(("127.0.0.53", 53))
        before = stack.enter_context(town.alice.send("127.0.0.53", 53, TOKEN))
        assert resolver.recv(100) == TOKEN
        town.load(replace(ALL, own="users", users=(ALICE,)))
        refused(partial(before.send, TOKEN))
        for port in served:
            refused(partial(town.alice.connect, "127.0.0.53", port))
            town.bob.connect("127.0.0.53", port).close()
        before.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # forgets that it was refused
        town.unguarded()
        before.send(TOKEN)
        assert resolver.recv(100) == TOKEN


@pytest.mark.promise("P3")
def test_only_the_users_that_were_named_have_no_ipv6(nft_town: HostTown) -> None:
    """Where the machine has none for Tor to listen at, or theirs is not wanted."""
    nft_town.load(replace(ALL, own="users", users=(ALICE,), ipv6=False))
    acts = [partial(act, nft_town.alice, site) for site in (SITE6, LAN6) for act in (tcp, udp)]
    for act in acts:
        refused(act)
    assert b"world" in tcp(nft_town.bob, SITE6)
    nft_town.contained(*acts)


@pytest.mark.promise("P3")
def test_what_a_closed_connection_still_sends_is_not_let_out(town: HostTown) -> None:
    """It has no user any more. Once conntrack has forgotten it, it would be nobody's."""
    town.load(replace(ALL, own="users", users=(ALICE,)))
    connection = town.alice.connect(SITE4, 443)
    while connection.recv(100):  # else it would end with a reset
        pass
    town.nft("table inet lost { chain c { type filter hook input priority 0; policy drop; }; }")
    connection.sendall(TOKEN)
    connection.close()
    with town.world_hears() as frames:
        town.root.run("conntrack", "-F")
        time.sleep(0.7)  # the kernel sends it again after 0.2 s, then 0.4 s
    assert not frames
    town.unguarded()
    town.passes(partial(time.sleep, 1))  # and once more after 0.8 s


@pytest.mark.promise("P1", "P2")
def test_only_onion_services_go_through_tor(town: HostTown) -> None:
    """Their addresses and names, whoever is asked for these, reach nobody else; all else does."""
    town.load(replace(ALL, own="onion"))
    names = ("a.onion", f"{'a' * 56}.Onion", f"www.{'a.' * 80}{'b' * 56}.ONION")
    with town.world_hears() as frames:
        for onion in (ONION4, ONION6):
            assert b"stand-in" in tcp(town.alice, onion)
        for resolver in ("127.0.0.53", LAN4, LAN6, "9.9.9.9"):
            for name in names:
                assert b"onion" in town.alice.ask(resolver, name).lower()
    assert not frames
    heard = len(town.heard)
    assert b"world" in tcp(town.alice)
    town.passes(partial(udp, town.alice))
    for name in ("example.test", "onion.example.test", "onions", "a.xonion"):
        town.passes(partial(question, town.alice, name))
        assert b"world" in by_tcp(town.alice, LAN4, name)
    assert len(town.heard) == heard
    for name in names:
        refused(partial(by_tcp, town.alice, LAN4, name))
    town.contained(partial(udp, town.alice, ONION4), partial(udp, town.alice, ONION6))


@pytest.mark.promise("P2")
@pytest.mark.parametrize("resolver", [LAN4, "127.0.0.53"])
def test_a_flow_that_began_with_another_name_asks_for_none_of_onion(
    town: HostTown, resolver: str
) -> None:
    """It is not redirected any more; on loopback somebody could ask further, and unseen."""
    town.load(replace(ALL, own="onion"))
    with ExitStack() as stack:
        if resolver != LAN4:
            listener = stack.enter_context(town.root.open(socket.AF_INET, socket.SOCK_DGRAM))
            listener.bind((resolver, 53))
        flow = stack.enter_context(town.alice.send(resolver, 53, query("example.test")))
        flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # forgets that nobody listens there
        with town.world_hears() as frames:
            refused(partial(flow.send, query("a.onion")))
        assert not frames
        flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        flow.send(query("a.example.test"))
    assert not town.heard


@pytest.mark.promise("P2")
def test_a_domain_to_search_takes_no_name_of_a_service_along(nft_town: HostTown) -> None:
    """As libc appends it, by UDP and TCP, to resolvers on loopback as well; other names pass."""
    nft_town.load(replace(ALL, own="onion"))
    service = f"{'a' * 56}.onion"
    names = [f"{service}.example.test", f"www.{'b' * 59}.{service.upper()}.test"]
    with nft_town.world_hears() as frames:
        for name in names:
            for resolver in (LAN4, LAN6, "127.0.0.53"):
                refused(partial(nft_town.alice.ask, resolver, name))
    assert not frames
    for name in names:
        refused(partial(by_tcp, nft_town.alice, LAN4, name))
    for name in (f"{'a' * 56}.example.test", "a.onion.example.test", f"{'a' * 55}.onion.test"):
        nft_town.passes(partial(question, nft_town.alice, name))
        assert b"world" in by_tcp(nft_town.alice, LAN4, name)


@pytest.mark.promise("P3")
def test_only_onion_services_and_no_ipv6(nft_town: HostTown) -> None:
    """That is of everybody, whatever else is left alone."""
    nft_town.load(replace(ALL, own="onion", ipv6=False))
    assert b"world" in tcp(nft_town.alice)
    acts = [partial(act, nft_town.alice, site) for site in (SITE6, ONION6) for act in (tcp, udp)]
    for act in acts:
        refused(act)
    nft_town.contained(*acts)


# ---- the tables of nft alone ---------------------------------------------------------------------


@pytest.mark.promise("P4")
def test_lockdown_ends_redirected_connections_and_lets_nothing_new_out(nft_town: HostTown) -> None:
    """Tor, the LAN and who is logged in go on; a redirected program learns of it."""
    town = nft_town
    town.load(ALL)
    idle = town.alice.connect(SITE4, 443)
    eventually(lambda: town.heard, "Tor to take the connection")
    town.nft(rules.render_lockdown(ALL))
    with town.world_hears() as frames:
        refused(partial(send_until_reset, idle))
        for site in (SITE4, SITE6, ONION4):
            refused(partial(tcp, town.alice, site))
        refused(partial(udp, town.alice, "9.9.9.9", 53))
    idle.close()
    assert not frames
    assert b"world" in tcp(town.tor)
    assert b"world" in tcp(town.alice, LAN4)
    town.contained(partial(tcp, town.alice))


@pytest.mark.promise("P4")
def test_closed_lets_nothing_out_but_answers(nft_town: HostTown) -> None:
    """Neither Tor nor the LAN: at boot nothing is known yet, after tampering nothing believed."""
    town = nft_town
    town.nft(rules.render_closed())
    with town.root.open(socket.AF_INET, socket.SOCK_STREAM) as sshd:
        sshd.bind((HOST4, 22))
        sshd.listen()
        with town.world.connect(HOST4, 22) as peer, sshd.accept()[0] as session:
            session.sendall(b"hello")
            assert peer.recv(10) == b"hello"
    acts = [
        partial(act, who, to)
        for who in (town.tor, town.root)
        for to in (SITE4, SITE6, LAN4)
        for act in (tcp, udp)
    ]
    for act in acts:
        refused(act)
    town.contained(*acts, partial(tcp, town.guest, LAN4))


@pytest.mark.promise("P1", "P2")
@pytest.mark.parametrize("who", ["alice", "guest"])
def test_what_other_rules_translate_is_not_taken_for_ours(nft_town: HostTown, who: str) -> None:
    """DNS led to another port of the LAN, and TCP led past Tor: both are refused."""
    town = nft_town
    actor, hook = (town.alice, "output") if who == "alice" else (town.guest, "prerouting")
    town.load(ALL)
    town.nft(
        f"table ip other {{ chain c {{ type nat hook {hook} priority -180; "
        f"udp dport 53 dnat to {LAN4}:5353; tcp dport 53 dnat to {LAN4}:80; "
        f"tcp dport 80 dnat to {SITE4}:443; }}; }}"
    )
    acts: list[Callable[[], object]]
    acts = [partial(udp, actor, "9.9.9.9", 53), partial(tcp, actor, "9.9.9.9", 53)]
    acts.append(partial(tcp, actor, "93.184.216.35"))
    with town.world_hears() as frames:
        for act in acts:
            with suppress(OSError):
                act()
    assert not frames
    town.nft("delete table inet ttp\n")
    for act in acts:
        town.passes(act)


@pytest.mark.promise("P2")
@pytest.mark.parametrize("who", ["alice", "guest"])
def test_dns_that_other_rules_hide_from_conntrack_is_refused(nft_town: HostTown, who: str) -> None:
    """Nobody translates it, and the LAN is a LAN."""
    town = nft_town
    actor, hook = (town.alice, "output") if who == "alice" else (town.guest, "prerouting")
    town.load(ALL)
    town.nft(
        f"table ip other {{ chain c {{ type filter hook {hook} priority -300; "
        "th dport 53 meta l4proto { tcp, udp } notrack; }; }"
    )
    town.contained(partial(udp, actor, LAN4, 53), partial(tcp, actor, LAN4, 53))


@pytest.mark.promise("P1", "P2", "P3")
def test_firehol_takes_the_rules_and_keeps_them_in_front_of_its_own(tmp_path: Path) -> None:
    """It lets go on whatever is established; ours come first, also for what it would redirect."""
    with host_town("firehol", tmp_path) as town:
        flow = town.alice.connect(SITE4, 80)
        eventually(lambda: town.met, "the world to take the connection")
        town.load(replace(ALL, gateway_for=("eth1",)))
        with town.world_hears() as frames:
            for actor in (town.alice, town.guest):
                for site in (SITE4, SITE6, ONION4, ONION6):
                    assert b"stand-in" in tcp(actor, site)
                for resolver in (LAN4, "9.9.9.9", DOH6):
                    assert b"example" in actor.ask(resolver, "example.test")
            for host, port in ((SITE4, 853), (DOH4, 443)):
                refused(partial(tcp, town.alice, host, port))
            refused(partial(send_until_reset, flow))
        assert not frames
        flow.close()
        assert b"world" in tcp(town.tor)
        assert b"world" in tcp(town.alice, LAN4)
        town.contained(
            *(partial(act, town.alice, site) for site in (SITE4, SITE6) for act in (udp, ping)),
            partial(udp, town.guest),
        )


@pytest.mark.promise("P12")
def test_iptables_chains_are_hooked_once(tmp_path: Path) -> None:
    """However often they are loaded."""
    with host_town("iptables-legacy", tmp_path) as town:
        many = tuple(range(22, 60))  # more than one match of iptables takes
        for _ in range(2):
            town.load(replace(ALL, services=many))
        listed = town.root.run("iptables-legacy", "-S", "OUTPUT")
        assert listed.count("TTP_filter_out") == 1
