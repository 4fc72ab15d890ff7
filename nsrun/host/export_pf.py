"""The rules of the whole host for pf(4): OpenBSD from 4.7 to 6.8, and, with rdr rules, older ones
and FreeBSD. Pure.

pf redirects only what arrives. So what this machine sends is routed to a second loopback interface,
lo1, and redirected as it arrives there; this is the way of Tor's wiki (TransparentProxy, BSD).
Source: pf.conf(5) of OpenBSD 4.6 and 4.7, GRAMMAR.
"""

from __future__ import annotations

from collections.abc import Iterator

from nsrun.errors import UsageError
from nsrun.host.export_torrc import heading
from nsrun.host.policy import DOH4, DOH6, LAN4, LAN6, HostPolicy
from nsrun.ruleset import PRIVATE4, PRIVATE6

_HEAD = """# Load these rules as root:
#   ifconfig lo1 create; ifconfig lo1 inet 127.0.0.2/32 up
#   pfctl -f FILE && pfctl -F states      (connections from before would go on)
# pf finds the user of TCP and UDP, of nothing else. These rules were never loaded by their authors.
"""
_FAMILIES = (("inet", "127.0.0.1"), ("inet6", "::1"))
_DNS = "proto udp from any to any port 53"
_SELF = "from any to self"


def rules(policy: HostPolicy, *, rdr: bool) -> str:
    """A pf.conf; with ``rdr`` in the words from before OpenBSD 4.7. Raises UsageError."""
    for name in policy.gateway_for:
        if name.endswith("*"):
            cause, hint = f"{name!r} is no name of an interface", "name a group of interfaces"
            raise UsageError("print rules for pf", cause, hint)
    to_lo1 = "route-to lo1 {family} {what}" if rdr else "{family} {what} route-to lo1"
    body = [
        *_tables(policy),
        "set block-policy return",
        *_translations(policy, rdr=rdr),
        "block all" if policy.own == "all" else "pass all",
        *_lets_in(policy, rdr=rdr),
        *(() if policy.own == "none" else _sends(policy, to_lo1)),
    ]
    return heading(policy, redirecting_to_loopback=True) + _HEAD + "\n".join([*body, ""])


def _tables(policy: HostPolicy) -> Iterator[str]:
    for name, networks in (
        ("onion", (policy.automap4, policy.automap6)),
        ("lan", (*LAN4, *LAN6)),
        ("private", (*PRIVATE4, *PRIVATE6)),
        ("doh", (*DOH4, *DOH6)),
    ):
        yield f"table <{name}> const {{ {', '.join(networks)} }}"


# ---- what arrives --------------------------------------------------------------------------------


def _arriving(policy: HostPolicy) -> Iterator[tuple[str, str, int | None]]:
    """Where, what, and to which port of Tor it is redirected; None: it is not. The first counts."""
    if policy.own != "none":
        yield "lo0", _DNS, policy.dns_port
        yield "lo1", _DNS, policy.dns_port
        yield "lo1", "proto tcp from any to any", policy.trans_port
    for on in policy.gateway_for:
        yield on, _DNS, policy.dns_port
        yield on, _SELF, None
        yield on, "proto tcp from any to <onion>", policy.trans_port
        yield on, "proto tcp from any to any port 853", None
        yield on, "proto tcp from any to <doh> port 443", None
        yield on, "from any to <private>", None
        yield on, "proto tcp from any to any", policy.trans_port


def _translations(policy: HostPolicy, *, rdr: bool) -> Iterator[str]:
    for on, what, port in _arriving(policy) if rdr else ():
        for family, tor in _families(policy):
            if port is None:
                yield f"no rdr on {on} {family} {what}"
            else:
                yield f"rdr pass on {on} {family} {what} -> {tor} port {port}"


def _lets_in(policy: HostPolicy, *, rdr: bool) -> Iterator[str]:
    for on, what, port in _arriving(policy) if not rdr else ():
        for family, tor in _families(policy):
            if port is not None:
                yield f"pass in quick on {on} {family} {what} rdr-to {tor} port {port}"
            else:
                yield f"{'pass' if what == _SELF else 'block'} in quick on {on} {family} {what}"
    for on in policy.gateway_for:
        yield f"pass in quick on {on} {_SELF}"
        yield f"block in quick on {on} all"
    if policy.own == "all":
        yield f"pass in quick proto tcp {_SELF}"
        if policy.lan:
            yield "pass in quick from <lan> to self"


# ---- what this machine sends ---------------------------------------------------------------------


def _sends(policy: HostPolicy, to_lo1: str) -> Iterator[str]:
    who = f" user {_any(policy.users)}" if policy.users else ""
    both = "proto { tcp, udp } from any to"

    def routed(what: str) -> Iterator[str]:
        for family, _ in _families(policy):
            yield "pass out quick " + to_lo1.format(family=family, what=what + who)

    yield "pass quick on { lo0, lo1 } all"
    if not policy.ipv6:
        yield "block quick inet6 all"
    yield from _exempt(policy)
    yield from routed(_DNS)
    yield from routed("proto tcp from any to <onion>")
    yield f"block out quick {both} <onion>{who}"
    yield f"block out quick proto tcp from any to any port 853{who}"
    if policy.own == "onion":
        yield "block out quick proto tcp from any to any port 53"
        return
    yield f"block out quick proto tcp from any to <lan> port 53{who}"
    yield f"block out quick proto tcp from any to <doh> port 443{who}"
    if policy.own == "all":
        yield "pass out quick inet proto udp from any port 68 to any port 67"
        yield "pass out quick inet6 proto udp from any port 546 to any port 547"
        yield "pass quick inet6 proto icmp6 all icmp6-type { 133, 134, 135, 136 }"
    if policy.lan:
        yield f"pass out quick {both if who else 'from any to'} <lan>{who}"
    yield f"block out quick {both} <private>{who}"
    yield from routed("proto tcp from any to any")
    if policy.users:
        yield f"block out quick {both} any{who}"


def _exempt(policy: HostPolicy) -> Iterator[str]:
    both = "proto { tcp, udp } from any to any"
    yield f"pass out quick proto tcp from any to any user {policy.tor_uid}"
    if users := (*((0,) if policy.allow_root else ()), *policy.bypass_users):
        yield f"pass out quick {both} user {_any(users)}"
    if policy.bypass_groups:
        yield f"pass out quick {both} group {_any(policy.bypass_groups)}"


def _families(policy: HostPolicy) -> tuple[tuple[str, str], ...]:
    return _FAMILIES if policy.ipv6 else _FAMILIES[:1]


def _any(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else f"{{ {', '.join(map(str, values))} }}"
