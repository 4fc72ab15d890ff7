"""``python3 -m nsrun.host.leaks UID GID CHECK…``: those checks of ``ttp check-leak`` on a host.

As a user whom no exemption lets past Tor. What concerns a workload's confinement is left out: a
host has none.
"""

from __future__ import annotations

import sys

from nsrun.errors import UsageError
from nsrun.host.oracle import become, way
from nsrun.host.plan import policy
from nsrun.host.session import Session
from nsrun.leak import inside

CHECKS = ("is-tor", "address4", "address6", "dns-libc", "dns", "udp", "udp6", "icmp")
OF_LAN = ("lan", "metadata")


def command(found: Session) -> tuple[str, ...]:
    """The command that checks the host of a session. Raises UsageError if nobody can try."""
    kind, *who = way(policy(found))
    if kind == "tor":
        hint = "try it where programs are caught; `ttp check` asks by Tor itself"
        raise UsageError("check for leaks", "nobody's traffic here is caught as a whole", hint)
    checks = CHECKS if found.spec.lan else (*CHECKS, *OF_LAN)
    module = (sys.executable, "-P", "-m", "nsrun.host.leaks")
    return (*module, *who, *checks)


def main() -> None:
    become(int(sys.argv[1]), int(sys.argv[2]))
    inside.main(sys.argv[3:])


if __name__ == "__main__":
    main()
