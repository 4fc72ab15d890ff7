"""What the whole-host mode may be asked for, and what it never lets through; without a kernel."""

from __future__ import annotations

from typing import Any

import pytest

from nsrun.errors import NsrunError, UsageError
from nsrun.host.policy import AUTOMAPS, HostPolicy, choose_automap
from nsrun.host.rules import chains

WRONG: dict[str, dict[str, Any]] = {
    "are caught, but none": {"own": "users"},
    "neither this machine's traffic": {"own": "none"},
    "nobody can be exempt": {"own": "none", "gateway_for": ("x",), "bypass_groups": (5,)},
    "a user cannot be caught": {"own": "users", "users": (0, 5), "allow_root": True},
    "the LAN is left alone": {"own": "onion", "lan": False},
    "port 9041 cannot be": {"dns_port": 9041},
    "Tor runs as uid 107": {"bypass_users": (107,)},
    "'lo' is loopback": {"gateway_for": ("lo",)},
    "'l.' is loopback": {"gateway_for": ("x", "l*")},
    '"" accept\' is no name of an interface': {"gateway_for": ('eth0"" accept',)},
    "'-x' is no name of an interface": {"gateway_for": ("-x",)},
    "'[*]' is no name of an interface": {"gateway_for": ("*",)},
    "'a{16}' is no name of an interface": {"gateway_for": ("a" * 16,)},
    "is no name of a control group": {"bypass_cgroup": 'a" accept\n'},
    "' is no name of a control group": {"tor_cgroup": 'a" drop\n'},
}


@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_meant_is_refused(why: str) -> None:
    """Whatever becomes a word of a rule is a number, or checked."""
    with pytest.raises(UsageError, match=why):
        HostPolicy(tor_uid=107, **WRONG[why])


def test_names_of_onion_services_clash_with_no_host_of_the_lan() -> None:
    """The documented range, unless the machine is in it."""
    assert choose_automap(("192.168.1.2/24", "fd00::1/64")) == AUTOMAPS[0] == "10.192.0.0/10"
    assert choose_automap(("10.200.0.5/16",)) == AUTOMAPS[1]
    assert choose_automap(("10.0.0.5/8", "100.100.1.1/32")) == AUTOMAPS[2]
    with pytest.raises(NsrunError, match="overlap"):
        choose_automap(("0.0.0.0/0",))


@pytest.mark.promise("P4")
@pytest.mark.parametrize("services", [(), (22,)])
def test_the_last_rules_refuse_everything(services: tuple[int, ...]) -> None:
    """What is not named does not leave, and is not forwarded, even if the rules had a hole."""
    for chain in chains(HostPolicy(107, services=services)):
        if chain.name in ("filter_out", "filter_forward"):
            assert chain.policy == "drop"
            assert chain.rules[-1].do == "refuse"
            accepted = [rule for rule in chain.rules if rule.do == "accept"]
            assert all(
                rule.oif or rule.users or rule.source or rule.to or rule.protocol
                for rule in accepted
            )
