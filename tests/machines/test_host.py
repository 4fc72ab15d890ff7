"""The whole host behind Tor: the documented commands, typed in a machine, with its wire watched.

    web, DNS, Tor ══ router ═p-host═ the machine
                       └─p-lan── LAN

Every packet of the machine passes p-host, and there is an allow list for it: TCP to relays, and
what neighbours ask each other.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from host_machine import (
    CURL,
    CUT,
    PYTHON,
    SHOUT,
    START,
    all_the_time,
    as_seen,
    contained,
    idle,
    is_closed,
    is_killed,
    speak,
    state_of,
    to,
    watched,
)
from machine import Machine
from nsrun.host import session
from nsrun.lab import topology
from nsrun.leak.frames import Tcp, Udp
from town import eventually

STUB = "/run/systemd/resolve/stub-resolv.conf"


@pytest.mark.promise("P1", "P2", "P3", "P8", "P12")
def test_the_documented_life_of_a_session(host: Machine) -> None:
    """start, status, check, refresh, a second start, stop; every packet of it judged."""
    with watched(host) as seen:
        up = host.run(*START)
        assert up.returncode == 0, up.stderr
        assert "by Tor" in up.stdout
        told = json.loads(host.run("ttp", "status", "--json", user="alice", check=True).stdout)
        assert told["state"] == "up"
        assert told["exit"] in host.lab.exits()
        assert host.run("ttp", "check", check=True).stdout.startswith("up: seen as")
        host.run("ttp", "refresh", check=True)
        assert as_seen(host, "-4")["IsTor"] is True
        assert as_seen(host, "-6")["IsTor"] is True
        leaks = host.run("ttp", "check-leak", "-v")
        assert leaks.returncode == 0, leaks.stdout + leaks.stderr
        assert leaks.stdout.splitlines()[-3].startswith("contained: 8 checks")
        assert "up already" in host.run(*START, check=True).stdout
        other = host.run(*START, "--allow-root")
        assert other.returncode == 2, other.stderr
        log = host.run("ttp", "logs", check=True).stdout
        assert "verified: seen as" in log
        assert host.run("ttp", "stop", check=True).stdout == "stopped: the network is as before\n"
        down = host.run("ttp", "status", user="alice")
        assert (down.returncode, down.stdout) == (1, "stopped: the host is not behind Tor\n")
    contained(host, seen[0])
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}


def test_the_log_of_a_session_can_be_json(host: Machine) -> None:
    """From its start to its end, whoever writes; the option may stand before the command, too."""
    for wrong in (("--log-format", "xml", "start"), ("--log-format", "json", "stop")):
        assert host.run("ttp", *wrong).returncode == 2, wrong
    host.run("ttp", "--log-format", "json", *START[1:], check=True)
    other = host.run(*START)
    assert other.returncode == 2, "another log is another session"
    host.run("ttp", "stop", check=True)
    told = [json.loads(line) for line in host.run("ttp", "logs", check=True).stdout.splitlines()]
    assert {tuple(one) for one in told} == {("timestamp", "level", "logger", "message")}
    assert told[0]["message"] == "a session begins"
    assert any(one["level"] == "ERROR" and "with others" in one["message"] for one in told)
    assert told[-1]["message"] == "nft delete table inet ttp"
    host.run("sh", "-c", f"rm {session.LOG}*", check=True)
    host.run("ttp", "stop")  # begins the log again


def test_who_is_not_root_may_look_and_no_more(host: Machine) -> None:
    """Exit code 2, and nothing is changed; and without a session, there is none to stop."""
    for verb in ("start", "stop", "restart", "check", "refresh", "logs"):
        done = host.run("ttp", verb, user="alice")
        assert done.returncode == 2, done.stderr
        assert "only root can" in done.stderr
    assert host.run("ttp", "stop").returncode == 2
    assert host.run("ttp", "check").returncode == 2


@pytest.mark.parametrize(
    "wrong",
    [
        ("--transport-port", "80"),
        ("--transport-port", "22222"),
        ("--interface", "nowhere0"),
        ("--bypass-user", "nobody-of-that-name"),
        ("--bypass-user", "root"),
        ("--bridge", "192.0.2.1:1"),
        ("--use-bridges",),
        ("--use-bridges", "--bridge", "192.0.2.1:1\nSocksPort 9050"),
        ("--dns-port", "9041"),
    ],
)
def test_a_wrong_request_changes_nothing(host: Machine, wrong: tuple[str, ...]) -> None:
    """Exit code 2, before the first effect."""
    listener = ("socat", "TCP-LISTEN:22222,fork,reuseaddr", "STDOUT")
    with all_the_time(host, *listener):
        host.run("sh", "-c", "until ss -Hltn sport = 22222 | grep -q .; do sleep 0.05; done")
        done = host.run(*START, *wrong)
    assert done.returncode == 2, done.stdout + done.stderr
    assert host.run("nft", "list", "tables").stdout == ""


@pytest.mark.promise("P4", "P8")
def test_a_start_that_fails_leaves_the_host_as_it_was(host: Machine) -> None:
    """Tor gets no further without the lab's authorities: exit code 1, and the network in clear."""
    done = host.run("ttp", "start", "--bootstrap-timeout", "1")
    assert done.returncode == 1, done.stdout
    assert "cannot wait for Tor" in done.stderr
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}


@pytest.mark.promise("P4")
def test_a_restart_that_fails_is_closed(host: Machine) -> None:
    """Whoever was behind Tor is not in clear because of an option; the next start mends it."""
    host.run(*START, check=True)
    assert as_seen(host, "-4")["IsTor"] is True
    done = host.run("ttp", "restart", "--bootstrap-timeout", "1")
    assert done.returncode == 1, done.stdout
    assert "stays closed" in done.stderr
    assert state_of(host) == "closed"
    assert host.run(*CURL, "-4", "-m", "3", f"http://{topology.WEB}/api/ip").returncode == 7
    host.run(*START, check=True)
    assert as_seen(host, "-4")["IsTor"] is True


@pytest.mark.promise("P4", "P12")
def test_an_exit_that_nobody_confirms_is_told_by_a_code_of_its_own(host: Machine) -> None:
    """3: up, and closed to all but Tor. The oracle's certificate is not believed here."""
    distrust = ("env", "SSL_CERT_FILE=/etc/hosts")
    done = host.run(*distrust, *START)
    assert done.returncode == 3, done.stderr
    assert as_seen(host, "-4")["IsTor"] is True
    assert host.run(*distrust, "ttp", "check").returncode == 3
    assert host.run("ttp", "check").returncode == 0


@pytest.mark.promise("P11", "P12")
def test_check_asks_nobody_when_the_rules_are_not_as_they_were(host: Machine) -> None:
    """T11: the oracle would be asked in clear; status and check without a session ask nobody."""
    with watched(host) as before:
        host.run("ttp", "status")
        host.run("ttp", "check")
    host.run(*START, check=True)
    with watched(host) as seen:
        host.run("nft", "flush", "chain", "inet", "ttp", "filter_out", check=True)
        host.run("nft", "flush", "chain", "inet", "ttp", "output", check=True)
        done = host.run("ttp", "check")
    assert done.returncode == 1, done.stdout
    assert "other rules" in done.stderr
    for capture in (before[0], seen[0]):
        assert not to(capture, Tcp, topology.WEB, topology.WEB6)
        assert not to(capture, Udp, topology.RESOLVER, topology.RESOLVER6)


AGREE = """
from dataclasses import replace
from pathlib import Path
from nsrun.host import machine, session
record = Path(session.RECORD)
found = session.read(record.read_text())
record.write_text(replace(found, rules=machine.fingerprint()).as_text())
"""


@pytest.mark.promise("P12")
def test_check_leak_finds_what_is_let_past_tor(host: Machine) -> None:
    """The control: rules that somebody has opened, and told the record of; and the LAN's checks."""
    host.run(*START, "--no-lan-bypass", check=True)
    closed = json.loads(host.run("ttp", "check-leak", "--json").stdout)
    assert closed["value"] == "contained"
    assert {"lan", "metadata"} <= {one["name"] for one in closed["checks"]}
    host.run("nft", "insert", "rule", "inet", "ttp", "filter_out", "accept", check=True)
    for verb in ("check", "check-leak"):
        assert "other rules" in host.run("ttp", verb).stderr
    host.run("nft", "flush", "chain", "inet", "ttp", "output", check=True)
    host.run(PYTHON, "-c", AGREE, check=True)
    done = host.run("ttp", "check-leak", "--json")
    told = {one["name"]: one["value"] for one in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert {told[name] for name in ("is-tor", "address4", "address6", "udp", "lan")} == {"leak"}


# ---- what went through Tor, at stop ------------------------------------------------------------

# As `conntrack -F` forgets, but only what leads to Tor.
FORGET = """
from nsrun import netlink
from nsrun.host import flows
from nsrun.host.policy import HostPolicy
with netlink.connect(netlink.NETLINK_NETFILTER) as kernel:
    for flow in flows.flows(kernel):
        if flow.leads_to(HostPolicy(tor_uid=0)):
            netlink.request(kernel, flows.CT_DELETE, flow.key)
"""


@pytest.mark.promise("P1", "P4")
@pytest.mark.parametrize("target", [topology.WEB, topology.WEB6])
def test_nothing_that_went_through_tor_goes_on_in_clear(host: Machine, target: str) -> None:
    """T5: an idle connection is ended by stop, and its next words are on no wire."""
    host.run(*START, check=True)
    with idle(host, target) as (process, heard), watched(host) as seen:
        host.run("ttp", "stop", check=True)
        assert speak(process, heard) == CUT
    assert not to(seen[0], Tcp, target)


@pytest.mark.promise("P1", "P4")
def test_half_closed_and_forgotten_connections_end_too(host: Machine) -> None:
    """Tor was killed, conntrack remembers nothing: a socket in CLOSE_WAIT is destroyed as well."""
    host.run(*START, check=True)
    with idle(host, topology.WEB) as (process, heard):
        host.run("systemctl", "kill", "--signal=KILL", session.TOR_UNIT, check=True)
        host.run(PYTHON, "-c", FORGET, check=True)
        with watched(host) as seen:
            host.run("ttp", "stop", check=True)
            assert speak(process, heard) == CUT
    assert not to(seen[0], Tcp, topology.WEB)


def test_control_a_careless_stop_lets_it_go_on_in_clear(host: Machine) -> None:
    """The same, without the sockets' end: the words are on the wire, to the site itself."""
    host.run(*START, check=True)
    with idle(host, topology.WEB) as (process, heard), watched(host) as seen:
        host.run("systemctl", "stop", session.TOR_UNIT, check=True)
        host.run("nft", "delete", "table", "inet", "ttp", check=True)
        host.run(PYTHON, "-c", FORGET, check=True)
        speak(process, heard)
    assert to(seen[0], Tcp, topology.WEB)


# ---- other users of the machine ----------------------------------------------------------------

# Tor sets SO_REUSEADDR, and so of two sockets the one that was bound last is asked.
BESIDE_TOR = """
import socket
it = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
it.bind(("127.0.0.1", 9054))
print("bound", flush=True)
found = it.recv(600)
print("control" if b"control" in found else "robbed", flush=True)
"""


@pytest.mark.promise("P2")
@pytest.mark.parametrize("mode", [(), ("--only-user", "alice"), ("--onion-only",)])
def test_who_listens_beside_tor_is_asked_nothing(host: Machine, mode: tuple[str, ...]) -> None:
    """Bob, at its DNSPort. Tor, killed and started again, is still reached; the control is that he
    is asked when there are no rules."""
    host.run(*START, *mode, check=True)
    tor = main_process(host)
    host.run("systemctl", "kill", "--signal=KILL", session.TOR_UNIT, check=True)
    eventually(lambda: main_process(host) not in {"0", tor}, "Tor to be started again")
    eventually(lambda: host.run("ttp", "check").returncode == 0, "Tor to be reached", 30)
    with host.start("python3", "-c", BESIDE_TOR, user="bob", stdout=subprocess.PIPE) as bob:
        assert bob.stdout is not None
        assert bob.stdout.readline() == "bound\n"
        name = f"{'a' * 55}d.onion"
        host.run("dig", "+tries=1", "+time=2", "@127.0.0.1", name, user="alice")
        host.run("nft", "delete", "table", "inet", "ttp", check=True)
        host.run("dig", "+tries=1", "+time=2", "-p9054", "@127.0.0.1", "control", user="alice")
        assert "control" in bob.communicate(timeout=5)[0]


def main_process(machine: Machine) -> str:
    return machine.run("systemctl", "show", "-P", "MainPID", session.TOR_UNIT).stdout.strip()


# ---- no moment between -------------------------------------------------------------------------


@pytest.mark.promise("P3", "P4")
def test_no_start_and_no_restart_opens_for_a_moment(host: Machine) -> None:
    """T6, T7: somebody sends all the time, while it is started once more, anew, and renewed."""
    shout = ("python3", "-c", SHOUT, topology.WEB, topology.WEB6)
    with watched(host) as control:
        host.run(*shout, "0.1", user="alice")
    host.run(*START, check=True)
    with watched(host) as seen, host.start(*shout, "60", user="alice") as process:
        host.run(*START, check=True)
        host.run("ttp", "restart", *START[2:], check=True)
        host.run("ttp", "refresh", check=True)
        process.kill()
    for address in (topology.WEB, topology.WEB6):
        assert to(control[0], Udp, address)
        assert not to(seen[0], Udp, address)


@pytest.mark.promise("P4", "P8")
def test_a_start_that_is_killed_at_any_step_is_closed_and_mended(host: Machine) -> None:
    """kill -9 before each: nothing goes out in clear from the first on; stop takes it back."""
    steps = 0
    every = ("--watchdog", "--gateway-for", "later0")
    while is_killed(host, steps, *START[1:], *every):
        assert is_closed(host) is (steps > 0), steps
        host.run("ttp", "stop", check=True)
        assert not is_closed(host)
        steps += 1
    assert steps > 8


@pytest.mark.promise("P4", "P8")
def test_a_session_whose_record_is_lost_is_taken_back(host: Machine) -> None:
    """T10: by the names of what there is, at other ports, too; what was redirected is ended. Where
    there is nothing to take back, nothing is changed."""
    assert host.run("ttp", "stop").returncode == 2
    before = host.state()
    host.run("ttp", "stop", "--restore-only", check=True)
    assert not host.changes(before)
    host.run(*START, "--transport-port", "19041", "--dns-port", "19054", check=True)
    for lose in (f"echo >{session.RECORD}", f"rm {session.RECORD}"):
        host.run("sh", "-c", lose, check=True)
        assert host.run("ttp", "stop").returncode in (1, 2)
        assert as_seen(host, "-4")["IsTor"] is True
    hold = ("socat", "-u", f"TCP:{topology.WEB}:80", "STDOUT")
    with host.start(*hold, user="alice", stderr=subprocess.PIPE) as held:
        host.run("sh", "-c", f"until ss -Htn dst {topology.WEB} | grep -q ESTAB; do :; done")
        host.run("ttp", "stop", "--restore-only", check=True)
        assert held.wait(10) != 0
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}
    assert not host.changes(before)


@pytest.mark.promise("P4", "P8")
def test_a_stop_that_is_killed_at_any_step_is_closed_and_goes_on(host: Machine) -> None:
    """kill -9 before each; the next one begins anew, and finds some of it done; start, too."""
    host.run(*START, "--watchdog", check=True)
    steps = 0
    while is_killed(host, steps, "stop"):
        assert is_closed(host), steps
        steps += 1
    assert steps > 8
    assert not is_closed(host)
    host.run(*START, check=True)
    assert is_killed(host, 5, "stop")
    host.run(*START, check=True)
    assert as_seen(host, "-4")["IsTor"] is True


# ---- options -----------------------------------------------------------------------------------


def test_what_is_on_the_machine_is_as_documented(host: Machine) -> None:
    """docs/compatibility.md, by path and by name; all of it volatile, but for Tor's guards."""
    host.run(*START, check=True)
    chains = host.run("nft", "list", "table", "inet", "ttp", check=True).stdout
    assert "chain output {" in chains
    assert "chain filter_out {" in chains
    shown = host.run("systemctl", "show", "-P", "FragmentPath,User", session.TOR_UNIT).stdout
    assert f"{session.UNITS}/{session.TOR_UNIT}" in shown
    for path, who in (
        (session.RECORD, "root 644"),
        (session.LOG, "root 600"),
        (session.RESOLV_CONF, "root 644"),
        (session.RESOLVED, "root 644"),
        (session.TORRC, "debian-tor 600"),
        (session.CONTROL, "debian-tor"),
        (session.COOKIE, "debian-tor 600"),
        (session.TOR_STATE, "debian-tor 700"),
    ):
        assert host.run("stat", "-c", "%U %a", path, check=True).stdout.startswith(who), path
    assert "nameserver 127.0.0.1\n" in host.run("cat", "/etc/resolv.conf", user="alice").stdout
    assert host.run("findmnt", "/etc/resolv.conf").returncode == 0
    assert "nameserver 127.0.0.53\n" in host.run("cat", STUB).stdout  # its manager's: uncovered
    assert host.run("systemctl", "is-active", "tor.service").stdout == "inactive\n"
    host.run("ttp", "stop", check=True)
    host.run("test", "-e", session.TOR_STATE, check=True)


@pytest.mark.promise("P1", "P2")
def test_a_name_of_onion_goes_to_tor(host: Machine) -> None:
    """T1: its address is a private one, and yet not taken for the LAN's."""
    name = f"{'a' * 55}d.onion"
    host.run(*START, check=True)
    found = host.run("getent", "ahostsv4", name, user="alice").stdout.split()
    assert found[0].startswith("10."), found
    with watched(host) as seen:
        done = host.run(*CURL, "--max-time", "2", f"http://{found[0]}/", user="alice")
    assert done.returncode != 7, "nobody took the connection"
    contained(host, seen[0], expect_some=False)


@pytest.mark.promise("P1", "P2", "P3")
def test_who_is_exempt_is_in_clear_and_nobody_else(host: Machine) -> None:
    """T3: by TCP and by UDP. Bob, bob's group or root; alice never."""
    echo = ("sh", "-c", f"echo word | socat -t1 - UDP:{topology.WEB}:7")
    for options, who in (
        (("--bypass-user", "bob"), "bob"),
        (("--bypass-group", "bob"), "bob"),
        (("--allow-root",), "root"),
    ):
        done = host.run("ttp", "restart", *START[2:], *options)
        assert done.returncode == 0, done.stderr
        assert as_seen(host, "-4", user=who)["IsTor"] is False, options
        assert host.run(*echo, user=who).stdout == "word\n", options
        for other in {"alice", "bob", "root"} - {who}:
            assert as_seen(host, "-4", user=other)["IsTor"] is True, (options, other)
            assert host.run(*echo, user=other).stdout == "", (options, other)


@pytest.mark.promise("P3")
def test_the_lan_is_reached_directly_unless_it_is_not_to_be(host: Machine) -> None:
    """And its resolver is asked in no case; loopback works in both (T2)."""
    lan = (*CURL, "--max-time", "3", f"http://{topology.LAN_WEB}/")
    for options, reached in (((), True), (("--no-lan-bypass",), False)):
        assert host.run("ttp", "restart", *START[2:], *options).returncode == 0
        assert (host.run(*lan, user="alice").returncode == 0) is reached
        with watched(host) as seen:
            host.run("dig", "+tries=1", "+time=2", f"@{topology.RESOLVER}", "test", user="alice")
        assert not to(seen[0], Udp, topology.RESOLVER)


@pytest.mark.promise("P3")
def test_without_ipv6_there_is_none(host: Machine) -> None:
    """Refused at once, not waited for; IPv4 goes to Tor."""
    host.run(*START, "--no-ipv6", check=True)
    assert "error" in as_seen(host, "-6", "--max-time", "5")
    assert as_seen(host, "-4")["IsTor"] is True


def test_a_machine_without_a_resolv_conf(host: Machine) -> None:
    """There is nothing to cover, and nothing is made; libc then asks 127.0.0.1 (resolv.conf(5))."""
    host.run("mv", "/etc/resolv.conf", "/etc/was.conf", check=True)
    try:
        host.run(*START, check=True)
        assert as_seen(host, "-4")["IsTor"] is True
        host.run("ttp", "stop", check=True)
        assert host.run("test", "-e", "/etc/resolv.conf").returncode == 1
    finally:
        host.run("mv", "/etc/was.conf", "/etc/resolv.conf", check=True)


def test_other_ports_and_an_interface(host: Machine) -> None:
    """Where Tor listens is for the administrator to say; the interface is shown. A restart to where
    somebody else listens changes nothing."""
    ports = ("--transport-port", "19041", "--dns-port", "19054")
    host.run(*START, *ports, "--interface", "lo", check=True)
    assert as_seen(host, "-4")["IsTor"] is True
    listening = host.run("ss", "-Hltn", "sport", "=", "19041").stdout
    assert "127.0.0.1:19041" in listening
    assert "interface  lo\n" in host.run("ttp", "status").stdout
    with all_the_time(host, "socat", "TCP-LISTEN:22222,fork,reuseaddr", "STDOUT"):
        host.run("sh", "-c", "until ss -Hltn sport = 22222 | grep -q .; do sleep 0.05; done")
        taken = host.run("ttp", "restart", *START[2:], "--transport-port", "22222")
    assert (taken.returncode, "port 22222" in taken.stderr) == (2, True), taken.stderr
    assert as_seen(host, "-4")["IsTor"] is True


@pytest.mark.promise("P1", "P2", "P3")
def test_a_command_that_bypasses_tor_is_alone_in_clear(host: Machine) -> None:
    """`sudo ttp bypass`: as who called, with his groups, and its exit code; others go to Tor."""
    assert host.run("ttp", "bypass", "true").returncode == 2
    host.run(*START, check=True)
    asked = ("sudo", "ttp", "bypass", *CURL, "-4", f"http://{topology.WEB}/api/ip")
    done = host.run(*asked, user="alice", check=True)
    assert json.loads(done.stdout) == {"IsTor": False, "IP": topology.WAN}
    assert as_seen(host, "-4")["IsTor"] is True
    who = host.run(
        "sudo", "ttp", "bypass", "--", "sh", "-c", "id -un; id -Gn; exit 7", user="alice"
    )
    assert (who.stdout, who.returncode) == ("alice\nalice\n", 7)
    assert host.run("ttp", "bypass", "true", user="alice").returncode == 2
    pipe = subprocess.PIPE
    with host.start("ttp", "bypass", "cat", stdin=pipe, stdout=pipe) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write("here\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "here\n"
        host.run("ttp", "restart", *START[2:], check=True)
        assert reader.communicate("still here\n")[0] == "still here\n"  # not ours to end


@pytest.mark.promise("P4")
def test_who_wants_to_reach_a_relay_by_tor_does_not_keep_it_from_starting(host: Machine) -> None:
    """Another Tor of the machine's does: it is refused, and Tor would die of it while it starts."""
    relay = f"http://{topology.EXITS[0].addresses[0]}:{topology.OR_PORT}/"
    host.run(*START, check=True)  # so that it knows the relays from the first moment on
    host.run("ttp", "stop", check=True)
    with all_the_time(host, "sh", "-c", f"while :; do curl -sm1 {relay}; done", user="alice"):
        host.run(*START, check=True)
        assert as_seen(host, "-4")["IsTor"] is True


def test_a_diagnosis_tells_all_but_secrets(host: Machine) -> None:
    """Units, torrc, our table, the resolver; a bridge's address nowhere."""
    host.run(*START, check=True)
    host.run("sh", "-c", f"echo Bridge 192.0.2.77:443 >>{session.TORRC}", check=True)
    told = host.run("ttp", "diagnose", check=True).stdout
    for words in (session.TOR_UNIT, "chain filter_out", "nameserver 127.0.0.1", "TransPort"):
        assert words in told
    assert "192.0.2.77" not in told
    assert host.run("ttp", "diagnose", user="alice").returncode == 2


@pytest.mark.promise("P8")
def test_uninstalled_nothing_remains(host: Machine) -> None:
    """In the middle of a session: the network as before, no unit, no file; /etc is the owner's."""
    assert host.run("ttp", "uninstall", user="alice").returncode == 2
    keep = "mkdir /root/kept && cp -a /usr/local/bin /usr/local/lib /usr/local/share /root/kept"
    host.run("sh", "-c", keep, check=True)
    host.run(*START, check=True)
    done = host.run("ttp", "uninstall", check=True)
    assert "kept /etc/ttp, which is yours" in done.stdout
    assert as_seen(host, "-4") == {"IsTor": False, "IP": topology.WAN}
    left = (
        "find / -xdev -name '*ttp*' -not -path '/root/*' -not -path '/etc/ttp*' -not -path '*http*'"
    )
    found = host.run("sh", "-c", f"{left}; ls -d /run/ttp /var/lib/tor/ttp").stdout
    assert found == ""
    host.run("sh", "-c", "cp -a /root/kept/* /usr/local && rm -r /root/kept", check=True)
    host.run("systemctl", "daemon-reload", check=True)
    host.run("ttp", "stop")  # begins the log again


# ---- from boot on ------------------------------------------------------------------------------


@pytest.mark.promise("P3", "P4")
def test_from_boot_on_nothing_leaves_before_tor(machine: Machine) -> None:
    """As installed: closed before the network comes up; the whole boot is watched."""
    host = machine  # not as it was: a boot gives its link another number
    options = "START_OPTIONS=--torrc /etc/ttp/lab.torrc\n"
    host.run("sh", "-c", "cat >/etc/default/ttp", text=options, check=True)
    host.run("systemctl", "--quiet", "enable", "ttp.service", check=True)
    try:
        with watched(host) as seen:
            host.reboot()
            assert as_seen(host, "-4")["IsTor"] is True
        contained(host, seen[0])
        status = host.run("systemctl", "is-active", "ttp-closed", "ttp").stdout
        assert status == "active\nactive\n"
    finally:
        host.run("ttp", "stop", check=True)
        host.run("systemctl", "--quiet", "disable", "ttp.service", "ttp-closed.service", check=True)
        host.run("rm", "/etc/default/ttp", check=True)
        with watched(host) as control:
            host.reboot()
            as_seen(host, "-4")
    assert to(control[0], Udp, topology.RESOLVER, topology.RESOLVER6)


@pytest.mark.promise("P4")
def test_closed_it_stays_closed_when_start_fails(host: Machine) -> None:
    """`ttp close` waits, then lets nothing out; a start that fails comes back to that,
    and stop opens."""
    with host.start("flock", session.RUNTIME, "sleep", "6"):
        host.run("ttp", "close", check=True)
    assert host.run("ttp", "status").stdout.startswith("state      closed\n")
    assert is_closed(host)
    assert host.run("ttp", "start", "--bootstrap-timeout", "0").returncode == 1
    assert is_closed(host)
    assert host.run("ttp", "status").stdout.startswith("state      closed\n")
    host.run(*START, check=True)
    assert as_seen(host, "-4")["IsTor"] is True
    host.run("ttp", "stop", check=True)
    assert not is_closed(host)


# ---- the watchdog ------------------------------------------------------------------------------


@pytest.mark.promise("P4")
def test_the_watchdog_closes_when_rules_are_changed(host: Machine) -> None:
    """By nobody's command, and within a second or two: a flush, or one rule more."""
    host.run(*START, "--watchdog", check=True)
    assert host.run("ttp", "watchdog", "status", user="alice").stdout.startswith("active, process")
    for change in ("flush ruleset", "insert rule inet ttp filter_out accept"):
        host.run("nft", *change.split(), check=True)
        eventually(lambda: state_of(host) == "locked", "the watchdog to close", 2)
        assert is_closed(host)
        assert "were changed" in host.journal(session.WATCHDOG)
        assert host.run("ttp", "restart", *START[2:], "--watchdog").returncode == 0
        assert state_of(host) == "up"
    host.run("ttp", "watchdog", "stop", check=True)
    assert host.run("ttp", "watchdog", "status").returncode == 1


@pytest.mark.promise("P4")
def test_the_watchdog_mends_what_has_failed(host: Machine) -> None:
    """Tor that has ended, a resolver that was uncovered; and it stays (T12)."""
    host.run(*START, check=True)
    host.run("ttp", "watchdog", "start", check=True)
    assert "up already" in host.run(*START, check=True).stdout
    pid = host.run("systemctl", "show", "-P", "MainPID", session.WATCHDOG).stdout
    host.run("systemctl", "stop", session.TOR_UNIT, check=True)
    eventually(
        lambda: host.run("systemctl", "is-active", session.TOR_UNIT).stdout == "active\n",
        "Tor to be started again",
    )

    def covered() -> bool:
        return "nameserver 127.0.0.1\n" in host.run("cat", "/etc/resolv.conf").stdout

    host.run("umount", "/etc/resolv.conf", check=True)
    eventually(covered, "the resolver to be covered again", 2)
    assert "busy" in host.run("mv", "/etc/resolv.conf", "/etc/was.conf").stderr
    assert state_of(host) == "up"
    assert host.run("systemctl", "show", "-P", "MainPID", session.WATCHDOG).stdout == pid
    host.run("ttp", "stop", check=True)
