"""When a host counts as moved to another network."""

from __future__ import annotations

import pytest

from nsrun.gateway.roaming import moved

OURS, GONE, FRESH = "::1", "2001:db8::5", "2001:db8::6"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("192.0.2.1", "192.0.2.1", False),
        ("192.0.2.1", "198.51.100.1", True),
        ("192.0.2.1", "", False),  # without a network nothing is to be gained
        ("", "192.0.2.1", True),  # what was started without one may not look again for minutes
        (GONE, FRESH, True),
        (OURS, FRESH, False),  # a new temporary address, beside the one before
        (OURS, "192.0.2.1", True),
        ("192.0.2.1", OURS, True),
    ],
)
def test_another_address_is_another_network(before: str, now: str, expected: bool) -> None:
    """Unless connections from the one before go on."""
    assert moved(before, now) is expected
