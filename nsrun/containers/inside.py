"""Read back from inside a container's network what was plugged into it (P12).

The eyes are others than the hands: files of /proc and a lookup, where the link was made by netlink.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from nsrun.address import BLOCKS
from nsrun.errors import VerifyError
from nsrun.netns import Namespace

SECONDS, TRIES = 2.0, 5  # for Tor to answer what it need not ask anybody
FLAG_UP = 1
SERVER = re.compile(r"nameserver\s+(\S+)")


def verify(
    network: int, pid: int, addresses: list[str], resolver: str, *, ipv6: bool, pinned: bool = True
) -> None:
    """Look at the network of descriptor ``network``, and at what process ``pid`` resolves by.

    One link beside loopback, its two addresses, default routes by it and by nothing else; one
    resolver, which is Tor, or if it is not ``pinned`` any that is asked by the link, where Tor is
    who answers. Raises VerifyError with what is not so.
    """
    space = Namespace(f"/proc/self/fd/{network}")
    try:
        found = space.call(_look, resolver)
    finally:
        space.close()
    servers = SERVER.findall(Path(f"/proc/{pid}/root/etc/resolv.conf").read_text())
    own4, own6 = addresses
    as_meant = {
        "links": found["links"] == {"lo", "eth0"},
        "addresses": found["addresses"] == ({own4, own6} if ipv6 else {own4}),
        "routes": found["routes"] == ({"0.0.0.0/0", "::/0"} if ipv6 else {"0.0.0.0/0"}),
        "resolvers": servers == [resolver] if pinned else all(map(_is_outside, servers)),
        "answer to a lookup": _is_automapped(found["answer"]),
    }
    if wrong := [what for what, right in as_meant.items() if not right]:
        cause = f"it has other {', '.join(wrong)} than were set up"
        raise VerifyError("plug in the container", cause)


def _is_outside(server: str) -> bool:
    return not ip_address(server.partition("%")[0]).is_loopback


def _look(resolver: str) -> dict[str, object]:
    links = {name for _, name in socket.if_nameindex()}
    own = Path("/proc/thread-self/net")
    routes4 = [line.split() for line in (own / "route").read_text().splitlines()[1:]]
    routes6 = [line.split() for line in _lines(own / "ipv6_route")]
    routes = {f"{_address4(one[1])}/{int(one[7], 16).bit_count()}" for one in routes4}
    # of IPv6 the kernel also lists its local table, and an "unreachable" on lo
    routes |= {"::/0" for one in routes6 if one[0] == "0" * 32 and one[9] != "lo"}
    addresses = {_address6(one.split()[0]) for one in _lines(own / "if_inet6")} - {"::1"}
    return {
        "links": links,
        "routes": routes,
        "addresses": addresses | _addresses4(own),
        "answer": _ask(resolver),
    }


def _lines(path: Path) -> list[str]:
    """Those of a file that is not there without IPv6."""
    return path.read_text().splitlines() if path.exists() else []


def _address4(text: str) -> str:
    """As /proc/net/route has it: a number in the byte order of the machine."""
    return str(IPv4Address(struct.pack("=I", int(text, 16))))


def _address6(text: str) -> str:
    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(text))


def _addresses4(own: Path) -> set[str]:
    """Local addresses, but for loopback's, by the kernel's table of routes (proc(5), fib_trie)."""
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", (own / "fib_trie").read_text())
    return {address for address in found if not address.startswith("127.")}


def _ask(resolver: str) -> bytes:
    """Look up a .onion name that nobody has: Tor gives it a virtual address, and asks nobody."""
    name = os.urandom(8).hex()
    query = os.urandom(2) + struct.pack(">5H", 0x100, 1, 0, 0, 0)
    query += bytes([len(name)]) + name.encode() + b"\x05onion\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(SECONDS)
        udp.connect((resolver, 53))
        for _ in range(TRIES):  # as with any resolver: a datagram may be lost
            with suppress(OSError):
                udp.send(query)
                answer = udp.recv(512)
                if answer[:2] == query[:2]:
                    return answer
    return b""


def _is_automapped(answer: object) -> bool:
    """Whether a DNS answer ends in an address that only a gateway's Tor gives out."""
    if not isinstance(answer, bytes) or len(answer) < 12 or not int.from_bytes(answer[6:8]):
        return False
    address = IPv4Address(answer[-4:])
    return any(address in block.automap for block in BLOCKS)
