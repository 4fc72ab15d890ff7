"""The lab's network is one that a leak gets through, by IPv4 and by IPv6, at any time."""

from __future__ import annotations

import pytest

from lab_helpers import Lab

pytestmark = pytest.mark.lab


@pytest.mark.promise("P12")
@pytest.mark.parametrize("site", ["11.200.0.80", "[2600:11c8::80]"])
def test_answers_arrive_although_the_routers_have_forgotten_everybody(lab: Lab, site: str) -> None:
    """The router looks for the host, the internet for the router: nothing is sent to help them."""
    fetch = ("curl", "-sS", "--max-time", "10", f"http://{site}/ip")
    assert lab.do(*lab.inside_argv("host", *fetch)).returncode == 0
    forgotten = (("router", "lan0"), ("router", "wan0"), ("inet", "isp0"))
    for place, interface in forgotten:
        for family in ("-4", "-6"):
            flush = ("ip", family, "neighbour", "flush", "dev", interface)
            assert lab.do(*lab.inside_argv(place, *flush)).returncode == 0
    done = lab.do(*lab.inside_argv("host", *fetch))
    assert done.returncode == 0, done.stderr
