"""Ways around the packets: services of gateway, host and neighbours, sockets of daemons, powers."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nsrun.leak.probes import SECONDS, Control, Expect, Outcome, Probe, Send, Shot, datagram

CLONE_NEWNET = 0x40000000
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTM_NEWADDR, NLM_F_REQUEST, NLM_F_ACK = 20, 1, 4
NFNL_SUBSYS_NFTABLES = 10
PIDFD_OPEN_NUMBER, PIDFD_GETFD_NUMBER = 434, 438
IO_URING_SETUP_NUMBER = 425
REQUEST_KEY_NUMBERS = {"x86_64": 249, "aarch64": 218, "riscv64": 218, "ppc64le": 270}
PR_GET_NO_NEW_PRIVS = 39

_LIBC = ctypes.CDLL(None, use_errno=True)


def _connect(host: str, port: int) -> Send:
    """Knock at a TCP port: answered if it is open and says or takes anything."""

    def send(shot: Shot) -> Outcome:
        with socket.create_connection((getattr(shot.world, host), port), shot.seconds) as tcp:
            tcp.settimeout(shot.seconds)
            tcp.sendall(shot.token + b"\r\n")
            return Outcome.ANSWERED if tcp.recv(100) else Outcome.REFUSED

    return send


def _datagram(host: str, port: int) -> Send:
    return lambda shot: datagram(shot, getattr(shot.world, host), port, shot.token)


def _socket(*paths: str) -> Send:
    """Connect to the first of these path sockets that exists; ``.name`` is a field of World."""

    def send(shot: Shot) -> Outcome:
        for path in paths:
            place = getattr(shot.world, path[1:]) if path.startswith(".") else path
            with socket.socket(socket.AF_UNIX) as door:
                door.settimeout(SECONDS)
                try:
                    door.connect(place)
                except FileNotFoundError:
                    continue
                return Outcome.ANSWERED
        return Outcome.REFUSED

    return send


def _abstract(shot: Shot) -> Outcome:
    with socket.socket(socket.AF_UNIX) as door:
        door.connect("\0" + shot.world.abstract)
    return Outcome.ANSWERED


def _files(*paths: str) -> Send:
    """Read a file, or list a directory; ``.name/…`` begins with the directory of that socket."""

    def send(shot: Shot) -> Outcome:
        for path in paths:
            field, _, rest = path[1:].partition("/")
            place = Path(getattr(shot.world, field)).parent / rest
            with place.open("rb") as file:
                file.read(1)
        return Outcome.ANSWERED

    return send


def _other_network(_shot: Shot) -> Outcome:
    """Join the network of any process that is in another one: a thread does, and ends there."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_join_other).result()


def _join_other() -> Outcome:
    own = Path("/proc/self/ns/net").stat().st_ino
    error: OSError = PermissionError(1, "no other network is in sight")
    for space in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            fd = os.open(space, os.O_RDONLY)
        except OSError as one:
            error = one
            continue
        try:
            if os.fstat(fd).st_ino != own:
                _call(_LIBC.setns, fd, CLONE_NEWNET)
                return Outcome.ANSWERED
        except OSError as one:
            error = one
        finally:
            os.close(fd)
    raise error


def _trace(shot: Shot) -> Outcome:
    outside = shot.world.outside
    _call(_LIBC.ptrace, PTRACE_ATTACH, outside, 0, 0)
    os.waitpid(outside, 0x40000000)  # __WALL
    _call(_LIBC.ptrace, PTRACE_DETACH, outside, 0, 0)
    return Outcome.ANSWERED


def _steal(shot: Shot) -> Outcome:
    """Take a descriptor out of a process outside (pidfd_getfd(2))."""
    pidfd = _call(_LIBC.syscall, PIDFD_OPEN_NUMBER, shot.world.outside, 0)
    try:
        os.close(_call(_LIBC.syscall, PIDFD_GETFD_NUMBER, pidfd, 0, 0))
    finally:
        os.close(pidfd)
    return Outcome.ANSWERED


def _walk(shot: Shot) -> Outcome:
    """Walk into the file system of a process outside, with all its sockets."""
    next(Path(f"/proc/{shot.world.outside}/root").iterdir())
    return Outcome.ANSWERED


def _sysctl(_shot: Shot) -> Outcome:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    path.write_text(path.read_text())
    return Outcome.ANSWERED


def _address(_shot: Shot) -> Outcome:
    """Give loopback one more address (rtnetlink(7)), and take it away."""
    message = struct.pack("BBBBI", socket.AF_INET, 32, 0, 0, 1)
    message += struct.pack("HH4s", 8, 2, socket.inet_aton("127.77.77.77"))
    _netlink(NETLINK_ROUTE, RTM_NEWADDR, message)
    _netlink(NETLINK_ROUTE, RTM_NEWADDR + 1, message)
    return Outcome.ANSWERED


def _table(_shot: Shot) -> Outcome:
    """Ask for the rules of this network namespace, as who may change them can."""
    _netlink(NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES << 8 | 1, struct.pack(">BBH", 1, 0, 0), 0x300)
    return Outcome.ANSWERED


def _raw_socket(_shot: Shot) -> Outcome:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    return Outcome.ANSWERED


def _packet_socket(_shot: Shot) -> Outcome:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    return Outcome.ANSWERED


def _mount(_shot: Shot) -> Outcome:
    """Uncover what was covered: mount a file system anew, and take it away."""
    _call(_LIBC.mount, b"none", b"/mnt", b"tmpfs", 0, None)
    _call(_LIBC.umount2, b"/mnt", 2)
    return Outcome.ANSWERED


def _ring(_shot: Shot) -> Outcome:
    """io_uring makes sockets without a call that a filter sees."""
    os.close(_call(_LIBC.syscall, IO_URING_SETUP_NUMBER, 1, ctypes.create_string_buffer(120)))
    return Outcome.ANSWERED


def _gain(_shot: Shot) -> Outcome:
    """Whether programs may give us more than we have, by setuid or file capabilities (prctl(2))."""
    gained = _call(_LIBC.prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    return Outcome.REFUSED if gained else Outcome.ANSWERED


def _key(_shot: Shot) -> Outcome:
    """Ask the kernel for a key: of type dns_resolver, a helper outside looks up a name for it."""
    number = REQUEST_KEY_NUMBERS.get(platform.machine(), -1)
    try:
        _call(_LIBC.syscall, number, b"user", b"ttp", None, 0)
    except OSError as error:
        if error.errno != errno.ENOKEY:  # it has been looked for
            raise
    return Outcome.ANSWERED


def _netlink(family: int, kind: int, body: bytes, flags: int = 0) -> None:
    """Send one request; raises what the kernel answers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family) as link:
        link.settimeout(SECONDS)
        flags |= NLM_F_REQUEST | NLM_F_ACK
        link.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        answer = link.recv(65536)
    number = struct.unpack_from("i", answer, 16)[0] if answer[4:6] == b"\2\0" else 0
    if number < 0:
        raise OSError(-number, os.strerror(-number))


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> int:
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _door(name: str, title: str, send: Send, promise: str, control: Control) -> Probe:
    return Probe(name, title, (promise,), Expect.NOWHERE, send, control=control)


PROBES = (
    *(_door(name, f"the gateway's {title}", _connect(host, port), "P5",
            Control.GATEWAY)
      for host, where in (("gateway", ""), ("uplink", " at its uplink's address"))
      for name, title, port in (
          (f"{host}-ssh", f"port 22{where}", 22),
          (f"{host}-socks", f"port 9050{where}", 9050),
          (f"{host}-control", f"port 9051{where}", 9051),
          (f"{host}-trans", f"TransPort asked for by name{where}", 9040),
      )),
    _door("gateway6-ssh", "the gateway's port 22, IPv6", _connect("gateway6", 22), "P5",
          Control.GATEWAY),
    _door("gateway-udp", "a UDP service of the gateway", _datagram("gateway", 7), "P5",
          Control.GATEWAY),
    _door("uplink-udp", "a UDP service at the gateway's uplink", _datagram("uplink", 7), "P5",
          Control.GATEWAY),
    _door("neighbour-tcp", "a service of another workload", _connect("neighbour", 22), "P5",
          Control.GATEWAY),
    _door("neighbour-udp", "a UDP service of another workload", _datagram("neighbour", 7), "P5",
          Control.GATEWAY),
    _door("host-ssh", "the host's ssh", _connect("host", 22), "P5", Control.GATEWAY),
    _door("host-udp", "a UDP service of the host", _datagram("host", 7), "P5", Control.GATEWAY),
    _door("socket-resolved", "systemd-resolved by its socket",
          _socket("/run/systemd/resolve/io.systemd.Resolve"), "P6", Control.HOST),
    _door("socket-nscd", "nscd by its socket", _socket("/run/nscd/socket"), "P6", Control.HOST),
    _door("socket-avahi", "avahi by its socket", _socket("/run/avahi-daemon/socket"), "P6",
          Control.HOST),
    _door("socket-dbus", "D-Bus by its socket", _socket("/run/dbus/system_bus_socket"), "P6",
          Control.HOST),
    _door("socket-docker", "Docker by its socket", _socket("/run/docker.sock"), "P6",
          Control.HOST),
    _door("socket-systemd", "systemd by its socket", _socket("/run/systemd/private"), "P6",
          Control.HOST),
    _door("socket-abstract", "an abstract socket of the host", _abstract, "P6", Control.HOST),
    _door("tor-control", "Tor's control socket", _socket(".control"), "P5", Control.HOST),
    _door("tor-files", "Tor's configuration", _files(".control/torrc"), "P5", Control.HOST),
    _door("supervisor", "the supervisor's socket", _socket(".api"), "P10", Control.HOST),
    _door("power-setns", "another network namespace", _other_network, "P10", Control.HOST),
    _door("power-trace", "tracing a process outside", _trace, "P10", Control.HOST),
    _door("power-steal", "a descriptor of a process outside", _steal, "P10", Control.HOST),
    _door("power-walk", "the files of a process outside", _walk, "P10", Control.HOST),
    _door("power-sysctl", "a network parameter", _sysctl, "P10", Control.HOST),
    _door("power-address", "another address", _address, "P10", Control.HOST),
    _door("power-rules", "the rules of the namespace", _table, "P10", Control.HOST),
    _door("power-raw", "a raw socket", _raw_socket, "P3", Control.HOST),
    _door("power-packet", "a packet socket", _packet_socket, "P3", Control.HOST),
    _door("power-mount", "a mount", _mount, "P10", Control.HOST),
    _door("power-ring", "io_uring", _ring, "P10", Control.HOST),
    _door("power-gain", "privileges of setuid programs", _gain, "P10", Control.HOST),
    _door("power-key", "a key, which a helper outside may look for", _key, "P6", Control.HOST),
)  # fmt: skip
