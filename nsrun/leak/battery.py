"""The leak battery in a lab: every probe behind the guard, and again where the guard is gone.

    workload ══ gateway ─uplink═══gw-NAME─┐
    workload ══ open gw ─uplink═══gw-OPEN─┼ router ── internet with Tor in it
    host ─eth0════════════════════p-host──┘

Behind the guard means: unprivileged probes in a workload that ``ttp run`` started; those that need
CAP_NET_RAW in a workload's namespace, with a power that no workload has. All wires beyond the
gateway are watched from before the first probe to after the last, and judged by what they may
carry; what a probe itself noticed counts as well. A control is the same probe made in a gateway
without rules, or on the host where a router would not pass it on: there it must be seen, else
nothing is proven.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nsrun.errors import NsrunError
from nsrun.lab import topology
from nsrun.lab.description import Description
from nsrun.leak import pcap
from nsrun.leak.broken import OPEN, Defect
from nsrun.leak.capture import Tap, tap
from nsrun.leak.field import Found, Order
from nsrun.leak.probes import SECONDS as SILENCE
from nsrun.leak.probes import Control, Expect, Needs, Outcome, Probe, World
from nsrun.leak.results import Controls, Made, Result, assess, seen_in_control
from nsrun.leak.verdict import Neighbours, Rule, TcpToRelays, Verdict, judge
from nsrun.ruleset import TRANS_PORT

SECONDS = 240.0  # for all probes of one sender, on a busy machine
HALF_PATIENCE = 2.0  # seconds for an answer that a defect may or may not let through
NEIGHBOURS = (topology.ROUTER, topology.ROUTER6, topology.ROUTER_LINK)
LAN = (topology.RESOLVER, topology.RESOLVER6, topology.LAN_WEB, topology.LAN_WEB6)
OPEN_LINK = ("192.168.77.51", "2001:db8:77::51")
DOORS_TCP, DOORS_UDP = (22, 9050, 9051), (7,)
SOCKETS = (
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/nscd/socket",
    "/run/avahi-daemon/socket",
    "/run/dbus/system_bus_socket",
    "/run/docker.sock",
    "/run/systemd/private",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """A lab, and how to run something in it. ``inside`` makes a command's prefix from a place."""

    lab: Description
    ttp: str
    files: Path

    def inside(self, place: str) -> list[str]:
        return [self.ttp, "lab", "run", "--lab", self.lab.name, "--in", place, "--"]

    def within(self, netns: str) -> list[str]:
        """A prefix that leads into any network namespace of the lab, with all power over it."""
        return [*self.inside("host"), "nsenter", f"--net={netns}", "--"]

    def rules(self, *ours: str, neighbours: tuple[str, ...] = NEIGHBOURS) -> list[Rule]:
        """What the wire of a gateway with the addresses ``ours`` may carry."""
        ports = {(a, self.lab.or_port) for both in self.lab.relays.values() for a in both}
        return [
            TcpToRelays(frozenset(ours), frozenset(ports)),
            Neighbours(frozenset((*ours, *neighbours)), frozenset(NEIGHBOURS)),
        ]

    def allowed(self) -> dict[str, Sequence[Rule]]:
        """What each wire may carry: of the gateway's, Tor; and of all, that the lab's router and
        hosts look for each other, and for a gateway that was there.
        """
        own = (*NEIGHBOURS, *OPEN_LINK)
        host = (topology.HOST, topology.HOST6, topology.HOST_LINK)
        return {
            "gateway": self.rules(topology.GATEWAY, topology.GATEWAY6, neighbours=own),
            "host": [Neighbours(frozenset((*own, *host)), frozenset(NEIGHBOURS))],
            "lan": [Neighbours(frozenset((*own, *LAN, topology.METADATA)), frozenset(NEIGHBOURS))],
        }

    def world(self, known: dict[str, Any], outside: int, **who: str) -> World:
        """``known`` is what the gateway's supervisor says of it; empty if it has none."""
        runtime = known.get("runtime", "/nowhere")
        return World(
            control=f"{runtime}/tor/control",
            api=f"{runtime}/api",
            outside=outside,
            resolver=topology.DNS,
            resolver6=topology.DNS6,
            lan_resolver=topology.RESOLVER,
            lan_web=topology.LAN_WEB,
            lan_web6=topology.LAN_WEB6,
            metadata=topology.METADATA,
            router=topology.ROUTER,
            host=topology.HOST,
            host6=topology.HOST6,
            **who,  # type: ignore[arg-type]  # World's other fields have been given
        )


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
    probes = [one for one in probes if one.control is not Control.HOST]
    made, capture = unguarded(bench, defect, probes, say)
    # the lab's own gateway, whose frames a bridge may flood; whom it leaks to, asks for it
    ours = (*OPEN_LINK, topology.GATEWAY, topology.GATEWAY6)
    allowed = bench.rules(*ours, neighbours=(*NEIGHBOURS, *LAN))
    verdicts = [judge("gateway", capture, allowed)]
    return assess(probes, made, verdicts, _controls(bench, gateway, probes, say)), verdicts


@dataclass(frozen=True)
class Scene:
    """A workload of a gateway that is watched: who is where, and how to be there.

    ``run`` is a command's prefix as a user would have it, ``into`` leads into the network
    namespace of one workload with all power over it..
    """

    world: World
    run: tuple[str, ...]
    into: tuple[str, ...]
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
    known = _json(bench.ttp, "gateway", "inspect", gateway)
    ours = (topology.GATEWAY, topology.GATEWAY6)
    with ExitStack() as stack:
        workload = stack.enter_context(_workload(bench, gateway, "leaktest"))
        neighbour = stack.enter_context(_workload(bench, gateway, "neighbour"))
        for pid in (known["tor"]["pid"], neighbour["pid"]):
            stack.enter_context(_decoys(bench.within(f"/proc/{pid}/ns/net")))
        outside = int(stack.enter_context(_host_decoys(bench)))
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
            taps={name: stack.enter_context(_tap(bench, place)) for name, place in wires.items()},
            allowed=bench.allowed(),
        )


def guarded(
    bench: Bench, gateway: str, probes: Sequence[Probe], say: Say
) -> tuple[dict[str, Made], list[Verdict]]:
    """Behind the guard: what each sender noticed, and what the wires carried."""
    with scene(bench, gateway) as here:
        say("behind the guard, as a workload")
        made = make(here.run, here.world, [one for one in probes if one.needs is Needs.NOTHING])
        say("behind the guard, with raw sockets")
        made |= make(here.into, here.world, [one for one in probes if one.needs is Needs.NET_RAW])
        expected = any(one.expect is Expect.TOR for one in probes)
        return made, here.judged(expect_some=expected)


def unguarded(
    bench: Bench, defect: Defect, probes: Sequence[Probe], say: Say
) -> tuple[dict[str, Made], pcap.Capture]:
    """In a gateway with this defect: what each sender noticed, and what its wire carried."""
    with open_scene(bench, defect) as (world, into, wire):
        say(f"a gateway with a defect: {defect.title}")
        return make(into, world, probes), wire.stop()


@contextmanager
def open_scene(bench: Bench, defect: Defect) -> Iterator[tuple[World, Sequence[str], Tap]]:
    """The like with a gateway that has this defect: the world, the way in, a tap on its wire."""
    name = f"{bench.lab.name[:7]}-bad"
    with ExitStack() as stack:
        found = stack.enter_context(_field(bench, defect, name))
        stack.enter_context(_decoys(bench.within(found.gateway_netns), trans=True))
        stack.enter_context(_decoys(bench.within(found.neighbour_netns)))
        stack.enter_context(_decoys(bench.inside("router")))
        stack.enter_context(_host_decoys(bench))
        wire = stack.enter_context(_tap(bench, ("router", f"gw-{name}")))
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
    known = _json(bench.ttp, "gateway", "inspect", gateway)
    with ExitStack() as stack:
        outside = int(stack.enter_context(_host_decoys(bench)))
        wire = stack.enter_context(_tap(bench, bench.lab.wires["host"]))
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
    forwarded = [one for one in probes if one.control is not Control.HOST]
    controls = {}
    if forwarded:
        controls["gateway"] = unguarded(bench, OPEN, forwarded, say)
    left = [one for one in probes if not seen_in_control(one, controls)]
    if left:
        controls["host"] = on_host(bench, gateway, left, say)
    return controls


# -- parts --------------------------------------------------------------------------------


def make(prefix: Sequence[str], world: World, probes: Sequence[Probe]) -> dict[str, Made]:
    """Make ``probes`` where ``prefix`` leads: what each sender noticed. Raises NsrunError."""
    names = [one.name for one in probes]
    if not names:
        return {}
    python = (sys.executable, "-P", "-m", "nsrun.leak.probes", json.dumps(asdict(world)))
    done = program(*prefix, *python, *names)
    lines = [json.loads(line) for line in done.splitlines() if line.startswith("{")]
    made = {line["name"]: Made(Outcome(line["outcome"]), line["why"]) for line in lines}
    if missing := set(names) - set(made):
        raise NsrunError("make every probe", f"no word of {', '.join(sorted(missing)[:5])}")
    return made


@contextmanager
def _workload(bench: Bench, gateway: str, name: str) -> Iterator[dict[str, Any]]:
    """A workload that does nothing until the block ends; what ``ttp ps`` says of it."""
    name = f"{name}-{os.getpid()}"
    command = [bench.ttp, "run", "--gateway", gateway, "--name", name, "--", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                found = _json(bench.ttp, "ps", "--gateway", gateway, "--json")
                if mine := [one for one in found if one["name"] == name]:
                    yield mine[0]
                    return
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NsrunError("start a workload", f"{' '.join(command)} did not start")
                time.sleep(0.05)  # the interval of the poll
        finally:
            process.kill()


@contextmanager
def _helper(command: Sequence[str], doing: str) -> Iterator[str]:
    """A program that says one line when it is ready, and ends with its standard input."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        ready = select.select([process.stdout], [], [], 20)[0]
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            words = process.communicate()[1].strip().splitlines()
            raise NsrunError(doing, words[-1] if words else "it said nothing")
        yield line
    finally:
        try:
            process.communicate(timeout=20)
        except (subprocess.TimeoutExpired, ValueError):
            process.kill()
            process.wait()


def _decoys(prefix: Sequence[str], *more: str, trans: bool = False) -> Any:
    """Servers at the ports that are knocked at; ``trans``: at TransPort's, too: no Tor."""
    tcp = (*DOORS_TCP, *((TRANS_PORT,) if trans else ()))
    ports = ("--tcp", *map(str, tcp), "--udp", *map(str, DOORS_UDP))
    command = [*prefix, sys.executable, "-P", "-m", "nsrun.leak.decoys", *ports, *more]
    return _helper(command, "start decoys")


def _host_decoys(bench: Bench) -> Any:
    return _decoys(bench.inside("host"), "--unix", *SOCKETS, "--abstract", "ttp-decoy")


@contextmanager
def _field(bench: Bench, defect: Defect, name: str) -> Iterator[Found]:
    uplink = {
        "netns": "/run/netns/router",
        "bridge": "lan0",
        "address": f"{OPEN_LINK[0]}/24",
        "router": topology.ROUTER,
        "address6": f"{OPEN_LINK[1]}/64",
        "router6": topology.ROUTER6,
    }
    order = json.dumps(asdict(Order(defect.name, name, uplink)))
    command = [*bench.inside("host"), sys.executable, "-P", "-m", "nsrun.leak.field", order]
    with _helper(command, f"make a gateway with {defect.title}") as line:
        yield Found(**json.loads(line))


def _tap(bench: Bench, place: tuple[str, str]) -> Any:
    netns, interface = place
    return tap(interface, bench.files / f"{interface}.pcap", bench.inside(netns))


def _json(*command: str) -> Any:
    return json.loads(program(*command))


def program(*command: str) -> str:
    """Standard output of a command, to which this package can be imported. Raises NsrunError."""
    search = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        raise NsrunError(f"run {' '.join(command[:8])} …", f"no end after {SECONDS:g} s") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NsrunError(f"run {' '.join(command[:8])} …", words[-1])
    return done.stdout
