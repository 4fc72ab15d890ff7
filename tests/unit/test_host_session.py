"""The whole host's session, on paper: options, bridges, record, plan, and what is to be ended."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from typing import Any, get_args

import pytest

from nsrun.errors import MissingError, UsageError
from nsrun.host import bridges, flows, session
from nsrun.host.flows import Ends, Flow, Tcp
from nsrun.host.plan import locked_rules, start_steps, tor_config
from nsrun.host.policy import HostPolicy
from nsrun.host.session import HostFacts, HostSpec, Session, State
from nsrun.host.steps import (
    AddListeners,
    CloseHost,
    CoverFile,
    CutHost,
    HostStep,
    LeadResolved,
    OpenHost,
    StartUnit,
    TorifyHost,
)
from nsrun.host.watchdog import verdict
from nsrun.torrc import render_host

FACTS = HostFacts(
    tor="/usr/bin/tor",
    python="/usr/bin/python3",
    tor_uid=107,
    tor_gid=113,
    interface="eth0",
    ipv6=True,
    reaches_ipv6=True,
    automap4="10.192.0.0/10",
    resolv_conf=True,
    resolved=True,
    made=("/run/tor", session.TOR_RUNTIME),
    cgroups=True,
)
SESSION = Session(HostSpec(watchdog=True), FACTS, pid=1, since=1.5)
ALICE = replace(
    SESSION,
    spec=HostSpec(only_users=("alice",), watchdog=True),
    facts=replace(FACTS, only_uids=(1000,)),
    barred=(1000,),
)
THEIRS = replace(FACTS, tor="", made=(), listeners=(1, 2), tor_pid=3)
GATEWAY = replace(SESSION, spec=replace(SESSION.spec, gateway_for=("eth1",)))
PRINT = "0123456789ABCDEF0123456789ABCDEF01234567"
OBFS4 = f"obfs4 192.0.2.1:443 {PRINT} cert=abc iat-mode=0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"trans_port": 1023},
        {"dns_port": 65536},
        {"trans_port": 9054},
        {"interface": "eth0\nup"},
        {"interface": "a/b"},
        {"bootstrap_timeout": -1.0},
        {"interval": 0.5},
        {"tor_user": "debian-tor"},
        {"external": True, "torrc": "UseBridges 1"},
        {"external": True, "bridges": ("192.0.2.1:443",)},
        {"interval": 3601.0},
        {"interval": float("nan")},
        {"only_users": ("alice",), "allow_root": True},
        {"gateway_for": ('eth1" accept',)},
        {"gateway_for": ("lo",)},
        {"gateway_only": True},
        {"gateway_for": ("eth1",), "external": True},
        {"gateway_only": True, "gateway_for": ("eth1",), "allow_root": True},
        {"gateway_only": True, "gateway_for": ("eth1",), "only_users": ("alice",)},
        {"only_users": ("alice",), "bypass_users": ("bob",)},
        {"only_users": ("alice",), "onion_only": True},
        {"onion_only": True, "lan": False},
    ],
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    """Before anything is done; a newline could become a line of its own somewhere."""
    with pytest.raises(UsageError):
        HostSpec(**wrong)


@pytest.mark.parametrize(
    ("line", "checked"),
    [
        (f"Bridge {OBFS4}", OBFS4),
        ("192.0.2.1:443", "192.0.2.1:443"),
        (f"bridge [2001:db8::1]:443   {PRINT}", f"[2001:db8::1]:443 {PRINT}"),
        (
            "snowflake 192.0.2.3:80 url=https://x.test/",
            "snowflake 192.0.2.3:80 url=https://x.test/",
        ),
    ],
)
def test_a_bridge_line_is_taken_as_people_paste_it(line: str, checked: str) -> None:
    """With or without the word Bridge; what is kept has single spaces. Once is enough."""
    assert bridges.check([line, line]) == (checked,)


def test_a_bridge_file_may_have_comments_and_blanks() -> None:
    """And ends of lines as Windows has them."""
    text = f"# mine\r\n\r\n  Bridge {OBFS4}  # at home\r\n192.0.2.1:443"
    assert bridges.lines_of(text) == [f"Bridge {OBFS4}", "192.0.2.1:443"]


@pytest.mark.parametrize(
    "line",
    [
        "192.0.2.1:443\nSocksPort 9050",
        "192.0.2.1:443\rSocksPort 9050",
        "",
        "Bridge",
        "obfs4",
        "obfs9 192.0.2.1:443",
        "192.0.2.1",
        "192.0.2.1:0",
        "192.0.2.1:70000",
        "192.0.2.300:443",
        "[192.0.2.1]:443",
        "example.com:443",
        "192.0.2.1:443 ABC",
        f"192.0.2.1:443 {PRINT} cert=abc",
        f"obfs4 192.0.2.1:443 {PRINT} cert",
        f"obfs4 192.0.2.1:443 {PRINT} cert=abc",
        f"obfs4 192.0.2.1:443 {PRINT} cert= iat-mode=0",
        f"meek_lite 192.0.2.1:443 {PRINT} front=x.test",
        "webtunnel 192.0.2.1:443",
        "snowflake 192.0.2.1:443 ice=stun:x.test:3478",
        "192.0.2.1:443 cert=abc",
        "192.0.2.1:443\\",  # the next line of the torrc would be part of it
        f"obfs4 192.0.2.1:443 {PRINT} cert=a#b iat-mode=0",
        "192.0.2.1:443\N{NO-BREAK SPACE}",
    ],
)
def test_a_wrong_bridge_line_is_refused(line: str) -> None:
    """A newline in one would be an option of Tor's; others would fail later, and less clearly."""
    with pytest.raises(UsageError, match="use a bridge line"):
        bridges.check([line])


def test_bridges_name_their_helpers() -> None:
    """Each transport is started once; a program that is missing is named, with its package."""
    lines = (OBFS4, OBFS4.replace("obfs4 ", "meek_lite "), OBFS4, "192.0.2.1:443")
    text = bridges.options(lines, {"obfs4": "/usr/bin/o", "meek_lite": "/usr/bin/m"})
    assert text.splitlines()[:4] == [
        "UseBridges 1",
        "ClientTransportPlugin obfs4 exec /usr/bin/o",
        "ClientTransportPlugin meek_lite exec /usr/bin/m",
        f"Bridge {OBFS4}",
    ]
    assert "obfs4proxy" in str(bridges.missing("obfs4").hint)
    assert isinstance(bridges.missing("snowflake"), MissingError)


@pytest.mark.parametrize(
    ("line", "hosts", "needs"),
    [
        (OBFS4, [], False),
        (
            "meek_lite 192.0.2.1:1 url=https://a.test/x front=b.test:8443",
            ["a.test", "b.test"],
            True,
        ),
        ("meek_lite 192.0.2.1:1 url=https://192.0.2.2/", ["192.0.2.2"], False),
        ("webtunnel [2001:db8::1]:1 url=https://[2001:db8::2]:443/x", ["2001:db8::2"], False),
        ("webtunnel 192.0.2.1:1 url=https://a.test", ["a.test"], True),
        (
            "snowflake 192.0.2.1:1 url=https://a.test/ fronts=b.test,c.test ice=stun:d.test:1,"
            "turn:e",
            ["a.test", "b.test", "c.test", "d.test", "e"],
            True,
        ),
    ],
)
def test_names_are_looked_up_only_where_a_line_has_one(
    line: str, hosts: list[str], needs: bool
) -> None:
    """And UDP is for snowflake alone."""
    assert bridges.hosts(line) == hosts
    assert bridges.need_names([line]) is needs
    assert bridges.need_udp([line]) is line.startswith("snowflake")


def test_helpers_ask_the_system_where_it_asks_in_clear() -> None:
    """As for single users: others are left alone, and Tor's is one of them."""
    line = "meek_lite 192.0.2.1:1 url=https://a.test"
    assert HostSpec(bridges=(line,)).asks_for_bridges
    assert not HostSpec(bridges=(line,), only_users=("alice",)).asks_for_bridges
    assert not HostSpec(bridges=(line,), onion_only=True).asks_for_bridges
    assert not HostSpec(bridges=(OBFS4,)).asks_for_bridges


def test_a_bridge_of_ipv6_is_no_use_without_it() -> None:
    """But an address that is not connected to may be anything."""
    HostSpec(ipv6=False, bridges=("webtunnel [2001:db8::1]:1 url=https://a.test",))
    HostSpec(bridges=(f"obfs4 [2001:db8::1]:1 {PRINT} cert=a iat-mode=0",))
    for line in ("[2001:db8::1]:1", f"obfs4 [2001:db8::1]:1 {PRINT} cert=a iat-mode=0"):
        with pytest.raises(UsageError, match="IPv6"):
            HostSpec(ipv6=False, bridges=("192.0.2.1:1", line))


@pytest.mark.promise("P2", "P3")
def test_helpers_are_let_out_only_as_far_as_bridges_need_it() -> None:
    """And while all else is closed, as there is no Tor without them."""
    plain = SESSION
    named = replace(SESSION, facts=replace(FACTS, tor_resolvers=("192.0.2.53", "fe80::1%eth0")))
    udp = replace(SESSION, facts=replace(FACTS, tor_udp=True))
    for made, names, any_udp in ((plain, False, False), (named, True, False), (udp, False, True)):
        tables = [one.text for one in start_steps(made, {}) if isinstance(one, CloseHost)]
        tables += [one.text for one in start_steps(made, {}) if isinstance(one, TorifyHost)]
        for text in tables:
            assert ("udp dport 53 accept" in text) is names
            assert ("P1 bridges by UDP" in text) is any_udp
        texts = [one.text for one in start_steps(made, {}) if isinstance(one, StartUnit)]
        assert any("BindReadOnlyPaths" in text for text in texts) is names


def test_nothing_of_a_bridge_is_told() -> None:
    """Neither what its line says, nor what Tor calls it."""
    said = (
        f"new bridge descriptor 'hidden' (fresh): ${PRINT}~hidden [Ab+/1] at 192.0.2.1\n"
        f"Proxy Client: unable to connect OR connection with 192.0.2.1:443 ID={PRINT}: x.test\n"
    )
    line = f"obfs4 192.0.2.1:443 {PRINT.lower()} cert=abc iat-mode=0 url=https://x.test/"
    told = bridges.without_secrets(said, f"UseBridges 1\nBridge {line}\n")
    for secret in ("hidden", PRINT, "192.0.2.1", "Ab+", "x.test"):
        assert secret not in told


def test_a_record_comes_back_and_keeps_no_secret() -> None:
    """From it the same steps are made, to be taken back; bridges are not for everybody to read."""
    secret = replace(HostSpec(), bridges=(OBFS4,), torrc="Bridge 192.0.2.9:1", bypass_users=("a",))
    made = replace(SESSION, spec=secret, rules="0a", redirected=True)
    text = made.as_text()
    assert "192.0.2" not in text
    found = session.read(text)
    assert found == replace(made, spec=replace(secret, bridges=(), torrc=""))
    undo = [step.undo() for step in start_steps(made, {"obfs4": "/x"})]
    assert undo == [step.undo() for step in start_steps(found, {})]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"spec": {}}', "null"])
def test_a_record_that_is_none_is_said_to_be_none(text: str) -> None:
    """As after a version that kept others."""
    with pytest.raises(ValueError):
        session.read(text)


@pytest.mark.promise("P4")
def test_the_first_step_closes_and_its_undo_is_the_last() -> None:
    """Tor starts behind closed rules, and what was redirected is cut before it is stopped."""
    steps = start_steps(SESSION, {})
    assert isinstance(steps[0], CloseHost)
    kinds = [type(step) for step in steps]
    assert kinds.index(StartUnit) < kinds.index(TorifyHost)
    back = [undo for step in reversed(steps) if (undo := step.undo()) is not None]
    assert isinstance(back[-1], OpenHost)
    cut = next(i for i, step in enumerate(back) if isinstance(step, CutHost))
    assert "stop ttp-tor.service" in back[cut + 1].describe()


@pytest.mark.promise("P9")
def test_a_tor_of_somebody_elses_is_neither_made_nor_ended() -> None:
    """No unit, no torrc, no directory; the rules are closed first and opened last all the same."""
    theirs = replace(SESSION, spec=replace(SESSION.spec, external=True), facts=THEIRS)
    steps = start_steps(theirs, {})
    acts = [step.describe() for one in steps for step in (one, one.undo()) if step is not None]
    assert not any(session.TOR_UNIT in act.partition("<<")[0] for act in acts)
    assert not any(path in act for act in acts for path in ("/run/tor", session.TOR_STATE))
    kept = [step for step in start_steps(SESSION, {}) if step in steps]
    assert [type(step) for step in kept[:1]] == [CloseHost]
    others = [step for step in steps if step not in kept]
    assert [type(step) for step in others] == [TorifyHost]  # whose Tor is in no slice of ours
    assert session.TOR_SLICE not in others[0].describe()


@pytest.mark.parametrize("kind", get_args(HostStep), ids=lambda kind: kind.__name__)
def test_every_kind_of_step_is_in_the_plan_or_takes_one_back(kind: type) -> None:
    """And so somebody is killed before it, in tests/machines."""
    steps = (step for made in (SESSION, ALICE, GATEWAY) for step in start_steps(made, {}))
    assert any(isinstance(one, kind) or isinstance(one.undo(), kind) for one in steps)


@pytest.mark.promise("P2", "P4", "P9")
def test_a_gateway_has_listeners_from_before_tor_to_after_it(golden: Any) -> None:
    """Tor cannot listen before; alone, it leaves this machine's names to whom they were left."""
    alone = replace(GATEWAY, spec=replace(GATEWAY.spec, gateway_only=True))
    for made in (GATEWAY, alone):
        kinds = [type(step) for step in start_steps(made, {})]
        assert kinds.index(AddListeners) < kinds.index(TorifyHost) - 1
        assert (CoverFile in kinds) is (made is GATEWAY)
        assert (LeadResolved in kinds) is (made is GATEWAY)
    golden("host-gateway.torrc", render_host(tor_config(alone, {})))
    assert "chain filter_out" in locked_rules(GATEWAY)
    assert "chain filter_out" not in locked_rules(alone)


def test_the_torrc_listens_on_loopback_only(golden: Any) -> None:
    """No proxy, no port but the documented ones, and every option is known."""
    text = render_host(
        tor_config(replace(SESSION, spec=HostSpec(bridges=(OBFS4,))), {"obfs4": "/o"})
    )
    golden("host.torrc", text)


@pytest.mark.parametrize("made", [SESSION, ALICE], ids=["host", "host-users"])
def test_the_plan_of_a_host(golden: Any, made: Session, request: pytest.FixtureRequest) -> None:
    """Every step and its undo, in order; the rules have golden files of their own."""
    steps = start_steps(made, {})
    back = [undo for step in reversed(steps) if (undo := step.undo()) is not None]
    lines = ["# start", *(s.describe() for s in steps), "# stop", *(s.describe() for s in back)]
    rules = re.compile(r"(nft -f - <<'EOF'\n).*?^EOF$", re.DOTALL | re.MULTILINE)
    golden(f"{request.node.callspec.id}.plan", rules.sub(r"\1…\nEOF", "\n".join(lines)) + "\n")


# ---- what is ended at stop ---------------------------------------------------------------------

US, SITE, TOR = map(ipaddress.ip_address, ("192.168.77.10", "93.184.216.34", "127.0.0.1"))
RULES = HostPolicy(tor_uid=107)
ALICES = replace(RULES, own="users", users=(1000,))


def flow(sent: Ends, answered: Ends, *, translated: bool) -> Flow:
    return Flow(6, sent, answered, translated, b"")


def tcp(port: int, target: Any = SITE, uid: int = 1000, state: int = 1, inode: int = 7) -> Tcp:
    return Tcp((US, port, target, 443), state, uid, inode, b"")


REDIRECTED = flow((US, 4000, SITE, 443), (TOR, 9041, US, 4000), translated=True)
OTHERS = flow((US, 4001, SITE, 443), (SITE, 443, US, 4001), translated=False)
CLIENT = flow((SITE, 443, US, 22), (US, 22, SITE, 443), translated=False)


@pytest.mark.promise("P4", "P9")
@pytest.mark.parametrize(
    ("found", "ends"),
    [
        (tcp(4000), True),
        (tcp(4000, state=8), True),  # CLOSE_WAIT: Tor has ended its half
        (tcp(4000, uid=107), False),
        (tcp(4001), False),
        (tcp(4002), True),  # conntrack has forgotten it
        (tcp(4002, TOR), False),
        (tcp(4002, state=6), False),
        (tcp(22), False),
        (tcp(80), False),
    ],
)
def test_sockets_are_ended_that_were_redirected_or_may_have_been(found: Tcp, ends: bool) -> None:
    """Not those in clear by right, of Tor, of loopback, or of who connected to a service here."""
    served = Tcp((ipaddress.ip_address("0.0.0.0"), 80, SITE, 0), flows.LISTEN, 0, 7, b"")
    known = [REDIRECTED, OTHERS, CLIENT]
    assert list(flows.doomed(known, [served, found], RULES)) == [found] * ends


@pytest.mark.promise("P4", "P9")
def test_of_a_gateway_alone_only_sockets_of_others_are_ended() -> None:
    """Tor's, at the other end of a LAN's; not one of this machine's own, forgotten or not."""
    rules = HostPolicy(107, own="none", gateway_for=("eth1",))
    at = ipaddress.ip_address(rules.listeners[0])
    served = Tcp((at, 9041, SITE, 0), flows.LISTEN, 107, 1, b"")
    of_the_lan = Tcp((at, 9041, ipaddress.ip_address("10.5.0.2"), 4000), 1, 107, 1, b"")
    found = [served, of_the_lan, tcp(4001), tcp(4002), tcp(4003, uid=107)]
    assert list(flows.doomed([OTHERS], found, rules)) == [of_the_lan]


@pytest.mark.promise("P4", "P9")
@pytest.mark.parametrize(
    ("found", "ends"),
    [
        (tcp(4000), True),
        (tcp(4002), False),
        (tcp(4002, ipaddress.ip_address("10.192.0.7")), True),
        (tcp(4002, ipaddress.ip_address("fd74:7470:1:1000::7")), True),
    ],
)
def test_of_onion_alone_no_other_forgotten_socket_ends(found: Tcp, ends: bool) -> None:
    """By its address, which leads nowhere but to Tor."""
    rules = replace(RULES, own="onion")
    assert list(flows.doomed([REDIRECTED, OTHERS], [found], rules)) == [found] * ends


@pytest.mark.promise("P4", "P9")
@pytest.mark.parametrize(
    ("found", "ends"),
    [
        (tcp(4000), True),
        (tcp(4002), True),
        (tcp(4001), False),
        (tcp(4000, uid=1001), True),  # by what conntrack knows: whose it is may have changed
        (tcp(4002, uid=1001), False),
        (tcp(4002, uid=0, inode=0), True),  # closed, and not yet sent: the user is forgotten, too
    ],
)
def test_of_others_than_the_named_users_no_forgotten_socket_ends(found: Tcp, ends: bool) -> None:
    """It cannot have been redirected."""
    assert list(flows.doomed([REDIRECTED, OTHERS], [found], ALICES)) == [found] * ends


@pytest.mark.parametrize(
    ("state", "rules", "wanted"),
    [
        ("up", "as loaded", "mend"),
        ("up", "others", "close"),
        ("locked", "as loaded", "wait"),
        ("locked", "others", "close"),
        ("starting", "others", "wait"),
        ("stopping", "others", "wait"),
        ("closed", "others", "wait"),
    ],
)
@pytest.mark.promise("P4")
def test_other_rules_are_closed_and_all_else_is_mended(
    state: State, rules: str, wanted: str
) -> None:
    """Only where they are known; what is locked is not mended, as it lets nothing through."""
    assert verdict(SESSION.at(state, rules="as loaded"), rules) == wanted


@pytest.mark.promise("P4")
def test_where_a_tor_no_longer_listens_all_is_closed() -> None:
    """Once: what is closed already need not be closed again, nor what is about to be changed."""
    for state in get_args(State):
        found = SESSION.at(state, rules="as loaded")
        assert (verdict(found, "as loaded", replaced=True) == "close") is (state == "up"), state


def test_without_a_session_it_ends() -> None:
    """Whatever rules there are: they are not known to be ours."""
    assert verdict(None, "others") == "end"
