"""A gateway under traffic, and what befalls it: the actors and the faults of test_disturbed.py.

Each fault begins at once, and returns what ends it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT
from kill_place import dead, eventually, part
from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun.lab import topology

# strays of every kind, and connections that Tor may carry: more of them than Tor can take up are
# in its way for a minute after each fault
PROBE = (ROOT / "tests" / "probe.py").read_text()
STRAYS = ("/usr/bin/python3", "-ISc", PROBE, "--for", "1000", "20")
WORKLOADS = 3
OTHER_ADDRESS = "192.168.77.11"
BACK = 180.0  # seconds to work again: few, but Tor alone takes up to that to give a connection up

# a ttp of another version than the supervisor's
ANOTHER = (
    str(Path(TTP).with_name("python")),
    "-c",
    "import nsrun; nsrun.__version__ += '.another'; from nsrun.client import main; main()",
)

# Tor's clock alone is moved, as CLOCK_REALTIME is in no namespace; its killed processes would leave
# the shared memory of libfaketime behind
CLOCK = "libfaketime.so.1"
IN_TIME = """
mount -t tmpfs -o mode=1777 none /dev/shm
PATH=$0:$PATH exec "$@"
"""
TOR_IN_TIME = """#!/bin/sh
PATH=${PATH#*:}
[ "$1" = --version ] && exec tor --version
export FAKETIME_TIMESTAMP_FILE={clock} FAKETIME_CACHE_DURATION=1
export FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_FORCE_MONOTONIC_FIX=0
LD_PRELOAD={library} exec tor "$@"
"""

End = Callable[[], object]


@dataclass
class Scene:
    """The host of a lab with a gateway of its own, and what runs behind it.

    ``state`` is a file system of the host's that can be filled; ``clock`` is how far Tor's is off.
    """

    lab: Lab
    chance: random.Random
    state: str = "/run/small"
    supervisor: int = 0
    netns: str = ""
    seen: set[int] = field(default_factory=set)
    busy: list[subprocess.Popen[bytes]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.lab.name}-d"

    @property
    def clock(self) -> Path:
        return self.lab.home / "clock"

    @property
    def story(self) -> str:
        """What has happened so far, a round in each line."""
        return "\n".join(self.told)

    def host(self, *argv: str, check: bool = True) -> str:
        """Run a command on the host, as its root; returns what it prints."""
        done = self.try_on_host(*argv)
        assert not check or done.returncode == 0, f"{' '.join(argv)}\n{done.stderr}\n{self.story}"
        return done.stdout

    def try_on_host(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.lab.do(*self.lab.inside_argv("host", *self._environment(), *argv))

    def _environment(self) -> tuple[str, ...]:
        return ("env", f"TTP_STATE_DIR={self.state}")

    def inspect(self) -> dict[str, dict[str, object]]:
        found = self.host(TTP, "gateway", "inspect", self.name, check=False)
        return dict(json.loads(found)) if found else {}

    def start(self) -> None:
        """A gateway, and workloads that send whatever must not get out."""
        fragment = str(self.lab.home / "fragment")
        up = (TTP, "gateway", "up", self.name, "--uplink", "pasta", "--torrc", fragment)
        apart = ("unshare", "--mount", "sh", "-ec", IN_TIME, str(self.lab.home / "shifted"))
        self.host(*apart, *up, "--bootstrap-timeout", "50")
        self.supervisor = int(str(self.inspect()["pid"]))
        self.seen.add(self.supervisor)
        self.netns = gateway_of(self.supervisor)
        run = (*self._environment(), TTP, "run", "-g", self.name, "--", *STRAYS)
        self.busy += [subprocess.Popen(self.lab.inside("host", *run)) for _ in range(WORKLOADS)]
        eventually(lambda: len(self.inspect().get("workloads", ())) == WORKLOADS, "traffic", 20)

    def stop(self) -> None:
        """End what runs; what still runs must have been able to, all the time."""
        over = [process.args for process in self.busy if process.poll() is not None]
        for process in self.busy:
            process.kill()
            process.wait()
        self.busy.clear()
        self.host(TTP, "gateway", "down", self.name, check=False)
        assert not over, f"a workload ended\n{self.story}"
        eventually(lambda: all(map(dead, self.seen)), "the end of every process")

    def part(self, name: str) -> int | None:
        """The process id of ``tor`` or of the ``uplink``, if there is one now."""
        pid = part(self.supervisor, name)
        if pid is not None:
            self.seen.add(pid)
        return pid

    def signal(self, name: str, pid: int | None) -> None:
        if pid is not None:
            self.lab.do("kill", f"-{name}", str(pid))

    def in_gateway(self, *argv: str) -> None:
        self.host("nsenter", f"--net={self.netns}", *argv, check=False)

    def pause(self, most: float) -> None:
        time.sleep(self.chance.uniform(0, most))  # the moment that is tested

    def works(self) -> bool:
        """Whether a command gets through Tor, now."""
        curl = (TTP, "run", "-g", self.name, "--bootstrap-timeout", "5", "--", "curl", "-sS")
        return '"IsTor":true' in self.host(*curl, "--max-time", "5", PLAIN_ORACLE, check=False)


def gateway_of(supervisor: int) -> str:
    """The first network namespace of a supervisor's threads that is not that of its main one."""
    own = Path(f"/proc/{supervisor}/ns/net").stat().st_ino
    threads = sorted(Path(f"/proc/{supervisor}/task").iterdir(), key=lambda path: int(path.name))
    found = (thread / "ns/net" for thread in threads)
    return next(str(path) for path in found if path.stat().st_ino != own)


# ---- what a gateway gets over by itself --------------------------------------------------------


def nothing() -> None:
    """It needs no end."""


def tor_killed(scene: Scene) -> End:
    scene.signal("KILL", scene.part("tor"))
    return nothing


def tor_hung(scene: Scene) -> End:
    pid = scene.part("tor")
    scene.signal("STOP", pid)
    return lambda: scene.signal("CONT", pid)


def uplink_killed(scene: Scene) -> End:
    scene.signal("KILL", scene.part("uplink"))
    return nothing


def uplink_hung(scene: Scene) -> End:
    pid = scene.part("uplink")
    scene.signal("STOP", pid)
    return lambda: scene.signal("CONT", pid)


def uplink_deleted(scene: Scene) -> End:
    scene.in_gateway("ip", "link", "delete", "uplink")
    return nothing


def supervisor_hung(scene: Scene) -> End:
    scene.signal("STOP", scene.supervisor)
    return lambda: scene.signal("CONT", scene.supervisor)


def all_suspended(scene: Scene) -> End:
    """As when a lid is closed."""
    pids = [scene.part("tor"), scene.part("uplink"), scene.supervisor]
    for pid in pids:
        scene.signal("STOP", pid)

    def wake() -> None:
        for pid in reversed(pids):
            scene.signal("CONT", pid)

    return wake


def cable_pulled(scene: Scene) -> End:
    """Behind the switch: nobody is told of it."""
    port = ("bridge", "link", "set", "dev", "p-host", "state")
    in_router = scene.lab.inside_argv("router", *port)
    scene.lab.do(*in_router, "0")
    return lambda: scene.lab.do(*in_router, "3")


def link_down(scene: Scene) -> End:
    scene.host("ip", "link", "set", "eth0", "down")

    def up() -> None:
        scene.host("ip", "link", "set", "eth0", "up")
        scene.host("ip", "route", "replace", "default", "via", topology.ROUTER)

    return up


def address_changed(scene: Scene) -> End:
    """Another one from DHCP, say, and later the first one again."""

    def change(old: str, new: str) -> None:
        commands = (
            f"address delete {old}/24 dev eth0",
            f"address add {new}/24 dev eth0",
            f"route replace default via {topology.ROUTER}",
        )
        scene.host("sh", "-c", "; ".join(f"ip {command}" for command in commands), check=False)

    change(topology.HOST, OTHER_ADDRESS)
    return lambda: change(OTHER_ADDRESS, topology.HOST)


def clock_jumped(scene: Scene) -> End:
    scene.clock.write_text(scene.chance.choice(("-2h", "-10m", "+10m", "+2h")) + "\n")
    return lambda: scene.clock.write_text("+0\n")


def disk_full(scene: Scene) -> End:
    filler = f"{scene.state}/filler"
    scene.host("dd", "if=/dev/zero", f"of={filler}", "bs=64k", check=False)
    return lambda: scene.host("rm", "-f", filler)


def resolver_replaced(scene: Scene) -> End:
    scene.host("mount", "--bind", "/etc/hostname", "/etc/resolv.conf")
    return lambda: scene.host("umount", "/etc/resolv.conf")


# ---- what it stays closed after, until it is started again -------------------------------------


def rules_flushed(scene: Scene) -> End:
    scene.in_gateway("nft", "flush", "ruleset")
    return nothing


def supervisor_killed(scene: Scene) -> End:
    scene.signal("KILL", scene.supervisor)
    return nothing


def upgraded(scene: Scene) -> End:
    """A ttp of another version is refused, and does what it is told to."""
    done = scene.try_on_host(*ANOTHER, "run", "-g", scene.name, "--", "true")
    assert done.returncode == 125, done
    assert f"restart it: ttp gateway down {scene.name}" in done.stderr
    scene.host(*ANOTHER, "gateway", "down", scene.name)
    return nothing


Fault = Callable[[Scene], End]
REPAIRED: tuple[Fault, ...] = (
    *(tor_killed, tor_hung, uplink_killed, uplink_hung, uplink_deleted, supervisor_hung),
    *(all_suspended, cable_pulled, link_down, address_changed, clock_jumped),
    *(disk_full, resolver_replaced),
)
OVER: tuple[Fault, ...] = (rules_flushed, supervisor_killed, upgraded)


def disturb(scene: Scene, rounds: int) -> int:
    """So many rounds of one to four faults at once; returns how many faults there were."""
    count = 0
    for number in range(rounds):
        faults = scene.chance.sample(REPAIRED, scene.chance.randint(1, 4))
        over = scene.chance.choice(OVER) if scene.chance.random() < 0.2 else None
        if over is upgraded:  # it takes a supervisor that answers
            faults = []
        faults += [over] if over else []
        scene.told.append(f"round {number}: {', '.join(fault.__name__ for fault in faults)}")
        ends, begin = [], time.monotonic()
        for fault in faults:
            scene.pause(0.3)
            ends.append(fault(scene))
        for end in scene.chance.sample(ends, len(ends)):
            scene.pause(0.3)
            end()
        if over:
            scene.stop()
            scene.start()
        try:
            eventually(scene.works, "the gateway to work", BACK)
        except AssertionError as error:
            log = scene.host(TTP, "gateway", "logs", scene.name, check=False)
            raise AssertionError(f"{error}\n{scene.story}\n{log[-3000:]}") from error
        scene.told[-1] += f"; over after {time.monotonic() - begin:.1f} s"
        count += len(faults)
    return count


@contextmanager
def on_host(lab: Lab, seed: int) -> Iterator[Scene]:
    """A host with IPv4 only, as the kernel itself greets every IPv6 link that comes up."""
    scene = Scene(lab, random.Random(seed))  # noqa: S311
    _prepare_clock(scene)
    fragment = lab.home / "fragment"
    fragment.write_text(str(lab.status()["client_torrc"]))
    fragment.chmod(0o644)
    switches = {
        "host": "net.ipv6.conf.eth0.disable_ipv6",
        "router": "net.ipv6.conf.p-host.disable_ipv6",
    }
    for place, switch in switches.items():
        lab.do(*lab.inside_argv(place, "sysctl", "-qw", f"{switch}=1"))
    scene.host("mkdir", "-p", scene.state)
    scene.host("mount", "-t", "tmpfs", "-o", "size=8m,mode=711", "none", scene.state)
    try:
        yield scene
    finally:
        scene.host("umount", scene.state)
        for place, switch in switches.items():
            lab.do(*lab.inside_argv(place, "sysctl", "-qw", f"{switch}=0"))
        for address in (topology.HOST6, topology.HOST_LINK):
            scene.host("ip", "address", "replace", f"{address}/64", "dev", "eth0", "nodad")
        scene.host("ip", "route", "replace", "default", "via", topology.ROUTER6, "dev", "eth0")


def _prepare_clock(scene: Scene) -> None:
    """A ``tor`` for the PATH whose clock is moved by a file."""
    (library,) = Path("/usr/lib").glob(f"*/faketime/{CLOCK}")
    shifted = scene.lab.home / "shifted"
    shifted.mkdir(exist_ok=True)
    text = TOR_IN_TIME.replace("{clock}", str(scene.clock)).replace("{library}", str(library))
    (shifted / "tor").write_text(text)
    (shifted / "tor").chmod(0o755)
    scene.clock.write_text("+0\n")
    scene.lab.home.chmod(0o711)  # Tor's user comes this way
    os.chmod(scene.clock, 0o644)
