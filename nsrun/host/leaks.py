"""``python3 -m nsrun.host.leaks NUMBER CHECK…``: those checks of ``ttp check-leak`` on a host.

As a user whom no exemption lets past Tor. What concerns a workload's confinement is left out: a
host has none.
"""

from __future__ import annotations

import sys

from nsrun.host.oracle import become, caught
from nsrun.host.session import Session
from nsrun.leak import inside

CHECKS = ("is-tor", "address4", "address6", "dns-libc", "dns", "udp", "udp6", "icmp")
OF_LAN = ("lan", "metadata")


def command(found: Session) -> tuple[str, ...]:
    """The command that checks the host of a session."""
    exempt = (*found.facts.bypass_uids, *found.facts.bypass_gids)
    checks = CHECKS if found.spec.lan else (*CHECKS, *OF_LAN)
    module = (sys.executable, "-P", "-m", "nsrun.host.leaks")
    return (*module, str(caught(exempt)), *checks)


def main() -> None:
    become(int(sys.argv[1]))
    inside.main(sys.argv[2:])


if __name__ == "__main__":
    main()
