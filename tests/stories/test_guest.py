"""A guest of root's gateway: owns the namespace at the other end of its link, and all in it.

    guest ─eth0══w4─┐
      app ─eth0══w2─┼─ gateway ─uplink══eth0─ world
      bob ─eth0══w3─┘

The guest can give itself any address, and send any frame. Actors are in town.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from nsrun.errors import NsrunError
from nsrun.netns import Namespace, own_namespace_of
from nsrun.plan import LINK_MAC
from nsrun.spec import RunSpec
from town import GATEWAY4, GATEWAY6, SITE4, SITE6, UPLINK4, Actor, Town, eventually

pytestmark = pytest.mark.root

TOKEN = b"a guest's own token"
MAC = bytes.fromhex(LINK_MAC.replace(":", ""))
ROUTER = "fe80::bad"


@contextmanager
def process(*prefix: str) -> Iterator[int]:
    """A process that says when it is where it should be; its number."""
    command = [*prefix, "sh", "-c", "echo there; exec cat"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "there\n"
        yield started.pid
        started.kill()


def inside(pid: int) -> tuple[str, ...]:
    return ("nsenter", "--user", "--net", "--target", str(pid))


@pytest.fixture
def guest(town: Town) -> Iterator[Actor]:
    with process("unshare", "--user", "--map-root-user", "--net") as pid:
        spec = RunSpec(("true",), name="guest")
        live = asyncio.run(town.workloads.attach(spec, pid, os.geteuid()))
        space = Namespace(f"/proc/{pid}/ns/net")
        yield Actor("guest", space, live)
        space.close()


def state(town: Town) -> str:
    """What a neighbour could change in the gateway."""
    commands = ("ip -4 route", "ip -6 route", "ip -o address", "ip neighbour", "ip -o link")
    return "\n".join(town.gateway.run(*command.split()) for command in commands)


@pytest.mark.promise("P1", "P2")
def test_a_guest_is_served_as_any_workload(town: Town, guest: Actor) -> None:
    """TCP and DNS go to Tor, under an identity of its own."""
    assert guest.live is not None
    with guest.connect(SITE4, 443) as connection:
        assert b"stand-in" in connection.recv(100)
    guest.ask("127.0.0.53", "example.test")
    own = guest.live.workload.address4
    assert town.heard == [(own, SITE4, 443), (own, "dns", 53)]


@pytest.mark.promise("P5")
def test_only_a_new_namespace_of_the_guests_own_is_plugged_in(town: Town, guest: Actor) -> None:
    """Not the host's, not somebody else's, none with a link to elsewhere, none twice."""
    mine = os.geteuid()
    assert guest.live is not None
    with process() as here, process("unshare", "-Urn") as new, process("unshare", "-Urn") as linked:
        with pytest.raises(NsrunError, match="did not make it"):
            own_namespace_of(here, mine + 1)
        with pytest.raises(NsrunError, match="has links already"):
            own_namespace_of(here, mine)
        add = ("ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
        subprocess.run((*inside(linked), *add), check=True)
        with pytest.raises(NsrunError, match="has links already"):
            own_namespace_of(linked, mine)
        with pytest.raises(NsrunError, match="did not make it"):
            own_namespace_of(new, mine + 1)
        own_namespace_of(new, mine).close()  # control: what all the others lack
        spec = RunSpec(("true",), name="twice")
        asyncio.run(town.workloads.attach(spec, new, mine))
        with pytest.raises(NsrunError, match="has links already"):
            asyncio.run(town.workloads.attach(RunSpec(("true",)), new, mine))
    with pytest.raises(NsrunError):
        asyncio.run(town.workloads.attach(RunSpec(("true",)), new, mine))  # it is gone


def udp(source: str, target: str) -> bytes:
    """An IPv4 packet to port 53 of ``target``."""
    payload = struct.pack(">HHHH", 40000, 53, 8 + len(TOKEN), 0) + TOKEN
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return (
        header[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + header[12:] + payload
    )


def icmp6(source: str, target: str, message: bytes) -> bytes:
    """An ICMPv6 packet that could come from a neighbour."""
    addresses = socket.inet_pton(socket.AF_INET6, source)
    addresses += socket.inet_pton(socket.AF_INET6, target)
    total = sum(struct.unpack(f">{len(addresses) // 2}H", addresses)) + len(message) + 58
    total += sum(struct.unpack(f">{len(message) // 2}H", message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    message = message[:2] + struct.pack(">H", ~total & 0xFFFF) + message[4:]
    return struct.pack(">IHBB", 0x60000000, len(message), 58, 255) + addresses + message


def advertisement(source: str) -> bytes:
    """I am a router, and your default one (RFC 4861, 4.2); and this prefix is on this link."""
    prefix = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 9000, 9000, 0)
    prefix += socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
    link_layer = b"\1\1" + MAC
    message = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0x08, 9000, 0, 0) + link_layer + prefix
    return icmp6(source, "ff02::1", message)


def ethernet(kind: int, payload: bytes, to: bytes = MAC) -> bytes:
    return to + MAC + kind.to_bytes(2) + payload


def test_control_the_kernel_would_believe_a_router(town: Town) -> None:
    """With the rules gone, on the link of an ordinary workload; a guest's is deaf as well."""
    town.gateway.run("nft", "flush", "ruleset")
    before = state(town)
    town.app.raw(ethernet(0x86DD, advertisement(ROUTER), b"\x33\x33\0\0\0\1"))
    eventually(lambda: "2001:db8:bad::/64" in state(town), "the route that was advertised")
    assert ROUTER not in before


@pytest.mark.promise("P4", "P5")
@pytest.mark.parametrize("rules", ["with the rules", "with the rules flushed"])
def test_no_frame_of_a_guest_changes_the_gateway_or_gets_out(
    town: Town, guest: Actor, rules: str
) -> None:
    """Whose address, which protocol, which layer: nothing is heard, learned or passed on."""
    assert guest.live is not None
    assert town.app.live is not None
    own, own6 = guest.live.workload.address4, guest.live.workload.address6
    victim = town.app.live.workload.address4
    everybody = b"\xff" * 6
    arp = struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + MAC
    arp += socket.inet_aton(victim) + MAC + socket.inet_aton(victim)
    tagged = struct.pack(">HH", 2, 0x800) + udp(own, SITE4)
    redirect = struct.pack(">BBHI", 137, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, own6)
    redirect += socket.inet_pton(socket.AF_INET6, SITE6)
    neighbour = struct.pack(">BBHI", 136, 0, 0, 0x20000000)
    neighbour += socket.inet_pton(socket.AF_INET6, GATEWAY6) + b"\2\1" + MAC
    frames = [
        *(ethernet(0x800, udp(source, SITE4)) for source in (victim, UPLINK4, GATEWAY4, SITE4)),
        ethernet(0x800, udp("127.0.0.1", GATEWAY4)),
        ethernet(0x800, udp("0.0.0.0", "255.255.255.255"), everybody),
        ethernet(0x806, arp, everybody),
        ethernet(0x8100, tagged),
        ethernet(0x88A8, struct.pack(">HH", 2, 0x8100) + tagged),
        *(ethernet(0x86DD, advertisement(one), b"\x33\x33\0\0\0\1") for one in (ROUTER, own6)),
        ethernet(0x86DD, icmp6(ROUTER, "ff02::1", redirect)),
        ethernet(0x86DD, icmp6("fe80::1", GATEWAY6, neighbour)),
        ethernet(0x86DD, icmp6("fe80::1", "ff02::16", struct.pack(">BBHI", 143, 0, 0, 0))),
        *(ethernet(kind, TOKEN * 4, everybody) for kind in (0x8863, 0x8847, 0x88CC, 0x88B5, 4)),
    ]
    if "flushed" in rules:
        town.gateway.run("nft", "flush", "ruleset")
    before = state(town)
    with town.world_hears() as heard:
        for frame in frames:
            guest.raw(frame)
    assert not [frame for frame in heard if TOKEN in frame]
    assert not town.heard
    assert state(town) == before
    if "flushed" not in rules:
        guest.ask("9.9.9.9", "example.test")  # control: this way frames do get to the gateway
        assert town.heard == [(own, "dns", 53)]


@pytest.mark.promise("P5", "P7")
def test_a_guest_with_the_address_of_another_is_not_heard(town: Town, guest: Actor) -> None:
    """It may put any address on its end of the link, and its routes as it likes."""
    assert guest.live is not None
    assert town.app.live is not None
    stolen = town.app.live.workload.address4
    own = guest.live.workload.address4
    guest.run("ip", "address", "add", f"{stolen}/32", "dev", "eth0")
    guest.run("ip", "route", "replace", "default", "dev", "eth0", "src", stolen)
    with pytest.raises(OSError):
        guest.connect(SITE4, 443, seconds=0.5)
    assert not town.heard
    guest.run("ip", "route", "replace", "default", "dev", "eth0", "src", own)
    with guest.connect(SITE4, 443) as connection:  # control
        connection.recv(100)
    assert [heard[0] for heard in town.heard] == [own]


@pytest.mark.promise("P5", "P8")
def test_a_guest_that_takes_its_link_apart_harms_itself(town: Town, guest: Actor) -> None:
    """Renamed it serves on; removed, the gateway forgets it; the others do not notice."""
    guest.run("ip", "link", "set", "eth0", "name", "other")
    guest.connect(SITE4, 443).close()
    guest.run("ip", "link", "delete", "other")
    eventually(lambda: "w4" not in town.gateway.run("ip", "-br", "link"), "the link to go")
    town.workloads.ended("w4")
    assert '"w4"' not in town.gateway.run("nft", "list", "table", "inet", "ttp")
    assert "guest" not in [live.name for live in town.workloads.live.values()]
    town.app.connect(SITE4, 443).close()


@pytest.mark.promise("P8")
def test_a_link_that_goes_while_it_is_plugged_in_is_not_kept(town: Town) -> None:
    """The guest's end is removed as soon as it is there: an error, or a workload that ends."""
    chase = "until ip link delete eth0 2>/dev/null; do :; done"
    for _ in range(3):
        with process("unshare", "-Urn") as pid:
            chaser = subprocess.Popen((*inside(pid), "timeout", "10", "sh", "-c", chase))
            with chaser, suppress(NsrunError):
                spec = RunSpec(("true",), name="chased")
                live = asyncio.run(town.workloads.attach(spec, pid, os.geteuid()))
                chaser.wait()
                town.workloads.ended(live.workload.link)
    assert [live.name for live in town.workloads.live.values()] == ["app", "bob"]
    rules = town.gateway.run("nft", "list", "table", "inet", "ttp")
    assert {f'"w{number}"' in rules for number in (4, 5, 6)} == {False}


@pytest.mark.promise("P5")
def test_names_are_each_users_own(town: Town) -> None:
    """Two users may use one name; neither finds the other's; root finds its own first."""
    guest, other = os.geteuid(), 54321
    with process("unshare", "-Urn") as pid:
        spec = RunSpec(("true",), name="only")
        live = asyncio.run(town.workloads.attach(spec, pid, guest))
        assert [one.name for one in town.workloads.of(guest)] == ["only"]
        assert town.workloads.named("only", guest) is live
        for name, who in (("app", guest), ("only", other)):
            with pytest.raises(NsrunError, match="there is none"):
                town.workloads.refresh(name, who)
        assert town.workloads.named("only") is live
        live.name = "app"
        assert town.workloads.named("app") is town.app.live
        assert town.workloads.named("app", guest) is live
