"""A lab to test in: how to be anywhere in it, what its wires may carry, decoys and taps there."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsrun.errors import NsrunError
from nsrun.lab import topology
from nsrun.lab.description import Description
from nsrun.leak.broken import Defect
from nsrun.leak.capture import tap
from nsrun.leak.field import Found, Order
from nsrun.leak.inside import SOCKETS
from nsrun.leak.probes import Outcome, Probe, World
from nsrun.leak.results import Made
from nsrun.leak.verdict import Neighbours, Rule, TcpToRelays
from nsrun.ruleset import TRANS_PORT

SECONDS = 240.0  # for all probes of one sender, on a busy machine
NEIGHBOURS = (topology.ROUTER, topology.ROUTER6, topology.ROUTER_LINK)
LAN = (topology.RESOLVER, topology.RESOLVER6, topology.LAN_WEB, topology.LAN_WEB6)
OPEN_LINK = ("192.168.77.51", "2001:db8:77::51")
MACHINES = (
    *(*NEIGHBOURS, *LAN, topology.METADATA, *OPEN_LINK),
    *(topology.HOST, topology.HOST6, topology.HOST_LINK),
)
AMONG_MACHINES = Neighbours(frozenset(MACHINES), frozenset(NEIGHBOURS))
DOORS_TCP, DOORS_UDP = (22, 9050, 9051), (7,)


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
        """What each wire may carry: of the gateway's, Tor; and of all, what the machines of the lab
        ask for each other, which for some seconds they also do after what came before a test.
        """
        own = self.rules(topology.GATEWAY, topology.GATEWAY6)
        return {
            "gateway": [*own, AMONG_MACHINES],
            "host": [AMONG_MACHINES],
            "lan": [AMONG_MACHINES],
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
def idle_workload(bench: Bench, gateway: str, name: str) -> Iterator[dict[str, Any]]:
    """A workload that does nothing until the block ends; what ``ttp ps`` says of it."""
    name = f"{name}-{os.getpid()}"
    command = [bench.ttp, "run", "--gateway", gateway, "--name", name, "--", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                found = ask(bench.ttp, "ps", "--gateway", gateway, "--json")
                if mine := [one for one in found if one["name"] == name]:
                    yield mine[0]
                    return
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NsrunError("start a workload", f"{' '.join(command)} did not start")
                time.sleep(0.05)  # the interval of the poll
        finally:
            process.kill()


@contextmanager
def helper(command: Sequence[str], doing: str) -> Iterator[str]:
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


def decoys(prefix: Sequence[str], *more: str, trans: bool = False) -> Any:
    """Servers at the ports that are knocked at; ``trans``: at TransPort's, too: no Tor."""
    tcp = (*DOORS_TCP, *((TRANS_PORT,) if trans else ()))
    ports = ("--tcp", *map(str, tcp), "--udp", *map(str, DOORS_UDP))
    command = [*prefix, sys.executable, "-P", "-m", "nsrun.leak.decoys", *ports, *more]
    return helper(command, "start decoys")


def host_decoys(bench: Bench) -> Any:
    return decoys(bench.inside("host"), "--unix", *SOCKETS, "--abstract", "ttp-decoy")


def bystander(bench: Bench) -> Any:
    """A process outside of the same user, without capabilities, as most that this user runs."""
    drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--")
    return helper([*bench.inside("host"), *drop, "sh", "-c", "echo $$; read _"], "start a process")


@contextmanager
def broken_gateway(bench: Bench, defect: Defect, name: str) -> Iterator[Found]:
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
    with helper(command, f"make a gateway with {defect.title}") as line:
        yield Found(**json.loads(line))


def tap_at(bench: Bench, place: tuple[str, str]) -> Any:
    netns, interface = place
    return tap(interface, bench.files / f"{interface}.pcap", bench.inside(netns))


def ask(*command: str) -> Any:
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
