"""Whom the stories of death are about, and the plans that they walk through: together, all.

tests/unit/test_kill_matrix.py builds every plan that there can be, and looks for each of its steps
in one of these. So a plan that gets a step which nobody is killed at turns that test red.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nsrun import ruleset
from nsrun.address import BLOCKS
from nsrun.cli.run import parse
from nsrun.plan import (
    Facts,
    Joined,
    Op,
    Workload,
    enter_ops,
    loose_link_steps,
    option_steps,
    workload_steps,
)
from nsrun.spec import Caller, GatewaySpec, RunSpec
from nsrun.steps import AttachNamespace, OpenNamespace, SetElements, Step

BLOCK = BLOCKS[0]
NAME = "mortal"
READY = 3  # workloads that a gateway has in stock; they are the first
GIVEN = "172.18.0.2"  # by an engine, to its container


@dataclass(frozen=True)
class Command:
    """``ttp VERB OPTIONS COMMAND``; ``{file}`` is a new file, ``{socket}`` one that is there."""

    options: tuple[str, ...] = ()
    verb: str = "run"
    guest: bool = False

    def words(self, *command: str, file: str = "/f", socket: str = "/s") -> list[str]:
        """The command line of ``ttp``."""
        options = [word.format(file=file, socket=socket) for word in self.options]
        join = ["busy"] if self.verb == "exec" else []
        return [self.verb, "--gateway", NAME, *options, *join, "--", *command]

    @property
    def spec(self) -> RunSpec:
        """As the supervisor understands it."""
        defaults: dict[str, object] = {"files": [], "environment": {}}
        request = {"do": self.verb, "gateway": NAME, "shell": "/bin/sh", "defaults": defaults}
        found = parse({**request, "arguments": self.words("true")[1:]})
        assert found is not None, self
        return found

    def enter(
        self, gateway: GatewaySpec, facts: Facts, caller: Caller, nested: bool
    ) -> tuple[Op, ...]:
        """What the client does to itself, by plan."""
        joined = Joined(1, ()) if self.verb == "exec" else None
        at = (gateway, facts, BLOCK, caller, nested, self.spec)
        return enter_ops(*at, guest=self.guest, joined=joined)


ALL_OPTIONS = ("--no-ipv6", "--isolate", "destination", "--socks", "--pcap", "{file}")

#: Stories in which a client is killed at each operation by which it becomes the command.
ENTERING = {
    "enter": Command(),
    "exec": Command(verb="exec"),
    "strict": Command(("--strict", "--workdir", "/", "--allow-socket", "{socket}")),
    "recorded": Command(("--pcap", "{file}")),
    "recorded strict": Command(("--pcap", "{file}", "--strict")),
    "enter as a guest": Command(guest=True),
    "strict as a guest": Command(("--strict",), guest=True),
    "exec as a guest": Command(verb="exec", guest=True),
}


@dataclass(frozen=True)
class Asker:
    """Somebody for whom the supervisor carries out ``steps``, which mortal.py counts to ``plans``.

    ``steps`` are those of his process, and of the first workload that he can get.
    """

    plans: tuple[str, ...]
    steps: Callable[[int], tuple[Step, ...]]
    command: Command | None = None
    undone: Callable[[int], tuple[Step, ...]] | None = None

    def undo(self, pid: int) -> tuple[Step, ...]:
        """What takes it back at the workload's end."""
        inverses = [step.undo() for step in reversed((self.undone or self.steps)(pid))]
        return tuple(inverse for inverse in inverses if inverse is not None)


def _of_a_command(command: Command) -> Asker:
    first = Workload(BLOCK, 2)
    options = option_steps(first, command.spec)
    return Asker(("option",), lambda _: options, command, lambda _: workload_steps(first) + options)


def _of_a_guest(pid: int) -> tuple[Step, ...]:
    workload = Workload(BLOCK, 2 + READY)
    options = option_steps(workload, Command(("--isolate", "connection", "--socks")).spec)
    return workload_steps(workload, AttachNamespace("workload", pid, 0)) + options


def _of_a_container(_pid: int) -> tuple[Step, ...]:
    return workload_steps(Workload(BLOCK, 2 + READY), OpenNamespace("workload", 0, empty=True))


def _of_an_engine() -> Asker:
    workload = Workload(BLOCK, 2 + READY, GIVEN)
    engine = OpenNamespace("workload", 0, empty=False)
    link = loose_link_steps(workload, engine, "ttp7")
    pairs = zip((workload.address4, workload.address6), map(str, BLOCK.identity(1)), strict=True)
    renewed = tuple(
        SetElements("gateway", ruleset.set_identity(*pair, None), ruleset.drop_identity(*pair))
        for pair in pairs
    )
    # the identities go last
    return Asker(
        ("plug", "refresh"), lambda _: link + renewed, undone=lambda _: renewed[::-1] + link
    )


#: Stories in which the supervisor is killed at each step that it takes for somebody who asks.
ASKING = {
    "options": _of_a_command(Command(ALL_OPTIONS)),
    "connections": _of_a_command(Command(("--isolate", "connection", "--socks"))),
    "guest": Asker(
        ("guest", "option"),
        _of_a_guest,
        Command(("--isolate", "connection", "--socks"), guest=True),
    ),
    "container": Asker(("plug",), _of_a_container),
    "engine": _of_an_engine(),
}

#: story, who tells it, uplink
STORIES = [
    *(("start", "root", uplink) for uplink in ("pasta", "slirp4netns", "lab")),
    ("start", "user", "pasta"),
    ("deep", "root", "veth"),  # all that it does to the host is within one step
    *(("parts", "root", uplink) for uplink in ("pasta", "veth")),
    ("stop", "root", "pasta"),
    ("workload", "root", "pasta"),
    ("workload", "user", "pasta"),
    ("given", "root", "pasta"),
    *(("enter", who, "pasta") for who in ("root", "sudo", "user")),
    *((story, "root", "pasta") for story in ENTERING if story != "enter"),
    *((story, "root", "pasta") for story in ASKING if story != "connections"),
    *((story, "root", "pasta") for story in ("crowd", "race", "reboot")),
    *((story, "root", "pasta") for story in ("meddling", "stopped", "full")),
]
IN_A_USERS_LAB = [("start", "root", "lab"), ("enter", "root", "pasta")]
TORTURE = [
    *(("deep", "root", uplink) for uplink in ("pasta", "slirp4netns", "lab")),
    *(("deep", "user", uplink) for uplink in ("pasta", "slirp4netns")),
    *(("parts", "root", uplink) for uplink in ("slirp4netns", "lab")),
    *((story, "root", "veth") for story in ("stop", "workload", "given", "enter")),
    *((story, "user", "pasta") for story in ("parts", "stop", "given", "strict")),
    *((story, "user", "pasta") for story in ("exec", "recorded", "recorded strict", "options")),
    ("strict", "sudo", "pasta"),
    ("connections", "root", "pasta"),
    *((story, "user", "slirp4netns") for story in ("crowd", "race", "reboot", "meddling")),
    *(
        (story, "user", "slirp4netns")
        for story in ("start", "parts", "stop", "workload", "given", "enter")
    ),
]
