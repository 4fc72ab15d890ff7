"""What our netlink messages make is what ip(8) and nft(8) make of the same lines.

ours ─eth0══w2─ its gateway          theirs ─eth0══w2─ its gateway
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from nsrun import netlink, ruleset
from nsrun.address import BLOCKS
from nsrun.apply import Machine
from nsrun.doctor.trials import read_back
from nsrun.errors import NsrunError, VerifyError
from nsrun.gateway.workloads import Workloads, gone_links, link_monitor
from nsrun.plan import LINK_MAC, Workload, option_steps, workload_steps
from nsrun.spec import RunSpec
from nsrun.steps import AwaitLink, DropElements, Ip, LoadRules, MakeNamespace, SetElements
from town import eventually

pytestmark = pytest.mark.root

BLOCK = BLOCKS[0]
MAC = f"address {LINK_MAC}"
TABLE = ruleset.render(ruleset.gateway_policy(BLOCK, 0), ruleset.FromInterface("w", "uplink"))
LINES = {
    "workload": (
        "link set lo up",
        "route add local 192.0.2.0/24 dev lo table main",
        f"link add eth1 {MAC} type veth peer name away {MAC} netns @gateway",
        "link set eth1 up",
        "address add 198.51.100.1/24 dev eth1",
        "address add 2001:db8::1/64 dev eth1 nodad",
        "route add 203.0.113.0/24 via 198.51.100.2",
    ),
}


class Pair:
    """A gateway and a workload, as namespaces; links are laid between them by lines."""

    def __init__(self) -> None:
        self.machine = Machine()
        for name in ("gateway", "workload"):
            self.machine.do(MakeNamespace(name))

    def run(self, where: str, *command: str, text: str = "") -> str:
        done = self.machine.namespaces[where].call(
            subprocess.run,
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=10,
            pass_fds=[space.fd for space in self.machine.namespaces.values()],
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def by_programs(self, step: Ip | SetElements) -> None:
        if isinstance(step, SetElements):
            self.run(step.where, "nft", "-f", "-", text=step.text)
            return
        lines = "\n".join(step.commands)
        for name, space in self.machine.namespaces.items():
            lines = lines.replace(f"@{name}", f"/proc/self/fd/{space.fd}")
        self.run(step.where, "ip", "-batch", "-", text=lines)

    def state(self) -> dict[str, object]:
        """All that ip(8) and nft(8) tell of both, but for what differs by chance."""
        found: dict[str, object] = {}
        for where in self.machine.namespaces:
            for what in ("link", "address", "-4 rule", "-6 rule"):
                told = json.loads(self.run(where, "ip", "-details", "-json", *what.split()))
                for one in told:
                    one.pop("link_netnsid", None)
                found[f"{where} {what}"] = told
            for family in ("-4", "-6"):
                routes = self.run(where, "ip", family, "-d", "route", "show", "table", "all")
                found[f"{where} routes {family}"] = sorted(routes.splitlines())
            found[f"{where} rules"] = self.run(where, "nft", "list", "ruleset")
        return found

    def close(self) -> None:
        for space in self.machine.namespaces.values():
            space.close()


@pytest.fixture
def ours() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def theirs() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_a_workload_is_the_same_as_by_ip_and_nft(ours: Pair, theirs: Pair) -> None:
    """Every line of the plan's: links, addresses, routes, rules, elements; then a few more."""
    workload = Workload(BLOCK, 2)
    renewed = [
        ruleset.set_identity(workload.address4, "10.128.0.1", None),
        ruleset.set_identity(workload.address6, "fd74:7470:1:2::1", None),
        ruleset.set_identity(workload.address4, "10.128.0.2", "10.128.0.1"),
    ]
    steps = [
        LoadRules("gateway", TABLE),
        *workload_steps(workload)[1:],
        *option_steps(workload, RunSpec(("true",), isolate="destination", socks=True)),
        *option_steps(workload, RunSpec(("true",), isolate="connection")),
        *(SetElements("gateway", text, "") for text in renewed),
        *(Ip(where, lines) for where, lines in LINES.items()),
    ]
    for step in steps:
        ours.machine.do(step)
        if isinstance(step, (Ip, SetElements)):
            theirs.by_programs(step)
        else:
            theirs.machine.do(step)
    assert '"w2" . 10.64.0.2' in str(ours.state()["gateway rules"])
    with suppress(AssertionError):
        eventually(lambda: ours.state() == theirs.state(), "the kernel to notice that links are up")
    assert ours.state() == theirs.state()


def test_a_link_is_awaited(ours: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it passes packets; that its other end stays down, or that there is none, is told."""
    monkeypatch.setattr(netlink, "PATIENCE", 5)
    add = f"link add eth1 {MAC} type veth peer name away {MAC} netns @gateway"
    ours.machine.do(Ip("workload", (add, "link set eth1 up")))
    with pytest.raises(NsrunError, match="it does not come up"):
        ours.machine.do(AwaitLink("workload", "eth1"))
    with pytest.raises(NsrunError, match="No such device"):
        ours.machine.do(AwaitLink("workload", "eth2"))
    ours.machine.do(Ip("gateway", ("link set away up",)))
    monkeypatch.undo()
    for where, link in (("workload", "eth1"), ("gateway", "away")):
        ours.machine.do(AwaitLink(where, link))
        assert " state UP " in ours.run(where, "ip", "link", "show", link)


@pytest.mark.promise("P12")
def test_what_is_plugged_in_is_read_back_by_another_hand(ours: Pair) -> None:
    """As ``ttp doctor`` does; a link that answers ARP, or another address, is noticed."""
    workload, machine = Workload(BLOCK, 2), ours.machine
    for step in (LoadRules("gateway", TABLE), *workload_steps(workload)[1:]):
        machine.do(step)
    space = machine.namespaces["workload"]
    space.call(read_back, workload)
    for wrong, line in (
        ("flags", "link set eth0 arp on"),
        ("addresses", "address add 10.9.9.9/32 dev eth0"),
    ):
        ours.run("workload", "ip", *line.split())
        with pytest.raises(VerifyError, match=wrong):
            space.call(read_back, workload)


def test_a_refusal_names_the_line_and_the_kernels_reason(ours: Pair) -> None:
    """The lines before it were carried out; whoever applies the plan takes them back."""
    lines = ("link set lo up", "address add 10.64.0.9/32 dev lo", "address add 10.64.0.9/32 dev lo")
    with pytest.raises(NsrunError) as refused:
        ours.machine.do(Ip("workload", lines))
    assert refused.value.doing == "do: ip address add 10.64.0.9/32 dev lo"
    assert refused.value.cause == "ipv4: Address already assigned"


@pytest.mark.parametrize(
    "line",
    [
        "link set lo down",
        "link add eth0 mtu 1500 type dummy",
        "address add 10.0.0.1/32 dev lo scope link",
        "route replace 0.0.0.0/0 dev lo",
        "route add 0.0.0.0/0 dev lo metric 5",
        "rule add pref 1 fwmark 1 lookup local",
    ],
)
def test_a_word_that_is_not_known_is_not_sent(ours: Pair, line: str) -> None:
    """Half an instruction would be another one."""
    with pytest.raises(ValueError, match="not understood"):
        ours.machine.do(Ip("workload", (line,)))


def test_elements_are_changed_all_or_none(ours: Pair) -> None:
    """One transaction (nft(8)); a refusal is an error, but for what was gone already."""
    ours.machine.do(LoadRules("gateway", "table inet ttp {\n set s { type ipv4_addr; }\n}\n"))
    add, drop = (f"{verb} element inet ttp s {{ 10.64.0.2 }}\n" for verb in ("add", "delete"))
    with pytest.raises(NsrunError, match="nft -f -: No such file"):
        ours.machine.do(SetElements("gateway", add + add.replace(" s ", " other "), drop))
    assert "10.64.0.2" not in ours.run("gateway", "nft", "list", "ruleset")
    ours.machine.do(SetElements("gateway", add, drop))
    assert "10.64.0.2" in ours.run("gateway", "nft", "list", "ruleset")
    for _ in range(2):
        ours.machine.do(DropElements("gateway", drop))
    assert "10.64.0.2" not in ours.run("gateway", "nft", "list", "ruleset")


def test_the_end_of_a_link_is_heard_by_its_name(ours: Pair) -> None:
    """And only its end: links that come are no news to the supervisor."""
    with link_monitor(ours.machine.namespaces["gateway"]) as monitor:
        for step in workload_steps(Workload(BLOCK, 7))[1:4]:
            ours.machine.do(step)
        assert gone_links(monitor) == []
        ours.run("workload", "ip", "link", "del", "eth0")
        assert gone_links(monitor) == ["w7"]


def test_ends_of_more_links_than_can_be_told_are_looked_for(ours: Pair) -> None:
    """netlink(7): what a full socket loses it says so (ENOBUFS)."""
    gateway = ours.machine.namespaces["gateway"]
    ours.machine.do(LoadRules("gateway", TABLE))
    workloads = Workloads(gateway, Workload(BLOCK, 2))
    live, fd = asyncio.run(workloads.give(RunSpec(("true",)), os.getpid()))
    with link_monitor(gateway) as monitor:
        monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(10):
            ours.run("gateway", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
            ours.run("gateway", "ip", "link", "del", "one")
        assert gone_links(monitor) is None
        assert gone_links(monitor) == []
        assert workloads.missing() == []
        ours.run("gateway", "ip", "link", "del", live.workload.link)
        assert workloads.missing() == [live.workload.link]
        assert workloads.ended(live.workload.link) is live
        assert workloads.missing() == []
    os.close(fd)
