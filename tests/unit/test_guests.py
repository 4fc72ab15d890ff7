"""What root's supervisor makes of the request of another user: nothing but text."""

from __future__ import annotations

import asyncio
import os

import pytest
from typer.main import get_command

from nsrun.cli.commands import app
from nsrun.errors import GatewayError, UsageError
from nsrun.gateway import guests


def test_no_option_of_a_run_names_a_file_that_parsing_would_look_at() -> None:
    """A parameter of a path's type is looked up when it is parsed: here, by root, for anybody."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    kinds = {param.name: param.type.name for param in commands["run"].params}
    assert {"gateway", "env_file", "workdir", "pcap"} <= kinds.keys()
    assert not {name for name, kind in kinds.items() if kind in ("path", "file", "filename")}
    up = {param.name: param.type.name for param in commands["gateway"].commands["up"].params}
    assert up["torrc"] == "file"  # control: this is how one that is looked at shows


def test_who_calls_is_what_the_kernel_says() -> None:
    """Of what a guest says of himself only paths are kept, which only he will use."""
    said = {"uid": 0, "gid": 0, "groups": [0], "sudo_uid": 0, "user_namespace": 1}
    said |= {"bus": "/b", "runtime_dir": "/r", "own": ["/o"]}
    found = guests.caller(1000, 1001, (27,), said)
    assert (found["uid"], found["gid"], found["groups"], found["sudo_uid"]) == (
        1000,
        1001,
        (27,),
        -1,
    )
    assert (found["bus"], found["runtime_dir"], found["own"]) == ("/b", "/r", ["/o"])
    with pytest.raises(UsageError):
        guests.caller(1000, 1001, (27,), {**said, "own": None})


def test_a_guest_is_in_the_group() -> None:
    """As his own group or one of the others; only root has guests, and names a group."""
    shared, root = guests.Guests(54300), os.geteuid() == 0
    assert shared.welcome(54300, ()) is root
    assert shared.welcome(1, (2, 54300)) is root
    assert not shared.welcome(1, (2, 3))
    assert not guests.Guests(None).welcome(0, (0,))


def test_each_guest_has_seats_of_his_own() -> None:
    """When one has taken all of his, another is still served; what is left can be taken again."""

    async def take() -> None:
        shared = guests.Guests(1)
        held = [shared.seat(1) for _ in range(guests.MOST_REQUESTS)]
        for seat in held:
            seat.__enter__()
        with pytest.raises(GatewayError, match="at once already"), shared.seat(1):
            pass
        with shared.seat(2):
            pass
        held[0].__exit__(None, None, None)
        with shared.seat(1):
            pass

    asyncio.run(take())
