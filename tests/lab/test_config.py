"""Configuration file and variables of a client, on the way through a supervisor."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab

pytestmark = pytest.mark.lab


@contextmanager
def configured(lab: Lab, text: str) -> Iterator[str]:
    """A configuration file of the lab's user: the assignment of TTP_CONFIG."""
    file = lab.home / "config.toml"
    file.write_text(text)
    file.chmod(0o644)
    try:
        yield f"TTP_CONFIG={file}"
    finally:
        file.unlink()


def run(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """``env WORDS``, where the last words are those after ``ttp run``."""
    at = next(i for i, word in enumerate(words) if "=" not in word)
    return lab.do("env", *words[:at], TTP, "run", *words[at:])


def test_a_running_gateway_heeds_the_client_s_defaults(lab: Lab) -> None:
    """The gateway is found by the file, the rest is sent; variables come before the file."""
    links = ("--", "cat", "/proc/net/if_inet6")
    with configured(lab, f"[run]\ngateway = '{lab.name}'  # mine\nno-ipv6 = true\n") as file:
        assert run(lab, file, *links).stdout == ""
        assert "eth0" in run(lab, file, "TTP_NO_IPV6=0", *links).stdout
        done = run(lab, file, "TTP_GATEWAY=nobody-knows", *links)
        assert done.returncode == 125
        assert "cannot use the gateway nobody-knows: it is not up" in done.stderr
    assert "eth0" in run(lab, f"TTP_GATEWAY={lab.name}", *links).stdout


def test_a_mistake_in_the_file_runs_nothing(lab: Lab) -> None:
    """With a gateway that is up, too."""
    with configured(lab, f"[run]\ngateway = '{lab.name}'\nno-ipv7 = true\n") as file:
        done = run(lab, file, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (125, "")
    assert "[run] no-ipv7: no such setting" in done.stderr


def test_a_gateway_that_the_file_describes_starts_on_demand(lab: Lab) -> None:
    """With its own settings; and a variable of whoever started it is not in force for others."""
    fragment = lab.home / "bridges"
    fragment.write_text(str(lab.status()["client_torrc"]))
    fragment.chmod(0o644)
    name = f"{lab.name}-cf"
    text = (
        f"[run]\ngateway = '{name}'\n[gateway]\nidle = 7\nuplink = ['pasta']\n"
        f"[gateway.{name}]\ntorrc = 'bridges'\nuplink = ['slirp4netns']\n"
    )
    with configured(lab, text) as file:

        def on_host(*words: str) -> subprocess.CompletedProcess[str]:
            return lab.do(*lab.inside_argv("host", "env", file, *words))

        try:
            done = on_host("TTP_NO_IPV6=1", TTP, "run", "--", "curl", "-sS", PLAIN_ORACLE)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["IsTor"] is True
            found = json.loads(on_host(TTP, "gateway", "inspect", name).stdout)
            assert (found["uplink"]["kind"], found["idle"]) == ("slirp4netns", 7)
            assert "eth0" in on_host(TTP, "run", "--", "cat", "/proc/net/if_inet6").stdout
        finally:
            on_host(TTP, "gateway", "down", name)
