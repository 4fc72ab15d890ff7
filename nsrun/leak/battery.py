"""The leak battery in a lab: every probe behind the guard, and again where the guard is gone.

    workload ══ gateway ─uplink═══gw-NAME─┐
    workload ══ open gw ─uplink═══gw-OPEN─┼ router ── internet with Tor in it
    host ─eth0════════════════════p-host──┘

Behind the guard means: unprivileged probes in a workload that ``ttp run`` started; those that need
CAP_NET_RAW in a workload's namespace, with a power that no workload has. All wires beyond the
gateway are watched from before the first probe to after the last, and judged by what they may
carry; what a probe itself noticed counts as well. A control is the same probe made in a gateway
without rules, on the host where a router would not pass it on, or in two workloads that Tor takes
for one: there it must be seen, else nothing is proven.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

from nsrun.lab import topology
from nsrun.leak import pcap
from nsrun.leak.bench import (
    LAN,
    NEIGHBOURS,
    OPEN_LINK,
    Bench,
    ask,
    broken_gateway,
    bystander,
    decoys,
    host_decoys,
    idle_workload,
    make,
    tap_at,
)
from nsrun.leak.broken import OPEN, Careless, Confused, Defect
from nsrun.leak.capture import Tap
from nsrun.leak.identity import pair
from nsrun.leak.probes import SECONDS as SILENCE
from nsrun.leak.probes import Control, Expect, Needs, Probe, World
from nsrun.leak.results import Controls, Made, Result, assess, seen_in_control
from nsrun.leak.verdict import GroupReports, Rule, Verdict, judge

FORWARDED = (Control.WIRE, Control.GATEWAY)  # controls made in a gateway without a guard
HALF_PATIENCE = 2.0  # seconds for an answer that a defect may or may not let through

Say = Callable[[str], None]


def battery(
    bench: Bench, gateway: str, probes: Sequence[Probe], say: Say
) -> tuple[list[Result], list[Verdict]]:
    """Make ``probes`` behind a gateway of the lab, and their controls. Raises NsrunError."""
    made, verdicts = guarded(bench, gateway, probes, say)
    return assess(probes, made, verdicts, _controls(bench, gateway, probes, say)), verdicts


def defective(
    bench: Bench, gateway: str, defect: Defect, probes: Sequence[Probe], say: Say
) -> tuple[list[Result], list[Verdict]]:
    """The same behind a gateway with ``defect``, which must be found out. Raises NsrunError."""
    probes = [one for one in probes if one.control in FORWARDED]
    made, capture = unguarded(bench, defect, probes, say)
    # the lab's own gateway, whose frames a bridge may flood; whom it leaks to, asks for it
    ours = (*OPEN_LINK, topology.GATEWAY, topology.GATEWAY6)
    allowed = [*bench.rules(*ours, neighbours=(*NEIGHBOURS, *LAN)), GroupReports()]
    verdicts = [judge("gateway", capture, allowed)]
    return assess(probes, made, verdicts, _controls(bench, gateway, probes, say)), verdicts


def flawed(
    bench: Bench, gateway: str, defect: Careless | Confused, probes: Sequence[Probe], say: Say
) -> tuple[list[Result], list[Verdict]]:
    """The same in a workload that is entered with ``defect``, or that Tor takes for another.

    It must be found out. Raw packets are not of it: they are sent with all power anyway. Raises
    NsrunError.
    """
    need = Needs.TWO if isinstance(defect, Confused) else Needs.NOTHING
    probes = [one for one in probes if one.needs is need]
    say(f"workloads with a defect: {defect.title}")
    made, verdicts = guarded(bench, gateway, probes, say, defect)
    return assess(probes, made, verdicts, _controls(bench, gateway, probes, say)), verdicts


@dataclass(frozen=True)
class Scene:
    """A workload of a gateway that is watched: who is where, and how to be there.

    ``run`` is a command's prefix as a user would have it, ``into`` leads into the network
    namespace of one workload with all power over it; ``beside`` so into another's, and ``gateway``
    into theirs.
    """

    world: World
    run: tuple[str, ...]
    into: tuple[str, ...]
    beside: tuple[str, ...]
    gateway: tuple[str, ...]
    taps: dict[str, Tap]
    allowed: dict[str, Sequence[Rule]]

    def judged(self, *, expect_some: bool) -> list[Verdict]:
        """``expect_some``: something went through Tor, so the gateway's wire had to carry it."""
        inside = (self.world.host, self.world.host6, self.world.uplink, self.world.uplink6)
        return [
            judge(
                wire,
                one.stop(),
                self.allowed.get(wire, ()),
                expect_some=expect_some and wire == "gateway",
                inside=inside,
            )
            for wire, one in self.taps.items()
        ]


@contextmanager
def scene(bench: Bench, gateway: str) -> Iterator[Scene]:
    """Two workloads behind a gateway of the lab, decoys behind every door, a tap on every wire."""
    known = ask(bench.ttp, "gateway", "inspect", gateway)
    ours = (topology.GATEWAY, topology.GATEWAY6)
    with ExitStack() as stack:
        workload = stack.enter_context(idle_workload(bench, gateway, "leaktest"))
        neighbour = stack.enter_context(idle_workload(bench, gateway, "neighbour"))
        for pid in (known["tor"]["pid"], neighbour["pid"]):
            stack.enter_context(decoys(bench.within(f"/proc/{pid}/ns/net")))
        stack.enter_context(host_decoys(bench))
        outside = int(stack.enter_context(bystander(bench)))
        world = bench.world(
            known,
            outside,
            gateway=known["address"][0],
            gateway6=known["address"][1],
            uplink=ours[0],
            uplink6=ours[1],
            neighbour=neighbour["address"][0],
            neighbour6=neighbour["address"][1],
            own=workload["address"][0],
            own6=workload["address"][1],
        )
        wires = {name: place for name, place in bench.lab.wires.items() if name != "internet"}
        yield Scene(
            world,
            run=(*bench.inside("host"), bench.ttp, "run", "--gateway", gateway, "--"),
            into=tuple(bench.within(f"/proc/{workload['pid']}/ns/net")),
            beside=tuple(bench.within(f"/proc/{neighbour['pid']}/ns/net")),
            gateway=tuple(bench.within(f"/proc/{known['tor']['pid']}/ns/net")),
            taps={name: stack.enter_context(tap_at(bench, place)) for name, place in wires.items()},
            allowed=bench.allowed(),
        )


def guarded(
    bench: Bench,
    gateway: str,
    probes: Sequence[Probe],
    say: Say,
    defect: Careless | Confused | None = None,
) -> tuple[dict[str, Made], list[Verdict]]:
    """Behind the guard: what each sender noticed, and what the wires carried.

    With ``defect`` the workload of the unprivileged probes has it, or its gateway.
    """
    with scene(bench, gateway) as here:
        say("behind the guard, as a workload")
        run = here.run
        if isinstance(defect, Careless):
            enter = (sys.executable, "-P", "-m", "nsrun.leak.careless", defect.name, gateway)
            run = (*bench.inside("host"), *enter)
        made = make(run, here.world, [one for one in probes if one.needs is Needs.NOTHING])
        say("behind the guard, with raw sockets")
        made |= make(here.into, here.world, [one for one in probes if one.needs is Needs.NET_RAW])
        say("behind the guard, two together")
        made |= _together(bench, here, probes, confused=isinstance(defect, Confused))
        expected = any(one.expect is Expect.TOR or one.needs is Needs.TWO for one in probes)
        return made, here.judged(expect_some=expected)


def unguarded(
    bench: Bench, defect: Defect, probes: Sequence[Probe], say: Say
) -> tuple[dict[str, Made], pcap.Capture]:
    """In a gateway with this defect: what each sender noticed, and what its wire carried."""
    with open_scene(bench, defect) as (world, into, wire):
        say(f"a gateway with a defect: {defect.title}")
        return make(into, world, probes), wire.stop()


def _together(
    bench: Bench, here: Scene, probes: Sequence[Probe], *, confused: bool
) -> dict[str, Made]:
    two = (here.into, here.beside)
    return {
        one.name: pair(bench, here.world, two, here.gateway, one, confused=confused)
        for one in probes
        if one.needs is Needs.TWO
    }


@contextmanager
def open_scene(bench: Bench, defect: Defect) -> Iterator[tuple[World, Sequence[str], Tap]]:
    """The like with a gateway that has this defect: the world, the way in, a tap on its wire."""
    name = f"{bench.lab.name[:7]}-bad"
    with ExitStack() as stack:
        found = stack.enter_context(broken_gateway(bench, defect, name))
        stack.enter_context(decoys(bench.within(found.gateway_netns), trans=True))
        stack.enter_context(decoys(bench.within(found.neighbour_netns)))
        stack.enter_context(decoys(bench.inside("router")))
        stack.enter_context(host_decoys(bench))
        wire = stack.enter_context(tap_at(bench, ("router", f"gw-{name}")))
        who = {key: value for key, value in asdict(found).items() if not key.endswith("netns")}
        link = {"uplink": OPEN_LINK[0], "uplink6": OPEN_LINK[1]}
        world = bench.world({}, 0, **link, **who)
        # without a guard nobody refuses, and everybody answers; behind half a guard, some do
        patience = world.patience if defect is OPEN else HALF_PATIENCE
        world = replace(world, patience=patience, moment=SILENCE)
        yield world, bench.within(found.own_netns), wire


def on_host(
    bench: Bench, gateway: str, probes: Sequence[Probe], say: Say
) -> tuple[dict[str, Made], pcap.Capture]:
    """On the simulated host itself, as its root, without ttp."""
    known = ask(bench.ttp, "gateway", "inspect", gateway)
    with ExitStack() as stack:
        stack.enter_context(host_decoys(bench))
        outside = int(stack.enter_context(bystander(bench)))
        wire = stack.enter_context(tap_at(bench, bench.lab.wires["host"]))
        world = bench.world(
            known,
            outside,
            # a false word about anybody else would be believed on the LAN, and outlive the test
            gateway=topology.NOBODY,
            gateway6=topology.NOBODY6,
            uplink=topology.NOBODY,
            uplink6=topology.NOBODY6,
            neighbour=topology.LAN_WEB,
            neighbour6=topology.LAN_WEB6,
            own=topology.HOST,
            own6=topology.HOST6,
        )
        say("on the host, without ttp")
        return make(bench.inside("host"), world, probes), wire.stop()


def _controls(bench: Bench, gateway: str, probes: Sequence[Probe], say: Say) -> Controls:
    """Where a router passes a probe on, that is its control; the others are made on the host."""
    forwarded = [one for one in probes if one.control in FORWARDED]
    controls = {}
    if any(one.needs is Needs.TWO for one in probes):
        with scene(bench, gateway) as here:
            say("two workloads that are taken for one")
            made = _together(bench, here, probes, confused=True)
            controls["identity"] = made, here.taps["gateway"].stop()
    if forwarded:
        controls["gateway"] = unguarded(bench, OPEN, forwarded, say)
    left = [one for one in probes if one.needs is not Needs.TWO]
    left = [one for one in left if not seen_in_control(one, controls)]
    if left:
        controls["host"] = on_host(bench, gateway, left, say)
    return controls


# -- parts --------------------------------------------------------------------------------
