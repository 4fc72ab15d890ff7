"""Frames are built here byte by byte from the RFCs, never with the decoder's own help."""

from __future__ import annotations

import random
import struct
from ipaddress import ip_address

import pytest

from nsrun.leak import frames
from nsrun.leak.frames import Arp, Frame, Icmp, Ip, Marker, Tcp, Udp, Unreadable

HERE, THERE = "02:00:00:00:00:01", "02:00:00:00:00:02"
DNS = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\7example\3org\0\0\x1c\0\1"


def ethernet(ethertype: int, payload: bytes, vlans: tuple[int, ...] = ()) -> bytes:
    tags = b"".join(struct.pack("!HH", 0x8100, vlan) for vlan in vlans)
    addresses = bytes.fromhex((THERE + HERE).replace(":", ""))
    return addresses + tags + struct.pack("!H", ethertype) + payload


def ipv4(protocol: int, payload: bytes, options: bytes = b"", place: int = 0x4000) -> bytes:
    size = 20 + len(options)
    start = struct.pack(
        "!BBHHHBBH", 0x40 | size // 4, 0, size + len(payload), 7, place, 64, protocol, 0
    )
    ends = ip_address("10.0.0.1").packed + ip_address("192.0.2.9").packed
    return start + ends + options + payload


def ipv6(protocol: int, payload: bytes, hops: int = 64) -> bytes:
    start = struct.pack("!IHBB", 0x60000000, len(payload), protocol, hops)
    return start + ip_address("fd00::1").packed + ip_address("2001:db8::9").packed + payload


def tcp(source: int, target: int, flags: int = 0x02, payload: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", source, target, 1, 0, 0x50, flags, 1000, 0, 0) + payload


def udp(source: int, target: int, payload: bytes = b"") -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def decode(data: bytes) -> Frame:
    return frames.decode(data, len(data))


def packet(data: bytes) -> Ip:
    body = decode(data).body
    assert isinstance(body, Ip)
    return body


ONE_OF_EACH = [
    (
        ethernet(0x0800, ipv4(6, tcp(4000, 9001))),
        "IP 10.0.0.1.4000 > 192.0.2.9.9001: tcp [S], length 54",
    ),
    (
        ethernet(0x86DD, ipv6(17, udp(4000, 53, DNS))),
        "IP6 fd00::1.4000 > 2001:db8::9.53: udp, AAAA? example.org, length 91",
    ),
    (
        ethernet(0x0800, ipv4(6, tcp(4000, 53, 0x18, struct.pack("!H", len(DNS)) + DNS))),
        "IP 10.0.0.1.4000 > 192.0.2.9.53: tcp [P.], AAAA? example.org, length 85",
    ),
    (
        ethernet(0x0800, ipv4(1, b"\x08\0\0\0")),
        "IP 10.0.0.1 > 192.0.2.9: icmp echo request, length 38",
    ),
    (
        ethernet(0x86DD, ipv6(58, b"\x87\0\0\0\0\0\0\0" + ip_address("fd00::2").packed, 255)),
        "IP6 fd00::1 > 2001:db8::9: icmp6 neighbour solicitation, fd00::2, length 78",
    ),
    (ethernet(0x0800, ipv4(132, bytes(12))), "IP 10.0.0.1 > 192.0.2.9: sctp, length 46"),
    (ethernet(0x0800, ipv4(200, b"")), "IP 10.0.0.1 > 192.0.2.9: protocol 200, length 34"),
    (ethernet(0x88CC, bytes(50)), f"ethertype 0x88cc {HERE} > {THERE}, length 64"),
    (ethernet(0x0026, bytes(46)), f"802.3 {HERE} > {THERE}, length 60"),
    (
        ethernet(0x0800, ipv4(6, tcp(1, 2)), vlans=(7, 9)),
        "vlan 7, vlan 9, IP 10.0.0.1.1 > 192.0.2.9.2: tcp [S], length 62",
    ),
    (b"\1\2\3", "unreadable: cut in the Ethernet header, length 3"),
]


@pytest.mark.parametrize(("data", "line"), ONE_OF_EACH, ids=[line for _, line in ONE_OF_EACH])
def test_a_frame_reads_as_one_line(data: bytes, line: str) -> None:
    """What tcpdump would say, short."""
    assert str(decode(data)) == line


def test_arp_is_decoded_for_ipv4_on_ethernet_only() -> None:
    """Anything else that calls itself ARP is not understood, and says so."""
    mac, here, there = bytes.fromhex("020000000001"), bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    request = b"\0\1\x08\0\6\4\0\1" + mac + here + bytes(6) + there
    assert decode(ethernet(0x0806, request)).body == Arp(1, HERE, "10.0.0.1", "10.0.0.2")
    assert str(decode(ethernet(0x0806, request))).startswith("ARP who-has 10.0.0.2 tell 10.0.0.1")
    assert isinstance(decode(ethernet(0x0806, b"\0\2" + request[2:])).body, Unreadable)
    assert decode(ethernet(0x0806, request + bytes(50))).trailer == 50


def test_ipv6_extension_headers_are_walked() -> None:
    """The protocol behind a chain of extension headers is found, and the chain is named."""
    chain = b"\x2b\0" + bytes(6) + b"\x3c\0" + bytes(6) + b"\6\0" + bytes(6) + tcp(1, 2)
    found = packet(ethernet(0x86DD, ipv6(0, chain)))
    assert found.extensions == ("hop-by-hop", "routing", "destination-options")
    assert found.protocol == 6
    assert found.body == Tcp(1, 2, "S")


def test_the_authentication_header_counts_its_length_in_words() -> None:
    """RFC 4302 2.2, unlike every other extension header: here 16 bytes, then TCP."""
    found = packet(ethernet(0x86DD, ipv6(51, b"\6\2" + bytes(14) + tcp(1, 2))))
    assert (found.extensions, found.body) == (("ah",), Tcp(1, 2, "S"))


def test_fragments_are_known_and_only_the_first_has_ports() -> None:
    """A later fragment's bytes are data, which must not be read as ports."""
    first = packet(ethernet(0x0800, ipv4(17, udp(1, 2), place=0x2000)))
    later = packet(ethernet(0x0800, ipv4(17, udp(1, 2), place=0x0001)))
    assert (first.fragment, first.body) == (0, Udp(1, 2))
    assert (later.fragment, later.body) == (8, None)
    first = packet(ethernet(0x86DD, ipv6(44, b"\x11\0\0\1\0\0\0\1" + udp(1, 2))))
    later = packet(ethernet(0x86DD, ipv6(44, b"\x11\0\0\x08\0\0\0\1" + udp(1, 2))))
    assert (first.fragment, first.body) == (0, Udp(1, 2))
    assert (later.fragment, later.protocol, later.body) == (8, 17, None)
    assert "fragment at 8" in str(later)


def test_ipv4_options_are_seen() -> None:
    """They move the ports, and are a place to hide things."""
    found = packet(ethernet(0x0800, ipv4(6, tcp(1, 2), options=bytes(8))))
    assert (found.extensions, found.body) == (("options",), Tcp(1, 2, "S"))


def test_bytes_behind_the_packet_are_counted_but_not_padding() -> None:
    """Ethernet pads short frames; bytes beyond that were put there by somebody."""
    short = ethernet(0x0800, ipv4(6, tcp(1, 2)))
    assert decode(short + bytes(60 - len(short))).trailer == 0
    assert decode(short + bytes(61 - len(short))).trailer == 61 - len(short)
    assert decode(ethernet(0x86DD, ipv6(6, tcp(1, 2))) + b"contraband").trailer == 10


def test_a_snapped_frame_decodes_like_the_whole_one() -> None:
    """A tap stores the head of a frame; its length on the wire is told apart from that."""
    whole = ethernet(0x0800, ipv4(6, tcp(1, 2, payload=bytes(1400))))
    snapped = frames.decode(whole[:256], len(whole))
    assert (snapped.body, snapped.trailer) == (decode(whole).body, 0)


def test_a_packet_longer_than_its_frame_is_unreadable() -> None:
    """A length field that lies makes the rest a matter of opinion."""
    body = packet(ethernet(0x0800, ipv4(6, tcp(1, 2, payload=bytes(99))))[:-50]).body
    assert body == Unreadable("claims 139 bytes, has 89")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (ethernet(0x0800, b"\x65" + ipv4(6, tcp(1, 2))[1:]), "not an IPv4 header"),
        (ethernet(0x0800, b"\x44" + ipv4(6, tcp(1, 2))[1:]), "not an IPv4 header"),
        (ethernet(0x86DD, b"\x40" + ipv6(6, tcp(1, 2))[1:]), "not an IPv6 header"),
        (ethernet(0x0800, b"\x45\0\0\x13" + ipv4(6, tcp(1, 2))[4:]), "claims 19 bytes, has 40"),
        (ethernet(0x86DD, ipv6(6, tcp(1, 2)[:12] + b"\x40" + bytes(7))), "not a TCP header"),
    ],
)
def test_a_header_that_contradicts_itself_is_unreadable(data: bytes, why: str) -> None:
    """Wrong version, header too short, packet shorter than its header."""
    body = decode(data).body
    if isinstance(body, Ip):
        assert body.body == Unreadable(why)
    else:
        assert body == Unreadable(why)


def test_bare_ip_packets_of_a_tun_device_are_decoded() -> None:
    """Such a link has no Ethernet header, and its version nibble says which IP it is."""
    frame = frames.decode(ipv6(6, tcp(1, 2)), 60, raw=True)
    assert frame.ethernet is None
    assert isinstance(frame.body, Ip)
    assert frame.body.body == Tcp(1, 2, "S")
    assert frames.decode(b"\x75", 1, raw=True).body == Unreadable("IP version 7")
    assert frames.decode(b"", 0, raw=True).body == Unreadable("IP version 0")


@pytest.mark.parametrize("mac", [b"", bytes.fromhex("020000000001")], ids=["tun", "ethernet"])
def test_a_marker_is_one_to_the_byte(mac: bytes) -> None:
    """One byte more, less or other, and it is just an unknown frame."""
    token = "ab" * frames.TOKEN_BYTES
    data = frames.marker(token, start=True, mac=mac)

    def body(changed: bytes) -> object:
        return frames.decode(changed, len(changed), raw=not mac).body

    assert body(data) == Marker(token, True)
    assert body(frames.marker(token, start=False, mac=mac)) == Marker(token, False)
    assert not isinstance(frames.decode(data, len(data) + 9, raw=not mac).body, Marker)  # cut
    for other in (data + b"\0", data[:-1], data[:-1] + b"\2", data.replace(b"tap", b"tab")):
        assert not isinstance(body(other), Marker)


def test_a_name_from_the_wire_cannot_write_to_the_terminal() -> None:
    """Control characters in a DNS question come out as numbers."""
    evil = DNS.replace(b"example", b"exa\x1b[2J")
    line = str(decode(ethernet(0x0800, ipv4(17, udp(1, 53, evil)))))
    assert r"AAAA? exa\027[2J.org" in line


def test_no_cut_of_any_frame_raises_or_passes_for_tcp() -> None:
    """Cut on the wire at every length: it still decodes, and never to a whole TCP segment."""
    for data, _ in ONE_OF_EACH:
        for size in range(len(data)):
            frame = decode(data[:size])
            str(frame)
            assert not (isinstance(frame.body, Ip) and isinstance(frame.body.body, Tcp | Icmp))


def test_no_garbage_raises() -> None:
    """A hundred thousand random changes to real frames, the same ones each time."""
    chance = random.Random(1)  # noqa: S311  not a secret
    for _ in range(100_000):
        data = bytearray(chance.choice(ONE_OF_EACH)[0])
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        length = chance.choice([len(data), 0, 70_000])
        str(frames.decode(bytes(data), length, raw=chance.random() < 0.2))
