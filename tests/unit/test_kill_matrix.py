"""Every step of every plan has a story in which somebody is killed at it (tests/kill_plans.py).

All plans there can be are built here; what they consist of, without numbers and names, is looked
for in the plans that ``make test`` walks through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any, get_args

import pytest

import nsrun.init
import nsrun.strict
from kill_plans import ASKING, BLOCK, ENTERING, GIVEN, NAME, STORIES
from nsrun import enter
from nsrun.plan import (
    Facts,
    Joined,
    Op,
    Workload,
    enter_ops,
    gateway_steps,
    loose_link_steps,
    option_steps,
    workload_steps,
)
from nsrun.spec import Caller, GatewaySpec, Isolation, LabUplink, RunSpec, Strict
from nsrun.steps import AttachNamespace, OpenNamespace, Step

FACTS = Facts(1, 102, 105, (), True, "hosts: files\n", "x86_64")
GATEWAY = GatewaySpec(NAME, f"/run/ttp/gateways/{NAME}", f"/var/lib/ttp/gateways/{NAME}")
ROOT = Caller(0, 0, (), own=("/run/ttp",))
SUDO = Caller(65534, 65534, (65534,), switched=True, own=("/run/ttp",))
USER = Caller(54321, 54321, (54321,), own=("/home/ttp",))
#: who calls, whether in a user namespace of his own, whether a guest
WHO = {
    "root": (ROOT, False, False),
    "sudo": (SUDO, False, False),
    "user": (USER, True, False),
    "guest": (USER, False, True),
}

# Options that a plan depends on; what each can be. All others change no step.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "ipv6": (True, False),
    "isolate": get_args(Isolation),
    "socks": (False, True),
    "pcap": ("", "/f"),
    "workdir": (None, "/"),
    "strict": (None, Strict(), Strict(("/s",))),
    "join": (None, "busy"),
}
NO_STEP = {
    *("command", "gateway", "name", "user", "bootstrap_timeout", "verbose", "env", "env_files"),
    *("timeout", "detach", "status_fd"),
}


def kinds(step: Step | Op) -> set[str]:
    """What a step does, line by line, without whom it does that for."""
    if isinstance(step, tuple):
        return {f"the client: {step[0]}"}
    text = re.sub(r"\S*\d\S*", "…", step.describe())
    return {f"{type(step).__name__}: {line}" for line in text.splitlines()}


def specs() -> Iterator[RunSpec]:
    for values in product(*OPTIONS.values()):
        yield replace(RunSpec(("true",)), **dict(zip(OPTIONS, values, strict=True)))


def plans() -> Iterator[tuple[Step | Op, ...]]:
    """All that there can be."""
    own, given = Workload(BLOCK, 9), Workload(BLOCK, 9, GIVEN)
    yield from (gateway_steps(replace(GATEWAY, uplinks=(one,)), FACTS, BLOCK) for one in uplinks())
    for namespace in (
        None,
        AttachNamespace("workload", 1, 1),
        OpenNamespace("workload", 1, empty=True),
    ):
        yield workload_steps(own, namespace)
    yield loose_link_steps(given, OpenNamespace("workload", 1, empty=False), "ttp7")
    for spec in specs():
        yield option_steps(own, spec)
        for caller, nested, guest in WHO.values():
            joined = Joined(1, ()) if spec.join else None
            at = (GATEWAY, FACTS, BLOCK, caller, nested, spec)
            yield enter_ops(*at, guest=guest, joined=joined)


def uplinks() -> tuple[str | LabUplink, ...]:
    return ("pasta", "slirp4netns", "veth", LabUplink("/n", "lan0", "192.0.2.1/24", "192.0.2.2"))


def walked() -> Iterator[tuple[Step | Op, ...]]:
    """Those of the stories."""
    for story, who, uplink in STORIES:
        wanted = uplinks()[-1] if uplink == "lab" else uplink
        if story in ("start", "deep"):
            yield gateway_steps(replace(GATEWAY, uplinks=(wanted,)), FACTS, BLOCK)
        elif story == "workload":
            yield workload_steps(Workload(BLOCK, 2))
        elif story in ASKING:
            yield ASKING[story].steps(1)
        elif story in ENTERING:
            command = ENTERING[story]
            caller, nested, _ = WHO["guest" if command.guest else who]
            yield command.enter(GATEWAY, FACTS, caller, nested)


def test_every_step_of_every_plan_is_walked_through() -> None:
    """A plan with a new step has no story yet."""
    known = {line for plan in walked() for step in plan for line in kinds(step)}
    every = {line for plan in plans() for step in plan for line in kinds(step)}
    assert not every - known


def test_every_option_is_tried_in_the_plans() -> None:
    """A new option is told here whether plans depend on it; and those that do not, do not."""
    names = {field.name for field in fields(RunSpec)}
    assert names == {*OPTIONS, *NO_STEP}
    for name, values in OPTIONS.items():
        made = {_shape(replace(RunSpec(("true",)), **{name: value})) for value in values}
        assert len(made) > 1, f"{name} changes no plan"


def _shape(spec: RunSpec) -> tuple[frozenset[str], ...]:
    at = (GATEWAY, FACTS, BLOCK, USER, True, spec)
    ops = enter_ops(*at, joined=Joined(1, ()) if spec.join else None)
    steps = (*option_steps(Workload(BLOCK, 9), spec), *ops)
    return tuple(frozenset(kinds(step)) for step in steps)


@pytest.mark.parametrize("step", get_args(Step), ids=lambda step: step.__name__)
def test_every_kind_of_step_is_in_a_plan_or_takes_one_back(step: type) -> None:
    """And so has a story, by the test above."""
    made = [step for plan in walked() for step in plan if not isinstance(step, tuple)]
    assert any(isinstance(one, step) or isinstance(one.undo(), step) for one in made)


def test_every_verb_of_the_client_is_walked_through() -> None:
    """Of those that enter.py knows, with and without --strict."""
    verbs = {*enter._VERBS, *nsrun.strict.VERBS, *nsrun.init.VERBS}
    assert verbs == {step[0] for plan in walked() for step in plan if isinstance(step, tuple)}
