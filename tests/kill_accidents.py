"""What else happens to a gateway, told like the stories of kill_stories.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import host_state
from kill_place import TTP, Place, dead, eventually, has_link, spaces
from mortal import Moment, Mortal
from nsrun import client, linux

CROWD = 20
PAGE = 4096


def crowd(place: Place) -> None:
    """The supervisor, killed under twenty workloads."""
    with place.up() as gateway, ExitStack() as stack:
        for _ in range(CROWD):
            command = place.run("sleep", "60")
            stack.callback(stack.enter_context(subprocess.Popen(command)).kill)
        eventually(lambda: len(_workloads(place)) == CROWD, "all of them", 20)
        pids = [workload["pid"] for workload in _workloads(place)]
        assert all(map(has_link, pids))
        place.case("supervisor", Moment("accident", "under", f"{CROWD} workloads"))
        place.dies(gateway, *pids)
    place.nothing_left()


def race(place: Place) -> None:
    """Of six supervisors at once one is it; when it is killed, of another six another one is."""
    for _ in range(2):
        all_of_them = [place.supervisor(lambda _: False) for _ in range(6)]
        try:
            eventually(partial(_but_one, all_of_them), "five to give way")
            (winner,) = [one for one in all_of_them if not dead(one.pid)]
            eventually(place.answers, "an answer")
            place.ask(do="wait", timeout=20)
            place.works()
            place.case("supervisor", Moment("accident", "after", "a race"))
            place.dies(winner)
        finally:
            for one in all_of_them:
                one.kill()
    place.nothing_left()


def _but_one(racers: list[Mortal]) -> bool:
    return sum(dead(one.pid) for one in racers) == len(racers) - 1


def reboot(place: Place) -> None:
    """What is in the runtime directory is gone, the guards are as before."""
    with place.up() as gateway:
        place.recovers(gateway)  # and Tor has written its guards down
    guards = _guards(place)
    with place.up() as gateway:
        place.works()
        place.dies(gateway)
    shutil.rmtree(os.environ["TTP_RUNTIME_DIR"])
    with place.up() as gateway:
        assert _guards(place) == guards != []
        place.case("all", Moment("accident", "by", "a reboot"))
        place.recovers(gateway)
    place.nothing_left()


def meddling(place: Place) -> None:
    """Somebody flushes the gateway's rules: closed. Deletes its uplink: it comes back."""
    with place.up() as gateway:
        _inside(gateway, "ip", "link", "delete", "uplink")
        eventually(lambda: "uplink" in _links(gateway), "another uplink")
        place.case("uplink", Moment("accident", "by", "ip link delete"))
        place.recovers(gateway)
    with place.up() as gateway, place.busy():
        _inside(gateway, "nft", "flush", "ruleset")
        place.stray(gateway.pid, first=1)  # of the gateway's own programs the rules were the guard
        said = ""
        for _ in range(5):  # more than are ready: the next ones cannot be made
            run = place.run("curl", "-sS", "--max-time", "0.3", "http://11.200.0.80")
            done = subprocess.run(run, capture_output=True, text=True)
            assert done.returncode != 0
            said += done.stderr
        place.case("rules", Moment("accident", "by", "nft flush ruleset"))
        assert "ttp: cannot " in said
        assert "Traceback" not in said
        inspected = place.ask(do="inspect")
        assert inspected["rules"] == []
        assert inspected["problem"]
        downs = [subprocess.Popen((TTP, "gateway", "down", place.spec.name)) for _ in range(2)]
        codes = sorted(down.wait(20) for down in downs)  # whoever comes second may find it gone
        assert codes[0] == 0
        assert codes[1] in (0, 1, 2)
        assert gateway.wait() == 0
    place.nothing_left()


def stopped(place: Place) -> None:
    """The supervisor, stopped when a client needs it to map its users: it is not waited for."""

    def wanted(moment: Moment) -> bool:
        return moment.plan == "enter" and moment.step.startswith("new_users")

    with place.up() as gateway:
        client.PATIENCE, patience = 1, client.PATIENCE  # the client is a fork of ours
        asking = place.client("run", "-g", place.spec.name, "--", "true", wanted=wanted)
        client.PATIENCE = patience
        place.case("supervisor", asking.advance(0))
        os.kill(gateway.pid, signal.SIGSTOP)
        try:
            asking.go()
            assert os.waitstatus_to_exitcode(asking.wait()) == 125
        finally:
            os.kill(gateway.pid, signal.SIGCONT)
        assert "the supervisor is silent" in place.said()
        assert "Traceback" not in place.said()
        place.recovers(gateway)
    place.nothing_left()


def full(place: Place) -> None:
    """A disk that is full sooner or later: the gateway is up, or says why not, and then is gone."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    place.host = host_state()
    disk = place.home / "disk"
    disk.mkdir()
    elsewhere = place.spec
    runtime, state = (str(disk / name / "gateways") for name in ("run", "state"))
    place.spec = replace(elsewhere, runtime=f"{runtime}/full", state=f"{state}/full")
    outcomes = set()
    for free in (*range(12), 16, 24, 32, 64):
        linux.mount("tmpfs", str(disk), "tmpfs", 0, "size=1M,nr_inodes=200,mode=711")
        with (disk / "ballast").open("wb") as ballast:
            pages = os.statvfs(disk).f_bavail - free
            ballast.write(bytes(PAGE * pages))
        gateway = place.supervisor(lambda _: False)
        try:
            outcome = _outcome(place, gateway)
            place.case("disk", Moment("accident", outcome, f"with {free} pages free"))
            refused, said = outcome == "refused", (place.home / "supervisor.log").read_text()
            assert os.waitstatus_to_exitcode(gateway.wait()) == refused, said
            assert ('{"error"' in said) == refused, said
            assert "Traceback" not in said, said
            assert not list(Path(runtime).glob("*")), "a directory is left"
            outcomes.add(outcome)
        finally:
            gateway.kill()
            linux.umount(str(disk))
    assert outcomes == {"up", "refused"}
    place.spec = elsewhere
    place.nothing_left()


def _outcome(place: Place, gateway: Mortal) -> str:
    """Whether the gateway comes up; if so, it is asked to go."""
    while not dead(gateway.pid):
        with suppress(client.NotHereError, client.RefusedError):
            place.ask(do="inspect")  # answered once the last step is done
            place.stray(gateway.pid)
            place.ask(do="down")
            return "up"
        time.sleep(0.005)  # the interval of the poll
    return "refused"


def _workloads(place: Place) -> list[dict[str, Any]]:
    return list(place.ask(do="inspect")["workloads"])


def _guards(place: Place) -> list[str]:
    state = Path(f"{place.spec.state}/tor/state").read_text()
    return sorted(line.split()[3] for line in state.splitlines() if line.startswith("Guard "))


def _inside(gateway: Mortal, *command: str) -> str:
    """Run a command in the gateway, as its root."""
    (space, *_) = spaces(gateway.pid)
    there: tuple[str, ...] = ("nsenter", f"--net={space}")
    if not Path(f"/proc/{gateway.pid}/ns/user").samefile("/proc/self/ns/user"):
        users = f"--user=/proc/{gateway.pid}/ns/user"
        there = ("nsenter", users, "--preserve-credentials", f"--net={space}")
    return subprocess.run((*there, *command), capture_output=True, text=True, check=True).stdout


def _links(gateway: Mortal) -> str:
    return _inside(gateway, "ip", "-o", "link")


ACCIDENTS: dict[str, Callable[[Place], None]] = {
    "crowd": crowd,
    "race": race,
    "reboot": reboot,
    "meddling": meddling,
    "stopped": stopped,
    "full": full,
}
