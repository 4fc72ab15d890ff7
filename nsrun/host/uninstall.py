"""``ttp uninstall``: take back what ``make install`` has put on a machine, and what came of it.

What an administrator wrote, in /etc, stays.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from nsrun import paths
from nsrun.errors import UsageError
from nsrun.gateway import control as gateways
from nsrun.host import control, machine, session

DOING = "uninstall ttp"
UNITS = ("ttp.service", "ttp-closed.service", "ttp-gateway@.service")
DRIVER = Path("/etc/systemd/system/ttp-docker-driver.socket")
KEPT = ("/etc/ttp", "/etc/default/ttp")


def uninstall(ears: control.Ears) -> Iterator[str]:
    """Each path that was removed. Raises UsageError while something of ttp's is in use."""
    control.need_root("uninstall")
    prefix = _prefix()
    if running := gateways.running():
        hint = " and ".join(f"ttp gateway down {name}" for name in running)
        raise UsageError(DOING, f"gateways are up: {', '.join(running)}", hint)
    if DRIVER.exists():
        raise UsageError(DOING, "Docker's driver is installed", "ttp docker driver uninstall")
    if control.current() is not None:
        control.stop(ears)
    directory = prefix / "lib/systemd/system"
    units = [directory / name for name in UNITS if (directory / name).exists()]
    if units:
        machine.systemctl("disable", *(unit.name for unit in units))
        for unit in units:
            unit.unlink()
            yield str(unit)
        machine.systemctl("daemon-reload")
    state = (paths.state(), paths.cache(), session.TOR_STATE, session.RUNTIME)
    for path in (*map(Path, state), prefix / "bin/ttp", prefix / "lib/ttp"):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        else:
            continue
        yield str(path)


def _prefix() -> Path:
    """Where ``make install`` has put this program. Raises UsageError if it was not that."""
    ours = Path(sys.prefix)
    prefix = ours.parents[1]
    if ours == prefix / "lib/ttp" and (prefix / "bin/ttp").is_symlink():
        return prefix
    raise UsageError(DOING, "it was not installed by make install", "pip uninstall nsrun, perhaps")
