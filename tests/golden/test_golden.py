"""What is rendered is compared to files in this folder; review a change as a diff of those.

``make golden`` rewrites them. A golden cannot see meaning: tests/stories can.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest

from nsrun import ruleset, torrc
from nsrun.address import BLOCKS
from nsrun.host import export_firehol, export_iptables, export_pf, rules
from nsrun.host.policy import HostPolicy
from nsrun.plan import Facts, make_plan
from nsrun.ruleset import FromInterface
from nsrun.spec import Caller, GatewaySpec, LabUplink, RunSpec, Strict

Golden = Callable[[str, str], None]

POLICY = ruleset.gateway_policy(BLOCKS[0], tor_uid=107)
HOST = HostPolicy(tor_uid=107)
EXEMPT = replace(
    HOST,
    allow_root=True,
    bypass_users=(1001, 1002),
    bypass_groups=(2001,),
    services=(22, 443),
)
MIDDLEBOX = replace(HOST, own="none", gateway_for=("eth1", "br-*"))
RULESETS = {
    "gateway": ruleset.render(POLICY, FromInterface("w", "uplink")),
    "gateway-second-block": ruleset.render(
        ruleset.gateway_policy(BLOCKS[1], tor_uid=0), FromInterface("w", "uplink")
    ),
    "host": rules.render(HOST),
    "host-bare": rules.render(replace(HOST, lan=False, ipv6=False, services=())),
    "host-exempt": rules.render(EXEMPT),
    "host-users": rules.render(replace(HOST, own="users", users=(1000,))),
    "host-onion": rules.render(replace(HOST, own="onion")),
    "host-middlebox": rules.render(MIDDLEBOX),
    "host-both": rules.render(replace(MIDDLEBOX, own="all", gateway_for=("eth1",))),
    "host-lockdown": rules.render_lockdown(EXEMPT),
    "host-closed": rules.render_closed(),
    "closed": ruleset.render_closed(),
    # of the image; the names of its links are those that compose/ gives to Docker's networks
    "../../images/gateway/rules": ruleset.render(
        ruleset.gateway_policy(BLOCKS[0], tor_uid=61042), FromInterface("w", "uplink0")
    ),
}
EXPORTS = {
    "host.iptables": export_iptables.script(HOST),
    "host-both.iptables": export_iptables.script(replace(MIDDLEBOX, own="all")),
    "host.firehol": export_firehol.configuration(HOST),
    "host.pf": export_pf.rules(HOST, rdr=False),
    "host.pf-rdr": export_pf.rules(HOST, rdr=True),
    "host-both.pf": export_pf.rules(replace(HOST, gateway_for=("fxp0",)), rdr=False),
    "host-both.pf-rdr": export_pf.rules(replace(HOST, gateway_for=("fxp0",)), rdr=True),
}

FACTS = Facts(
    supervisor=4242,
    tor_uid=107,
    tor_gid=113,
    networks=("192.168.1.20/24",),
    ipv6=True,
    nsswitch="passwd: files\nhosts: files mdns4_minimal [NOTFOUND=return] dns\n",
    machine="x86_64",
)
ROOT = Caller(0, 0, (0,))
USER = Caller(1000, 1000, (27, 1000), "/tmp/bus", "/run/user/1000")
SUDO = replace(USER, bus="", switched=True)
GATEWAY = GatewaySpec("default", "/run/ttp/gateways/default", "/var/lib/ttp/gateways/default")
USERS = GatewaySpec(
    "default", "/run/user/1000/ttp/gateways/default", "/home/u/.local/state/ttp/gateways/default"
)
LAB = LabUplink(
    "/run/netns/router", "lan0", "192.168.77.50/24", "192.168.77.1", "fd00::50/64", "fd00::1"
)
PLAIN = RunSpec(("true",))
PLANS = {
    "root": make_plan(GATEWAY, FACTS, ROOT, nested=False, spec=PLAIN),
    "sudo": make_plan(GATEWAY, FACTS, SUDO, nested=False, spec=PLAIN),
    "rootless": make_plan(
        USERS, replace(FACTS, tor_uid=0, tor_gid=0), USER, nested=True, spec=PLAIN
    ),
    "guest": make_plan(GATEWAY, FACTS, USER, nested=False, spec=PLAIN, guest=4343),
    "strict": make_plan(
        USERS,
        replace(FACTS, tor_uid=0, tor_gid=0),
        USER,
        nested=True,
        spec=replace(PLAIN, strict=Strict(("/tmp/.X11-unix/X0",))),
    ),
    "strict-root": make_plan(
        GATEWAY, FACTS, ROOT, nested=False, spec=replace(PLAIN, strict=Strict())
    ),
    "lab": make_plan(
        replace(USERS, name="lab", uplinks=(LAB,), torrc="ExitNodes lab1\n"),
        replace(FACTS, tor_uid=0, tor_gid=0, networks=("10.66.0.1/16",)),
        USER,
        nested=True,
        spec=RunSpec(("true",), isolate="destination", socks=True, ipv6=False, pcap="f.pcap"),
    ),
}


@pytest.mark.parametrize("name", RULESETS)
def test_ruleset(name: str, golden: Golden) -> None:
    """The text of every ruleset is known, rule by rule."""
    golden(f"{name}.nft", RULESETS[name])


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, golden: Golden) -> None:
    """What is printed for other packet filters; tests/stories loads what Linux can load."""
    golden(name, EXPORTS[name])


@pytest.mark.parametrize("name", RULESETS)
def test_ruleset_is_accepted_and_comes_back(name: str) -> None:
    """The real nft takes every ruleset, over another one too, and lists what was sent (P12)."""
    text = RULESETS[name]
    first = ruleset.render_closed() if "delete table" in text else ""
    script = "nft -f - <<E\n" + first + text + "E\nnft list table inet ttp"
    command = ("unshare", "-rn", "sh", "-c", f"PATH=$PATH:/usr/sbin; {script}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert not done.stderr
    assert ruleset.outline(done.stdout) == ruleset.outline(text)


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str, golden: Golden) -> None:
    """Every step, in order, for each kind of caller."""
    plan = PLANS[name]
    lines = [
        "# gateway",
        *(step.describe() for step in plan.gateway),
        "# workload",
        *(step.describe() for step in plan.workload),
        "# enter",
        *(repr(op) for op in plan.enter),
    ]
    golden(f"{name}.plan", "\n".join(lines) + "\n")


def test_torrc_of_the_image(golden: Golden) -> None:
    """That of every gateway, but that Tor is alone in its container, and links have IPv4 only."""
    config = torrc.TorConfig(
        BLOCKS[0],
        data="/var/lib/tor",
        control="/run/tor/control",
        owner=None,
        ipv6=False,
        fragment="%include /etc/tor/torrc.d/*.conf",
        links6=False,
    )
    golden("../../images/gateway/torrc", torrc.render(config))
