"""The programs that ttp runs: whether they are there, run, and are new enough."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

from nsrun import facts
from nsrun.doctor import MISSING, OK, WARNING, Finding
from nsrun.errors import MissingError

VERSION_OPTION = {"ip": "-V", "openssl": "version"}
FOR_LABS = {"dnsmasq": "dnsmasq-base", "openssl": "openssl"}


def look() -> list[Finding]:
    """Python, and each program that a gateway needs. Uplinks are tried in trials.py."""
    python = Finding(
        "python", OK, f"{platform.python_version()}, {os.path.realpath('/proc/self/exe')}"
    )
    needed = {name: package for name, package in facts.PROGRAMS.items() if name != "tor"}
    found = [_program(*one, MISSING) for one in needed.items()]
    return [python, _tor(), *found, *(_program(*one, WARNING) for one in FOR_LABS.items())]


def _tor() -> Finding:
    try:
        version = facts.tor_version()
    except MissingError as error:
        return Finding("tor", MISSING, error.cause, error.hint)
    return Finding("tor", OK, f"{version}, {_path('tor')}")


def _program(name: str, package: str, without: str) -> Finding:
    """Its first line about its version; that it can be run at all is what counts."""
    install = f"sudo apt-get install {package}"
    path = _path(name)
    if path is None:
        labs = "" if without == MISSING else "; only labs need it"
        return Finding(name, without, f"not installed{labs}", install)
    try:
        asked = (path, VERSION_OPTION.get(name, "--version"))
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, without, f"{path} does not run: {error}", install)
    said = (done.stdout or done.stderr).strip().splitlines()
    return Finding(name, OK, f"{said[0] if said else '?'}, {path}")


def _path(name: str) -> str | None:
    return shutil.which(name, path=facts.search_path())
