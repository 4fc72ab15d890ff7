"""A packet filter's rule as a value, whatever filter is to run it, and its form for nft. Pure.

The rules of the whole host are made once (nsrun.host.rules) and written down for several packet
filters: what a rule means must not depend on which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nsrun import ruleset

Verdict = Literal["accept", "return", "drop", "reset", "refuse"]
"""``reset`` (TCP) and ``refuse`` (ICMP, administratively prohibited) tell the sender at once."""


@dataclass(frozen=True)
class Rule:
    """``do`` it to what fits everything that is given; within one tuple, any. Empty fits all.

    ``do`` is a verdict, or the number of the port to redirect to: at the address ``at`` of this
    machine, or at loopback's for packets of its own. Families: both, if no address decides.
    """

    why: str
    do: Verdict | int
    at: str = ""
    iif: tuple[str, ...] = ()
    not_iif: str = ""
    oif: tuple[str, ...] = ()
    ipv6_only: bool = False
    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    cgroup: str = ""  # below the root of the unified hierarchy, one level deep
    not_cgroup: str = ""  # of the socket that is reached, in the input hook
    owned: bool = False  # by any socket that a process still has open
    source: tuple[str, ...] = ()
    no_way_back: bool = False  # what is sent to its source leaves elsewhere than where it came from
    to: tuple[str, ...] = ()
    to_this_machine: bool = False
    to_others: bool = False  # to be forwarded, if this machine does that: not by broadcast
    protocol: Literal["", "tcp", "udp", "icmpv6"] = ""
    icmpv6: tuple[int, ...] = ()  # types, from a neighbour only: with a hop limit of 255 or 1
    sport: tuple[int, ...] = ()
    dport: tuple[int, ...] = ()
    not_dport: tuple[int, ...] = ()
    original_dport: int = 0  # before anybody's address translation
    translated: bool | None = None  # by anybody's DNAT or redirection
    reply: bool | None = None  # by whom the connection was not begun
    states: tuple[Literal["new", "related", "invalid"], ...] = ()  # of its connection
    not_opening: bool = False  # TCP, and not the first packet of a connection
    asks_onion: bool = False  # DNS, by ``protocol``: the name that is asked for ends in .onion
    searches_onion: bool = False  # the same, but a domain is behind the name of a service

    @property
    def version(self) -> Literal[4, 6] | None:
        """The only version of IP that it can fit, if there is one."""
        if self.ipv6_only or self.protocol == "icmpv6":
            return 6
        networks = self.to or self.source or ((self.at,) if self.at else ())
        if not networks:
            return None
        return 6 if ":" in networks[0] else 4


@dataclass(frozen=True)
class Chain:
    """Rules for what passes ``hook``, in their order; ``policy`` for what none of them decides."""

    name: str
    kind: Literal["raw", "nat", "filter"]
    hook: Literal["prerouting", "input", "forward", "output"]
    rules: tuple[Rule, ...]
    policy: Literal["accept", "drop"] = "accept"


# Before those of Docker and other tools, which are at -100: the first that translates, wins.
_PRIORITIES = {"raw": -300, "nat": -150, "filter": 0}


# A question of DNS stands behind a header of 12 bytes, and by TCP behind the length of the message;
# a name has up to 255 bytes (RFC 1035, 3.1, 4.1, 4.2.2), of which .onion has the last.
_ONION, _ANY_CASE = b"\5ONION", b"\xff" + b"\xdf" * 5
_HEADER, _NAME = 12, 255
_PLACES = range(_HEADER, 2 + _HEADER + _NAME - len(_ONION))
# A service's own label has 56 characters (rend-spec-v3, "Encoding onion addresses"). Before it are
# at most as many bytes here, as a transaction has not room for all; names that long are rare.
_SERVICE, _BEFORE = 56, 64
_SERVICES = range(_HEADER, 2 + _HEADER + _BEFORE + 1)


def nft(chains: Iterable[Chain], table: str) -> str:
    """One transaction, that puts these chains in the place of whatever the table was."""
    chains = tuple(chains)
    body = "".join(map(_names, chains)) + "".join(
        ruleset.chain(
            chain.name,
            "nat" if chain.kind == "nat" else "filter",
            f"{chain.hook} priority {_PRIORITIES[chain.kind]}",
            chain.policy,
            (ruleset.rule(rule.why, " ".join(_all_words(chain, rule))) for rule in chain.rules),
        )
        for chain in chains
    )
    return ruleset.replacing(table, body)


def _all_words(chain: Chain, rule: Rule) -> Iterator[str]:
    yield from _words(rule)
    if rule.asks_onion:
        yield f"jump {chain.name}_names"
    elif rule.searches_onion:
        yield f"jump {chain.name}_searches"
    else:
        yield _verdict(rule)


def _names(chain: Chain) -> str:
    """Chains that only questions pass: nft compares at a fixed place, so at each there can be.

    What is done stands in another one, once for each protocol: who is not root of the first user
    namespace can send no more than 208 KiB to the kernel at once.
    """
    asking = [rule for rule in chain.rules if rule.asks_onion]
    searching = [rule for rule in chain.rules if rule.searches_onion]
    ends = (_at(place, _ONION + b"\0", _ANY_CASE + b"\xff") for place in _PLACES)
    services = (
        f"{_at(place, bytes([_SERVICE]))} {_at(place + 1 + _SERVICE, _ONION, _ANY_CASE)}"
        for place in _SERVICES
    )
    return _compared(f"{chain.name}_names", asking, ends) + _compared(
        f"{chain.name}_searches", searching, services
    )


def _compared(name: str, rules: list[Rule], matches: Iterable[str]) -> str:
    """A chain that does what ``rules`` say to what fits any of ``matches``."""
    if not rules:
        return ""
    found = "".join(f"  meta l4proto {rule.protocol} {_verdict(rule)}\n" for rule in rules)
    lines = "".join(f"  {match} goto {name}_found\n" for match in matches)
    return f" chain {name}_found {{\n{found} }}\n chain {name} {{\n{lines} }}\n"


def _at(place: int, wanted: bytes, mask: bytes = b"") -> str:
    """What the payload has at that byte, under ``mask`` if there is one."""
    masked = f" & 0x{mask.hex()} ==" if mask else ""
    return f"@ih,{8 * place},{8 * len(wanted)}{masked} 0x{wanted.hex()}"


def _words(rule: Rule) -> Iterator[str]:
    yield from _interfaces(rule)
    yield from _owner(rule)
    yield from _addresses(rule)
    yield from _transport(rule)
    yield from _connection(rule)


def _verdict(rule: Rule) -> str:
    match rule.do:
        case "reset":
            return "reject with tcp reset"
        case "refuse":
            return "reject with icmpx admin-prohibited"
        case int(port) if rule.at:
            at, ip = (f"[{rule.at}]", "ip6") if rule.version == 6 else (rule.at, "ip")
            return f"dnat {ip} to {at}:{port}"
        case int(port):
            return f"redirect to :{port}"
        case verdict:
            return verdict


def _interfaces(rule: Rule) -> Iterator[str]:
    if rule.iif:
        yield f"iifname {_any(_quoted(rule.iif))}"
    if rule.not_iif:
        yield f'iifname != "{rule.not_iif}"'
    if rule.oif:
        yield f"oifname {_any(_quoted(rule.oif))}"
    if rule.ipv6_only or (rule.at and not (rule.to or rule.source)):
        yield f"meta nfproto ipv{rule.version}"


def _owner(rule: Rule) -> Iterator[str]:
    if rule.users:
        yield f"meta skuid {_any(rule.users)}"
    if rule.groups:
        yield f"meta skgid {_any(rule.groups)}"
    if rule.cgroup:
        yield f'socket cgroupv2 level 1 "{rule.cgroup}"'
    if rule.not_cgroup:
        yield f'socket cgroupv2 level 1 != "{rule.not_cgroup}"'
    if rule.owned:
        yield "meta skuid 0-4294967294"  # without a user, no match on it fits


def _addresses(rule: Rule) -> Iterator[str]:
    ip = "ip6" if rule.version == 6 else "ip"
    if rule.source:
        yield f"{ip} saddr {_any(rule.source)}"
    if rule.to:
        yield f"{ip} daddr {_any(rule.to)}"
    if rule.no_way_back:
        yield "fib saddr . iif oif missing"
    if rule.to_this_machine:
        yield "fib daddr type local"
    if rule.to_others:
        yield "fib daddr type != { local, broadcast, multicast, anycast }"


def _transport(rule: Rule) -> Iterator[str]:
    if rule.icmpv6:
        yield f"icmpv6 type {_any(rule.icmpv6)} ip6 hoplimit {{ 1, 255 }}"
    if rule.protocol in ("tcp", "udp"):
        if not (rule.sport or rule.dport or rule.not_dport):
            yield f"meta l4proto {rule.protocol}"
        if rule.sport:
            yield f"{rule.protocol} sport {_any(rule.sport)}"
        if rule.dport:
            yield f"{rule.protocol} dport {_any(rule.dport)}"
        if rule.not_dport:
            yield f"{rule.protocol} dport != {_any(rule.not_dport)}"


def _connection(rule: Rule) -> Iterator[str]:
    if rule.original_dport:
        yield f"ct original proto-dst {rule.original_dport}"
    if rule.translated is not None:
        yield "ct status dnat" if rule.translated else "ct status ! dnat"
    if rule.reply is not None:
        yield f"ct direction {'reply' if rule.reply else 'original'}"
    if rule.states:
        yield f"ct state {','.join(rule.states)}"
    if rule.not_opening:
        yield "tcp flags & (fin | syn | rst | ack) != syn"


def _quoted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f'"{name}"' for name in names)


def _any(values: tuple[object, ...]) -> str:
    """One value, or a set of several."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{{ {', '.join(words)} }}"
