"""Links, addresses, routes and set elements without a process: netlink(7), spoken directly.

The steps of a plan are lines of ip(8) and nft(8). Those that make a workload go to the kernel from
here, in a tenth of the time that five programs take. Only the words that plans use are known.

Sources: rtnetlink(7), linux/if_link.h, linux/fib_rules.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_interface, ip_network

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLA_F_NESTED, NLMSGERR_ATTR_MSG, IFNAMSIZ = 0x8000, 1, 16
REQUEST, ACK, EXCL, CREATE = 0x1, 0x4, 0x200, 0x400
NEW = ACK | EXCL | CREATE
DUMP, DUMP_INTR, DONE = 0x300, 0x10, 3

ERROR, NEWLINK, DELLINK, GETLINK = 2, 16, 17, 18
NEWADDR, NEWROUTE, NEWRULE, DELRULE = 20, 24, 32, 33
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_OPERSTATE, IF_OPER_UP = 1, 3, 4, 16, 6
IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD = 18, 26, 28
INFO_KIND, INFO_DATA, PEER, ADDR_GEN_MODE, GEN_MODE_NONE = 1, 2, 1, 8, 1
IFF_UP, IFF_NOARP = 0x1, 0x80
IFA_ADDRESS, IFA_LOCAL, IFA_F_NODAD = 1, 2, 2
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
RTPROT_BOOT, RTN_UNICAST, RTN_LOCAL = 3, 1, 2  # who made a route; its type
FRA_DST, FRA_PRIORITY, FRA_TABLE, FRA_IP_PROTO, FRA_DPORT_RANGE = 1, 6, 15, 22, 24
FR_ACT_TO_TBL = 1
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
TABLES = {"main": 254, "local": 255}  # /etc/iproute2/rt_tables
SCOPES = {"universe": 0, "link": 253, "host": 254}

NFT_BATCH_BEGIN, NFT_BATCH_END, NFT_SUBSYSTEM, NFT_INET = 16, 17, 10, 1
NFT_ELEMENT = {"add": NFT_SUBSYSTEM << 8 | 12, "delete": NFT_SUBSYSTEM << 8 | 14}
ELEM_LIST_TABLE, ELEM_LIST_SET, ELEM_LIST_ELEMENTS = 1, 2, 3
ELEM, ELEM_KEY, ELEM_DATA, DATA_VALUE = 1, 1, 2, 1

PATIENCE = 2000  # ms for a link to come up, which takes a few

Message = tuple[int, int, bytes]  # type, flags, and what follows the header


def dump(kernel: socket.socket, kind: int, body: bytes) -> Iterator[bytes]:
    """What the kernel lists when it is asked for all of a ``kind``: the body of each message.

    Raises OSError when it refuses, or when its list changed while it was read (EINTR).
    """
    kernel.send(struct.pack("=IHHII", 16 + len(body), kind, REQUEST | DUMP, 0, 0) + body)
    while True:
        for answered, flags, found in _flagged(kernel.recv(1 << 20)):
            if answered in (ERROR, DONE):
                code = -int.from_bytes(found[:4], "little", signed=True)
                if code > 0:
                    raise OSError(code, os.strerror(code))
                return
            if flags & DUMP_INTR:
                raise OSError(errno.EINTR, "the kernel's list changed while it was read")
            yield found


def request(kernel: socket.socket, kind: int, body: bytes) -> None:
    """One message that is answered by success or an error. Raises OSError."""
    _send(kernel, [(kind, ACK, body)])


def connect(protocol: int) -> socket.socket:
    """A socket to the kernel's routing or netfilter, in the present network namespace for good.

    Keep that of netfilter: its end waits until what was deleted is freed, 10 ms.
    """
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):  # no echo of the request, but a reason
        kernel.setsockopt(SOL_NETLINK, option, 1)
    return kernel


def ip(kernel: socket.socket, commands: Iterable[str], namespaces: Mapping[str, int]) -> None:
    """Carry out lines of ``ip -batch``; ``@name`` is one of ``namespaces``, by its descriptor.

    Must be called in the socket's namespace. Raises OSError with the line that failed and the
    kernel's words, ValueError for a line that is not understood.
    """
    for command in commands:
        try:
            _send(kernel, [_ip(command.split(), namespaces)])
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"ip {command}") from error


def elements(kernel: socket.socket, text: str) -> None:
    """Add and delete elements of sets and maps: lines of nft(8), all of them or none.

    Raises OSError with the kernel's words, ValueError for a line that is not understood.
    """
    edge = struct.pack("=BxH", 0, socket.htons(NFT_SUBSYSTEM))
    batch = [_element(line) for line in text.splitlines()]
    _send(kernel, [(NFT_BATCH_BEGIN, 0, edge), *batch, (NFT_BATCH_END, 0, edge)])


def await_up(kernel: socket.socket, link: str) -> None:
    """Wait until a link passes packets, which is some ms after both of its ends were set up.

    Must be called in the socket's namespace. Linux 6.8 and later waits itself, when it is asked
    (commit facd15dfd691). Raises OSError if there is no such link, or if it does not come up.
    """
    request = _packet([(GETLINK, 0, _link(["name", link], {}))])
    for _ in range(PATIENCE):
        kernel.send(request)
        [(kind, body)] = messages(kernel.recv(1 << 16, socket.MSG_DONTWAIT))
        if kind == ERROR:
            code = -int.from_bytes(body[:4], "little", signed=True)
            raise OSError(code, os.strerror(code), f"ip link show {link}")
        if dict(attributes(body[16:]))[IFLA_OPERSTATE] == bytes([IF_OPER_UP]):
            return
        time.sleep(0.001)  # an older kernel tells, but to another socket, which may miss it
    raise OSError(errno.ETIMEDOUT, "it does not come up", f"ip link show {link}")


def gone_links(data: bytes) -> list[str]:
    """Names of the links that went, by what a socket of the group RTMGRP_LINK received."""
    return [
        dict(attributes(body[16:]))[IFLA_IFNAME].rstrip(b"\0").decode()
        for kind, body in messages(data)
        if kind == DELLINK
    ]


# -- lines of ip(8) ------------------------------------------------------------------------------


def _ip(words: list[str], namespaces: Mapping[str, int]) -> Message:
    match words:
        case ["link", "add", *rest]:
            return NEWLINK, NEW, _link(["name", *rest], namespaces)
        case ["link", "set", *rest]:
            return NEWLINK, ACK, _link(["dev", *rest], namespaces)
        case ["link", "del", name]:
            return DELLINK, ACK, _link(["name", name], namespaces)  # ENODEV if there is none
        case ["address", "add", *rest]:
            return NEWADDR, NEW, _address(_options(["local", *rest]))
        case ["route", "add", "local", *rest]:
            return NEWROUTE, NEW, _route(_options(["to", *rest]), RTN_LOCAL)
        case ["route", "add", *rest]:
            return NEWROUTE, NEW, _route(_options(["to", *rest]), RTN_UNICAST)
        case ["rule", "add", *rest]:
            return NEWRULE, NEW, _rule(_options(rest))
        case ["rule", "del", *rest]:
            return DELRULE, ACK, _rule(_options(rest))
    raise ValueError(f"not understood: ip {' '.join(words)}")


def _options(words: list[str]) -> dict[str, str]:
    """Words by the word before them; those that stand alone have an empty value."""
    left = iter(words)
    return {word: "" if word in ("up", "nodad") else next(left, "") for word in left}


def _link(words: list[str], namespaces: Mapping[str, int]) -> bytes:
    """struct ifinfomsg and attributes; what follows ``peer`` is the other end's."""
    own = words[: words.index("peer")] if "peer" in words else words
    index, flags, change, attributes = 0, 0, 0, b""
    for word, value in _options(own).items():
        match word, value:
            case "dev", _:
                index = socket.if_nametoindex(value)
            case "name", _:
                attributes += _text(IFLA_IFNAME, value)
            case "mtu", _:
                attributes += _number(IFLA_MTU, int(value))
            case "address", _:
                attributes += attribute(IFLA_ADDRESS, bytes.fromhex(value.replace(":", "")))
            case "netns", _:
                attributes += _number(IFLA_NET_NS_FD, namespaces[value])
            case "addrgenmode", "none":
                mode = attribute(ADDR_GEN_MODE, bytes([GEN_MODE_NONE]))
                attributes += nest(IFLA_AF_SPEC, nest(socket.AF_INET6, mode))
            case "arp", "off":
                flags, change = flags | IFF_NOARP, change | IFF_NOARP
            case "up", _:
                flags, change = flags | IFF_UP, change | IFF_UP
            case "type", "veth":
                peer = _link(words[len(own) + 1 :], namespaces)
                data = nest(INFO_DATA, nest(PEER, peer))
                attributes += nest(IFLA_LINKINFO, _text(INFO_KIND, value) + data)
            case _:
                raise ValueError(f"not understood: ip link … {word} {value}")
    return struct.pack("=BxHiII", 0, 0, index, flags, change) + attributes


def _address(options: dict[str, str]) -> bytes:
    """struct ifaddrmsg and attributes."""
    address, index = ip_interface(options.pop("local")), socket.if_nametoindex(options.pop("dev"))
    flags = IFA_F_NODAD if options.pop("nodad", None) is not None else 0
    _nothing_in(options)
    family, packed = _family(address.version), address.ip.packed
    header = struct.pack("=BBBBI", family, address.network.prefixlen, flags, 0, index)
    return header + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)


def _route(options: dict[str, str], kind: int) -> bytes:
    """struct rtmsg and attributes. The scope is what ip(8) takes when none is given."""
    target, attributes = ip_network(options.pop("to")), b""
    if target.prefixlen:
        attributes += attribute(RTA_DST, target.network_address.packed)
    scope = "universe" if target.version == 6 else "host" if kind == RTN_LOCAL else "link"
    if router := options.pop("via", ""):
        attributes += attribute(RTA_GATEWAY, ip_address(router).packed)
        scope = "universe"
    if device := options.pop("dev", ""):
        attributes += _number(RTA_OIF, socket.if_nametoindex(device))
    table = _table(options.pop("table", "local" if kind == RTN_LOCAL else "main"))
    _nothing_in(options)
    fields = (target.prefixlen, 0, 0, table, RTPROT_BOOT, SCOPES[scope], kind, 0)
    return struct.pack("=BBBBBBBBI", _family(target.version), *fields) + attributes


def _rule(options: dict[str, str]) -> bytes:
    """struct fib_rule_hdr and attributes; one without ``lookup`` is to be deleted."""
    attributes = _number(FRA_PRIORITY, int(options.pop("pref")))
    target = ip_network(options.pop("to", "0.0.0.0/0"))
    if target.prefixlen:
        attributes += attribute(FRA_DST, target.network_address.packed)
    if protocol := options.pop("ipproto", ""):
        attributes += attribute(FRA_IP_PROTO, bytes([PROTOCOLS[protocol]]))
    if port := options.pop("dport", ""):
        attributes += attribute(FRA_DPORT_RANGE, struct.pack("=HH", int(port), int(port)))
    action = 0
    if table := options.pop("lookup", ""):
        action = FR_ACT_TO_TBL
        attributes += _number(FRA_TABLE, _table(table))
    _nothing_in(options)
    fields = (target.prefixlen, 0, 0, 0, 0, 0, action, 0)
    return struct.pack("=BBBBBBBBI", _family(target.version), *fields) + attributes


def _nothing_in(options: dict[str, str]) -> None:
    if options:
        raise ValueError(f"not understood: ip … {' '.join(options)}")


def _family(version: int) -> int:
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def _table(name: str) -> int:
    return TABLES[name] if name in TABLES else int(name)


# -- lines of nft(8) -----------------------------------------------------------------------------


def _element(line: str) -> Message:
    """``add element inet TABLE SET { KEY . KEY : VALUE }``, or ``delete``: one element."""
    found = re.fullmatch(r"(add|delete) element inet (\S+) (\S+) \{ (.+?)(?: : (.+))? \}", line)
    if found is None:
        raise ValueError(f"not understood: nft {line}")
    verb, table, name, key, value = found.groups()
    element = nest(ELEM_KEY, attribute(DATA_VALUE, _concatenated(key.split(" . "))))
    if value:
        element += nest(ELEM_DATA, attribute(DATA_VALUE, _packed(value)))
    attributes = _text(ELEM_LIST_TABLE, table) + _text(ELEM_LIST_SET, name)
    attributes += nest(ELEM_LIST_ELEMENTS, nest(ELEM, element))
    return NFT_ELEMENT[verb], ACK | CREATE, struct.pack("=BxH", NFT_INET, 0) + attributes


def _concatenated(words: Iterable[str]) -> bytes:
    """Each in as many registers, of four bytes, as it takes."""
    packed = (_packed(word) for word in words)
    return b"".join(value + bytes(-len(value) % 4) for value in packed)


def _packed(word: str) -> bytes:
    """A quoted interface's name, a port, or an address, as the kernel compares it."""
    if word.startswith('"'):
        return word.strip('"').encode().ljust(IFNAMSIZ, b"\0")
    if word.isdigit():
        return struct.pack("!H", int(word))
    return ip_address(word).packed


# -- messages ------------------------------------------------------------------------------------


def _send(kernel: socket.socket, sent: list[Message]) -> None:
    """Send messages at once, and look at every answer. Raises OSError with the first refusal.

    The kernel has answered when send(2) returns, so nothing is waited for.
    """
    kernel.send(_packet(sent))
    unanswered = sum(1 for _, flags, _ in sent if flags & ACK)
    while unanswered > 0:
        for _, body in messages(kernel.recv(1 << 16, socket.MSG_DONTWAIT)):
            code = -int.from_bytes(body[:4], "little", signed=True)
            if code:
                words = dict(attributes(body[20:])).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0")
                raise OSError(code, words.decode() or os.strerror(code))
            unanswered -= 1


def _packet(sent: list[Message]) -> bytes:
    return b"".join(
        struct.pack("=IHHII", 16 + len(body), kind, REQUEST | flags, number, 0) + body
        for number, (kind, flags, body) in enumerate(sent)
    )


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message (netlink(7)): a length, then what it counts, aligned to 4."""
    for kind, _, body in _flagged(data):
        yield kind, body


def _flagged(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while data:
        length, kind, flags = struct.unpack_from("=IHH", data)
        yield kind, flags, data[16:length]
        data = data[(length + 3) & ~3 :]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, number = struct.unpack_from("=HH", data)
        yield number, data[4:length]
        data = data[(length + 3) & ~3 :]


def attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def nest(number: int, attributes: bytes) -> bytes:
    return attribute(number | NLA_F_NESTED, attributes)


def _number(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=I", value))


def _text(number: int, value: str) -> bytes:
    return attribute(number, value.encode() + b"\0")
