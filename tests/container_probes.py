"""The probes of `ttp leaktest` in containers: which, where their Python is, and what is meant."""

from __future__ import annotations

import sys
from pathlib import Path

from nsrun.leak.probes import Control, Expect, Needs, Outcome, Probe
from nsrun.leak.probes.table import PROBES
from nsrun.leak.results import Made

KNOWN = {"power-ring"}  # docs/known-issues.md: Docker's filter of system calls is Docker's
PLAIN = [probe for probe in PROBES if probe.needs is Needs.NOTHING]
RAW = [probe for probe in PROBES if probe.needs is Needs.NET_RAW]
FEW = {"dns-udp", "udp", "tcp", "udp-quic", "tcp-lan", "udp-stun"}
#: Where the tests' own Python is, a container finds its own.
LINK = f"mkdir -p {Path(sys.executable).parent}; ln -sf /usr/bin/python3 {sys.executable}"


def as_meant(probe: Probe, made: dict[str, Made]) -> bool:
    """What of an outcome has nothing to do with wires, which are judged by themselves."""
    answered = made[probe.name].outcome is Outcome.ANSWERED
    if probe.expect is Expect.TOR:
        return answered
    return not answered or (probe.expect is Expect.NOWHERE and probe.control is Control.WIRE)
