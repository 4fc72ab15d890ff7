"""The systemd units of a gateway and of a whole host, and what a gateway tells systemd."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from harness import ROOT
from nsrun.gateway.service import teller
from nsrun.host import session, units

UNIT = ROOT / "nsrun" / "systemd" / "ttp-gateway@.service"


def verify(unit: Path, text: str) -> subprocess.CompletedProcess[str]:
    unit.write_text(text.replace("/usr/local/bin/ttp", str(ROOT / "nsrun" / "ttp")))
    command = ("systemd-analyze", "verify", str(unit))
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    """It complains about what it does not know; here, to show that, about a misspelt line."""
    text = UNIT.read_text()
    done = verify(tmp_path / "ttp-gateway@default.service", text)
    assert (done.returncode, done.stderr) == (0, "")
    wrong = text.replace("LockPersonality", "LookPersonality")
    assert "LookPersonality" in verify(tmp_path / "ttp-gateway@wrong.service", wrong).stderr


@pytest.mark.parametrize("name", ["ttp-closed.service", "ttp.service"])
def test_systemd_understands_the_units_of_a_whole_host(tmp_path: Path, name: str) -> None:
    """Each with the other beside it, which it names."""
    for one in ("ttp-closed.service", "ttp.service"):
        text = UNIT.with_name(one).read_text()
        (tmp_path / one).write_text(text.replace("/usr/local/bin/ttp", str(ROOT / "nsrun" / "ttp")))
    done = verify(tmp_path / name, UNIT.with_name(name).read_text())
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_understands_the_unit_of_the_watchdog_and_nothing_binds_it(tmp_path: Path) -> None:
    """T12: Tor's restart, by the watchdog itself too, must not end the watchdog."""
    text = units.watchdog("/usr/bin/python3", 15.0)
    done = verify(tmp_path / session.WATCHDOG, text)
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"Requires", "BindsTo", "PartOf"} & {line.split("=")[0] for line in text.split()}


@pytest.mark.parametrize("name", ["notify", "@ttp-test-notify"])
def test_the_manager_is_told_what_the_supervisor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """sd_notify(3), to a path or an abstract socket; children do not inherit the right to it."""
    address = f"\0{name[1:]}{os.getpid()}" if name.startswith("@") else str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        effects: list[str] = []
        tell = teller(effects.append)
        assert "NOTIFY_SOCKET" not in os.environ
        tell({"effect": "ip link"})
        tell({"progress": 45, "summary": "Loading"})
        tell({"ready": True})
        manager.settimeout(1)
        assert manager.recv(100) == b"STATUS=Tor 45 % Loading"
        assert manager.recv(100) == b"READY=1"
        assert effects == ["ip link"]
        for percent in range(1000):  # which nobody reads: it is not waited for
            tell({"progress": percent, "summary": "Loading"})


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, and when the manager has gone."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    teller(None)({"ready": True})
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
    teller(None)({"ready": True})
