"""The lab's network is one that a leak gets through at any time, and nothing else gets astray."""

from __future__ import annotations

import pytest

from lab_helpers import Lab
from nsrun.leak.verdict import Value, as_text, judge

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


LATE = "import socket; socket.socket(2, 2).sendto(b'late', ('192.168.77.60', 7))"


@pytest.mark.promise("P12")
@pytest.mark.parametrize("flood", ["off", "on"])
def test_what_comes_late_for_a_host_that_has_gone_is_on_no_wire(lab: Lab, flood: str) -> None:
    """Relays repeat what a killed gateway did not take; a bridge that floods shows it to all."""

    def router(*command: str) -> None:
        assert lab.do(*lab.inside_argv("router", *command)).returncode == 0

    gone = ("192.168.77.60", "dev", "lan0")
    router("ip", "neighbour", "replace", *gone, "lladdr", "02:00:00:00:00:60")
    if flood == "on":
        router("ip", "link", "set", "p-host", "type", "bridge_slave", "flood", flood)
    try:
        with lab.tap("router", "p-host") as host:
            router("python3", "-c", LATE)
            verdict = judge("host", host.stop(), [lab.neighbours()])
    finally:
        router("ip", "neighbour", "delete", *gone)
        router("ip", "link", "set", "p-host", "type", "bridge_slave", "flood", "off")
    expected = Value.LEAK if flood == "on" else Value.CONTAINED
    assert verdict.value is expected, as_text([verdict])


def test_administration_programs_are_found_in_it(lab: Lab) -> None:
    """A user has no sbin in PATH on Debian, and is root in the lab; leak tests run nft there."""
    for place in ("host", "router"):
        list_tables = lab.inside_argv(place, "nft", "list", "tables")
        done = lab.do("env", "PATH=/usr/bin:/bin", *list_tables)
        assert done.returncode == 0, done.stderr
