"""What ``make demo`` shows: a private Tor network, curl through it, strays, and what the wires saw.

    ttp run ══ gateway ═══gw-demo═══┐
                                    ├ router ── internet with Tor in it
    simulated host ═══════p-host════┘

Taps stand on both wires, out of the workload's reach. As a control, a packet that must not get out
of ``ttp run`` is sent from the simulated host without it: there, the same tap has to see it.
Succeeds if curl left by an exit, both wires are contained and the control was seen.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nsrun.errors import ExitCode, NsrunError
from nsrun.lab.topology import GATEWAY, GATEWAY6, LAN_WEB, METADATA, ROUTER, ROUTER6, WEB
from nsrun.leak.capture import tap
from nsrun.leak.verdict import Neighbours, TcpToRelays, Value, as_text, judge, worst

LAB = "demo"
TTP = str(Path(sys.executable).with_name("ttp"))
RUN = ("run", "--gateway", LAB, "--")
STRAY = "ttp-demo-stray"


def python(code: str) -> tuple[str, ...]:
    return ("python3", "-c", f"from socket import *; {code}")


UDP = python(
    "s = socket(AF_INET, SOCK_DGRAM); s.settimeout(2); "
    f's.connect(("{WEB}", 7)); s.send(b"{STRAY}"); print("answer:", s.recv(99))'
)
PING = python(
    "s = socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP); "
    f's.sendto(b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0", ("{WEB}", 0))'
)
NEIGHBOURS = python(
    "s = socket(AF_INET6, SOCK_DGRAM); "
    f'print(s.sendto(b"{STRAY}", ("ff02::1%eth0", 9)), "bytes sent, for the wires to tell")'
)
STRAYS = {
    "UDP": UDP,
    "ICMP": PING,
    "the LAN": ("curl", "-sS", "-m", "5", f"http://{LAN_WEB}/"),
    "the cloud's metadata service": ("curl", "-sS", "-m", "5", f"http://{METADATA}/"),
    "all neighbours, by IPv6 link-local multicast": NEIGHBOURS,
}


def main() -> int:
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    if any(lab["name"] == LAB for lab in lab_status()):
        print(f"demo: the lab {LAB} is up already\nhint: ttp lab down {LAB}", file=sys.stderr)
        return 1
    print("A private Tor network, with a LAN, a host on it and a gateway beside that:", flush=True)
    try:
        print(f"$ ttp lab up {LAB}", flush=True)
        subprocess.run((TTP, "lab", "up", LAB), check=True)
        return 0 if tour() else 1
    except NsrunError as error:
        print(f"demo: {error}\nhint: {error.hint}", file=sys.stderr)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough: the lab still has to go
        print(f"\n$ ttp lab down {LAB}", flush=True)
        down = subprocess.run((TTP, "lab", "down", LAB), stderr=subprocess.PIPE, text=True)
        if down.returncode != ExitCode.USAGE:  # which says that there is none to end
            print(down.stderr, end="", file=sys.stderr)
    return 1


def tour() -> bool:
    """Everything between up and down; whether all went as promised."""
    lab = lab_status(LAB)[0]
    wire, host_wire = lab["wires"]["gateway"][1], lab["wires"]["host"][1]
    relays = {(address, lab["or_port"]) for both in lab["relays"].values() for address in both}
    ours = frozenset({GATEWAY, GATEWAY6})
    allowed = (
        TcpToRelays(ours, frozenset(relays)),
        Neighbours(ours | {ROUTER, ROUTER6}),
    )
    router = (TTP, *inside("router"))
    print(f"\nTaps on {wire}, the gateway's uplink, and on {host_wire}, the host's wire.")
    with tempfile.TemporaryDirectory(prefix="ttp-demo-") as name:
        files = Path(name)
        with (
            tap(wire, files / "gateway.pcap", router) as gateway,
            tap(host_wire, files / "host.pcap", router) as host,
        ):
            print("\nA command behind Tor:")
            left_by_exit = look_up(lab)
            print("\nWhat Tor does not carry goes nowhere:")
            for what, command in STRAYS.items():
                print(f"# {what}")
                show(*RUN, *command)
            verdicts = [
                judge(wire, gateway.stop(), allowed, expect_some=True),
                judge(host_wire, host.stop(), ()),
            ]
        print("\nControl: the same UDP packet from the host itself, without ttp run:")
        with tap(host_wire, files / "control.pcap", router) as control:
            show(*inside("host"), *UDP)
            strays = [leak.frame for leak in judge(host_wire, control.stop(), ()).leaks]
    seen = [frame for frame in strays if STRAY.encode() in frame.data]
    print(f"{host_wire} saw {seen[0] if seen else 'nothing of it: these taps prove nothing'}")
    print(f"\nVerdict:\n{as_text(verdicts)}")
    return left_by_exit and bool(seen) and worst(verdicts) is Value.CONTAINED


def look_up(lab: dict[str, Any]) -> bool:
    """curl through Tor: does the world see the address of an exit?"""
    try:
        seen = json.loads(show(*RUN, "curl", "-s", "https://check.torproject.org/api/ip"))
    except ValueError:
        print("there was no answer")
        return False
    exits = {address: name for name, both in lab["exits"].items() for address in both}
    print(f"exit address {seen['IP']}, of {exits.get(seen['IP'], 'no exit of the lab')}")
    print(f"IsTor {json.dumps(seen['IsTor'])}")
    return seen["IsTor"] is True and seen["IP"] in exits


def show(*arguments: str) -> str:
    """Run ttp as in a shell. Prints and returns the last line of its output.

    Of a traceback, that is the one which says what was refused.
    """
    print(f"$ {shlex.join(('ttp', *arguments))}", flush=True)
    begin = time.monotonic()
    done = subprocess.run(
        (TTP, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(f"{last}  [exit code {done.returncode}, {time.monotonic() - begin:.2f} s]", flush=True)
    return last


def inside(place: str) -> tuple[str, ...]:
    return ("lab", "run", "--lab", LAB, "--in", place, "--")


def lab_status(*names: str) -> list[dict[str, Any]]:
    return ask("lab", "status", "--json", *names)


def ask(*arguments: str) -> list[dict[str, Any]]:
    asked = subprocess.run((TTP, *arguments), stdout=subprocess.PIPE, check=True, timeout=60)
    return list(json.loads(asked.stdout))


if __name__ == "__main__":
    sys.exit(main())
