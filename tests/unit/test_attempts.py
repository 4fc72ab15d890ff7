"""What a program sent on its own link, packet by packet: fit for Tor, or an attempt."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from nsrun.address import BLOCKS
from nsrun.leak.attempts import Allowed, block_of, examine, sent
from nsrun.leak.frames import Arp, Ethernet, Frame, Icmp, Ip, Tcp, Udp, Unreadable
from nsrun.ruleset import PRIVATE4

BLOCK = BLOCKS[0]
OWN, OWN6 = map(str, BLOCK.link(2))
LINK = Ethernet("02:00:00:00:00:01", "02:00:00:00:00:01", (), 0x0800)
PROTOCOL = {Tcp: 6, Udp: 17}


def frame(body: Ip | Arp | None) -> Frame:
    return Frame(1_700_000_000_123_456_789, 74, b"bytes", LINK, body)


def to(target: str, body: Tcp | Udp | Icmp | Unreadable | None, protocol: int = 0) -> Frame:
    version, source = (6, OWN6) if ":" in target else (4, OWN)
    if isinstance(body, Icmp):
        protocol = {4: 1, 6: 58}[version]
    number = protocol or PROTOCOL.get(type(body), 0)
    return frame(Ip(version, source, target, 64, number, body=body))


def tcp(port: int = 443) -> Tcp:
    return Tcp(40000, port, "S")


def udp(port: int) -> Udp:
    return Udp(40000, port)


@pytest.mark.parametrize(
    "packet",
    [
        to("11.200.0.80", tcp()),
        to("2600:11c8::80", tcp()),
        to("11.200.0.80", tcp(853)),
        to(str(BLOCK.automap[7]), tcp(80)),
        to(str(BLOCK.automap6[7]), tcp(80)),
        to(str(BLOCK.gateway), udp(53)),
        to(str(BLOCK.gateway6), udp(53)),
        to("127.0.0.53", udp(53)),
        to("8.8.8.8", Icmp(4, 3, 3)),
        frame(Ip(6, "::", "ff02::16", 1, 58, ("hop-by-hop",), body=Icmp(6, 143, 0))),
    ],
)
def test_what_tor_carries_is_no_attempt(packet: Frame) -> None:
    """TCP to public addresses and .onion, DNS to the resolver, and what the kernel says itself."""
    assert sent(packet, BLOCK)
    assert examine(packet, BLOCK) is None


@pytest.mark.parametrize(
    ("packet", "why", "guard"),
    [
        (to("8.8.8.8", udp(53)), "DNS to 8.8.8.8", "P2 DNS goes to Tor, ipv4"),
        (to("2600:11c8::53", udp(53)), "DNS to 2600:", "P2 DNS goes to Tor, ipv6"),
        (to("8.8.8.8", tcp(53)), "DNS by TCP", "P1 TCP goes to Tor, ipv4"),
        (to("192.168.77.53", tcp(53)), "DNS by TCP", "P3 other TCP is refused"),
        (to("192.168.77.80", tcp(80)), "the LAN", "P3 other TCP is refused"),
        (to("169.254.169.254", tcp(80)), "metadata", "P3 other TCP is refused"),
        (to("11.200.0.80", udp(3478)), "STUN", "P3 all else is refused"),
        (to("11.200.0.80", udp(7)), "UDP, which", "P3 all else is refused"),
        (to("239.255.255.250", udp(1900)), "SSDP) to everybody", "P3 all else is refused"),
        (to("ff02::fb", udp(5353)), "mDNS) to everybody", "P3 all else is refused"),
        (to("255.255.255.255", udp(67)), "DHCP) to everybody", "P3 all else is refused"),
        (to("11.200.0.80", Icmp(4, 8, 0)), "ICMP", "P3 all else is refused"),
        (to("2600:11c8::80", Icmp(6, 128, 0)), "ICMP", "P3 all else is refused"),
        (to("224.0.0.22", None, 2), "igmp", "P3 all else is refused"),
        (to("11.200.0.80", Unreadable("cut"), 6), "tcp, not readable", "P3 all else is refused"),
        (frame(Ip(4, "192.168.77.9", "8.8.8.8", 64, 17, body=udp(53))), "DNS", "P5 no spoofing"),
        (frame(Arp(1, "02:00:00:00:00:01", OWN, "10.64.0.3")), "not IP", "no rule"),
        (frame(None), "not IP", "no rule"),
    ],
)
def test_all_else_is_an_attempt(packet: Frame, why: str, guard: str) -> None:
    """And it is said why, and which rule of the gateway stopped it."""
    assert sent(packet, BLOCK)
    found = examine(packet, BLOCK)
    assert found is not None
    assert why in found.why
    assert found.guard.startswith(guard)
    assert found.time == "22:13:20.123456"


@pytest.mark.parametrize("network", PRIVATE4)
def test_every_private_network_is_out_of_reach(network: str) -> None:
    """The list is the gateway's own."""
    first = str(ip_network(network)[5])
    assert examine(to(first, tcp(80)), BLOCK)


def test_only_packets_from_without_to_the_workload_are_received() -> None:
    """Whatever their source claims; between two workloads, either end has sent it."""
    answer = Ip(4, "8.8.8.8", OWN, 64, 17, body=Udp(53, 40000))
    assert not sent(frame(answer), BLOCK)
    assert not sent(frame(replace(answer, source=str(BLOCK.gateway))), BLOCK)
    assert sent(frame(replace(answer, source=str(BLOCK.links[3]))), BLOCK)
    assert sent(frame(replace(answer, target="11.200.0.80")), BLOCK)


def test_what_a_test_allows_is_exact() -> None:
    """What is given must fit, all of it."""
    ping, stun = to("11.200.0.80", Icmp(4, 8, 0)), to("11.200.0.80", udp(3478))
    assert Allowed(protocol="icmp").covers(ping)
    assert not Allowed(protocol="icmp").covers(stun)
    assert Allowed(ip_network("11.200.0.0/16"), 3478, "udp").covers(stun)
    assert Allowed(protocol="17").covers(stun)
    assert not Allowed(ip_network("11.200.0.81")).covers(stun)
    assert not Allowed(port=3479).covers(stun)
    assert not Allowed(port=3478).covers(ping)
    assert not Allowed(ip_network("2600:11c8::/32")).covers(stun)
    assert not Allowed(protocol="udp").covers(frame(None))


def test_the_gateways_address_tells_its_block() -> None:
    """Of the two that there are."""
    assert [block_of(str(block.gateway)) for block in BLOCKS] == list(BLOCKS)
