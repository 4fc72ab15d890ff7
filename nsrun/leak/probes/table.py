"""Every probe of the battery, as they are made; a probe's number is its place."""

from __future__ import annotations

from nsrun.leak.probes import doors, names, raw, transport

PROBES = (*names.PROBES, *transport.PROBES, *doors.PROBES, *raw.PROBES)
