"""A Debian machine for the tests of this directory: tests/machine.py tells how to use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from docker_machine import Docker, docker
from machine import Machine, debian
from nsrun.host import session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All are root's; the first one on a new machine waits until a Debian is made."""
    for item in items:
        if "tests/machines/" in item.nodeid:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.lab)
            item.add_marker(pytest.mark.timeout(600), append=False)


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """Debian 13. A test leaves it as it found it; `machine.changes(before)` says whether it did."""
    with debian() as made:
        yield made


@pytest.fixture
def host(machine: Machine) -> Iterator[Machine]:
    """The machine, as it was before the test and after it, whatever happens.

    But for the log, which is there until the next boot; the first command begins it.
    """
    yield from host_of(machine)


def host_of(machine: Machine) -> Iterator[Machine]:
    if not machine.path(session.LOG).exists():
        machine.run("ttp", "stop")
    before = machine.state()
    yield machine
    machine.run("ttp", "stop")
    assert machine.changes(before) == ""


@pytest.fixture(scope="session")
def crowd() -> Iterator[Machine]:
    """Debian 13 with firewalls and resolvers of others, disabled; without systemd-resolved."""
    with debian(beside=True) as made:
        yield made


@pytest.fixture
def crowded(crowd: Machine) -> Iterator[Machine]:
    """As ``host``, of ``crowd``."""
    yield from host_of(crowd)


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Docker]:
    """Docker of the Debian that the test names as its parameter."""
    with docker(request.param) as made:
        yield made


@pytest.fixture
def bare(engine: Docker) -> Iterator[Docker]:
    """Without a container, before the test and after it."""
    yield engine
    engine.clear()
