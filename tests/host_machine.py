"""What stories of a whole host behind Tor have in common: commands, and what a wire shows."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from lab_helpers import ORACLE
from machine import Machine
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Icmp, Ip, Tcp
from nsrun.leak.pcap import Capture
from nsrun.leak.verdict import Rule, Value, as_text, judge

OWN = (topology.HOST, topology.HOST6)
ELSEWHERE = ("192.168.77.66", "2001:db8:77::66")  # where it moves to; relays speak to it on
Idle = tuple[subprocess.Popen[str], IO[str]]
START = ("ttp", "start", "--torrc", "/etc/ttp/lab.torrc")
PYTHON = "/usr/local/lib/ttp/bin/python"
CUT = "Software caused connection abort\n"  # ECONNABORTED: what a destroyed socket says
CURL = ("curl", "-sS", "--max-time", "20")
ECHO = f"echo word | socat -t1 - UDP:{topology.WEB}:7"
#: Every rule of nft, of iptables and of routing.
SAVE = "nft --stateless list ruleset; iptables-save; ip6tables-save; ip rule; ip -6 rule"
# By UDP, which is for nobody, all the time.
SHOUT = """
import socket, sys, time
udp = [(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), (sys.argv[1], 7)),
       (socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), (sys.argv[2], 7))]
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    for one, where in udp:
        try:
            one.sendto(b"stray", where)
        except OSError:
            pass
    time.sleep(0.0005)
"""

# Connect, say so, and write when told to; several times, as the first words may come too early.
IDLE = """
import socket, sys, time
it = socket.create_connection((sys.argv[1], 80), 20)
print("open", flush=True)
sys.stdin.readline()
try:
    for _ in range(3):
        it.sendall(b"late words")
        time.sleep(0.3)
    print("sent", flush=True)
except OSError as error:
    print(error.strerror, flush=True)
"""
MORTAL = """
import os, sys
from nsrun.cli import main
from nsrun.host.machine import HostMachine

kind = sys.argv.pop(1)
left = int(kind) if kind.isdigit() else -1
do = HostMachine.do

def counted(self, step):
    global left
    if left == 0 or kind == type(step).__name__:
        os.kill(os.getpid(), 9)
    left -= 1
    do(self, step)

HostMachine.do = counted
main()
"""


class FromBefore:
    """What far ends of earlier connections send on, for minutes: the machine was closed or booted,
    or its Tor has gone, and nobody told them. An answer would be judged like all that leaves.
    """

    name = "from far ends of before, unanswered"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target=target, body=Tcp(flags=flags)):
                own = (*OWN, *ELSEWHERE)
                return source not in own and target in own and "S" not in flags
        return False


class ListenerReports:
    """What a link that comes up sends to routers: to which groups it listens (RFC 9777)."""

    name = "reports of listeners"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(target="ff02::16", body=Icmp(kind=143)):
                return True
        return False


def contained(
    machine: Machine,
    capture: Capture,
    *more: Rule,
    moved: tuple[str, ...] = (),
    expect_some: bool = True,
) -> None:
    """Nothing but TCP to relays, and neighbours, and what ``more`` says.

    ``moved`` are addresses that the machine had as well.
    """
    known = machine.lab.neighbours(*OWN, *moved, topology.RESOLVER, topology.LAN_WEB)
    rules = [*machine.lab.rules(*OWN, *moved), known, ListenerReports(), FromBefore(), *more]
    verdict = judge("p-host", capture, rules, expect_some=expect_some)
    assert verdict.value is Value.CONTAINED, as_text([verdict])


@contextmanager
def watched(machine: Machine) -> Iterator[list[Capture]]:
    """What passes the machine's wire while the block runs; it is there when the block has ended."""
    seen: list[Capture] = []
    with machine.lab.tap("router", "p-host") as wire:
        yield seen
        seen.append(wire.stop())


@contextmanager
def all_the_time(machine: Machine, *argv: str, user: str = "root") -> Iterator[None]:
    """A command that runs beside the test, as a unit: so all of it ends with the block."""
    unit = "beside.service"
    run = ("systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--uid={user}")
    machine.run(*run, "--", *argv, check=True)
    try:
        yield
    finally:
        machine.run("systemctl", "stop", unit, check=True)


def to(capture: Capture, kind: type, *addresses: str) -> list[Any]:
    """Frames of ``kind``, TCP or UDP, to one of the addresses."""
    return [
        frame
        for frame in capture.frames
        if isinstance(frame.body, Ip)
        and frame.body.target in addresses
        and isinstance(frame.body.body, kind)
    ]


def as_seen(machine: Machine, *options: str, user: str = "alice") -> dict[str, Any]:
    """What the lab's oracle says to a user of the machine."""
    done = machine.run(*CURL, *options, ORACLE, user=user)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {"error": done.stderr}


def is_closed(machine: Machine, user: str = "alice") -> bool:
    """Whether the web cannot be reached in clear, by who has its address already."""
    page = f"http://{topology.WEB}/api/ip"
    done = machine.run(*CURL, "--max-time", "5", page, user=user)
    return '"IsTor":false' not in done.stdout


def state_of(machine: Machine) -> str:
    return str(json.loads(machine.run("ttp", "status", "--json").stdout)["state"])


@contextmanager
def idle(machine: Machine, target: str, *prefix: str, user: str = "alice") -> Iterator[Idle]:
    """A connection to the web, that says nothing until a line is written to it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = (*prefix, "python3", "-c", IDLE, target)
    with machine.start(*command, user=user, **pipes) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            yield process, process.stdout
        finally:
            process.kill()


def speak(process: subprocess.Popen[str], heard: IO[str]) -> str:
    """What became of its words."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return heard.readline()


def is_killed(machine: Machine, step: int | str, *words: str) -> bool:
    """Whether ``ttp`` with these words was killed before its step of that number, from 0, or before
    the first of that kind."""
    done = machine.run(PYTHON, "-c", MORTAL, str(step), *words)
    assert done.returncode in (0, -9, 137), done.stderr
    return done.returncode != 0


def rules_of_others(machine: Machine) -> str:
    """Every rule but ours; without times and counters."""
    told = machine.run("sh", "-c", SAVE, check=True).stdout
    ours = machine.run("nft", "--stateless", "list", "table", "inet", "ttp").stdout
    return re.sub(r"(?m)^#.*\n| *\[\d+:\d+\]|^\n", "", told.replace(ours, ""))
