"""Addresses, names, torrc fragments and what a plan must be, without any effect."""

from __future__ import annotations

import pytest

from nsrun import ruleset
from nsrun.address import BLOCKS, choose_block
from nsrun.errors import NsrunError, UsageError
from nsrun.plan import Facts, Workload, gateway_steps, hosts_by_dns, workload_steps
from nsrun.spec import GatewaySpec, RunSpec
from nsrun.steps import LoadRules, SetElements, StartTor, StartUplink, WriteFile
from nsrun.torrc import REFUSED, check_fragment

FACTS = Facts(1, 107, 113, ("192.168.1.2/24",), True, "", "x86_64")
SPEC = GatewaySpec("g", "/run/ttp/gateways/g", "/var/lib/ttp/gateways/g")


@pytest.mark.parametrize(
    ("networks", "block"),
    [
        ((), 0),
        (("192.168.1.2/24", "2001:db8::2/64"), 0),
        (("10.0.0.5/8",), 1),
        (("10.128.0.3/20",), 1),
        (("10.63.0.1/16",), 0),
        (("100.100.1.1/32",), 0),
    ],
)
def test_a_block_overlaps_no_network_of_the_host(networks: tuple[str, ...], block: int) -> None:
    """Tor must reach bridges and proxies on the host's own networks."""
    assert choose_block(networks) == BLOCKS[block]


def test_no_block_is_left() -> None:
    """Two clashes are an error that names both ranges."""
    with pytest.raises(NsrunError, match="overlap") as error:
        choose_block(("10.0.0.5/8", "100.64.0.1/10"))
    assert "100.64.0.0/10" in str(error.value)


@pytest.mark.promise("P7")
def test_an_identity_is_never_given_out_twice() -> None:
    """At the end of the range there is an error, not a second round."""
    block = BLOCKS[1]
    first, last = block.link(2), block.link(block.capacity)
    assert first != last
    with pytest.raises(NsrunError, match="are used"):
        block.link(block.capacity + 1)
    with pytest.raises(NsrunError, match="are used"):
        block.identity(block.capacity + 1)


def test_ranges_of_a_block_do_not_overlap() -> None:
    """A .onion address is no workload, and a renewed identity no link."""
    for block in BLOCKS:
        ranges = (block.links, block.identities, block.automap)
        assert not any(a.overlaps(b) for a in ranges for b in ranges if a is not b)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", ".x", "x" * 33, "a\n"])
def test_names_are_checked(name: str) -> None:
    """A name becomes part of a path: nothing else fits."""
    with pytest.raises(UsageError):
        RunSpec(("true",), gateway=name)
    with pytest.raises(UsageError):
        RunSpec(("true",), name=name)


def test_run_needs_a_command() -> None:
    """Without one there is a hint how to give it."""
    with pytest.raises(UsageError, match="no command"):
        RunSpec(())


def test_a_capture_cannot_go_where_the_commands_output_goes() -> None:
    """What tcpdump calls - would be mixed with it."""
    with pytest.raises(UsageError, match="standard output is the command's"):
        RunSpec(("true",), pcap="-")


@pytest.mark.parametrize("option", REFUSED)
def test_a_fragment_may_not_set(option: str) -> None:
    """In any case, with a prefix, or shortened as Tor would still take it."""
    for word in (option, option.upper(), f"+{option}", f"/{option}", option[:-1]):
        with pytest.raises(UsageError, match="line 2"):
            check_fragment(f"ExitNodes {{de}}\n  {word} 1\n", "file")


def test_a_fragment_may_set_what_breaks_nothing() -> None:
    """Comments, continued lines and the options that people want."""
    text = "# SocksPort 9050\nExitNodes {de}, \\\n SocksPort\nUseBridges 1\nBridge 192.0.2.1:443\n"
    assert check_fragment(text, "file") == text


@pytest.mark.promise("P4")
def test_nothing_is_open_before_it_is_closed() -> None:
    """Drop rules come before any link, the full rules before Tor; a link speaks last of all."""
    steps = gateway_steps(SPEC, FACTS, BLOCKS[0])
    kinds = [type(step) for step in steps]
    rules = [index for index, kind in enumerate(kinds) if kind is LoadRules]
    assert rules[0] < kinds.index(StartUplink) < rules[1] < kinds.index(StartTor)
    closed, full = (steps[index] for index in rules)
    assert isinstance(closed, LoadRules)
    assert closed.text == ruleset.render_closed()
    assert isinstance(full, LoadRules)
    assert "sources4" in full.text
    assert isinstance(workload_steps(Workload(BLOCKS[0], 2))[-1], SetElements)


def test_every_undo_is_the_end_of_its_chain() -> None:
    """An undo step undoes; it has none of its own but rules, which are their own inverse."""
    for step in (
        *gateway_steps(SPEC, FACTS, BLOCKS[0]),
        *workload_steps(Workload(BLOCKS[0], 2)),
    ):
        inverse = step.undo()
        assert inverse is None or inverse.undo() is None


def test_torrc_is_written_before_tor_starts() -> None:
    """Tor reads the file that the plan wrote."""
    steps = gateway_steps(SPEC, FACTS, BLOCKS[0])
    written = [step.path for step in steps if isinstance(step, WriteFile)]
    assert [step.torrc for step in steps if isinstance(step, StartTor)] == written


def test_names_are_looked_up_by_dns_only() -> None:
    """mdns, resolve and myhostname ask other programs."""
    text = "passwd: files systemd\nhosts: files mdns4_minimal [NOTFOUND=return] resolve dns\n"
    assert hosts_by_dns(text) == "passwd: files systemd\nhosts: files dns\n"
    assert hosts_by_dns("") == "hosts: files dns\n"
