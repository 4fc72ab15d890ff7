"""Ctrl-C and other signals at every stage of what takes a while: one line, the code, nothing left.

Also kill -9 of a lab's holder, while it boots, lives and ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT
from kill_place import dead, descendants
from lab_helpers import TTP, Lab
from nsrun.errors import NsrunError
from nsrun.lab import control
from town import eventually

pytestmark = pytest.mark.lab

NAME = "brief"
STAGES = ("ip netns add gateway", "nft -f", "start uplink", "tor --defaults-torrc")
BOOT = ("making namespaces", "starting relays", "waiting for the first request")
ON_DEMAND = ("run", "--", "true")


@contextmanager
def begun(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, as a shell's job is."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def on_host(lab: Lab, *argv: str) -> list[str]:
    """``ttp`` on the simulated host; if we run in the background, it does not know."""
    return lab.inside("host", "env", "--default-signal=INT", TTP, *argv)


def running(lab: Lab, name: str) -> dict[str, Any]:
    """What a gateway on the simulated host says of itself, if there is one."""
    done = lab.do(*lab.inside_argv("host", TTP, "gateway", "inspect", name))
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def hit(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal the whole group, as a terminal does, and look at what it says."""
    os.killpg(process.pid, number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert number != signal.SIGINT or said.splitlines()[-1].startswith("ttp: interrupted")
    assert "Traceback" not in said


def await_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    assert any(words in line for line in process.stderr), f"it never came to “{words}”"


@pytest.mark.promise("P8")
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_while_a_gateway_is_made(lab: Lab, stage: str) -> None:
    """Whatever step it is at, it is taken back."""
    up = ("gateway", "up", NAME, "--uplink", "slirp4netns", "--verbose")
    with begun(on_host(lab, *up)) as process:
        await_line(process, stage)
        hit(process, signal.SIGINT)
    eventually(lambda: not running(lab, NAME), "its end")


@pytest.mark.promise("P8")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize(
    ("name", "argv"),
    [(NAME, ("gateway", "up", NAME, "--uplink", "slirp4netns")), ("default", ON_DEMAND)],
)
def test_whoever_waits_for_tor_is_killed(
    lab: Lab, number: signal.Signals, name: str, argv: tuple[str, ...]
) -> None:
    """The real network's relays are out of reach here: the gateway never was of use to anybody."""
    with begun(on_host(lab, *argv)) as process:
        eventually(lambda: running(lab, name), "the gateway", 20)
        found = running(lab, name)
        hit(process, number)
    pids = [found["pid"], found["tor"]["pid"], found["uplink"]["pid"]]
    eventually(lambda: all(map(dead, pids)), "its end")
    assert not running(lab, name)


@pytest.mark.promise("P4")
def test_a_gateway_that_somebody_else_waits_for_stays(lab: Lab) -> None:
    """Who comes second waits for Tor as well, and is the last one to leave."""
    with begun(on_host(lab, *ON_DEMAND)) as first:
        eventually(lambda: running(lab, "default"), "the gateway", 20)
        with begun(on_host(lab, *ON_DEMAND)) as second:
            eventually(lambda: running(lab, "default")["waiting"] == 2, "two to wait for it")
            hit(first, signal.SIGINT)
            eventually(lambda: running(lab, "default")["waiting"] == 1, "one to be left")
            hit(second, signal.SIGINT)
    eventually(lambda: not running(lab, "default"), "its end")


@contextmanager
def cleared(lab: Lab, name: str) -> Iterator[None]:
    """Whatever a story does with the lab ``name``, it goes with it."""
    try:
        yield
    finally:
        lab.ttp("lab", "down", name)


@pytest.mark.promise("P8")
@pytest.mark.parametrize("stage", BOOT)
def test_ctrl_c_while_a_lab_boots(lab: Lab, stage: str) -> None:
    """No process of it is left, and no file."""
    name = f"{lab.name}b"
    up = lab.command("env", "--default-signal=INT", TTP, "lab", "up", name)
    with cleared(lab, name):
        with begun(up) as process:
            await_line(process, stage)
            holder = next(pid for pid in descendants(process.pid) if _is_holder(pid))
            inside = [holder, *descendants(holder)]
            hit(process, signal.SIGINT)
        eventually(lambda: all(map(dead, inside)), "the end of its programs")
        down = lab.ttp("lab", "down", name)
        assert (down.returncode, "there is none" in down.stderr) == (2, True), down.stderr


@pytest.mark.promise("P8")
def test_a_starter_tells_of_a_holder_that_was_killed(lab: Lab) -> None:
    """While it boots: one line, and nothing is left."""
    name = f"{lab.name}b"
    with cleared(lab, name), begun(lab.command(TTP, "lab", "up", name)) as process:
        await_line(process, BOOT[1])
        holder = next(pid for pid in descendants(process.pid) if _is_holder(pid))
        os.kill(holder, signal.SIGKILL)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 1, said
        assert f"ttp: cannot start the lab {name}: " in said
        assert "Traceback" not in said


@pytest.mark.promise("P8")
def test_a_starter_does_not_wait_for_a_holder_that_is_stopped(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and ends what there is of the lab."""
    if lab.who == "user":
        return  # the starter is this process
    name, inside = f"{lab.name}b", list[int]()

    def stop(_percent: int, what: str) -> None:
        if what == BOOT[1]:
            holder = next(pid for pid in descendants(os.getpid()) if _is_holder(pid))
            inside.extend([holder, *descendants(holder)])
            os.kill(holder, signal.SIGSTOP)

    monkeypatch.setattr(control, "SILENCE", 3)
    with cleared(lab, name):
        with pytest.raises(NsrunError, match=f"start the lab {name}: its holder is silent for 3"):
            control.up(name, stop)
        assert inside
        eventually(lambda: all(map(dead, inside)), "the end of its programs")
        assert name not in control.names()


def kill_lab(lab: Lab, story: str) -> None:
    """Tell one of tests/kill_lab.py's, as the lab's user."""
    python, program = Path(TTP).with_name("python"), ROOT / "tests" / "kill_lab.py"
    done = lab.do(str(python), str(program), f"{lab.name}k", story, seconds=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.promise("P8")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("story", ["boot", "end"])
def test_death_at_every_statement_of_a_lab(lab: Lab, story: str) -> None:
    """Kill -9 of its holder while it boots, of who ends it: the next command clears up."""
    if lab.who == "root":
        kill_lab(lab, story)


@pytest.mark.torture
@pytest.mark.promise("P8")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("story", ["boot", "end", "ending"])
def test_death_at_every_other_statement_of_a_lab(lab: Lab, story: str) -> None:
    """The same of a user's, and of a holder that ends its programs."""
    if lab.who == "user" or story == "ending":
        kill_lab(lab, story)


def _is_holder(pid: int) -> bool:
    return b"nsrun.lab\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.promise("P8")
def test_a_lab_ends_whoever_is_killed(lab: Lab) -> None:
    """Its holder, while it lives and while it ends; who ends it. The next command clears up."""
    name = f"{lab.name}c"
    with cleared(lab, name):
        kill_in_turn(lab, name)


def kill_in_turn(lab: Lab, name: str) -> None:
    def up() -> list[int]:
        done = lab.ttp("lab", "up", name, "--no-gateway")
        assert done.returncode == 0, done.stderr
        holder = int(json.loads(lab.ttp("lab", "status", "--json", name).stdout)[0]["pid"])
        return [holder, *descendants(holder)]

    def ended(pids: list[int]) -> None:
        eventually(lambda: all(map(dead, pids)), "the end of its programs")

    pids = up()
    os.kill(pids[0], signal.SIGKILL)
    ended(pids)
    pids = up()  # over what it has left
    os.kill(pids[1], signal.SIGSTOP)  # the end has to wait for this one
    with begun(lab.command(TTP, "lab", "down", name)) as down:
        eventually(lambda: dead(pids[-1]), "its end to begin")
        hit(down, signal.SIGKILL)
        os.kill(pids[0], signal.SIGKILL)
    ended(pids)
    assert lab.ttp("lab", "down", name).returncode == 0
    assert lab.ttp("lab", "down", name).returncode == 2
