"""The gateway's Tor reaches the network, by whatever carries it, and nothing else does.

     gateway                    host                        world
    ┌──────────┐  uplink   ┌──────────────┐  eth0 eth1  ┌─────────────────┐
    │ Tor      ├───────────┤ pasta, slirp ├─────────────┤ 198.51.100.7    │
    │          │           │ or veth      │             │ 2001:db8:99::7  │
    └──────────┘           └──────────────┘             └─────────────────┘
        uplink ── gw-test ─────────────────── lan0 ── (kind "lab": no host between)

All three are throw-away namespaces; this machine's own network is not touched.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nsrun.errors import MissingError, NsrunError, UsageError
from nsrun.gateway.uplink import Pasta, Running, Slirp, Uplink, choose, describe, start
from nsrun.gateway.uplink_veth import Lab, Veth, sweep_veth
from nsrun.netns import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

WORLD, WORLD6 = "198.51.100.7", "2001:db8:99::7"
HOST, HOST6 = "192.168.77.10", "2001:db8:77::10"
HELPERS = ("pasta", "slirp4netns")
ON_HOST = (*HELPERS, "veth")
ALL = (*ON_HOST, "lab")


def run(line: str) -> str:
    return subprocess.run(line.split(), capture_output=True, text=True, check=True).stdout


def ask(address: str, port: int, seconds: float = 3) -> str:
    """The answer of a server: the client address that it sees."""
    with socket.create_connection((address, port), seconds) as link:
        return link.recv(100).decode()


def wait_until(awaited: str, state: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < deadline, f"waited {seconds} s until {awaited}"
        select.select([], [], [], 0.01)


@dataclass
class Place:
    host: Namespace
    world: Namespace
    gateway: Namespace
    log: str
    stack: ExitStack = field(default_factory=ExitStack)

    def serve(self, where: Namespace, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        both = address == "::"
        server = where.call(
            lambda: socket.create_server((address, port), family=family, dualstack_ipv6=both)
        )

        def answer() -> None:
            while True:
                try:
                    link, peer = server.accept()
                except OSError:
                    return
                with link:
                    link.sendall(peer[0].removeprefix("::ffff:").encode())

        thread = threading.Thread(target=answer)
        thread.start()
        self.stack.callback(server.close)
        self.stack.callback(thread.join)
        self.stack.callback(server.shutdown, socket.SHUT_RDWR)

    def start(self, kind: str) -> Running:
        if kind in HELPERS:
            return self.host.call(choose, (kind,), "g", self.gateway, self.log)
        return self.host.call(start, self.uplink(kind), self.gateway, self.log)

    def uplink(self, kind: str) -> Uplink:
        if kind == "veth":
            return Veth("test", "10.99.0.2/30", "10.99.0.1", "fd99::2/126", "fd99::1")
        lan, lan6 = ("192.168.77.50/24", "192.168.77.1"), ("2001:db8:77::50/64", "2001:db8:77::1")
        return Lab("test", self.world.path, "lan0", *lan, *lan6)

    def links(self) -> list[str]:
        return self.gateway.call(lambda: [name for _, name in socket.if_nameindex()])

    def host_state(self) -> str:
        def look() -> str:
            lists = [run("ip -o link"), run("ip route"), run("ip -6 route")]
            sysctls = sorted(Path("/proc/sys/net").glob("ipv?/conf/*/*forwarding"))
            values = [f"{path} {path.read_text()}" for path in sysctls]
            return "".join((*lists, run("nft list ruleset"), *values))

        return self.host.call(look)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    host, world, gateway = Namespace(), Namespace(), Namespace()
    place = Place(host, world, gateway, str(tmp_path / "uplink.log"))
    with place.stack as stack:
        for namespace in (host, world, gateway):
            stack.callback(namespace.close)
            namespace.call(run, "ip link set lo up")
        host.call(run, f"ip link add eth0 type veth peer name eth1 netns {world.path}")
        for line in (
            "link add lan0 type bridge",
            "link set lan0 addrgenmode none",
            "link set eth1 addrgenmode none",
            "link set eth1 master lan0 up",
            "link set lan0 up",
            "address add 192.168.77.1/24 dev lan0",
            "address add 2001:db8:77::1/64 dev lan0 nodad",
            f"address add {WORLD} dev lo",
            f"address add {WORLD6} dev lo nodad",
        ):
            world.call(run, f"ip {line}")
        # the kernel repeats its announcements for a second or two: have that over with
        announce = Path("/proc/sys/net/ipv6/conf/eth0/mldv2_unsolicited_report_interval")
        host.call(announce.write_text, "1")
        for line in (
            "link set eth0 addrgenmode none",
            "link set eth0 up",
            f"address add {HOST}/24 dev eth0",
            f"address add {HOST6}/64 dev eth0 nodad",
            "address add fe80::10/64 dev eth0 nodad",
            "route add default via 192.168.77.1",
            "-6 route add default via 2001:db8:77::1",
        ):
            host.call(run, f"ip {line}")
        place.serve(world, "::", 8080)
        yield place


@pytest.mark.parametrize("kind", ALL)
def test_tor_reaches_the_world_from_the_hosts_own_address(place: Place, kind: str) -> None:
    uplink = place.start(kind)

    seen = place.gateway.call(ask, WORLD, 8080), place.gateway.call(ask, WORLD6, 8080)

    assert seen == (("192.168.77.50", "2001:db8:77::50") if kind == "lab" else (HOST, HOST6))
    assert uplink.interface in place.links()
    assert [address.version for address in uplink.addresses] == [4, 6]
    assert len(uplink.routers) == 2
    link = place.gateway.call(run, "ip address show dev uplink")
    assert "fe80" not in link
    assert ("mtu 65520" in link) is (kind != "veth")
    uplink.stop()


@pytest.mark.parametrize("kind", ALL)
def test_stop_leaves_nothing(place: Place, kind: str) -> None:
    before = place.host_state(), place.world.call(run, "ip -o link")
    uplink = place.start(kind)
    assert "uplink" in place.links()

    uplink.stop()
    uplink.stop()

    assert place.links() == ["lo"]
    assert (place.host_state(), place.world.call(run, "ip -o link")) == before
    assert uplink.pid is None or not Path(f"/proc/{uplink.pid}").exists()
    place.start(kind).stop()  # and it can be had again


@pytest.mark.parametrize("kind", ON_HOST)
def test_a_host_without_ipv6_gives_none(place: Place, kind: str) -> None:
    place.host.call(run, "ip -6 route delete default")

    uplink = place.start(kind)

    assert [address.version for address in uplink.addresses] == [4]
    assert place.gateway.call(ask, WORLD, 8080) == HOST
    uplink.stop()


@pytest.mark.parametrize("kind", HELPERS)
def test_death_of_the_helper_is_noticed(place: Place, kind: str) -> None:
    uplink = place.start(kind)
    assert uplink.pid is not None
    assert uplink.pidfd is not None
    assert select.select([uplink.pidfd], [], [], 0)[0] == []

    os.kill(uplink.pid, signal.SIGKILL)

    assert select.select([uplink.pidfd], [], [], 5)[0] == [uplink.pidfd]
    assert place.links() == ["lo"]
    assert uplink.addresses == ()
    uplink.stop()


@pytest.mark.parametrize("kind", HELPERS)
def test_a_missing_program_is_one_clear_line(
    place: Place, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ip").symlink_to("/sbin/ip")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NsrunError) as raised:
        place.start(kind)

    assert str(raised.value) == f"cannot start an uplink: {kind}: there is no program {kind}"
    assert place.links() == ["lo"]
    with pytest.raises(MissingError, match=f"there is no program {kind}"):
        place.host.call(start, Pasta() if kind == "pasta" else Slirp(), place.gateway, place.log)


def test_the_next_candidate_is_tried_when_the_first_does_not_work(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "pasta"
    broken.write_text("#!/bin/sh\necho 'no external interface' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(NsrunError, match="pasta: no external interface"):
        place.host.call(choose, ("pasta",), "g", place.gateway, place.log)
    uplink = place.host.call(choose, HELPERS, "g", place.gateway, place.log)

    assert uplink.kind == "slirp4netns"
    assert place.links() == ["lo", "uplink"]
    assert place.gateway.call(ask, WORLD, 8080) == HOST
    with pytest.raises(NsrunError, match="has a link uplink already"):
        place.start("veth")
    assert place.gateway.call(ask, WORLD, 8080) == HOST
    uplink.stop()


def test_a_candidate_that_hangs_is_killed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, pid = tmp_path / "pasta", tmp_path / "pid"
    hanging.write_text(f"#!/bin/sh\necho $$ >{pid}\nexec tail -f /dev/null\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    uplink = place.host.call(choose, HELPERS, "g", place.gateway, place.log)

    assert uplink.kind == "slirp4netns"
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    uplink.stop()


@pytest.mark.parametrize("kind", ON_HOST)
def test_the_hosts_loopback_is_out_of_reach(place: Place, kind: str) -> None:
    place.serve(place.host, "127.0.0.1", 9999)
    place.serve(place.host, "::1", 9999)
    assert place.host.call(ask, "127.0.0.1", 9999) == "127.0.0.1"
    uplink = place.start(kind)

    for address in (*uplink.routers, "127.0.0.1", "::1", HOST, HOST6, "192.0.2.3"):
        with pytest.raises(OSError, match=r"timed out|refused|unreachable|No route"):
            place.gateway.call(ask, address, 9999, 0.3)

    assert place.gateway.call(ask, WORLD, 8080) == HOST
    uplink.stop()


def tap() -> socket.socket:
    """Every frame of the world's wire to the host."""
    every_protocol = socket.htons(3)
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every_protocol)
    tap.bind(("eth1", 0))
    return tap


def frames(tap: socket.socket, quiet: float = 0.3) -> set[str]:
    """The protocols seen, until the wire has been quiet for a while."""
    seen = set()
    while select.select([tap], [], [], quiet)[0]:
        frame, (_, _, direction, *_) = tap.recvfrom(2048)
        if direction == socket.PACKET_OUTGOING:
            continue  # the world's own
        kind = frame[12:14].hex()
        protocol = {"0800": f"ip {frame[23]}", "86dd": f"ip6 {frame[20]}", "0806": "arp"}
        seen.add(protocol.get(kind, kind))
    return seen


@pytest.mark.parametrize("kind", HELPERS)
def test_the_wire_carries_the_tcp_of_tor_and_nothing_more(place: Place, kind: str) -> None:
    tcp, neighbours = {"ip 6", "ip6 6"}, {"arp", "ip6 58"}  # the latter are the host's own kernel's
    with place.world.call(tap) as wire:
        frames(wire)  # the host's kernel announces its own addresses
        uplink = place.start(kind)
        assert frames(wire) == set()  # starting and waiting is silent

        place.gateway.call(ask, WORLD, 8080)
        place.gateway.call(ask, WORLD6, 8080)
        seen = frames(wire)
        uplink.stop()

        assert tcp <= seen <= tcp | neighbours
        assert frames(wire) <= neighbours


@pytest.mark.parametrize("kind", HELPERS)
def test_the_hosts_address_may_change(place: Place, kind: str) -> None:
    uplink = place.start(kind)
    before = uplink.addresses

    place.host.call(run, f"ip address delete {HOST}/24 dev eth0")
    place.host.call(run, "ip address add 192.168.77.44/24 dev eth0")
    place.host.call(run, "ip route add default via 192.168.77.1")

    assert place.gateway.call(ask, WORLD, 8080) == "192.168.77.44"
    assert uplink.addresses == before
    uplink.stop()


SUPERVISOR = """
import os, sys
from nsrun import linux
from nsrun.gateway.uplink import choose, start
from nsrun.gateway.uplink_veth import Veth
from nsrun.netns import Namespace
host, kind, log = sys.argv[1:]
linux.setns(os.open(host, os.O_RDONLY), linux.CLONE_NEWNET)
gateway = Namespace()
if kind == "veth":
    up = start(Veth("test", "10.99.0.2/30", "10.99.0.1", "fd99::2/126", "fd99::1"), gateway, log)
else:
    up = choose((kind,), "g", gateway, log)
print(up.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ON_HOST)
def test_kill_9_of_the_supervisor_leaves_nothing(place: Place, kind: str) -> None:
    before = place.host_state()
    supervisor = subprocess.Popen(
        (sys.executable, "-c", SUPERVISOR, place.host.path, kind, place.log),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with supervisor:
        assert supervisor.stdout is not None
        pid = supervisor.stdout.readline().strip()
        assert pid
        supervisor.kill()

    if kind == "veth":
        links = ("ip -o link",)
        wait_until("the link is gone", lambda: "ttp-" not in place.host.call(run, *links))
        assert place.host_state() != before
        assert place.host.call(sweep_veth) == ["ttp_test"]
        assert place.host.call(sweep_veth) == []
    else:
        wait_until(f"{kind} is dead", lambda: dead(int(pid)))
    assert place.host_state() == before


def dead(pid: int) -> bool:
    """Also when nobody has reaped it: as PID 1 of a container often does not."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_veth_makes_no_router_of_the_host(place: Place) -> None:
    """The way back needs forwarding on eth0; our table keeps it closed for everybody else."""
    cellar = Namespace()  # a second network behind the host, as a container's bridge would be
    place.stack.callback(cellar.close)
    place.host.call(run, f"ip link add cellar type veth peer name eth0 netns {cellar.path}")
    place.host.call(run, "ip address add 10.50.0.1/24 dev cellar")
    place.host.call(run, "ip link set cellar up")
    cellar.call(run, "ip address add 10.50.0.2/24 dev eth0")
    cellar.call(run, "ip link set eth0 up")
    cellar.call(run, "ip route add default via 10.50.0.1")
    place.world.call(run, f"ip route add 10.50.0.0/24 via {HOST}")
    place.host.call(Path("/proc/sys/net/ipv4/conf/cellar/forwarding").write_text, "1")
    place.serve(cellar, "0.0.0.0", 80)
    uplink = place.start("veth")
    assert place.gateway.call(ask, WORLD, 8080) == HOST

    with pytest.raises(OSError, match=r"timed out|No route"):
        place.world.call(ask, "10.50.0.2", 80, 0.5)

    delete_rule(place, "forward", "ttp undo: ipv4")
    assert place.world.call(ask, "10.50.0.2", 80) == "192.168.77.1"  # so it was that rule
    uplink.stop()


@pytest.mark.parametrize("chain", ["input", "forward"])
def test_a_veth_leads_to_no_service_of_the_host_nor_of_the_gateway(
    place: Place, chain: str
) -> None:
    uplink = place.start("veth")
    if chain == "input":
        asker, asked, address, comment = place.gateway, place.host, "10.99.0.1", "P5"
    else:
        place.world.call(run, f"ip route add 10.99.0.0/30 via {HOST}")
        asker, asked, address, comment = place.world, place.gateway, "10.99.0.2", "nobody connects"
    place.serve(asked, "0.0.0.0", 9998)

    with pytest.raises(TimeoutError):
        asker.call(ask, address, 9998, 0.5)

    delete_rule(place, chain, comment)
    assert asker.call(ask, address, 9998)  # so it was that rule
    uplink.stop()


def delete_rule(place: Place, chain: str, comment: str) -> None:
    listed = place.host.call(run, f"nft -a list chain inet ttp_test {chain}")
    handle = next(line for line in listed.splitlines() if f'comment "{comment}' in line).split()[-1]
    place.host.call(run, f"nft delete rule inet ttp_test {chain} handle {handle}")


def test_two_veths_do_not_close_each_others_way_back(place: Place) -> None:
    before = place.host_state()
    other = Namespace()
    place.stack.callback(other.close)
    first = place.start("veth")
    twin = Veth("twin", "10.99.0.6/30", "10.99.0.5")
    second = place.host.call(start, twin, other, place.log)
    assert (place.gateway.call(ask, WORLD, 8080), other.call(ask, WORLD, 8080)) == (HOST, HOST)

    first.stop()
    assert other.call(ask, WORLD, 8080) == HOST

    second.stop()
    assert place.host_state() == before


def test_only_tcp_passes_a_veth(place: Place) -> None:
    uplink = place.start("veth")
    with place.world.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((WORLD, 53))
        server.settimeout(0.5)

        def send(origin: Namespace) -> None:
            with origin.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", (WORLD, 53))

        send(place.host)
        assert server.recv(1) == b"x"
        send(place.gateway)
        with pytest.raises(TimeoutError):
            server.recv(1)
    uplink.stop()


USER = """
import os, socket, sys
from encodings import idna  # before the directories of root are closed to us
from nsrun import linux
from nsrun.gateway.uplink import choose
from nsrun.netns import Namespace
host, kind = sys.argv[1:]
linux.setns(os.open(host, os.O_RDONLY), linux.CLONE_NEWNET)
linux.unshare(linux.CLONE_NEWNS)
linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
linux.mount("tmpfs", "/mnt", "tmpfs")
os.mknod("/mnt/tun", 0o20600, os.makedev(10, 200))
os.chmod("/mnt/tun", 0o666)
linux.mount("/mnt/tun", "/dev/net/tun", "", linux.MS_BIND)
os.close(os.open("/mnt/log", os.O_CREAT))
os.chown("/mnt/log", 12345, 12345)
os.chmod("/mnt/log", 0o600)
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
linux.prctl(linux.PR_SET_DUMPABLE, 1)
linux.unshare(linux.CLONE_NEWUSER)
for name, text in (("setgroups", "deny"), ("uid_map", "0 12345 1"), ("gid_map", "0 12345 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
gateway = Namespace()
up = choose((kind,), "g", gateway, "/mnt/log")
for address in ("198.51.100.7", "2001:db8:99::7"):
    print(gateway.call(socket.create_connection, (address, 8080), 3).recv(99).decode())
up.stop()
print(gateway.call(socket.if_nameindex))
"""


@pytest.mark.parametrize("kind", HELPERS)
def test_an_unprivileged_user_needs_nothing_else(place: Place, kind: str) -> None:
    ran = subprocess.run(
        (sys.executable, "-c", USER, place.host.path, kind),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert (ran.stderr, ran.stdout.splitlines()) == ("", [HOST, HOST6, "[(1, 'lo')]"])


@pytest.mark.parametrize("kind", ALL)
def test_a_person_can_paste_what_describe_shows(place: Place, kind: str) -> None:
    helpers: dict[str, Uplink] = {"pasta": Pasta(), "slirp4netns": Slirp((4,))}
    lines = describe(helpers.get(kind) or place.uplink(kind))
    place.gateway.call(run, "ip link set lo up")
    if kind in helpers:
        lines[0] += " & helper=$!"
    environment = {**os.environ, "GATEWAY": place.gateway.path, "EGRESS": "eth0"}
    script = "\n".join(("set -e", *lines, "echo up", "read end", "kill ${helper:-} || true"))
    shell = place.host.call(
        lambda: subprocess.Popen(
            ("sh", "-c", script),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    )
    with shell:
        assert shell.stdout is not None
        while shell.stdout.readline() not in ("up\n", ""):
            pass  # sysctl says what it does

        def reached() -> bool:
            try:
                return place.gateway.call(ask, WORLD, 8080) in (HOST, "192.168.77.50")
            except OSError:
                return False

        wait_until("the gateway reaches the world", reached)
        shell.communicate("end\n")


def test_names_that_make_no_link_are_refused() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        Veth("far-too-long-a-name", "10.99.0.2/30", "10.99.0.1")
