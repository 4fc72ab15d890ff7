"""The rules for pf are sentences of its grammar; no kernel here could load them.

The grammars are the parts used of GRAMMAR in pf.conf(5): of OpenBSD 4.7, where redirections are
options of a rule, and of 4.6, where they are rules of their own, before all others.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nsrun.errors import UsageError
from nsrun.host import export_pf
from nsrun.host.policy import HostPolicy

NUMBER, NAME, ADDRESS = r"\d+", r"[a-z]+\d*", r"[0-9a-f.:]+(?:/\d+)?"


def either(one: str) -> str:
    """One, or several in braces."""
    return rf"(?:{one}|\{{ {one}(?:, {one})* \}})"


HOST = rf"(?:any|self|<[a-z]+>|{ADDRESS})"
HOSTS = rf"(?:all|from {HOST}(?: port {NUMBER})? to {HOST}(?: port {NUMBER})?)"
WHERE = rf"(?: on {either(NAME)})?"
WHAT = rf"(?: inet6?)?(?: proto {either(NAME)})? {HOSTS}"
OPTION = rf"(?: (?:user|group) {either(NUMBER)}| icmp6-type {either(NUMBER)})"
ACTION = r"(?:pass|block)(?: in| out)?(?: quick)?"
TABLE = rf"table <[a-z]+> const {either(ADDRESS)}"
SET = "set block-policy return"
GRAMMARS = {
    False: [
        TABLE,
        SET,
        rf"{ACTION}{WHERE}{WHAT}(?:{OPTION}| route-to {NAME}| rdr-to {ADDRESS} port {NUMBER})*",
    ],
    True: [
        TABLE,
        SET,
        rf"rdr pass{WHERE}{WHAT} -> {ADDRESS} port {NUMBER}|no rdr{WHERE}{WHAT}",
        rf"{ACTION}{WHERE}(?: route-to {NAME})?{WHAT}{OPTION}*",
    ],
}
HERE = HostPolicy(tor_uid=107)
POLICIES = {
    "all": HERE,
    "bare": replace(HERE, lan=False, ipv6=False),
    "exempt": replace(HERE, allow_root=True, bypass_users=(5, 6), bypass_groups=(7,)),
    "users": replace(HERE, own="users", users=(5, 6)),
    "onion": replace(HERE, own="onion"),
    "middlebox": replace(HERE, own="none", gateway_for=("fxp0",)),
    "both": replace(HERE, gateway_for=("fxp0", "fxp1")),
}


def sections(text: str, *, rdr: bool) -> list[int]:
    """For each line which part of the grammar it is of. Fails where it is of none."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = []
    for line in lines:
        of = [n for n, rule in enumerate(GRAMMARS[rdr]) if re.fullmatch(rule, line)]
        assert of, f"not a sentence of pf.conf(5): {line}"
        found += of
    return found


@pytest.mark.parametrize("rdr", [False, True], ids=["rdr-to", "rdr"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_is_a_sentence_and_in_its_place(name: str, rdr: bool) -> None:
    """pfctl wants tables, options, redirections and filter in this order (require-order)."""
    found = sections(export_pf.rules(POLICIES[name], rdr=rdr), rdr=rdr)
    assert found == sorted(found)
    assert set(found) == set(range(len(GRAMMARS[rdr])))


@pytest.mark.parametrize(
    ("line", "rdr"),
    [
        ("pass in quick on lo1 inet proto tcp from any to any rdr-to 127.0.0.1 port 9041", True),
        ("pass out quick inet proto tcp from any to any route-to lo1", True),
        ("pass out quick route-to lo1 inet proto tcp from any to any", False),
        ("rdr pass on lo1 inet proto tcp from any to any -> 127.0.0.1 port 9041", False),
        ("pass out quick proto tcp user 107", False),
        ("pass out quick from any", False),
    ],
)
def test_the_grammars_are_not_too_lax(line: str, rdr: bool) -> None:
    """They refuse each other's words, and half a rule."""
    with pytest.raises(AssertionError, match="not a sentence"):
        sections(line, rdr=rdr)


def test_pf_knows_no_beginnings_of_names() -> None:
    with pytest.raises(UsageError, match="no name of an interface"):
        export_pf.rules(replace(HERE, gateway_for=("br-*",)), rdr=False)
