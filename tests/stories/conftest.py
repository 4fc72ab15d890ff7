"""The fixture of the network stories; its actors are in town.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nsrun.apply import Machine, apply
from nsrun.gateway.workloads import Workloads
from nsrun.plan import Facts, Workload, gateway_steps
from nsrun.spec import GatewaySpec, RunSpec
from nsrun.steps import MakeNamespace
from town import BLOCK, Actor, TorStandIn, Town, Uplink, arrive


@pytest.fixture
def town(tmp_path: os.PathLike[str]) -> Iterator[Town]:
    facts = Facts(os.getpid(), 0, 0, (), True, "", "x86_64")
    spec = GatewaySpec("g", f"{tmp_path}/r/gateways/g", f"{tmp_path}/s/gateways/g")
    heard: list[tuple[str, str, int]] = []
    ports: list[int] = []
    machine = Machine(
        starters={
            "uplink": lambda _: Uplink(machine),
            "tor": lambda _: TorStandIn(machine.namespaces["gateway"], heard, ports),
        }
    )
    with ExitStack() as stack:
        machine.do(MakeNamespace("world"))
        stack.callback(machine.namespaces["world"].close)
        stack.enter_context(apply(gateway_steps(spec, facts, BLOCK), machine.do))
        gateway = Actor("gateway", machine.namespaces["gateway"])
        workloads = Workloads(gateway.space, Workload(BLOCK, 2))
        stack.callback(workloads.close)
        app, bob = (arrive(workloads, stack, RunSpec(("true",), name=n)) for n in ("app", "bob"))
        world = Actor("world", machine.namespaces["world"])
        yield Town(app, bob, gateway, world, machine, workloads, stack, heard, ports)
