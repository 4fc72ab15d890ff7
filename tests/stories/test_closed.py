"""A gateway on its way up: the uplink is there, the full rules are not yet, and nothing passes.

    app ─eth0══w2─ gateway ─uplink══eth0─ world

So it is in the middle of every start, and whatever ends a start there leaves it so.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from nsrun.apply import Machine, apply
from nsrun.gateway.workloads import Workloads
from nsrun.plan import Facts, Workload, gateway_steps, workload_steps
from nsrun.spec import GatewaySpec
from nsrun.steps import LoadRules, MakeNamespace, SetElements, SetSysctl, StartUplink
from town import BLOCK, SITE4, SITE6, UPLINK4, WORLD4, Actor, Town, Uplink

pytestmark = pytest.mark.root

TOKEN = b"a closed gateway's own token"


@pytest.fixture
def closed(tmp_path: os.PathLike[str]) -> Iterator[Town]:
    """All steps up to the uplink; and a link, which no start would make so early."""
    facts = Facts(os.getpid(), 0, 0, (), True, "", "x86_64")
    spec = GatewaySpec("g", f"{tmp_path}/r/gateways/g", f"{tmp_path}/s/gateways/g")
    machine = Machine(starters={"uplink": lambda _: Uplink(machine)})
    steps = gateway_steps(spec, facts, BLOCK)
    uplink = next(i for i, step in enumerate(steps) if isinstance(step, StartUplink))
    with ExitStack() as stack:
        machine.do(MakeNamespace("world"))
        stack.callback(machine.namespaces["world"].close)
        stack.enter_context(apply(steps[: uplink + 1], machine.do))
        link = [s for s in workload_steps(Workload(BLOCK, 2)) if not isinstance(s, SetElements)]
        stack.enter_context(apply(link, machine.do))
        app, gateway, world = (
            Actor(name, machine.namespaces[name]) for name in ("workload", "gateway", "world")
        )
        workloads = Workloads(gateway.space, Workload(BLOCK, 3))
        yield Town(app, app, gateway, world, machine, workloads, stack)


def speak(actor: Actor) -> None:
    """UDP, ICMP and TCP."""
    for host, family in ((SITE4, socket.AF_INET), (SITE6, socket.AF_INET6)):
        with suppress(OSError):
            actor.send(host, 443, TOKEN).close()
        with suppress(OSError):
            actor.connect(host, 443, seconds=0.1).close()
        protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
        with suppress(OSError), actor.open(family, socket.SOCK_RAW, protocol) as icmp:
            icmp.sendto(b"\x80\0\0\0\0\1\0\1" + TOKEN, (host, 0))


def forward(town: Town) -> None:
    for key in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
        town.machine.do(SetSysctl("gateway", f"net.{key}", "1"))


@pytest.mark.promise("P4")
@pytest.mark.parametrize("sender", ["gateway", "app"])
def test_nothing_leaves_before_the_full_rules(closed: Town, sender: str) -> None:
    """Neither of the gateway's own, as Tor's would be, nor what somebody has it forward."""
    actor = closed.gateway if sender == "gateway" else closed.app
    forward(closed)
    with closed.world_hears() as frames:
        speak(actor)
    assert not frames
    closed.machine.do(LoadRules("gateway", "flush ruleset\n"))
    with closed.world_hears() as frames:  # control
        speak(actor)
    assert sum(TOKEN in frame for frame in frames) >= 4


@pytest.mark.promise("P4", "P5")
@pytest.mark.parametrize("sender", ["world", "app"])
def test_nothing_comes_in_before_the_full_rules(closed: Town, sender: str) -> None:
    """A service on all addresses of the gateway is heard by nobody."""
    actor = closed.world if sender == "world" else closed.app
    with closed.gateway.open(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("0.0.0.0", 9999))
        service.settimeout(0.3)
        actor.send(UPLINK4, 9999, TOKEN).close()
        with pytest.raises(TimeoutError):
            service.recv(100)
        closed.machine.do(LoadRules("gateway", "flush ruleset\n"))
        actor.send(UPLINK4, 9999, TOKEN).close()
        assert service.recv(100) == TOKEN


@pytest.mark.promise("P4")
def test_of_the_gateway_only_tors_user_may_connect(town: Town) -> None:
    """With the full rules: another user of the namespace, an uplink's helper say, may not."""
    connect = (
        "import socket\n"
        f"try: socket.create_connection(({WORLD4!r}, 9001), 1); print('connected')\n"
        "except OSError: print('lost')"
    )
    become = ("setpriv", "--clear-groups", "--regid=65534", "--reuid")
    with town.world.open(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((WORLD4, 9001))
        listener.listen()
        for user, said in (("65534", "lost"), ("0", "connected")):
            argv = (*become, user, "/usr/bin/python3", "-c", connect)
            with town.world_hears() as frames:
                assert town.gateway.run(*argv).strip() == said
            assert bool(frames) == (user == "0")
