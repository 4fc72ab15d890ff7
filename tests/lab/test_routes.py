"""What the network itself may say to lead packets astray: false routes, redirects, ICMP errors."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest

from harness import ROOT
from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Ip, Tcp
from nsrun.leak.probes import packets
from nsrun.leak.verdict import Value, as_text, judge

pytestmark = pytest.mark.lab

PROBE = ("/usr/bin/python3", str(ROOT / "tests" / "probe.py"))
CURL = ("curl", "-sS", "--max-time", "20", PLAIN_ORACLE)
REDIRECT_HOST, TOO_LARGE = (5, 1), (3, 4)  # ICMP type and code (RFC 792, 1191)
MTU = 576
SAY = """
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
for message in sys.argv[2:]:
    link.sendto(bytes.fromhex(message), (sys.argv[1], 0))
"""
HOLD = """
import socket, sys
held = socket.create_connection((sys.argv[1], 80))
held.sendall(b"GET /ip HTTP/1.1\\r\\nHost: test\\r\\n\\r\\n")
held.recv(2048)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.promise("P1", "P3")
def test_a_public_network_that_claims_to_be_the_lan(lab: Lab) -> None:
    """A DHCP server may give the host such a route (RFC 3442): then sites are sought on the LAN.

    The host's own packets are; of the gateway's there is nothing but TCP to relays.
    """
    route = ("11.200.0.0/24", "dev", "eth0")
    with lab.other_gateway("pasta") as name:
        run = (TTP, "run", "-g", name, "--")
        assert lab.do(*lab.inside_argv("host", "ip", "route", "add", *route)).returncode == 0
        try:
            with lab.tap("router", "p-host") as host:
                done = lab.do(*lab.inside_argv("host", *run, *CURL))
                sent = lab.do(*lab.inside_argv("host", *run, *PROBE))
                own = lab.rules(topology.HOST, topology.HOST6)
                verdict = judge("host", host.stop(), own, expect_some=True)
            with lab.tap("router", "p-host") as host:
                lab.do(*lab.inside_argv("host", "curl", "-m2", f"http://{topology.WEB}/"))
                control = judge("host", host.stop(), own)
        finally:
            lab.do(*lab.inside_argv("host", "ip", "route", "del", *route))
    assert json.loads(done.stdout)["IsTor"] is True
    assert sent.returncode == 0, sent.stderr
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    assert f"who-has {topology.WEB}" in as_text([control]), "control: the host did seek it there"


@pytest.mark.promise("P1", "P4")
def test_no_redirect_of_the_network_changes_a_route(lab: Lab) -> None:
    """About connections that it has. A smaller MTU is heeded, as it must be (RFC 1191)."""
    tor = lab.gateway()["tor"]
    assert isinstance(tor, dict)
    gateway = ("nsenter", f"--net=/proc/{tor['pid']}/ns/net", "--")
    flush = lab.inside_argv("host", *gateway, "ip", "route", "flush", "cache")
    heard = False
    for _ in range(10):  # who has sent more meanwhile believes nothing that is said of before
        with lab.tap("router", f"gw-{lab.name}") as wire:
            assert lab.run(*CURL).returncode == 0
            seen = last_sent(wire.stop().frames, topology.GATEWAY)
        assert seen
        lie(lab, topology.GATEWAY, seen.values())
        after = [route(lab, gateway, one) for one in seen]
        assert lab.do(*flush).returncode == 0
        assert all(f"via {topology.ROUTER} " in one for one in after), after
        if heard := any(f"mtu {MTU}" in one for one in after):
            break
    assert heard, "control: what the router says was heard"
    assert json.loads(lab.run(*CURL).stdout)["IsTor"] is True


@pytest.mark.promise("P12")
def test_control_the_host_believes_what_the_network_says(lab: Lab) -> None:
    """The same lies about a connection of its own: it goes by the LAN's web server, in small."""
    with lab.tap("router", "p-host") as wire, held_connection(lab):
        seen = last_sent(wire.stop().frames, topology.HOST)
        lie(lab, topology.HOST, seen.values())
        found = route(lab, (), topology.WEB)
    flush = ("ip", "route", "flush", "cache")
    assert lab.do(*lab.inside_argv("host", *flush)).returncode == 0
    assert f"via {topology.LAN_WEB}" in found, found
    assert f"mtu {MTU}" in found, found
    assert topology.ROUTER in route(lab, (), topology.WEB)


@contextmanager
def held_connection(lab: Lab) -> Iterator[None]:
    hold = lab.inside("host", sys.executable, "-c", HOLD, topology.WEB)
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.communicate()


def last_sent(frames: Sequence[Frame], source: str) -> dict[str, bytes]:
    """By target, the header of the packet that ``source`` would send there next, and 8 bytes more:
    the kernel believes only who knows a sequence number that is due (RFC 5927).
    """
    found = {}
    for frame in frames:
        match frame.body:
            case Ip(version=4, source=who, target=target, body=Tcp()) if who == source:
                ip = frame.data[14:]
                length = struct.unpack_from(">H", ip, 2)[0] - 20 - (ip[32] >> 4) * 4
                ports, number = ip[20:24], struct.unpack_from(">I", ip, 24)[0]
                found[target] = ip[:20] + ports + struct.pack(">I", (number + length) % (1 << 32))
    return found


def lie(lab: Lab, target: str, quoted: Iterable[bytes]) -> None:
    """The router says of each packet that another way is better, and that it was too large."""
    elsewhere = IPv4Address(topology.LAN_WEB).packed
    messages = [
        packets.icmp(*kind, about + header).hex()
        for header in quoted
        for kind, about in (
            (TOO_LARGE, struct.pack(">HH", 0, MTU)),
            (REDIRECT_HOST, elsewhere),
        )
    ]
    for _ in range(3):  # a redirect to whose address is not known yet only has that looked up
        said = lab.do(*lab.inside_argv("router", sys.executable, "-c", SAY, target, *messages))
        assert said.returncode == 0, said.stderr


def route(lab: Lab, enter: Sequence[str], target: str) -> str:
    done = lab.do(*lab.inside_argv("host", *enter, "ip", "-4", "route", "get", target))
    assert done.returncode == 0, done.stderr
    return done.stdout
