"""``ttp doctor``: what ttp needs of this machine, found by trying it.

Findings come from ``programs``, from ``trials``, which run in a process and in namespaces of
their own (``python -m nsrun.doctor``), and from ``files``. No packet is sent, nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, MISSING = "ok", "warning", "missing"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. ``do`` is what to do about it, a command where there is one.

    ``state``: ``ok``; ``warning``, something is worse without it; ``missing``, ttp cannot work.
    """

    name: str
    state: str
    found: str
    do: str = ""
