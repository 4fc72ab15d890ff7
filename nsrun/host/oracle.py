"""``python3 -m nsrun.host.oracle UID GID``: ask Tor's own service how it sees this host.

By the way of any program: names by libc, TCP by what the rules do with it. It is asked as a user
whom no exemption lets past Tor, with no privilege that it would need to be told the truth. The
answer is a line of JSON: ``{"IsTor", "IP", "seconds"}``, or ``{"error"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

ORACLE = "https://check.torproject.org/api/ip"
SECONDS = 20.0  # until there is no answer; a circuit takes one to a few
UIDS = (65534, 65533, 65532)  # nobody, and numbers that Debian's policy (9.2.2) gives to nobody


@dataclass(frozen=True)
class Seen:
    """``seconds`` is how long the answer took; without an address, ``error`` says why."""

    is_tor: bool
    address: str = ""
    seconds: float = 0.0
    error: str = ""


def ask(exempt: tuple[int, ...]) -> Seen:
    """How the host is seen, by a user and a group whose numbers are not ``exempt``."""
    command = [sys.executable, "-P", "-m", "nsrun.host.oracle", str(caught(exempt))]
    environment = {
        **{name: os.environ[name] for name in ("SSL_CERT_FILE", "LANG") if name in os.environ},
        "PATH": os.defpath,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=2 * SECONDS
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Seen(is_tor=False, error=f"no answer in {2 * SECONDS:g} s")
    except ValueError:
        last = ["it said nothing", *done.stderr.splitlines()][-1]
        return Seen(is_tor=False, error=last)
    if "error" in found:
        return Seen(is_tor=False, error=found["error"])
    return Seen(found["IsTor"] is True, str(found["IP"]), found["seconds"])


def caught(exempt: tuple[int, ...]) -> int:
    """The number of a user and of a group whom the rules do not exempt."""
    return next(number for number in UIDS if number not in exempt)


def become(number: int) -> None:
    """Be this user and group, and no more; whatever has to be read is imported by now."""
    import encodings.idna  # noqa: F401  else by the first name that is looked up
    import ssl  # noqa: F401

    os.setgroups([])
    os.setresgid(number, number, number)
    os.setresuid(number, number, number)


def main() -> None:
    become(int(sys.argv[1]))
    begin = time.monotonic()
    try:
        with build_opener(ProxyHandler({})).open(ORACLE, timeout=SECONDS) as answer:
            told = json.loads(answer.read(4096))
        found = {"IsTor": told["IsTor"], "IP": told["IP"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = {"error": str(getattr(error, "reason", None) or error)}
    sys.stdout.write(json.dumps({**found, "seconds": time.monotonic() - begin}) + "\n")


if __name__ == "__main__":
    main()
