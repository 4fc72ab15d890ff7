"""The rules of the whole host as a firehol.conf. Pure.

FireHOL's own words (client, server) let established connections go on, whatever they are, so these
are rules of iptables, which its configuration may contain; it has no comments for them. They stand
in front of its own, which then let pass what ours have nothing against. See firehol-iptables(5).
"""

from __future__ import annotations

from collections.abc import Iterator

from nsrun.host.export_iptables import PREFIX, lines, loadable
from nsrun.host.export_torrc import heading
from nsrun.host.policy import HostPolicy

_HEAD = """version 6

# Like every firehol.conf, this replaces all rules of iptables that there are. Say below what may
# reach this machine, and what it forwards: what it sends is decided above.
"""
_TAIL = """
interface any world
\tpolicy accept
"""


def configuration(policy: HostPolicy) -> str:
    return "".join((heading(policy), _HEAD, *_rules(policy), _TAIL))


def _rules(policy: HostPolicy) -> Iterator[str]:
    for chain in loadable(policy):
        name = PREFIX + chain.name
        yield f"\niptables_both -t {chain.kind} -N {name}\n"
        for version, command in ((4, "iptables"), (6, "ip6tables")):
            before = ""
            for words, why, target in lines(chain, version):
                if why != before:
                    yield f"# {why}\n"
                yield " ".join(f"{command} -t {chain.kind} -A {name} {words} {target}".split())
                yield "\n"
                before = why
        yield f"iptables_both -t {chain.kind} -I {chain.hook.upper()} -j {name}\n"
