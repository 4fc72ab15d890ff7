"""The fixture of the network stories; its actors are in town.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nsrun.apply import Machine, apply
from nsrun.gateway.workloads import Workloads
from nsrun.netns import Namespace
from nsrun.plan import Facts, Workload, gateway_steps
from nsrun.spec import GatewaySpec
from nsrun.steps import MakeNamespace
from town import BLOCK, Actor, TorStandIn, Town, Uplink


@pytest.fixture
def town(tmp_path: os.PathLike[str]) -> Iterator[Town]:
    facts = Facts(os.getpid(), 0, 0, (), True, "", "x86_64")
    spec = GatewaySpec("g", f"{tmp_path}/r/gateways/g", f"{tmp_path}/s/gateways/g")
    machine = Machine(
        starters={
            "uplink": lambda _: Uplink(machine),
            "tor": lambda _: TorStandIn(machine.namespaces["gateway"], heard),
        }
    )
    heard: list[tuple[str, str, int]] = []
    with ExitStack() as stack:
        machine.do(MakeNamespace("world"))
        stack.callback(machine.namespaces["world"].close)
        stack.enter_context(apply(gateway_steps(spec, facts, BLOCK), machine.do))
        gateway = Actor("gateway", machine.namespaces["gateway"])
        workloads = Workloads(gateway.space, Workload(BLOCK, 2))
        stack.callback(workloads.close)
        actors = []
        for name in ("app", "bob"):
            live, fd = asyncio.run(workloads.give(name, os.getpid(), ("true",), ipv6=True))
            space = Namespace(f"/proc/self/fd/{fd}")
            os.close(fd)
            stack.callback(space.close)
            actors.append(Actor(name, space, live))
        world = Actor("world", machine.namespaces["world"])
        app, bob = actors
        yield Town(app, bob, gateway, world, machine, workloads, heard)
