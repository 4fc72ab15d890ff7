"""The rules of the whole host: what HostPolicy means, packet by packet. Pure.

Packets are caught where they are born, in the output hook, and, of a LAN that this machine is the
gateway of, where they arrive. Four ideas run through all of it:

- What must not leave is not named; what may is, and the rest is refused (``own`` = all). So
  packets without a socket, which no match on a user can see, are refused as well.
- What the nat chains leave alone although it would be for Tor (``return``: private addresses, DNS
  over TLS), is refused by the filter chains, fast, so that programs fall back.
- The filter chains believe no redirect that they cannot see: a packet for Tor is addressed to
  loopback. The status in conntrack alone would pass flows that anybody's rules translated, and
  our own redirected ones when the nat chains are gone.
- Loopback is exempt by interface, never by address. DNS on loopback is redirected all the same:
  that is where resolv.conf points to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from nsrun.host.policy import DOH4, DOH6, LAN4, LAN6, HostPolicy
from nsrun.host.rule import Chain, Rule, Verdict, nft
from nsrun.ruleset import PRIVATE4, PRIVATE6

_DNS, _DOT, _HTTPS = (53,), (853,), (443,)
_TOR4, _TOR6 = ("127.0.0.1",), ("::1",)
_NO_NAMES: tuple[tuple[Literal["tcp", "udp"], Verdict], ...] = (("tcp", "reset"), ("udp", "refuse"))
_LOOPBACK = Rule("P4 loopback, by interface", "accept", oif=("lo",))


def render(policy: HostPolicy) -> str:
    """The whole table, to be loaded by one ``nft -f -``; Tor may start before or after."""
    return nft(chains(policy), policy.table)


def render_lockdown(policy: HostPolicy) -> str:
    """The table while ``ttp stop`` goes on: nothing is redirected any more.

    What would be for Tor is refused, redirected connections of before as well, so that their
    programs learn of it; Tor itself and what is exempt go on.
    """
    locked = (
        replace(one, rules=tuple(rule for rule in one.rules if not rule.translated))
        if one.kind != "nat"
        else replace(one, rules=())  # so that a reset still reaches who in the LAN has a connection
        for one in chains(policy)
        if one.kind != "nat" or one.hook == "prerouting"
    )
    return nft(locked, policy.table)


def render_closed(table: str = "ttp") -> str:
    """The table at boot, before anything is known, and after tampering: nothing but loopback.

    The machine may get and keep its address, and answers who connects to it, so that it can be
    repaired from afar.
    """
    rules = (
        _LOOPBACK,
        *_answers(),
        *_neighbours(),
        *_refuse_all(),
    )
    return nft(
        (
            Chain("filter_out", "filter", "output", rules, "drop"),
            Chain("filter_forward", "filter", "forward", (), "drop"),
            Chain("filter_in", "filter", "input", (_from_before(),)),
        ),
        table,
    )


def chains(policy: HostPolicy) -> tuple[Chain, ...]:
    """Those that ``policy`` needs, those before routing first."""
    redirects = {"all": _redirects, "users": _redirects, "onion": _onion_redirects}
    refusals = {"all": _refusals, "users": _users_refusals, "onion": _onion_refusals}
    own = policy.own
    default: Literal["accept", "drop"] = "drop" if own == "all" else "accept"
    found = []
    if policy.gateway_for:
        found += [
            Chain("sources", "raw", "prerouting", (_forged(policy),)),
            Chain("prerouting", "nat", "prerouting", tuple(_arriving(policy))),
            Chain("filter_arriving", "filter", "prerouting", tuple(_not_forwarded(policy))),
        ]
    if own != "none":
        found += [
            Chain("output", "nat", "output", tuple(redirects[own](policy))),
            Chain("filter_out", "filter", "output", tuple(refusals[own](policy)), default),
        ]
    if own == "all" or policy.gateway_for:
        forwarded = tuple(_forwarded(policy))
        found.append(Chain("filter_forward", "filter", "forward", forwarded, default))
    if incoming := tuple(_incoming(policy)):
        found.append(Chain("filter_in", "filter", "input", incoming))
    return tuple(found)


# ---- this machine's own packets ----------------------------------------------------------------


def _exempt(policy: HostPolicy) -> Iterator[Rule]:
    """Split tunnel: whoever it is, by whatever protocol."""
    if policy.allow_root:
        yield Rule("P1 root is exempt, by --allow-root", "accept", users=(0,))
    if policy.bypass_users:
        yield Rule("P1 exempt users", "accept", users=policy.bypass_users)
    if policy.bypass_groups:
        yield Rule("P1 exempt groups", "accept", groups=policy.bypass_groups)
    if policy.bypass_cgroup:
        yield Rule("P1 exempt commands", "accept", cgroup=policy.bypass_cgroup)


def _redirects(policy: HostPolicy) -> Iterator[Rule]:
    """DNS on loopback first, for whoever is exempt too: nobody else answers there. Elsewhere,
    DNS of the exempt is theirs."""
    who = policy.users
    yield Rule("P1 Tor itself leaves", "return", users=(policy.tor_uid,))
    yield Rule(
        "P2 DNS on loopback goes to Tor",
        policy.dns_port,
        oif=("lo",),
        users=who,
        protocol="udp",
        dport=_DNS,
    )
    yield from (replace(rule, do="return") for rule in _exempt(policy))
    yield Rule("P2 DNS goes to Tor", policy.dns_port, users=who, protocol="udp", dport=_DNS)
    yield replace(_LOOPBACK, do="return")
    if policy.own == "all" and policy.services:
        yield Rule(
            "P5 services go on",
            "return",
            protocol="tcp",
            sport=policy.services,
            not_opening=True,
        )
    yield from (replace(rule, users=who) for rule in _to_tor(policy))


def _to_tor(policy: HostPolicy) -> Iterator[Rule]:
    """.onion, whose addresses are private ones, before these are left to be refused."""
    yield from _onion(policy)
    yield Rule("P2 DNS over TLS is refused below", "return", protocol="tcp", dport=_DOT)
    for version, doh, private in (("ipv4", DOH4, PRIVATE4), ("ipv6", DOH6, PRIVATE6)):
        yield Rule(
            f"P2 DNS over HTTPS is refused below, {version}",
            "return",
            to=doh,
            protocol="tcp",
            dport=_HTTPS,
        )
        yield Rule(f"P3 private addresses are not for Tor, {version}", "return", to=private)
    yield Rule("P1 TCP goes to Tor", policy.trans_port, protocol="tcp")


def _onion(policy: HostPolicy) -> Iterator[Rule]:
    for version, automap in (("ipv4", policy.automap4), ("ipv6", policy.automap6)):
        yield Rule(
            f"P1 .onion goes to Tor, {version}", policy.trans_port, to=(automap,), protocol="tcp"
        )


def _refusals(policy: HostPolicy) -> Iterator[Rule]:
    yield _LOOPBACK
    yield from _ipv6_refused(policy)
    yield from _redirected()
    yield from _tor_leaves(policy)
    yield from _exempt(policy)
    yield from _answers(policy.services)
    if policy.gateway_for:
        yield from _to_the_lan(policy)
    yield from _other_resolvers()
    yield from _stray_onion(policy)
    if policy.tor_udp:
        yield from _tor_udp(policy)
    if policy.lan:
        yield from _lan()
    yield from _neighbours()
    yield from _refuse_all()


def _tor_leaves(policy: HostPolicy) -> Iterator[Rule]:
    """Its helpers are of the same user; those that know a bridge by a name ask for it."""
    yield Rule("P1 Tor itself leaves", "accept", users=(policy.tor_uid,), protocol="tcp")
    for version, sign in (("ipv4", "."), ("ipv6", ":")):
        if to := tuple(one for one in policy.tor_resolvers if sign in one):
            yield Rule(
                f"P2 names of bridges, {version}",
                "accept",
                users=(policy.tor_uid,),
                to=to,
                protocol="udp",
                dport=_DNS,
            )


def _tor_udp(policy: HostPolicy) -> Iterator[Rule]:
    """Whom it goes to, others say: no address of the LAN is among those it should be."""
    who = (policy.tor_uid,)
    for version, private in (("ipv4", PRIVATE4), ("ipv6", PRIVATE6)):
        why = f"P3 bridges by UDP have public addresses, {version}"
        yield Rule(why, "refuse", users=who, to=private, protocol="udp")
    yield Rule("P1 bridges by UDP", "accept", users=who, protocol="udp")


def _users_refusals(policy: HostPolicy) -> Iterator[Rule]:
    """Of ``users`` only. A packet without an open socket has no user: it passes if it belongs to a
    connection that is known, else it could be the rest of a redirected one.

    A resolver on loopback is somebody else's, and would ask in clear.
    """
    mine = [*_other_resolvers(), *_stray_onion(policy)]
    if policy.lan:
        mine += _lan()
    for rule in _other_resolvers():
        if rule.dport:
            yield replace(rule, why=f"{rule.why}, on loopback", oif=("lo",), users=policy.users)
    yield _LOOPBACK
    yield from (replace(rule, users=policy.users) for rule in _ipv6_refused(policy))
    yield from _redirected()
    yield from _exempt(policy)
    yield from (replace(rule, users=policy.users) for rule in (*mine, *_refuse_all()))
    yield Rule("P9 other users are left alone", "accept", owned=True)
    yield Rule(
        "P3 nobody's TCP of no connection", "drop", protocol="tcp", states=("new", "invalid")
    )


def _onion_redirects(policy: HostPolicy) -> Iterator[Rule]:
    """Names, whoever asks whom for them, resolvers of this machine too; then what they lead to."""
    yield Rule(
        "P2 names of .onion go to Tor", policy.dns_port, protocol="udp", dport=_DNS, asks_onion=True
    )
    yield from (replace(rule, do="return") for rule in _exempt(policy))
    yield from _onion(policy)


def _onion_refusals(policy: HostPolicy) -> Iterator[Rule]:
    """A name of .onion is asked of nobody but Tor, and its address reaches nobody else. A question
    by UDP that is not redirected is one of a flow that began with another name. libc appends a
    domain of resolv.conf's to a name that was not found, or has few dots (resolv.conf(5)), and Tor
    would ask for that at an exit; so it is refused."""
    for protocol, do in _NO_NAMES:
        why = f"P2 names of .onion to anyone but Tor, {protocol}"
        yield Rule(why, do, protocol=protocol, dport=_DNS, asks_onion=True)
        why = f"P2 names of .onion in a domain to search, {protocol}"
        yield Rule(why, do, protocol=protocol, dport=_DNS, searches_onion=True)
    yield _LOOPBACK
    yield from _ipv6_refused(policy)
    yield from _exempt(policy)
    yield from _stray_onion(policy)


def _redirected() -> Iterator[Rule]:
    for version, tor in (("ipv4", _TOR4), ("ipv6", _TOR6)):
        yield Rule(f"P1 P2 what was redirected, {version}", "accept", to=tor, translated=True)


def _answers(services: tuple[int, ...] = ()) -> Iterator[Rule]:
    """By TCP only: what filter_in lets begin from outside is known to be no flow of ours.

    The connections of ``services`` may be older than conntrack's knowledge of them, and then
    began, for it, with whoever spoke first.
    """
    yield Rule("P5 answers to who connects to this machine", "accept", protocol="tcp", reply=True)
    if services:
        yield Rule("P5 services go on", "accept", protocol="tcp", sport=services, not_opening=True)


def _other_resolvers() -> Iterator[Rule]:
    """Flows from before the rules, which are not redirected, and those that other rules redirect;
    LAN or not. By TCP, to the DNSPort: it has none."""
    refusals = (
        Rule("P2 DNS to anyone but Tor, tcp", "reset", protocol="tcp"),
        Rule("P2 DNS to anyone but Tor, udp", "refuse", protocol="udp"),
    )
    for rule in refusals:
        yield replace(rule, dport=_DNS)
        why = f"{rule.why}, translated"
        yield replace(rule, why=why, original_dport=53, reply=False)
    yield Rule("P2 DNS over TLS", "reset", protocol="tcp", dport=_DOT)


def _stray_onion(policy: HostPolicy) -> Iterator[Rule]:
    for version, automap in (("ipv4", policy.automap4), ("ipv6", policy.automap6)):
        yield Rule(f"P3 .onion by other ways, {version}", "refuse", to=(automap,))


def _lan() -> Iterator[Rule]:
    for version, networks in (("ipv4", LAN4), ("ipv6", LAN6)):
        yield Rule(f"P3 the LAN, directly, {version}", "accept", to=networks)


def _neighbours() -> Iterator[Rule]:
    """Without these the machine has no address, and Tor no network. AF_PACKET, which DHCP clients
    use before they have one, passes no chain; a lease is renewed by UDP, from ports that only
    the privileged can have. Types: router and neighbour discovery (RFC 4861), MLDv2 (RFC 9777)."""
    for why, sport, dport in (("DHCP", 68, 67), ("DHCPv6", 546, 547)):
        yield Rule(
            f"P4 the address of this machine, {why}",
            "accept",
            protocol="udp",
            sport=(sport,),
            dport=(dport,),
        )
    yield Rule("P4 neighbours, IPv6", "accept", protocol="icmpv6", icmpv6=(133, 135, 136, 143))


def _refuse_all() -> Iterator[Rule]:
    yield Rule("P3 other TCP is refused", "reset", protocol="tcp")
    yield Rule("P3 all else is refused", "refuse")


def _ipv6_refused(policy: HostPolicy) -> Iterator[Rule]:
    if not policy.ipv6:
        yield Rule("P3 TCP by IPv6 is refused", "reset", ipv6_only=True, protocol="tcp")
        yield Rule("P3 IPv6 is refused", "refuse", ipv6_only=True)


# ---- other machines' packets -------------------------------------------------------------------


def _forged(policy: HostPolicy) -> Rule:
    """Whoever is answered, by Tor, a service or a refusal, would be so past Tor: somebody behind
    this machine could have its address sent to a site of his choice (RFC 3704, 2.2)."""
    return Rule("P3 forged sources", "drop", iif=policy.gateway_for, no_way_back=True)


def _arriving(policy: HostPolicy) -> Iterator[Rule]:
    """DNS even if this machine itself was asked: it is the resolver of its LAN."""
    mine = policy.gateway_for
    dns = Rule("P2 DNS of the LAN goes to Tor", policy.dns_port, protocol="udp", dport=_DNS)
    here = Rule("P5 connections to this machine", "return", to_this_machine=True)
    for rule in (dns, here, *_to_tor(policy)):
        yield from _at_listeners(policy, replace(rule, iif=mine))


def _at_listeners(policy: HostPolicy, rule: Rule) -> Iterator[Rule]:
    """What is redirected, once for each version of IP; the rest as it is."""
    if not isinstance(rule.do, int):
        yield rule
        return
    for at in policy.listeners:
        version = 6 if ":" in at else 4
        if rule.version in (None, version):
            why = rule.why if rule.version else f"{rule.why}, ipv{version}"
            yield replace(rule, why=why, at=at)


def _not_forwarded(policy: HostPolicy) -> Iterator[Rule]:
    """Refused before routing: a machine that forwards nothing would drop it, and say nothing; one
    that does would lead who is on one link with its own router to that (ICMP redirect)."""
    rules = (*_from_lan_to_lan(policy), *_refuse_all())
    yield from (replace(rule, iif=policy.gateway_for, to_others=True) for rule in rules)


def _to_the_lan(policy: HostPolicy) -> Iterator[Rule]:
    """What its gateway sends on its own behalf: Tor's answers, refusals, and addresses."""
    mine = policy.gateway_for
    dns = (policy.dns_port,)
    yield Rule(
        "P2 Tor's answers to the LAN",
        "accept",
        oif=mine,
        protocol="udp",
        sport=dns,
        reply=True,
        translated=True,
    )
    yield Rule("P3 refusals to the LAN", "accept", oif=mine, states=("related",))
    for why, sport, dport in (("DHCP", 67, 68), ("DHCPv6", 547, 546)):
        yield Rule(
            f"P4 addresses of the LAN, {why}",
            "accept",
            oif=mine,
            protocol="udp",
            sport=(sport,),
            dport=(dport,),
        )
    yield Rule(
        "P4 addresses of the LAN, IPv6", "accept", oif=mine, protocol="icmpv6", icmpv6=(134,)
    )


def _forwarded(policy: HostPolicy) -> Iterator[Rule]:
    """Containers' and virtual machines' packets, too: never silently past Tor."""
    rules = [*_other_resolvers(), *_stray_onion(policy)]
    if not policy.ipv6:  # in silence, as no answer by IPv6 would leave either
        rules.append(Rule("P3 IPv6 is not forwarded", "drop", ipv6_only=True))
    rules += [*_from_lan_to_lan(policy), *_refuse_all()]
    mine = () if policy.own == "all" else policy.gateway_for
    yield from (replace(rule, iif=mine) for rule in rules)


def _from_lan_to_lan(policy: HostPolicy) -> Iterator[Rule]:
    """A packet with a source route (RFC 791) is, until it has passed the rules, to this machine."""
    if policy.lan:
        for version, networks in (("ipv4", LAN4), ("ipv6", LAN6)):
            why = f"P3 from LAN to LAN, directly, {version}"
            yield Rule(why, "accept", source=networks, to=networks, to_others=True)


def _incoming(policy: HostPolicy) -> Iterator[Rule]:
    """What begins from outside may be answered; so nothing may seem to that did not.

    conntrack takes the first packet it sees for the beginning, and it may see nothing before there
    are rules: an answer to us, too, on a connection that was open then (tcp_loose).
    """
    listeners = (
        Rule("P5 only what was redirected reaches Tor, tcp", "reset", protocol="tcp"),
        Rule("P5 only what was redirected reaches Tor, udp", "refuse", protocol="udp"),
    )
    if policy.gateway_for:
        for rule, port in zip(listeners, (policy.trans_port, policy.dns_port), strict=True):
            yield replace(rule, not_iif="lo", dport=(port,), translated=False)
    if policy.gateway_for and policy.own != "all":
        yield from (replace(rule, iif=policy.gateway_for) for rule in _resolvers_here())
    if policy.tor_cgroup:
        yield from _to_nobody_else(policy)
    if policy.own == "all":
        yield replace(_from_before(), not_dport=policy.services)


def _resolvers_here() -> Iterator[Rule]:
    """One of this machine's, as libvirt's dnsmasq, would ask in clear for the LAN: by TCP, for a
    flow older than the rules, and while nothing is redirected any more."""
    for protocol, do in _NO_NAMES:
        why = f"P2 DNS of the LAN to anyone but Tor, {protocol}"
        yield Rule(why, do, protocol=protocol, dport=_DNS)
    yield Rule("P2 DNS of the LAN over TLS", "reset", protocol="tcp", dport=_DOT)


def _to_nobody_else(policy: HostPolicy) -> Iterator[Rule]:
    """Any user may bind Tor's UDP port beside it, as Tor sets SO_REUSEADDR (socket(7)), and would
    then be asked in its place; and its TCP port while there is no Tor."""
    for version, address in (("ipv4", _TOR4), ("ipv6", _TOR6)):
        at = (*address, *(one for one in policy.listeners if (":" in one) == (version == "ipv6")))
        tcp = Rule("P1 nobody else is at Tor's port", "reset", protocol="tcp")
        udp = Rule("P2 nobody else is at Tor's port", "refuse", protocol="udp")
        for rule, port in ((tcp, policy.trans_port), (udp, policy.dns_port)):
            yield replace(
                rule,
                why=f"{rule.why}, {version}",
                to=at,
                dport=(port,),
                not_cgroup=policy.tor_cgroup,
            )


def _from_before() -> Rule:
    """Else it would be answered: by a reset, if nobody knows of the connection."""
    return Rule(
        "P1 answers to connections from before",
        "drop",
        not_iif="lo",
        protocol="tcp",
        states=("new",),
        not_opening=True,
    )
