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
PACKAGE = Path("/var/lib/dpkg/info/ttp.list")
SHARED = (  # man pages, and completion
    "man/man1/ttp*.1",
    "bash-completion/completions/ttp",
    "zsh/site-functions/_ttp",
    "fish/vendor_completions.d/ttp.fish",
)


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
    shared = [file for name in SHARED for file in sorted((prefix / "share").glob(name))]
    for path in (*map(Path, state), *shared, prefix / "bin/ttp", prefix / "lib/ttp"):
        if path.is_symlink() or path.is_file():
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
    if prefix == Path("/usr") and PACKAGE.exists():
        raise UsageError(DOING, "it is a package of Debian's", "apt remove ttp")
    if ours == prefix / "lib/ttp" and (prefix / "bin/ttp").is_symlink():
        return prefix
    raise UsageError(DOING, "it was not installed by make install", "pip uninstall nsrun, perhaps")
