"""The whole host where Tor is blocked: by each kind of bridge, with its wire watched.

    bridge: ORPort, obfs4, meek ══ router, which lets nothing to relays ═p-host═ the machine

Relays, their addresses and ports are those of the lab's consensus; the bridge is in none.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import roots
from host_machine import (
    OWN,
    START,
    FromBefore,
    ListenerReports,
    as_seen,
    is_closed,
    state_of,
    watched,
)
from lab_helpers import Lab
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Ip, Tcp, Udp
from nsrun.leak.pcap import Capture
from nsrun.leak.verdict import Rule, TcpToRelays, Value, as_text, judge
from town import eventually

BRIDGE, BRIDGE6 = "11.60.0.1", "2600:113c::1"
OBFS4_PORT, MEEK_PORT, WEBTUNNEL_PORT, BEHIND_TLS = 7777, 8443, 8444, 8445
FRONT = "www.test"  # of which the lab's web server has a certificate, and the meek server too
NOBODY = f"192.0.2.3:80 {'A' * 40}"  # where a transport does not use the address of a line
TOR_PORTS = f"{{ {topology.OR_PORT}, {topology.DIR_PORT} }}"
CENSOR = f"""
table inet censor {{
    chain forward {{
        type filter hook forward priority -10; policy accept;
        ip daddr != {BRIDGE} tcp dport {TOR_PORTS} drop
        meta nfproto ipv6 tcp dport {TOR_PORTS} drop
    }}
}}
"""
HELPERS = ("obfs4proxy", "snowflake-client")

# What stands behind a front: each session of meek is a connection to the bridge. A request carries
# what was sent, and its answer what has come (meek's protocol, version 1).
MEEK = """
import http.server, select, socket, ssl, sys
sessions = {}

class Meek(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        name = self.headers["X-Session-Id"]
        if name not in sessions:
            sessions[name] = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        tor = sessions[name]
        tor.sendall(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        found = tor.recv(1 << 16) if select.select([tor], [], [], 0.1)[0] else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("", int(sys.argv[3])), Meek)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain("/run/lab/web.pem", "/run/lab/web.key")
server.socket = tls.wrap_socket(server.socket, server_side=True)
print("listening", flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class Lines:
    """How one bridge is reached, by each transport."""

    plain: str
    obfs4: str
    meek: str = f"meek_lite {NOBODY} url=https://hidden.test:{MEEK_PORT}/ front={FRONT}:{MEEK_PORT}"
    webtunnel: str = f"webtunnel {NOBODY} url=https://{FRONT}:{WEBTUNNEL_PORT}/secret ver=0.0.1"
    snowflake: str = f"snowflake {NOBODY} url=https://{FRONT}/ ice=stun:stun.test:3478"


@dataclass(frozen=True)
class Lookups:
    """Of names of bridges, by the resolver that the machine had before."""

    names: tuple[str, ...]
    name: str = "names of bridges"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, body=Udp(target_port=53) as udp):
                asked = udp.question.partition("? ")[2].rstrip(".")
                return source in OWN and target in RESOLVERS and asked in self.names
            case Ip(source=source, target=target, body=Udp(source_port=53)):
                return source in RESOLVERS and target in OWN
        return False


RESOLVERS = (topology.RESOLVER, topology.RESOLVER6)


@dataclass(frozen=True)
class Remains:
    """What the far end of an earlier test sends on, for a while, and who knows nothing of it."""

    name: str = "of connections to bridges, from before"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, body=Tcp() as tcp) if "S" not in tcp.flags:
                ends = {(source, tcp.source_port), (target, tcp.target_port)}
                far = (BRIDGE, BRIDGE6, topology.WEB, topology.WEB6)
                ports = (OBFS4_PORT, MEEK_PORT, WEBTUNNEL_PORT)
                return any((at, port) in ends for at in far for port in ports)
        return False


@dataclass(frozen=True)
class Stun:
    name: str = "STUN of snowflake's"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, body=Udp() as udp):
                ends = {source, target}
                return bool(
                    ends & {*OWN}
                    and ends & {topology.WEB, topology.WEB6}
                    and 3478 in (udp.source_port, udp.target_port)
                )
        return False


def contained(machine: Machine, capture: Capture, *rules: Rule) -> None:
    """Nothing but what ``rules`` cover, of which there is some, and what goes without saying."""
    known = machine.lab.neighbours(*OWN, *RESOLVERS, topology.LAN_WEB)
    verdict = judge(
        "p-host",
        capture,
        [*rules, FromBefore(), Remains(), known, ListenerReports()],
        expect_some=True,
    )
    assert verdict.value is Value.CONTAINED, as_text([verdict])
    for rule in rules:
        assert any(map(rule.covers, capture.frames)), f"not seen: {rule.name}"


def tcp_to(port: int, *addresses: str) -> TcpToRelays:
    reached = frozenset((address, port) for address in addresses)
    return TcpToRelays(frozenset(OWN), reached, f"to port {port}")


@pytest.fixture(scope="module")
def blocked(machine: Machine) -> Iterator[Lines]:
    """The machine with helpers installed, its way to relays blocked, and a bridge elsewhere."""
    with ExitStack() as stack:
        for name in HELPERS:
            stack.enter_context(_installed(machine, Path("/usr/bin", name)))
        lab = machine.lab
        _in(lab, "router", "sh", "-c", f"nft -f - <<'E'{CENSOR}E")
        stack.callback(_in, lab, "router", "nft", "delete", "table", "inet", "censor")
        _in(lab, "inet", "ip", "address", "add", BRIDGE, "dev", "lo")
        stack.callback(_in, lab, "inet", "ip", "address", "del", BRIDGE, "dev", "lo")
        webtunnel = roots.unpacked("webtunnel")
        lines = stack.enter_context(_bridge(lab, lab.home / "bridge", webtunnel))
        stack.enter_context(_tls(lab))
        stack.enter_context(_meek(lab))
        yield lines


@contextmanager
def _installed(machine: Machine, program: Path) -> Iterator[None]:
    there = machine.path(f"/usr/bin/{program.name}")
    there.write_bytes(program.read_bytes())
    there.chmod(0o755)
    try:
        yield
    finally:
        there.unlink()


@contextmanager
def _bridge(lab: Lab, directory: Path, webtunnel: Path) -> Iterator[Lines]:
    directory.mkdir(mode=0o700)
    torrc = f"""
        TestingTorNetwork 1
        DataDirectory {directory}
        Nickname hidden
        ContactInfo none
        BridgeRelay 1
        BridgeDistribution none
        PublishServerDescriptor 0
        ExitRelay 0
        AssumeReachable 1
        SocksPort 0
        Address {BRIDGE}
        ORPort {BRIDGE}:{topology.OR_PORT} IPv4Only
        ExtORPort auto
        ServerTransportPlugin obfs4 exec /usr/bin/obfs4proxy
        ServerTransportListenAddr obfs4 [::]:{OBFS4_PORT}
        ServerTransportPlugin webtunnel exec {webtunnel}/usr/bin/webtunnel-server
        ServerTransportListenAddr webtunnel 127.0.0.1:{BEHIND_TLS}
        ServerTransportOptions webtunnel url=https://{FRONT}:{WEBTUNNEL_PORT}/secret
        OutboundBindAddress {BRIDGE}
        Log notice file {directory}/log
    """
    (directory / "torrc").write_text(torrc + str(lab.status()["client_torrc"]))
    log, obfs4 = directory / "log", directory / "pt_state/obfs4_bridgeline.txt"
    tor = ("tor", "--defaults-torrc", "/dev/null", "--hush", "-f", f"{directory}/torrc")
    with subprocess.Popen(lab.inside("inet", *tor)) as process:
        try:
            done = "Bootstrapped 100%"
            eventually(lambda: log.exists() and done in log.read_text(), "the bridge", 30)
            fingerprint = (directory / "fingerprint").read_text().split()[1]
            shown = obfs4.read_text().splitlines()[-1].removeprefix("Bridge ")
            shown = shown.replace("<IP ADDRESS>:<PORT>", f"{BRIDGE}:{OBFS4_PORT}")
            yield Lines(
                plain=f"{BRIDGE}:{topology.OR_PORT} {fingerprint}",
                obfs4=shown.replace("<FINGERPRINT>", fingerprint),
                meek=Lines.meek.replace("A" * 40, fingerprint),
                webtunnel=Lines.webtunnel.replace("A" * 40, fingerprint),
            )
        finally:
            process.kill()


@contextmanager
def _tls(lab: Lab) -> Iterator[None]:
    """What a web server does for webtunnel."""
    own = "cert=/run/lab/web.pem,key=/run/lab/web.key,verify=0,fork,reuseaddr"
    listen = f"OPENSSL-LISTEN:{WEBTUNNEL_PORT},pf=ip6,ipv6-v6only=0,{own}"
    server = lab.inside("inet", "socat", listen, f"TCP:127.0.0.1:{BEHIND_TLS}")
    with subprocess.Popen(server, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _meek(lab: Lab) -> Iterator[None]:
    server = (sys.executable, "-c", MEEK, BRIDGE, str(topology.OR_PORT), str(MEEK_PORT))
    with subprocess.Popen(lab.inside("inet", *server), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield
        finally:
            process.kill()


def _in(lab: Lab, place: str, *argv: str) -> None:
    done = lab.do(*lab.inside_argv(place, *argv))
    assert done.returncode == 0, done.stderr


def helper(machine: Machine, name: str) -> dict[str, str]:
    """The process of that program, if it is a child of the session's Tor; and of which unit."""
    tor = machine.run("systemctl", "show", "-P", "MainPID", session.TOR_UNIT).stdout.strip()
    found = machine.run("pgrep", "--parent", tor, "--full", name).stdout.split()
    if not found:
        return {}
    shown = machine.run("ps", "-o", "user:20=,unit=,pid=", "-p", found[0]).stdout.split()
    return dict(zip(("user", "unit", "pid"), shown, strict=True))


CONFINED = {"user": "debian-tor", "unit": session.TOR_UNIT}


@pytest.mark.promise("P4", "P8")
def test_control_without_a_bridge_it_does_not_start(host: Machine, blocked: Lines) -> None:
    """No relay is reached: exit code 1, and the network is as before."""
    del blocked
    done = host.run(*START, "--bootstrap-timeout", "4")
    assert done.returncode == 1, done.stdout
    assert "cannot wait for Tor" in done.stderr
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}


@pytest.mark.promise("P1", "P3", "P12")
def test_a_bridge_where_every_relay_is_blocked(host: Machine, blocked: Lines) -> None:
    """Tor speaks to the bridge, and to no relay. The same lines in another order are the same
    session; others are not. None of them is told to anybody."""
    both = f"# mine\r\n\r\nBridge {blocked.plain}\r\n{blocked.obfs4} # at home\r\n"
    with watched(host) as seen:
        up = host.run(*START, "--use-bridges", "--bridge-file", "-", text=both)
        assert up.returncode == 0, up.stderr
        assert as_seen(host, "-4")["IsTor"] is True
        again = ("--use-bridges", "--bridge", blocked.obfs4, "--bridge", blocked.plain)
        assert "up already" in host.run(*START, *again, check=True).stdout
        for other in ((), again[:3], (*again, "--bridge", "192.0.2.8:443")):
            assert "with others" in host.run(*START, *other).stderr, other
        told = "".join(
            host.run(*command).stdout
            for command in (("ttp", "diagnose"), ("ttp", "logs"), ("cat", session.RECORD))
        )
        for secret in (BRIDGE, blocked.plain.split()[1], "cert=", "hidden"):
            assert secret not in told, secret
        host.run("ttp", "stop", check=True)
    ports = {(BRIDGE, topology.OR_PORT), (BRIDGE, OBFS4_PORT)}
    contained(host, seen[0], TcpToRelays(frozenset(OWN), frozenset(ports)))


@pytest.mark.promise("P1", "P3")
def test_obfs4_where_every_relay_is_blocked(host: Machine, blocked: Lines) -> None:
    """Its helper runs as Tor does, and only as long; nothing more is opened. By IPv6, too."""
    with watched(host) as seen:
        up = host.run(*START, "--use-bridges", "--bridge", blocked.obfs4)
        assert up.returncode == 0, up.stderr
        assert as_seen(host, "-4")["IsTor"] is True
        proxy = helper(host, "obfs4proxy")
        assert proxy.items() > CONFINED.items()
        assert "bridges" not in host.run("ttp", "status", user="alice").stdout
        by_ipv6 = blocked.obfs4.replace(BRIDGE, f"[{BRIDGE6}]")
        done = host.run("ttp", "restart", *START[2:], "--use-bridges", "--bridge", by_ipv6)
        assert done.returncode == 0, done.stderr
        assert host.run("test", "-e", f"/proc/{proxy['pid']}").returncode == 1
        host.run("ttp", "stop", check=True)
    contained(host, seen[0], tcp_to(OBFS4_PORT, BRIDGE), tcp_to(OBFS4_PORT, BRIDGE6))


@pytest.mark.promise("P1", "P2", "P3", "P4")
def test_meek_asks_for_its_front_and_nothing_else_is_asked(host: Machine, blocked: Lines) -> None:
    """The resolver of before, for that name: from closed, after a restart, and for a Tor that is
    started anew. Whoever else asks, is answered by Tor."""
    with watched(host) as seen:
        host.run("ttp", "close", check=True)
        for verb in ("start", "restart"):
            up = host.run("ttp", verb, *START[2:], "--use-bridges", "--bridge", blocked.meek)
            assert up.returncode == 0, up.stderr
        assert as_seen(host, "-4")["IsTor"] is True
        proxy = helper(host, "obfs4proxy")
        assert proxy.items() > CONFINED.items()
        its = host.run("cat", f"/proc/{proxy['pid']}/root/etc/resolv.conf", check=True).stdout
        assert f"nameserver {RESOLVERS[0]}\n" in its
        told = host.run("ttp", "status", user="alice").stdout
        assert f"bridges    names from {', '.join(RESOLVERS)}\n" in told
        host.run("systemctl", "kill", "--signal=KILL", session.TOR_UNIT, check=True)
        eventually(lambda: as_seen(host, "-4").get("IsTor") is True, "Tor to be back", 30)
        host.run("getent", "hosts", "other.test", user="alice")
        asked = host.run("dig", "+tries=1", f"@{RESOLVERS[0]}", "more.test", user="alice")
        assert topology.WEB in asked.stdout
        host.run("ttp", "stop", check=True)
    through = tcp_to(MEEK_PORT, topology.WEB, topology.WEB6)
    contained(host, seen[0], through, Lookups((FRONT,)))


@pytest.mark.promise("P1", "P2", "P3")
def test_webtunnel_asks_for_its_site(host: Machine, blocked: Lines) -> None:
    """As meek does for its front."""
    program = roots.unpacked("webtunnel") / "usr/bin/webtunnel-client"
    with _installed(host, program), watched(host) as seen:
        up = host.run(*START, "--use-bridges", "--bridge", blocked.webtunnel)
        assert up.returncode == 0, up.stderr
        assert as_seen(host, "-4")["IsTor"] is True
        assert helper(host, "webtunnel-client").items() > CONFINED.items()
        host.run("ttp", "stop", check=True)
    through = tcp_to(WEBTUNNEL_PORT, topology.WEB, topology.WEB6)
    contained(host, seen[0], through, Lookups((FRONT,)))


@pytest.mark.promise("P3", "P4")
def test_snowflake_opens_udp_for_its_helper_alone(host: Machine, blocked: Lines) -> None:
    """It asks its broker and STUN, which is told; nobody there gives it a proxy, so that the start
    fails, and leaves nothing."""
    options = ("--use-bridges", "--bridge", blocked.snowflake, "--bootstrap-timeout", "8")
    shout = f"for i in 1 2 3 4 5; do echo x | socat -t1 - UDP:{topology.WEB}:7; done"
    pipe = subprocess.PIPE
    start = host.start(*START, *options, stdout=pipe, stderr=pipe)
    with watched(host) as seen, start as process:
        eventually(lambda: helper(host, "snowflake-client"), "the helper", 20)
        assert helper(host, "snowflake-client").items() > CONFINED.items()
        assert state_of(host) == "starting"
        assert is_closed(host)
        told = host.run("ttp", "status", user="alice").stdout
        assert f"bridges    names from {', '.join(RESOLVERS)}; UDP\n" in told
        assert host.run("sh", "-c", shout, user="alice").stdout == ""
        said = process.communicate(timeout=60)
        assert process.returncode == 1, said
    contained(
        host,
        seen[0],
        tcp_to(443, topology.WEB, topology.WEB6),
        Stun(),
        Lookups((FRONT, "stun.test")),
    )


WRONG = (
    ("--bridge", "192.0.2.1:1\nSocksPort 9050"),
    ("--bridge", "[2001:db8::1]:443", "--no-ipv6"),
    ("--bridge-file", "/root"),
    ("--bridge-file", "/root/none"),
    ("--bridge-file", "/dev/zero"),
    ("--bridge-file", "/dev/null"),
    ("--bridge-file", "-"),
)


@pytest.mark.promise("P8")
def test_a_wrong_bridge_changes_nothing(host: Machine, blocked: Lines) -> None:
    """It is said what is wrong; a session that is up goes on."""
    host.run("sh", "-c", "echo MaxCircuitDirtiness never >/root/wrong", check=True)
    later = (
        ("--bridge", f"webtunnel {NOBODY} url=https://www.test/"),  # there is no program for it
        ("--bridge", "192.0.2.1:1", "--torrc", "/root/wrong"),  # Tor itself refuses it
    )
    for wrong in (*WRONG, *later):
        done = host.run("ttp", "start", "--use-bridges", *wrong)
        assert done.returncode in (1, 2), wrong
        assert "Traceback" not in done.stderr
        assert host.run("nft", "list", "tables").stdout == "", wrong
    host.run(*START, "--use-bridges", "--bridge", blocked.obfs4, check=True)
    for wrong in later:
        assert host.run("ttp", "restart", "--use-bridges", *wrong).returncode in (1, 2), wrong
    assert state_of(host) == "up"
    assert as_seen(host, "-4")["IsTor"] is True
    host.run("rm", "/root/wrong", check=True)
