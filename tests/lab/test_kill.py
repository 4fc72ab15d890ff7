"""Kill -9 at every step of every plan: nothing gets out, and the next command leaves nothing.

    squatter ══ gateway ═ uplink ═ host ══p-host══ router ── internet with Tor in it
    strays from within ┘

The supervisor, Tor, the uplink and the client are the real ones, on the simulated host of a lab.
They stop before each step of the plan (tests/mortal.py), are killed there, and what they leave is
looked at (tests/kill_place.py, kill_stories.py; kill_enter.py and kill_askers.py for clients).
kill_plans.py says whose plans these are; tests/unit/test_kill_matrix.py, that none is left out.
kill_accidents.py has what else befalls a gateway: a crowd, a race, a reboot, somebody who meddles,
a full disk. Meanwhile a tap on the host's wire
allows TCP to relays only. `make torture` goes to every program and file within the steps, too.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import ROOT
from kill_plans import IN_A_USERS_LAB, STORIES, TORTURE
from lab_helpers import TTP, Lab
from nsrun.lab import topology
from nsrun.leak.verdict import Value, Verdict, as_text, judge
from probe import TOKEN
from users import USER, home_of, prefix_of

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

ADDRESS, ADDRESS6 = "192.168.77.60", "2001:db8:77::60"
ON_LAN = {
    "netns": "/run/netns/router",
    "bridge": "lan0",
    "address": f"{ADDRESS}/24",
    "router": topology.ROUTER,
    "address6": f"{ADDRESS6}/64",
    "router6": topology.ROUTER6,
}

# who may speak to relays: a bridge also floods what is for a gateway that has just died
OURS = (topology.HOST, topology.HOST6, ADDRESS, ADDRESS6, topology.GATEWAY, topology.GATEWAY6)


@contextmanager
def prefix(lab: Lab, who: str) -> Iterator[list[str]]:
    """On the simulated host: as root, as a user by sudo, or as a user without any."""
    match who:
        case "sudo":
            yield ["env", "SUDO_UID=65534", "SUDO_GID=65534"]
        case "user":
            with home_of(USER) as home:
                yield prefix_of(USER, home)
        case _:
            yield []


def tell(
    lab: Lab, story: str, who: str, uplink: str, defect: str = ""
) -> tuple[dict[str, list[str] | str], Verdict]:
    """What a story says of itself, and what was on the wire meanwhile."""
    wire = "p-host"
    if uplink == "lab":
        wire, uplink = "lan0", json.dumps(ON_LAN)  # the bridge itself: every port's frames are seen
        subprocess.run(lab.inside("router", "ip", "link", "set", wire, "promisc", "on"), check=True)
    python, program = Path(TTP).with_name("python"), ROOT / "tests" / "kill_stories.py"
    arguments = (story, uplink, str(lab.status()["client_torrc"]), defect)
    with lab.tap("router", wire) as tap, prefix(lab, who) as become:
        done = subprocess.run(
            lab.inside("host", *become, str(python), str(program), *arguments),
            capture_output=True,
            text=True,
            timeout=280,
        )
        verdict = judge(wire, tap.stop(), lab.rules(*OURS), expect_some=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)), verdict


def holds(lab: Lab, story: str, who: str, uplink: str) -> None:
    said, verdict = tell(lab, story, who, uplink)
    cases = "\n".join(said["cases"])
    assert not said["trouble"], f"{cases}\n{said['trouble']}"
    assert verdict.value is Value.CONTAINED, f"{cases}\n{as_text([verdict])}"
    assert said["cases"]


@pytest.mark.promise("P4", "P8")
@pytest.mark.parametrize(("story", "who", "uplink"), STORIES)
def test_death_at_every_step(lab: Lab, story: str, who: str, uplink: str) -> None:
    """No packet outside, and the host as before once the next command has run."""
    if lab.who == "root" or (story, who, uplink) in IN_A_USERS_LAB:
        holds(lab, story, who, uplink)


@pytest.mark.torture
@pytest.mark.promise("P4", "P8")
@pytest.mark.parametrize(("story", "who", "uplink"), TORTURE)
def test_death_at_every_moment(lab: Lab, story: str, who: str, uplink: str) -> None:
    """The same for all other pairs, and before every program and file inside a step."""
    if lab.who == "root":
        holds(lab, story, who, uplink)


@pytest.mark.promise("P12")
@pytest.mark.parametrize(("defect", "uplink"), [("open-first", "pasta"), ("no-sweep", "veth")])
def test_a_defect_is_found(lab: Lab, defect: str, uplink: str) -> None:
    """They can fail: with the uplink before the rules, with a sweep that does nothing."""
    if lab.who == "user" and uplink == "veth":
        return  # it needs root
    said, verdict = tell(lab, "start", "root", uplink, defect)
    if defect == "open-first":
        assert verdict.value is Value.LEAK, as_text([verdict])
        assert any(TOKEN in leak.frame.data for leak in verdict.leaks)
    else:
        assert "the host is not as before" in said["trouble"]
        assert "ttp undo" in said["trouble"]
