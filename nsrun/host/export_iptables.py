"""The rules of the whole host as a shell script for iptables, either backend. Pure.

One file for iptables-restore(8) per version of IP, so it is not one transaction; the filter table
comes first, so that what is not redirected yet is refused. Chains are our own and hooked in front
of others. What ours have nothing against is left to these (RETURN), as with nft: ACCEPT would
pass them by. See iptables-extensions(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from nsrun.host.export_torrc import heading
from nsrun.host.policy import HostPolicy
from nsrun.host.rule import Chain, Rule
from nsrun.host.rules import chains

PREFIX = "TTP_"
_REFUSED = {4: "icmp-admin-prohibited", 6: "icmp6-adm-prohibited"}
_HEAD = """# Load these rules: sh FILE. IPTABLES=iptables-legacy or =iptables-nft sets the backend.
# Loading them again replaces them. Another tool that puts its own rules in front of them later,
# as Docker does with FORWARD, can let packets pass by them: load them last.
set -eu
ipv4=${IPTABLES:-iptables}
ipv6=ip6${ipv4#ip}

hook() {
    "$@" 2>/dev/null || {
        command=$1 table=$3 chain=$5
        shift 5
        "$command" -t "$table" -I "$chain" "$@"
    }
}
"""


def script(policy: HostPolicy) -> str:
    """A script for sh(1), to be run as root."""
    ordered = loadable(policy)
    parts = ["#!/bin/sh\n", heading(policy), _HEAD]
    for version, command in ((6, '"$ipv6"'), (4, '"$ipv4"')):
        for kind in ("raw", "filter", "nat"):
            mine = [chain for chain in ordered if chain.kind == kind]
            if not mine:
                continue
            parts.append(f"\n{command}-restore --noflush <<'END'\n*{kind}\n")
            parts += [f":{PREFIX}{chain.name} - [0:0]\n" for chain in mine]
            for chain in mine:
                parts += [
                    f'-A {PREFIX}{chain.name} {words} -m comment --comment "{why}" {target}\n'
                    for words, why, target in lines(chain, version)
                ]
            parts.append("COMMIT\nEND\n")
            parts += [
                f"hook {command} -t {kind} -C {chain.hook.upper()} -j {PREFIX}{chain.name}\n"
                for chain in mine
            ]
    return "".join(parts)


def loadable(policy: HostPolicy) -> tuple[Chain, ...]:
    """REJECT does not stand before routing: there, packets that are not to be forwarded end."""
    every = chains(policy)
    return tuple(one for one in every if (one.kind, one.hook) != ("filter", "prerouting"))


def lines(chain: Chain, version: int) -> Iterator[tuple[str, str, str]]:
    """Of each rule for IP ``version``: what fits, why, and what is done; ``-A CHAIN`` left out."""
    for rule in chain.rules:
        # strings are compared whole, and of a searched name only the ends of its label are known
        if rule.version in (None, version) and not rule.searches_onion:
            for variant in product(*_variants(rule)):
                yield " ".join((*variant, *_words(rule))), rule.why, f"-j {_target(rule, version)}"
    if chain.policy == "drop":
        yield "", "P4 nothing by accident", "-j DROP"


def _variants(rule: Rule) -> Iterator[list[str]]:
    """What a rule of iptables has only one of: a rule for each."""
    if rule.protocol in ("tcp", "udp"):
        yield [f"-p {rule.protocol}"]
    several = (
        ("-i", [name.replace("*", "+") for name in rule.iif]),
        ("-o", [name.replace("*", "+") for name in rule.oif]),
        ("-m owner --uid-owner", rule.users),
        ("-m owner --gid-owner", rule.groups),
    )
    for option, values in several:
        if values:
            yield [f"{option} {value}" for value in values]
    for option, ports in (("--sports", rule.sport), ("--dports", rule.dport)):
        if ports:
            yield [f"-m multiport {option} {some}" for some in _listed(ports)]
    if rule.icmpv6:
        yield [
            f"-p icmpv6 --icmpv6-type {kind} -m hl --hl-eq {limit}"
            for kind, limit in product(rule.icmpv6, (1, 255))
        ]


def _words(rule: Rule) -> Iterator[str]:
    if rule.not_iif:
        yield f"! -i {rule.not_iif}"
    if rule.cgroup:
        yield f"-m cgroup --path {rule.cgroup}"
    if rule.owned:
        yield "-m owner --socket-exists"
    if rule.source:
        yield f"-s {','.join(rule.source)}"
    if rule.to:
        yield f"-d {','.join(rule.to)}"
    if rule.no_way_back:
        yield "-m rpfilter --invert"
    if rule.to_this_machine:
        yield "-m addrtype --dst-type LOCAL"
    if rule.to_others:
        yield "-m addrtype ! --dst-type LOCAL"
    for some in _listed(rule.not_dport):
        yield f"-m multiport ! --dports {some}"
    if rule.original_dport:
        yield f"-m conntrack --ctorigdstport {rule.original_dport}"
    if rule.translated is not None:
        yield f"-m conntrack {'' if rule.translated else '! '}--ctstate DNAT"
    if rule.reply is not None:
        yield f"-m conntrack --ctdir {'REPLY' if rule.reply else 'ORIGINAL'}"
    if rule.states:
        yield f"-m conntrack --ctstate {','.join(rule.states).upper()}"
    if rule.not_opening:
        yield "! --syn"
    if rule.asks_onion:
        yield '-m string --algo bm --icase --hex-string "|05|onion|00|"'


def _target(rule: Rule, version: int) -> str:
    match rule.do:
        case "accept" | "return":
            return "RETURN"
        case "drop":
            return "DROP"
        case "reset":
            return "REJECT --reject-with tcp-reset"
        case "refuse":
            return f"REJECT --reject-with {_REFUSED[version]}"
        case port if rule.at:
            at = f"[{rule.at}]" if version == 6 else rule.at
            return f"DNAT --to-destination {at}:{port}"
        case port:
            return f"REDIRECT --to-ports {port}"


def _listed(ports: tuple[int, ...]) -> list[str]:
    """As many as multiport takes at once."""
    return [",".join(map(str, ports[n : n + 15])) for n in range(0, len(ports), 15)]
