"""The driver as a service of systemd, which listens for it: dockerd never waits for a dead one.

With it comes a service that starts, when Docker has, what this could not (keeper.py).

``root`` is the directory of another system, as systemctl(1) takes it: one that an image is made of.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import nsrun
from nsrun.errors import NsrunError, UsageError

UNITS = ("ttp-docker-driver.socket", "ttp-docker-driver.service", "ttp-docker-revive.service")
ENABLED = (UNITS[0], UNITS[2])
DIRECTORY = "etc/systemd/system"  # of units that no package has brought
RUNNING = Path("/run/systemd/system")  # sd_booted(3)


def install(program: str, root: Path) -> None:
    """Write the units, for ``program``, and enable them; on a running system start the socket.

    What fails leaves nothing. Raises NsrunError.
    """
    doing = "install the driver"
    _check(doing, root)
    directory = root / DIRECTORY
    with ExitStack() as back:
        for name in UNITS:
            text = Path(nsrun.__file__).with_name("systemd").joinpath(name).read_text()
            if not (directory / name).exists():  # else it is a working one's
                back.callback((directory / name).unlink, missing_ok=True)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / name).write_text(text.replace("/usr/local/bin/ttp", program))
            except OSError as error:
                raise NsrunError(doing, f"{error.filename}: {error.strerror}") from error
        back.callback(partial(_systemctl, doing, root, "disable", *ENABLED, check=False))
        _reload(doing, root)
        _systemctl(doing, root, "enable", *ENABLED)
        if _is_ours(root):
            # a driver of before the installation is of another version
            _systemctl(doing, root, "stop", *UNITS, check=False)
            _systemctl(doing, root, "start", UNITS[0])
        back.pop_all()


def uninstall(root: Path) -> None:
    """Stop and disable the units, and remove them. Raises NsrunError."""
    doing = "uninstall the driver"
    _check(doing, root)
    files = [root / DIRECTORY / name for name in UNITS]
    if not any(file.exists() for file in files):
        raise UsageError(doing, "it is not installed")
    if _is_ours(root):
        _systemctl(doing, root, "stop", *UNITS)
    _systemctl(doing, root, "disable", *ENABLED)
    for file in files:
        file.unlink(missing_ok=True)
    _reload(doing, root)


def _check(doing: str, root: Path) -> None:
    """Raises UsageError unless it can be done, and by us."""
    if os.geteuid() != 0:
        raise UsageError(doing, "only root can", "use sudo")
    if _is_ours(root) and not RUNNING.is_dir():
        hint = "run `ttp docker driver serve` by what starts services here"
        raise UsageError(doing, "systemd does not run here", hint)


def _is_ours(root: Path) -> bool:
    return root == Path("/")


def _reload(doing: str, root: Path) -> None:
    if _is_ours(root):
        _systemctl(doing, root, "daemon-reload")


def _systemctl(doing: str, root: Path, verb: str, *units: str, check: bool = True) -> None:
    command: Sequence[str] = ("systemctl", "--quiet", verb, *units)
    if not _is_ours(root):
        command = ("systemctl", "--quiet", "--root", str(root), verb, *units)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NsrunError(doing, f"systemctl: {error.strerror}", "install systemd") from error
    if check and done.returncode:
        said = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise NsrunError(doing, f"{' '.join(command)}: {said}", "journalctl --unit docker")
