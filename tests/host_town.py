"""The actors of the whole host's stories: a machine, the world on its wire, and a guest behind it.

    guest ─eth0══eth1─ host ─eth0══eth0─ world

The host has a public address and one of a LAN, and forwards for the guest, as for a container or
a virtual machine. A stand-in of Tor listens on its loopback and towards the guest. The world has
every address there is, serves TCP on all of them, and hears every frame on its wire.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nsrun.host import export_firehol, export_iptables, rules
from nsrun.host.policy import DNS_PORT, TRANS_PORT, HostPolicy
from nsrun.host.steps import AddListeners
from nsrun.leak.frames import decode
from nsrun.netns import Namespace
from nsrun.plan import LINK_MAC
from town import ETH_P_ALL, Actor, TorStandIn

Form = Literal["nft", "iptables-legacy", "iptables-nft", "firehol"]
FORMS: tuple[Form, ...] = ("nft", "iptables-legacy", "iptables-nft")

TOR, ALICE, BOB = 54107, 54001, 54002
HOST4, HOST6 = "203.0.113.2", "2001:db8:7::2"
HOST_LAN4, HOST_LAN6 = "192.168.77.2", "fd00:77::2"
LAN4, LAN6 = "192.168.77.53", "fd00:77::53"
GUEST4, GUEST6 = "10.5.0.2", "2001:db8:5::2"
TO_GUEST4, TO_GUEST6 = "10.5.0.1", "2001:db8:5::1"
CGROUPS = next(
    mount.split()[1]
    for mount in Path("/proc/mounts").read_text().splitlines()
    if mount.split()[2] == "cgroup2"
)
OTHERS = AddListeners(HostPolicy(TOR, gateway_for=("eth1",)).listeners)
LISTENERS = {TRANS_PORT: socket.SOCK_STREAM, DNS_PORT: socket.SOCK_DGRAM}
SERVED = (22, 53, 80, 443, 853)
MLD = "icmp6 listener report"


@dataclass
class User(Actor):
    """Somebody on the host: sockets made by ``open`` are theirs."""

    uid: int = 0
    gid: int = 0

    def open(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        made = self.space.call(_socket_as, self.uid, self.gid, family, kind, proto)
        made.settimeout(2)
        return made


def _socket_as(uid: int, gid: int, family: int, kind: int, proto: int) -> socket.socket:
    """What rules call a socket's user is the one of file systems (setfsuid(2)), of one thread."""
    libc = ctypes.CDLL(None)
    libc.setfsgid(gid)
    libc.setfsuid(uid)
    try:
        return socket.socket(family, kind, proto)
    finally:
        libc.setfsuid(0)
        libc.setfsgid(0)


@dataclass
class HostTown:
    root: User
    alice: User
    bob: User
    tor: User
    guest: Actor
    world: Actor
    form: Form
    lock: Path
    heard: list[tuple[str, str, int]] = field(default_factory=list)
    met: list[socket.socket] = field(default_factory=list)
    """Connections that the world took."""

    def load(self, policy: HostPolicy) -> None:
        """The rules, in the form that this town is about."""
        if self.form == "nft":
            # which looks for control groups below /sys/fs/cgroup, whatever is mounted there
            mount = f"mount --bind {CGROUPS} /sys/fs/cgroup && exec nft -f -"
            self._tell(("unshare", "--mount", "sh", "-c", mount), rules.render(policy))
        elif self.form == "firehol":
            self._start_firehol(policy)
        else:
            self._tell(("sh",), export_iptables.script(policy))

    def nft(self, text: str) -> None:
        self._tell(("nft", "-f", "-"), text)

    def unguarded(self) -> None:
        """Take all rules away: what a positive control needs."""
        self._tell(("nft", "flush", "ruleset"))
        for command in ("iptables-legacy", "ip6tables-legacy"):
            for table in ("raw", "filter", "nat"):
                self._tell((command, "-t", table, "-F"))
            for chain in ("INPUT", "FORWARD", "OUTPUT"):
                self._tell((command, "-P", chain, "ACCEPT"))

    def _start_firehol(self, policy: HostPolicy) -> None:
        """With directories of its own, where it keeps what was there before."""
        configuration, defaults = (self.lock.with_name(name) for name in ("fire.conf", "default"))
        configuration.write_text(export_firehol.configuration(policy))
        defaults.write_text("START_FIREHOL=YES\n")
        steps = (
            f"mount --bind {defaults} /etc/default/firehol",
            "mount -t tmpfs tmpfs /run",
            "mount -t tmpfs tmpfs /var/spool",
            "mkdir /run/lock /var/spool/firehol",
            f"firehol {configuration} start >/run/said 2>&1 || {{ cat /run/said >&2; exit 1; }}",
        )
        self._tell(("unshare", "--mount", "sh", "-c", " && ".join(steps)))

    def _tell(self, command: tuple[str, ...], text: str = "") -> None:
        environment = os.environ | {
            "IPTABLES": self.form,
            "XTABLES_LOCKFILE": str(self.lock),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        done = self.root.space.call(
            subprocess.run, command, input=text, text=True, capture_output=True, timeout=10,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not done.stderr

    @contextmanager
    def world_hears(self) -> Iterator[list[str]]:
        """Frames that reach the world while the block runs, decoded; but for the reports of
        listeners that IPv6 sends at times of its own. Closed by a marker that the host sends past
        its rules: without it the silence proves nothing.
        """
        frames: list[str] = []
        with self.world.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
            tap.bind(("eth0", ETH_P_ALL))
            tap.settimeout(10)
            yield frames
            marker = b"\2" * 12 + b"\x88\xb5" + os.urandom(16)
            self.root.raw(marker)
            while True:
                frame, origin = tap.recvfrom(70000)
                if frame == marker:
                    break
                text = str(decode(frame, len(frame)))
                if origin[2] != socket.PACKET_OUTGOING and MLD not in text:
                    frames.append(text)

    def contained(self, *acts: Callable[[], object]) -> None:
        """Not a frame of any of ``acts`` leaves; without the rules, some of each would."""
        with self.world_hears() as frames:
            for act in acts:
                with suppress(OSError):
                    act()
        assert not frames, frames
        self.unguarded()
        for act in acts:
            with self.world_hears() as frames, suppress(OSError):
                act()
            assert frames, f"{act} sends nothing, guarded or not"

    def passes(self, act: Callable[[], object]) -> list[str]:
        """What ``act`` sends out into the world, which is not nothing."""
        with self.world_hears() as frames:
            act()
        assert frames
        return frames


@contextmanager
def host_town(form: Form, directory: Path) -> Iterator[HostTown]:
    with ExitStack() as stack:
        host, world, guest = spaces = [Namespace() for _ in range(3)]
        for space in spaces:
            stack.callback(space.close)
        _ip(world, "link set lo up", f"link add eth0 type veth peer name eth0 netns {host.path}")
        _ip(guest, "link set lo up", f"link add eth0 type veth peer name eth1 netns {host.path}")
        # no ARP, so that the first packet need not wait, or be missed
        quiet = (f"link set eth0 address {LINK_MAC} addrgenmode none", "link set eth0 arp off up")
        _ip(
            host,
            "link set lo up",
            *OTHERS.commands,
            *quiet,
            f"address add {HOST4}/24 dev eth0",
            f"address add {HOST_LAN4}/24 dev eth0",
            f"address add {HOST6}/64 dev eth0 nodad",
            f"address add {HOST_LAN6}/64 dev eth0 nodad",
            "link set eth1 addrgenmode none up",
            "address add fe80::1/64 dev eth1 nodad",
            f"address add {TO_GUEST4}/24 dev eth1",
            f"address add {TO_GUEST6}/64 dev eth1 nodad",
            "address add fd05::1/64 dev eth1 nodad",
            "route add default via 203.0.113.1",
            "route add default via 2001:db8:7::1",
        )
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            host.call(Path(f"/proc/sys/net/{switch}").write_text, "1")
        _ip(
            guest,
            "link set eth0 addrgenmode none up",
            "address add fe80::2/64 dev eth0 nodad",
            f"address add {GUEST4}/24 dev eth0",
            f"address add {GUEST6}/64 dev eth0 nodad",
            "address add fd05::2/64 dev eth0 nodad",
            f"route add default via {TO_GUEST4}",
            f"route add default via {TO_GUEST6}",
        )
        _ip(
            world,
            *quiet,
            "address add 203.0.113.1/32 dev lo",
            "route add local 0.0.0.0/1 dev lo table main",
            "route add local 128.0.0.0/1 dev lo table main",
            "route add local 2000::/3 dev lo table main",
            "route add local fc00::/7 dev lo table main",
            *(f"route add {one} dev eth0" for one in (HOST4, HOST_LAN4, HOST6, HOST_LAN6)),
            f"route add 10.5.0.0/24 via {HOST4} dev eth0 onlink",
            f"route add 2001:db8:5::/64 via {HOST6} dev eth0 onlink",
            f"route add fd05::/64 via {HOST6} dev eth0 onlink",
        )
        town = HostTown(
            root=User("root", host),
            alice=User("alice", host, uid=ALICE, gid=ALICE),
            bob=User("bob", host, uid=BOB, gid=BOB),
            tor=User("tor", host, uid=TOR, gid=TOR),
            guest=Actor("guest", guest),
            world=Actor("world", world),
            form=form,
            lock=directory / "lock",
        )
        at = ("127.0.0.1", "::1", *OTHERS.addresses)
        tor = TorStandIn(host, town.heard, [], at, LISTENERS)
        stack.callback(tor.stop)
        stack.callback(_serve(world, town.met))
        yield town


def _ip(space: Namespace, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    space.call(subprocess.run, ("ip", "-batch", "-"), input=text, text=True, check=True, timeout=10)


def _serve(space: Namespace, met: list[socket.socket]) -> Callable[[], None]:
    """Take every TCP connection to SERVED ports, greet it, and keep it; returns what ends that."""
    listeners = []
    for port in SERVED:
        listener = space.call(socket.socket, socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        listener.listen()
        listeners.append(listener)
    stop, wake = socket.socketpair()

    def serve() -> None:
        while True:
            for ready in select.select([wake, *listeners], [], [])[0]:
                if ready is wake:
                    return
                connection = ready.accept()[0]
                connection.sendall(b"hello from the world\n")
                met.append(connection)

    thread = threading.Thread(target=serve)
    thread.start()

    def end() -> None:
        stop.close()
        thread.join()
        for one in (*listeners, *met, wake):
            one.close()

    return end
