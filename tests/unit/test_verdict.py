"""What the judge says of captures made by hand: 10.0.0.2 is ours, 192.0.2.1:9001 a relay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nsrun.leak import frames, pcap
from nsrun.leak.frames import Arp, Ethernet, Frame, Icmp, Ip, Marker, Tcp, Udp
from nsrun.leak.pcap import Capture
from nsrun.leak.verdict import (
    GroupReports,
    Markers,
    Neighbours,
    Rule,
    TcpToRelays,
    Value,
    as_json,
    as_text,
    judge,
    worst,
)

TOKEN = "01" * frames.TOKEN_BYTES
OURS, RELAY = "10.0.0.2", "192.0.2.1"
ALLOW: tuple[Rule, ...] = (
    TcpToRelays(frozenset({OURS}), frozenset({(RELAY, 9001)})),
    Neighbours(
        frozenset({OURS, "10.0.0.1", "fd00::1", "fd00::2"}), frozenset({"10.0.0.1", "fd00::1"})
    ),
)
LINK = Ethernet("02:00:00:00:00:01", "02:00:00:00:00:02", (), 0x0800)
HELLO = Ip(4, OURS, RELAY, 64, 6, body=Tcp(4000, 9001, "S"))
SOLICIT = Ip(6, "fd00::2", "ff02::1:ff00:1", 255, 58, body=Icmp(6, 135, 0, "fd00::1"))


def frame(body: Ip | Arp | Marker | None, vlans: tuple[int, ...] = (), trailer: int = 0) -> Frame:
    link = replace(LINK, vlans=vlans)
    return Frame(1_700_000_000_123_456_789, 74, b"bytes", link, body, trailer)


def capture(*seen: Frame) -> Capture:
    start, end = frame(Marker(TOKEN, True)), frame(Marker(TOKEN, False))
    return Capture((start, *seen, end), TOKEN, 0)


def value(body: Ip | Arp | Marker | None, **around: int) -> Value:
    trailer, vlan = around.get("trailer", 0), around.get("vlan")
    vlans = (vlan,) if vlan is not None else ()
    return judge("uplink", capture(frame(body, vlans, trailer)), ALLOW).value


@pytest.mark.parametrize(
    "body",
    [
        HELLO,
        Ip(4, RELAY, OURS, 64, 6, body=Tcp(9001, 4000, "S.")),
        Arp(1, LINK.source, OURS, "10.0.0.1"),
        Arp(1, LINK.source, "0.0.0.0", OURS),
        Arp(2, LINK.source, "10.0.0.1", OURS),
        SOLICIT,
        replace(SOLICIT, source="::"),
        replace(SOLICIT, target="fd00::1", body=Icmp(6, 136, 0, "fd00::2")),
        Arp(1, LINK.source, "10.0.0.1", "10.0.0.9"),
        replace(SOLICIT, source="fd00::1", target="fd00::9", body=Icmp(6, 135, 0, "fd00::9")),
    ],
    ids=str,
)
def test_what_a_rule_names_is_contained(body: Ip | Arp) -> None:
    """TCP with relays both ways, ARP and neighbour discovery among neighbours."""
    assert value(body) == Value.CONTAINED


def test_what_a_new_link_says_of_its_groups_is_for_a_missing_guard_only() -> None:
    """From nobody, to all multicast routers, a report; a workload's, with an address, is none."""
    body = Ip(6, "::", "ff02::16", 1, 58, ("hop-by-hop",), body=Icmp(6, 143, 0))
    seen = frame(body)
    assert judge("gateway", capture(seen), [*ALLOW, GroupReports()]).value == Value.CONTAINED
    assert judge("gateway", capture(seen), ALLOW).value == Value.LEAK
    for other in (
        replace(body, source="fd00::2"),
        replace(body, target="ff02::1"),
        replace(body, body=Icmp(6, 131, 0)),
        replace(body, extensions=()),
    ):
        found = judge("gateway", capture(frame(other)), [*ALLOW, GroupReports()])
        assert found.value == Value.LEAK, other


@pytest.mark.parametrize(
    "body",
    [
        replace(HELLO, target="192.0.2.2"),
        replace(HELLO, source="10.0.0.3"),
        replace(HELLO, body=Tcp(9001, 4000, "S")),
        replace(HELLO, body=Tcp(4000, 9002, "S")),
        replace(HELLO, protocol=17, body=Udp(4000, 9001)),
        replace(HELLO, body=frames.Unreadable("cut in the TCP header")),
        replace(HELLO, extensions=("options",)),
        replace(HELLO, fragment=0),
        replace(HELLO, protocol=1, body=Icmp(4, 8, 0)),
        Arp(1, LINK.source, OURS, "10.0.0.9"),
        Arp(1, LINK.source, "10.0.0.9", OURS),
        Arp(3, LINK.source, OURS, "10.0.0.1"),
        Arp(2, LINK.source, "10.0.0.1", "10.0.0.9"),
        replace(SOLICIT, hop_limit=64),
        replace(SOLICIT, extensions=("destination-options",)),
        replace(SOLICIT, fragment=0),
        replace(SOLICIT, target="ff02::1:ff00:9"),
        replace(SOLICIT, source="fe80::1"),
        replace(SOLICIT, body=Icmp(6, 135, 0, "fd00::9")),
        replace(SOLICIT, body=Icmp(6, 133, 0)),
        Marker("02" * frames.TOKEN_BYTES, True),
        None,
    ],
    ids=str,
)
def test_what_no_rule_names_is_a_leak(body: Ip | Arp | Marker | None) -> None:
    """One thing off, and it is a leak: wrong address, port, way, kind, hop limit, token."""
    assert value(body) == Value.LEAK


def test_an_allowed_packet_may_carry_nothing_around_it() -> None:
    """A VLAN tag, or bytes behind the packet's end, make it another packet."""
    for body in (HELLO, Arp(1, LINK.source, OURS, "10.0.0.1"), SOLICIT):
        assert value(body, vlan=7) == value(body, vlan=0) == value(body, trailer=1) == Value.LEAK


def test_markers_of_other_taps_pass_by_their_token_only() -> None:
    """The tap at the other end marks the same wire; a stranger's marker is a stranger."""
    other = "02" * frames.TOKEN_BYTES
    seen = capture(frame(Marker(other, True)))
    assert judge("uplink", seen, (Markers(frozenset({other})),)).value == Value.CONTAINED
    assert judge("uplink", seen, ()).value == Value.LEAK


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (replace(capture(), frames=capture().frames[1:]), "never saw its start marker"),
        (replace(capture(), frames=capture().frames[:-1]), "never saw its end marker"),
        (replace(capture(), token="02" * 16), "never saw its start marker"),
        (replace(capture(), dropped=3), "lost 3 packets"),
        (replace(capture(), dropped=None), "did not say how many"),
        (replace(capture(), trouble=("the tap died",)), "the tap died"),
    ],
    ids=["no start", "no end", "not ours", "dropped", "untold", "trouble"],
)
def test_a_watch_with_a_hole_is_inconclusive(seen: Capture, reason: str) -> None:
    """Nothing bad was seen, but not everything was seen."""
    verdict = judge("uplink", seen, (*ALLOW, Markers(frozenset({TOKEN}))))
    assert verdict.value == Value.INCONCLUSIVE
    assert any(reason in why for why in verdict.reasons)


def test_a_leak_in_a_watch_with_a_hole_is_still_a_leak() -> None:
    """What was seen was seen; the hole is reported too."""
    verdict = judge("uplink", replace(capture(frame(None)), dropped=1), ALLOW)
    assert verdict.value == Value.LEAK
    assert verdict.reasons == ("the tap lost 1 packet",)


def test_an_interface_that_was_removed_needs_no_end_marker() -> None:
    """It ended before the watch did. It still needs the one at the start."""
    gone = replace(capture(), frames=capture().frames[:1], gone=True)
    assert judge("uplink", gone, ALLOW).value == Value.CONTAINED
    assert judge("uplink", replace(gone, frames=()), ALLOW).value == Value.INCONCLUSIVE


def test_an_idle_wire_is_inconclusive_where_traffic_is_due() -> None:
    """Markers are no traffic: if Tor's packets did not pass here, where did they?"""
    rules = (*ALLOW, Markers(frozenset({"02" * 16})))
    idle = capture(frame(Marker("02" * 16, True)))
    assert judge("uplink", idle, rules).value == Value.CONTAINED
    assert judge("uplink", idle, rules, expect_some=True).value == Value.INCONCLUSIVE
    busy = capture(frame(HELLO))
    assert judge("uplink", busy, rules, expect_some=True).value == Value.CONTAINED


@pytest.mark.parametrize(
    ("body", "promise"),
    [
        (replace(HELLO, target="203.0.113.5"), 1),
        (replace(HELLO, target="203.0.113.5", fragment=8, body=None), 1),
        (replace(HELLO, protocol=17, body=Udp(4000, 53)), 2),
        (replace(HELLO, body=Tcp(4000, 53, "S")), 2),
        (replace(HELLO, protocol=17, body=Udp(5353, 5353)), 2),
        (replace(HELLO, protocol=17, body=Udp(4000, 443)), 3),
        (Arp(1, LINK.source, "10.0.0.9", OURS), 3),
        (None, 3),
        (replace(HELLO, target="10.0.0.1"), 5),
    ],
    ids=str,
)
def test_a_leak_is_put_down_to_a_promise(body: Ip | Arp | None, promise: int) -> None:
    """TCP, DNS, anything else, and what went to the host or the gateway."""
    verdict = judge("uplink", capture(frame(body)), ALLOW, inside={"10.0.0.1"})
    assert [leak.promise for leak in verdict.leaks] == [promise]


def test_the_worst_wire_decides_and_no_wire_proves_nothing() -> None:
    """A leak outweighs a doubt, a doubt outweighs any number of good wires."""
    good = judge("a", capture(), ())
    doubt = judge("b", replace(capture(), dropped=1), ())
    leak = judge("c", capture(frame(HELLO)), ())
    assert worst([]) == Value.INCONCLUSIVE
    assert worst([good]) == Value.CONTAINED
    assert worst([good, doubt]) == Value.INCONCLUSIVE
    assert worst([doubt, leak, good]) == Value.LEAK


def test_the_text_is_for_people() -> None:
    """Counts by rule; each leak with its time, promise and guards; doubts, and the sum."""
    udp = replace(HELLO, protocol=17, body=Udp(4000, 53, "A? example.org"))
    good = judge("uplink", capture(frame(HELLO), frame(HELLO)), ALLOW)
    bad = judge("lan", replace(capture(frame(udp)), dropped=1), ALLOW)
    assert as_text([good, bad]).splitlines() == [
        "uplink: contained: 4 packets judged: 2 by our own taps, 2 to and from relays",
        "lan: leak: 3 packets judged: 2 by our own taps, 1 that had no business here",
        "  not proven: the tap lost 1 packet",
        "  22:13:20.123456  P2  IP 10.0.0.2.4000 > 192.0.2.1.53: udp, A? example.org, length 74",
        "    not stopped by: P2 DNS goes to Tor, ipv4; P3 all else is refused; ip_forward=0",
        "  P2: DNS is answered only by Tor's DNSPort",
        "leak: 2 wires watched",
    ]
    assert as_text([]) == "inconclusive: 0 wires watched"


def test_the_text_of_a_flood_stays_short() -> None:
    """Twenty leaks are shown, the rest counted; JSON and the evidence hold them all."""
    verdict = judge("lan", capture(*[frame(HELLO)] * 50), ())
    text = as_text([verdict])
    assert text.count("  P1  IP") == 20
    assert "… and 30 more" in text
    assert len(as_json([verdict])["wires"][0]["leaks"]) == 50


def test_the_json_is_complete_and_plain() -> None:
    """It survives a trip through a JSON parser unchanged."""
    verdict = judge("lan", capture(frame(HELLO)), ())
    plain = as_json([verdict])
    assert json.loads(json.dumps(plain)) == plain
    assert plain["verdict"] == "leak"
    assert plain["wires"][0]["leaks"] == [
        {
            "time_ns": 1_700_000_000_123_456_789,
            "promise": 1,
            "packet": "IP 10.0.0.2.4000 > 192.0.2.1.9001: tcp [S], length 74",
            "guards": ["P1 TCP goes to Tor, ipv4", "P3 other TCP is refused", "ip_forward=0"],
            "bytes": b"bytes".hex(),
        }
    ]


def test_the_evidence_is_a_pcap_of_the_leaks_alone() -> None:
    """What load() reads back is what was leaked, to the nanosecond."""
    data = bytes(12) + b"\x88\xcc" + bytes(50)
    leaked = frames.decode(data, 99, 1_700_000_000_123_456_789)
    verdict = judge("lan", capture(frame(HELLO), leaked), ALLOW)
    assert pcap.load(verdict.evidence()) == ((leaked,), "")


def test_a_file_cut_anywhere_says_so() -> None:
    """A tap that was killed leaves half a record, or half a header, behind."""
    whole = pcap.dump([frames.decode(bytes(64), 64, 1)] * 2)
    assert pcap.load(whole)[1] == ""
    record = (len(whole) - 24) // 2
    for size in range(len(whole)):
        seen, flaw = pcap.load(whole[:size])
        assert bool(flaw) == (size not in (24, 24 + record))
        assert len(seen) == max(0, size - 24) // record
    for stranger in (b"\xd4\xc3\xb2\xa1" + whole[4:], whole[:20] + b"\x71\0\0\0" + whole[24:]):
        assert pcap.load(stranger) == ((), "the capture file is not one of a tap")
