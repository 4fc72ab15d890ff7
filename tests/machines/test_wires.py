"""What leaks elsewhere, on the wire of a whole host: an address, a protocol, a flow of before.

Each is tried without ttp, too, where it must be seen.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from host_machine import CURL, START, as_seen, contained, idle, is_closed, speak, to, watched
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Icmp, Ip, Tcp, Udp
from nsrun.leak.pcap import Capture

ONION = f"{'a' * 55}d.onion"
RESOLVERS = ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111")  # of the best known, by DoH and DoT


@contextmanager
def at(machine: Machine, address: str) -> Iterator[str]:
    """The machine has this address of IPv4 instead of its own, and its router one beside it."""
    router = f"{address.rpartition('.')[0]}.1"
    beside = ("ip", "address", "add", f"{router}/24", "dev", "lan0")
    done = machine.lab.do(*machine.lab.inside_argv("router", *beside))
    assert done.returncode == 0, done.stderr
    move = (
        "ip -4 address flush dev eth0; ip address add $0/24 dev eth0; ip route add default via $1"
    )
    try:
        machine.run("sh", "-ec", move, address, router, check=True)
        yield router
    finally:
        machine.run("ttp", "stop")
        machine.run("sh", "-ec", move, topology.HOST, topology.ROUTER, check=True)
        machine.lab.do(*machine.lab.inside_argv("router", "ip", "address", "del", *beside[3:]))


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.parametrize(
    ("address", "options", "automap"),
    [
        pytest.param("11.77.0.10", (), "10.", id="public"),
        pytest.param("100.64.77.10", ("--no-lan-bypass",), "10.", id="shared"),
        pytest.param("10.200.77.10", (), "100.", id="where .onion addresses would be"),
    ],
)
def test_whatever_address_a_host_has_it_is_behind_tor(
    host: Machine, address: str, options: tuple[str, ...], automap: str
) -> None:
    """T1, T2: a public one, one of a provider's NAT (RFC 6598), or one in .onion's own range."""
    with at(host, address) as router:
        assert as_seen(host, "-4")["IsTor"] is False  # the control
        stays_behind_tor(host, options, automap, moved=(address, router))


def stays_behind_tor(
    host: Machine, options: tuple[str, ...], automap: str, moved: tuple[str, ...]
) -> None:
    with watched(host) as seen:
        host.run(*START, *options, check=True)
        assert as_seen(host, "-4")["IsTor"] is True
        found = host.run("getent", "ahostsv4", ONION, user="alice").stdout.split()
        assert found[0].startswith(automap), found
        assert host.run(*CURL, "-m2", f"http://{found[0]}/", user="alice").returncode != 7
        host.run("sh", "-c", f"echo stray | socat -t1 - UDP:{found[0]}:7", user="alice")
        host.run("ping", "-c1", "-W1", found[0])
    contained(host, seen[0], moved=moved)


def pings(capture: Capture, *addresses: str) -> list[Ip]:
    """Requests of ping to one of the addresses."""
    return [
        frame.body
        for frame in capture.frames
        if isinstance(frame.body, Ip)
        and frame.body.target in addresses
        and isinstance(frame.body.body, Icmp)
    ]


@pytest.mark.promise("P1", "P3")
def test_root_is_let_past_tor_by_every_protocol_or_by_none(host: Machine) -> None:
    """T3: its TCP, UDP and ping; without the option nothing of it."""
    ask = f"""
        ping -4 -c1 -W1 {topology.WEB}
        echo stray | socat -t1 - UDP:{topology.WEB}:7
        curl -sm5 http://{topology.WEB}/api/ip
        ping -6 -c1 -W1 {topology.WEB6}
    """
    for options in ((), ("--allow-root",)):
        assert host.run("ttp", "restart", *START[2:], *options).returncode == 0
        with watched(host) as seen:
            host.run("sh", "-c", ask)
        sent = [
            bool(pings(seen[0], topology.WEB)),
            bool(pings(seen[0], topology.WEB6)),
            bool(to(seen[0], Udp, topology.WEB)),
            bool(to(seen[0], Tcp, topology.WEB)),
        ]
        assert sent == [bool(options)] * 4, options


@pytest.mark.promise("P2", "P3")
def test_encrypted_names_fall_back_to_tor(host: Machine) -> None:
    """T9: DNS over TLS and HTTPS is refused at once, and not by Tor; canaries tell programs."""
    asks = [(one, port) for one in RESOLVERS for port in (443, 853)]
    host.run(*START, check=True)
    with watched(host) as seen:
        for one, port in (*asks, (topology.WEB, 853)):
            done = host.run(*CURL, "-k", "-m5", f"https://{url(one)}:{port}/", user="alice")
            assert done.returncode == 7, (one, port, done.stderr)  # refused
        for name in ("use-application-dns.net", "dns.google"):
            asked = ("dig", "+short", "+time=5", f"@{topology.RESOLVER}", name)
            assert host.run(*asked, user="alice").stdout == "0.0.0.0\n", name
        assert as_seen(host, "-4")["IsTor"] is True
    contained(host, seen[0])
    host.run("ttp", "stop", check=True)
    with watched(host) as control:
        for one, port in asks:
            host.run(*CURL, "-k", "-m1", f"https://{url(one)}:{port}/", user="alice")
    for one in RESOLVERS:
        assert to(control[0], Tcp, one), one


def url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


# Follows connections before there is a session, as any firewall does; so their state is known.
FIREWALL = """
table inet theirs {
    chain in { type filter hook input priority 10; policy accept; ct state invalid drop; }
}
"""
FLOW = """
import socket, sys
query = bytes.fromhex("0007 0100 0001 0000 0000 0000 04 74657374 00 0001 0001")
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect((sys.argv[1], 53))
while True:
    try:
        udp.send(query)
    except OSError:
        pass
    print("sent", flush=True)
    if not sys.stdin.readline():
        break
"""


@pytest.mark.promise("P2")
def test_a_program_that_goes_on_asking_a_resolver_of_the_lan_is_not_heard(host: Machine) -> None:
    """T4: its flow is older than the rules, so that nobody translates it; and it is of the LAN."""
    host.run("nft", "-f", "-", text=FIREWALL, check=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with host.start("python3", "-c", FLOW, topology.RESOLVER, user="alice", **pipes) as asking:
        assert asking.stdout is not None
        with watched(host) as control:
            assert asking.stdout.readline() == "sent\n"
            assert speak(asking, asking.stdout) == "sent\n"
        host.run(*START, check=True)
        with watched(host) as seen:
            for _ in range(3):
                assert speak(asking, asking.stdout) == "sent\n"
        asking.kill()
    host.run("nft", "delete", "table", "inet", "theirs", check=True)
    assert to(control[0], Udp, topology.RESOLVER)
    assert not to(seen[0], Udp, topology.RESOLVER)


@pytest.mark.promise("P4", "P8")
def test_an_interrupted_start_is_taken_back(host: Machine) -> None:
    """T10: Ctrl-C at one moment after another, up to waiting for Tor: the host is as it was."""
    for seconds in ("0.6", "1", "2"):
        interrupted = ("timeout", "--preserve-status", "--signal=INT", seconds)
        done = host.run(*interrupted, "ttp", "start")  # without the lab's torrc: it goes on waiting
        assert done.returncode == 130, (seconds, done.returncode, done.stderr)
        assert host.run("nft", "list", "tables").stdout == "", seconds
        assert not host.path(session.RECORD).exists(), seconds
        assert host.run("systemctl", "is-active", session.TOR_UNIT).stdout == "inactive\n", seconds
    assert not is_closed(host)
    with idle(host, topology.WEB):  # nothing keeps it from its own connections
        pass
