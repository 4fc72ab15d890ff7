"""What tells the hosts of a LAN of their gateway, on paper; in tests/machines servers read it."""

from __future__ import annotations

import json
import re
from ipaddress import ip_interface
from typing import Any

import pytest

from nsrun.errors import UsageError
from nsrun.host.export_lan import Lan, Server, configuration

FOUR: Any = ip_interface("192.168.1.1/24")
SIX: Any = ip_interface("fd00:1::1/64")
LAN = Lan("eth1", FOUR, SIX)


@pytest.mark.parametrize(
    ("server", "lines"),
    [
        ("dnsmasq", ("interface=eth1", "dhcp-option=tag:eth1,option:router,192.168.1.1")),
        ("dnsmasq", ("dhcp-range=set:eth1/6,fd00:1::,ra-only,64", "port=0")),
        ("dhcpd", ("  option domain-name-servers 192.168.1.1;",)),
        ("radvd", ("  prefix fd00:1::/64 { };", "  RDNSS fd00:1::1 { };")),
    ],
)
def test_this_machine_is_router_and_resolver(server: Server, lines: tuple[str, ...]) -> None:
    """Of each interface that it is the gateway for."""
    told = configuration([LAN, Lan("eth2.7", FOUR, SIX)], server).splitlines()
    assert set(lines) <= set(told)
    assert any("eth2.7" in line for line in told)


def test_no_lan_is_taken_for_another() -> None:
    """By dnsmasq, whose tags are made of the names of interfaces."""
    told = configuration([LAN, Lan("eth16", FOUR, SIX)], "dnsmasq")
    tags = re.findall("set:([^,]+)", told)
    assert len(tags) == len({*tags}) == 4
    assert {*re.findall("tag:([^,]+)", told)} == {*tags}


def test_the_lines_for_kea_are_json() -> None:
    told = json.loads(configuration([LAN], "kea").partition("\n")[2])
    (subnet,) = told["Dhcp4"]["subnet4"]
    assert subnet["pools"] == [{"pool": "192.168.1.128 - 192.168.1.254"}]


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ("192.168.1.1/24", ("192.168.1.128", "192.168.1.254")),
        ("192.168.1.254/24", ("192.168.1.1", "192.168.1.127")),
        ("10.0.0.1/29", ("10.0.0.4", "10.0.0.6")),
    ],
)
def test_its_own_address_is_not_given_to_others(own: str, given: tuple[str, str]) -> None:
    """The half of the network that it is not in."""
    four: Any = ip_interface(own)
    assert tuple(map(str, Lan("eth1", four).range)) == given


@pytest.mark.parametrize(
    ("lan", "server", "why"),
    [
        (Lan("eth1", None, SIX), "kea", "no address by IPv4"),
        (Lan("eth1", None, SIX), "dhcpd", "no address by IPv4"),
        (Lan("eth1", FOUR), "radvd", "no address by IPv6"),
        (Lan("eth1"), "dnsmasq", "it has no address"),
        (Lan("eth1", ip_interface("10.0.0.1/30")), "dnsmasq", "too small"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_told_is_said(lan: Lan, server: Server, why: str) -> None:
    """And nothing is printed that would be half of it."""
    with pytest.raises(UsageError, match=why):
        configuration([lan], server)
