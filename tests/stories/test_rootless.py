"""The network stories need no root: a user namespace is enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import ROOT


def test_the_stories_hold_without_root(as_user: list[str], user_home: Path) -> None:
    """A sample of them, told again by an unprivileged user."""
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    inner += [f"--basetemp={user_home}/pytest", str(ROOT / "tests/stories/test_workload.py")]
    sample = "tcp_to_anywhere or dns_to_any or udp or identity"
    done = subprocess.run(
        [*as_user, "unshare", "-Urnm", *inner, "-k", sample],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
