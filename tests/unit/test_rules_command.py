"""``ttp rules`` prints what its options mean, and changes nothing."""

from __future__ import annotations

import pytest

from nsrun.cli.commands import app
from nsrun.errors import UsageError
from nsrun.host import export_iptables, rules
from nsrun.host.policy import HostPolicy

MEANT = {
    "": HostPolicy(107),
    "--allow-root --no-lan-bypass --no-ipv6": HostPolicy(
        107, allow_root=True, lan=False, ipv6=False
    ),
    "--bypass-user 4,5 --bypass-user 6 --bypass-group 7": HostPolicy(
        107, bypass_users=(4, 5, 6), bypass_groups=(7,)
    ),
    "--only-user root": HostPolicy(107, own="users", users=(0,)),
    "--only-user 5": HostPolicy(107, own="users", users=(5,)),
    "--onion-only -t 9 -d 10": HostPolicy(107, own="onion", trans_port=9, dns_port=10),
    "--gateway-for eth1 --gateway-for br-*": HostPolicy(107, gateway_for=("eth1", "br-*")),
    "--gateway-for eth1 --gateway-only": HostPolicy(107, own="none", gateway_for=("eth1",)),
    "--service 80 --service 22": HostPolicy(107, services=(80, 22)),
}
WRONG = {
    "--gateway-only": "neither this machine's",
    "--only-user 5 --onion-only": "--only-user and --onion-only exclude",
    "--bypass-user root": "root is exempt by another option",
    "--bypass-group root": "root is exempt by another option",
    "--bypass-user no-such": "there is no user 'no-such'",
    "--bypass-group no-such": "there is no group 'no-such'",
    "--bypass-user 4294967295": "there is no user",
    "--bypass-user 5,": "there is no user ''",
    "--gateway-for lo": "is loopback",
}


@pytest.mark.parametrize("options", MEANT)
def test_options_are_what_the_rules_are_made_from(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["rules", "--tor-uid", "107", *options.split()], standalone_mode=False)
    assert capsys.readouterr().out.endswith(rules.render(MEANT[options]))
    app(
        ["rules", "--format", "iptables", "--tor-uid", "107", *options.split()],
        standalone_mode=False,
    )
    assert capsys.readouterr().out == export_iptables.script(MEANT[options])


@pytest.mark.parametrize("options", WRONG)
def test_what_cannot_be_meant_prints_nothing(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rules are better than others."""
    with pytest.raises(UsageError, match=WRONG[options]):
        app(["rules", "--tor-uid", "107", *options.split()], standalone_mode=False)
    assert not capsys.readouterr().out


def test_above_the_rules_stands_what_they_count_on(capsys: pytest.CaptureFixture[str]) -> None:
    """As comments, which no filter reads."""
    app(["rules", "--tor-uid", "107", "--gateway-for", "eth1"], standalone_mode=False)
    text = capsys.readouterr().out
    for line in ("TransPort [::1]:9041", "DNSPort 10.192.0.0:9054", "nameserver 127.0.0.1"):
        assert f"#   {line}\n" in text
    assert "ip address replace 10.192.0.0/32 dev lo" in text
