"""pytest plugin: tests of a program that is to leak nothing. See docs/pytest-plugin.md.

pytest loads this module in every run, so all else is imported when a fixture is used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from nsrun.lab.description import Description
    from nsrun.leak.torified import Torified
    from nsrun.leak.watch import Leaks, Wires

MARKER = "no_leaks: the test fails when its program sends what Tor would not carry, or a wire leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ttp", "tests behind Tor, in a lab")
    group.addoption(
        "--tor-lab", metavar="NAME", default="", help="use the lab NAME, which is up, and leave it"
    )
    group.addoption(
        "--leak-evidence",
        metavar="DIR",
        type=Path,
        default=None,
        help="write packets that should not be to files in DIR (default: the test's tmp_path)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Raises UsageError when several processes of pytest-xdist would watch the wires of one lab."""
    config.addinivalue_line("markers", MARKER)
    if config.getoption("--tor-lab") and len(getattr(config.option, "tx", None) or ()) > 1:
        raise pytest.UsageError(
            "ttp: cannot share the lab of --tor-lab among processes of pytest-xdist: "
            "each would see the other's wires; leave out --tor-lab, or -n"
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    """A marked test has the fixture; and whoever has it, has it first, to miss no packet."""
    if not isinstance(item, pytest.Function):
        return
    names = item.fixturenames
    if "leaks" in names:
        names.remove("leaks")
    elif not item.get_closest_marker("no_leaks"):
        return
    names.insert(0, "leaks")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Judge when the test's body has ended, so that the test itself fails and not its clean-up."""
    leaks: Leaks | None = getattr(item, "funcargs", {}).get("leaks")
    if leaks is None:
        return (yield)
    try:
        result = yield
    except BaseException:  # pytest's own outcomes, too: the test's own failure comes first
        item.add_report_section("call", "leaks", leaks.verdict()[1])
        raise
    value, text = leaks.verdict()
    if value != "contained":
        pytest.fail(text, pytrace=False)
    return result


@pytest.fixture(scope="session")
def tor_lab(pytestconfig: pytest.Config) -> Iterator[Description]:
    """A lab with its gateway, for the whole session: a Tor network of its own, offline."""
    from nsrun.errors import NsrunError
    from nsrun.lab import control

    given: str = pytestconfig.getoption("--tor-lab")
    name = given or f"py{os.getpid()}"  # a process of pytest-xdist has a lab of its own
    try:
        lab = control.describe(name) if given else control.up(name, lambda _percent, _what: None)
        if not lab.gateway:
            raise NsrunError(f"use the lab {name}", "it has no gateway", f"ttp lab up {name}")
    except NsrunError as error:
        pytest.fail("\n".join([f"ttp: {error}", *_advice(error.hint)]), pytrace=False)
    yield lab
    if not given:
        control.down(name)


@pytest.fixture
def torified(tor_lab: Description, tmp_path_factory: pytest.TempPathFactory) -> Torified:
    """Runs commands, and calls functions, behind the lab's Tor."""
    from nsrun.leak.torified import Torified

    return Torified(tor_lab.name, tmp_path_factory.mktemp("links"))


@pytest.fixture
def wires(tor_lab: Description, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wires]:
    """Taps on every wire outside of the workloads' own links."""
    from nsrun.leak.bench import Bench
    from nsrun.leak.torified import program
    from nsrun.leak.watch import watch

    with watch(Bench(tor_lab, program(), tmp_path_factory.mktemp("wires"))) as found:
        yield found


@pytest.fixture
def leaks(request: pytest.FixtureRequest, torified: Torified, wires: Wires) -> Leaks:
    """Fails the test, at its end, for what its programs sent that Tor would not carry."""
    from nsrun.leak.watch import Leaks, addresses

    directory: Path | None = request.config.getoption("--leak-evidence")
    if directory is None:
        evidence: Path = request.getfixturevalue("tmp_path")
    else:
        evidence = directory / re.sub(r"[^\w.-]+", "-", request.node.nodeid).strip("-")
    return Leaks(torified, addresses(torified.gateway), wires, evidence.absolute())


def _advice(hint: str) -> Iterator[str]:
    """The hint, and what ``ttp doctor`` finds missing."""
    import json
    import subprocess

    from nsrun.leak.torified import program

    if hint:
        yield hint
    done = subprocess.run(
        [program(), "doctor", "--json"], capture_output=True, text=True, check=False, timeout=90
    )
    for one in json.loads(done.stdout or '{"checks": []}')["checks"]:
        if one["state"] == "missing":
            yield f"ttp doctor: {one['name']}: {one['found']}; do: {one['do']}"
