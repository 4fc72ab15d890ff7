"""A gateway without its guard, or with a broken one, in the lab; with decoys behind every door.

    python3 -m nsrun.leak.field ORDER

runs in the lab's ``host`` as its root, makes the gateway by the real steps but for the defect, and
two workloads, prints one JSON line, and ends, with all it made, with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from nsrun import facts
from nsrun.address import choose_block
from nsrun.apply import Machine, apply
from nsrun.gateway import uplink
from nsrun.leak.broken import DEFECTS, OPEN
from nsrun.netns import Namespace
from nsrun.plan import Workload, gateway_steps, workload_steps
from nsrun.spec import GatewaySpec, LabUplink
from nsrun.steps import SetElements, StartTor, StartUplink, Step


@dataclass(frozen=True)
class Order:
    """``defect`` is a name from broken.py; ``uplink`` has the fields of LabUplink."""

    defect: str
    name: str
    uplink: dict[str, str]


@dataclass(frozen=True)
class Found:
    """What was made: paths of the network namespaces, and addresses as in World."""

    gateway_netns: str
    own_netns: str
    neighbour_netns: str
    gateway: str
    gateway6: str
    own: str
    own6: str
    neighbour: str
    neighbour6: str


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="ttp-field-") as directory, ExitStack() as undo:
        found = make(order, directory, undo)
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        sys.stdout.flush()
        sys.stdin.buffer.read()


def make(order: Order, directory: str, undo: ExitStack) -> Found:
    """Raises NsrunError."""
    defect = next(one for one in (OPEN, *DEFECTS) if one.name == order.defect)
    spec = GatewaySpec(order.name, directory, directory, (LabUplink(**order.uplink),))
    found = facts.probe()
    block = choose_block(found.networks)
    log = f"{directory}/log"
    Path(log).touch()

    def start_uplink(step: StartTor | StartUplink) -> uplink.Running:
        assert isinstance(step, StartUplink)
        return uplink.choose(step.candidates, spec.name, machine.namespaces["gateway"], log)

    machine = Machine(starters={"uplink": start_uplink})
    undo.push(apply(defect.breaks(gateway_steps(spec, found, block)), machine.do))
    gateway = machine.namespaces["gateway"]
    spaces = []
    for number in (2, 3):
        own = Machine({"gateway": gateway})
        undo.push(apply(_links(Workload(block, number)), own.do))
        spaces.append(own.namespaces["workload"])
    first, second = Workload(block, 2), Workload(block, 3)
    return Found(
        gateway_netns=_path(gateway),
        own_netns=_path(spaces[0]),
        neighbour_netns=_path(spaces[1]),
        gateway=str(block.gateway),
        gateway6=str(block.gateway6),
        own=first.address4,
        own6=first.address6,
        neighbour=second.address4,
        neighbour6=second.address6,
    )


def _path(space: Namespace) -> str:
    return f"/proc/{os.getpid()}/fd/{space.fd}"


def _links(workload: Workload) -> list[Step]:
    """A workload's steps, but for the elements of sets that a broken gateway does not have."""
    return [step for step in workload_steps(workload) if not isinstance(step, SetElements)]


if __name__ == "__main__":
    main()
