"""What of --strict needs no kernel: variables, and machines that it does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nsrun.address import BLOCKS
from nsrun.errors import MissingError
from nsrun.plan import Facts, enter_ops
from nsrun.spec import Caller, GatewaySpec, RunSpec, Strict
from nsrun.strict import without_doors

FACTS = Facts(1, 0, 0, (), ipv6=True, nsswitch="", machine="x86_64")
SESSION = {
    "DISPLAY": ":7.0",
    "XAUTHORITY": "/home/u/.Xauthority",
    "WAYLAND_DISPLAY": "wayland-0",
    "XDG_RUNTIME_DIR": "/run/user/1000",
    "SSH_AUTH_SOCK": "/tmp/ssh-1/agent.1",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus,guid=1",
    "SSH_CONNECTION": "192.0.2.1 1 192.0.2.2 22",
    "TMUX": "/tmp/tmux-1000/default,1,0",
}
HARMLESS = {"PATH": "/bin", "HOME": "/home/u", "LANG": "C", "http_proxy": "http://x/"}


@pytest.mark.parametrize(
    ("allowed", "stay"),
    [
        ([], []),
        (["/tmp/.X11-unix/X7"], ["DISPLAY", "XAUTHORITY"]),
        (["/tmp/.X11-unix/X8"], []),
        (["/run/user/1000/wayland-0"], ["WAYLAND_DISPLAY"]),
        (["/tmp/ssh-1/agent.1"], ["SSH_AUTH_SOCK"]),
        (["/run/user/1000/bus"], ["DBUS_SESSION_BUS_ADDRESS"]),
    ],
)
def test_only_variables_of_allowed_sockets_stay(allowed: list[str], stay: list[str]) -> None:
    """The others name doors that are shut, or tell where this machine is."""
    kept = without_doors({**SESSION, **HARMLESS}, allowed)
    assert set(kept) == {*HARMLESS, "XDG_RUNTIME_DIR", *stay}


def test_an_unknown_machine_is_refused() -> None:
    """Without a filter there is nothing strict about it."""
    gateway = GatewaySpec("g", "/r", "/s")
    facts = replace(FACTS, machine="ppc64le")
    spec = RunSpec(("true",), strict=Strict())
    with pytest.raises(MissingError, match="no filter of system calls is known for ppc64le"):
        enter_ops(gateway, facts, BLOCKS[0], Caller(0, 0, ()), False, spec)
