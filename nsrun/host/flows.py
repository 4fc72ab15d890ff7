"""What was redirected to Tor, ended for good: sockets, and what conntrack remembers of them.

When Tor is gone and its rules are too, a program that writes to a connection of before would write
in clear, to the site itself. So the sockets are destroyed first, by the kernel, whether anybody
uses them or not; then the entries that lead to Tor's ports are deleted, and no others (P9).

Sources: sock_diag(7), rtnetlink(7), linux/inet_diag.h, linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from nsrun import netlink
from nsrun.errors import NsrunError
from nsrun.host.policy import HostPolicy

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 4, 20, 21
LISTEN, ENDED = 10, {6, 7}  # TIME_WAIT, CLOSE: nothing of these is sent unasked (tcp_states.h)
CT_GET, CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ID, CTA_ZONE = 1, 2, 3, 12, 18
TUPLE_IP, TUPLE_PROTO, NESTED = 1, 2, 0x8000
IP4_SRC, IP4_DST, IP6_SRC, IP6_DST = 1, 2, 3, 4
PROTO_NUM, PROTO_SRC, PROTO_DST = 1, 2, 3
IPS_DST_NAT = 1 << 5
GETADDR = 22  # rtnetlink(7)
AGAIN = 5  # dumps, as the kernel's tables change under them

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Ends = tuple[Address, int, Address, int]  # source, its port, target, its port


@dataclass(frozen=True)
class Flow:
    """An entry of conntrack: as it was sent first, from where it is answered, how to name it."""

    protocol: int
    sent: Ends
    answered: Ends
    translated: bool
    key: bytes

    def leads_to(self, policy: HostPolicy) -> bool:
        """Whether it was redirected to a listener of Tor's, on this host."""
        where, port, _, _ = self.answered
        ours = self.translated and port in (policy.trans_port, policy.dns_port)
        return ours and (where in _listeners(policy) or _is_local(where))


@dataclass(frozen=True)
class Tcp:
    """A socket of TCP; ``key`` names it to the kernel, with its cookie.

    ``inode`` is 0 once no process has it open.
    """

    ends: Ends
    state: int
    uid: int
    inode: int
    key: bytes


def cut(policy: HostPolicy) -> None:
    """End what was redirected to Tor. Nothing new may be redirected any more.

    A socket that conntrack has forgotten may have been: it goes too, unless it is on loopback,
    Tor's own, of nobody who was caught, or of somebody who connected to us. Of other machines'
    connections Tor's sockets go: conntrack still translates the reset that the kernel then sends.
    Raises NsrunError; nothing may be opened then.
    """
    try:
        with (
            netlink.connect(NETLINK_SOCK_DIAG) as diag,
            netlink.connect(netlink.NETLINK_NETFILTER) as conntrack,
        ):
            known = flows(conntrack)
            for one in doomed(known, sockets(diag), policy):
                _end(diag, SOCK_DESTROY, one.key)
            for flow in known:
                if flow.leads_to(policy):
                    _end(conntrack, CT_DELETE, flow.key)
    except OSError as error:
        hint = "the host stays closed; `ttp stop` tries again"
        raise NsrunError("end what was redirected to Tor", error.strerror, hint) from error


def doomed(known: Collection[Flow], found: Collection[Tcp], policy: HostPolicy) -> Iterator[Tcp]:
    """Those of the sockets ``found`` that were redirected, or may have been."""
    redirected = {flow.sent for flow in known if flow.leads_to(policy)}
    clear = {ends for flow in known for ends in (flow.sent, flow.answered)} - redirected
    served = {one.ends[1] for one in found if one.state == LISTEN}
    for one in found:
        where, port, target, _ = one.ends
        if one.state in (LISTEN, *ENDED) or target.is_loopback:
            continue
        if where in _listeners(policy):
            yield one
            continue
        if one.uid == policy.tor_uid:
            continue
        forgotten = one.ends not in clear and port not in served
        if one.ends in redirected or (forgotten and _is_caught(one, policy)):
            yield one


def _is_caught(one: Tcp, policy: HostPolicy) -> bool:
    """Whether the rules would have redirected it. What is closed, but not yet sent, has no user."""
    match policy.own:
        case "all":
            return True
        case "users":
            return one.uid in policy.users or not one.inode
        case "onion":
            target = one.ends[2]
            onion = map(ipaddress.ip_network, (policy.automap4, policy.automap6))
            return any(target in network for network in onion)
        case "none":
            return False


def _listeners(policy: HostPolicy) -> frozenset[Address]:
    return frozenset(map(ipaddress.ip_address, policy.listeners))


def give_up(uid: int) -> int:
    """End a user's connections from addresses that this host has no longer; how many there were.

    They are never answered, and nobody says so.
    """
    with (
        netlink.connect(NETLINK_SOCK_DIAG) as diag,
        netlink.connect(netlink.NETLINK_ROUTE) as routes,
    ):
        ours = addresses(routes)
        lost = [
            one
            for one in sockets(diag)
            if one.uid == uid and one.state not in (LISTEN, *ENDED)
            if not one.ends[0].is_loopback and one.ends[0] not in ours
        ]
        for one in lost:
            _end(diag, SOCK_DESTROY, one.key)
    return len(lost)


def addresses(routes: socket.socket) -> set[Address]:
    """Every address that a link of this host has."""
    every = struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)
    bodies = _dump(routes, GETADDR, every)
    found = (dict(netlink.attributes(body[8:])) for body in bodies)
    return {
        ipaddress.ip_address(one.get(netlink.IFA_LOCAL) or one[netlink.IFA_ADDRESS])
        for one in found
    }


def sockets(diag: socket.socket) -> list[Tcp]:
    """Every socket of TCP in this network namespace."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        every = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
        found += [_tcp(body) for body in _dump(diag, SOCK_DIAG_BY_FAMILY, every)]
    return found


def flows(conntrack: socket.socket) -> list[Flow]:
    """Every entry of TCP and UDP."""
    header = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    made = (_flow(body) for body in _dump(conntrack, CT_GET, header))
    return [flow for flow in made if flow is not None]


def _dump(kernel: socket.socket, kind: int, body: bytes) -> list[bytes]:
    for _ in range(AGAIN):
        try:
            return list(netlink.dump(kernel, kind, body))
        except InterruptedError:
            _drain(kernel)
    raise OSError(errno.EBUSY, "the kernel's list changes faster than it can be read")


def _drain(kernel: socket.socket) -> None:
    """What is left of an answer; the kernel has sent it all when it says nothing at once."""
    try:
        while True:
            kernel.recv(1 << 20, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return


def _end(kernel: socket.socket, kind: int, key: bytes) -> None:
    try:
        netlink.request(kernel, kind, key)
    except FileNotFoundError:
        return  # it has just ended by itself


def _tcp(body: bytes) -> Tcp:
    """struct inet_diag_msg; the request to destroy is made of its struct inet_diag_sockid."""
    family, state = body[0], body[1]
    identity = body[4:52]
    source_port, target_port = struct.unpack_from("!HH", identity)
    ends = (
        *(_address(family, identity[4:20]), source_port),
        *(_address(family, identity[20:36]), target_port),
    )
    uid, inode = struct.unpack_from("=II", body, 64)
    key = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + identity
    return Tcp(ends, state, uid, inode, key)


def _address(family: int, packed: bytes) -> Address:
    """As conntrack has it: IPv4 on a socket of IPv6 is IPv4."""
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(packed[:4])
    six = ipaddress.IPv6Address(packed)
    return six.ipv4_mapped or six


def _flow(body: bytes) -> Flow | None:
    """struct nfgenmsg and attributes; None for another protocol."""
    found = {number & ~NESTED: value for number, value in netlink.attributes(body[4:])}
    protocol, sent = _tuple(found[CTA_TUPLE_ORIG])
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return None
    _, answered = _tuple(found[CTA_TUPLE_REPLY])
    named = (CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE)
    nested = {CTA_TUPLE_ORIG: CTA_TUPLE_ORIG | NESTED}
    key = body[:4] + b"".join(
        netlink.attribute(nested.get(number, number), found[number])
        for number in named
        if number in found
    )
    status = int.from_bytes(found[CTA_STATUS])
    return Flow(protocol, sent, answered, bool(status & IPS_DST_NAT), key)


def _tuple(data: bytes) -> tuple[int, Ends]:
    parts = {number & ~NESTED: value for number, value in netlink.attributes(data)}
    where = dict(netlink.attributes(parts[TUPLE_IP]))
    proto = dict(netlink.attributes(parts[TUPLE_PROTO]))
    source = ipaddress.ip_address(where.get(IP4_SRC) or where[IP6_SRC])
    target = ipaddress.ip_address(where.get(IP4_DST) or where[IP6_DST])
    ports = (int.from_bytes(proto.get(number, b"")) for number in (PROTO_SRC, PROTO_DST))
    source_port, target_port = ports
    return proto[PROTO_NUM][0], (source, source_port, target, target_port)


def _is_local(address: Address) -> bool:
    """Whether this host has it: Docker may lead its own flows to the same port of a container."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((str(address), 0))
        except OSError:
            return False
    return True
