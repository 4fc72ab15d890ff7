"""A lab of root's with a dockerd on its simulated host, for all tests of containers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from composed import images
from docker_host import Dockerd, dockerd
from driver_host import Host, create
from lab_helpers import TTP, Lab


@pytest.fixture(scope="session")
def docker_lab(as_root: list[str]) -> Iterator[Lab]:
    """A lab with its gateway, whose host has a daemon."""
    name = f"d{os.getpid() % 100000}"
    with tempfile.TemporaryDirectory(prefix="ttp-docker-") as home:
        lab = Lab(name, "root", tuple(as_root), Path(home))
        up = lab.do(TTP, "lab", "up", name, seconds=100)  # the first one bakes
        assert up.returncode == 0, up.stderr
        try:
            yield lab
        finally:
            down = lab.ttp("lab", "down", name)
            assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def daemon(docker_lab: Lab) -> Iterator[Dockerd]:
    with dockerd(docker_lab, docker_lab.home) as found:
        yield found


@pytest.fixture(scope="session")
def built(daemon: Dockerd) -> Dockerd:
    """The daemon, with what images/ makes."""
    images(daemon)
    return daemon


@pytest.fixture
def engine(daemon: Dockerd) -> Iterator[Dockerd]:
    """The daemon, without a container before the test, and after it."""
    daemon.clear()
    yield daemon
    daemon.clear()


@pytest.fixture(scope="module")
def driven(daemon: Dockerd) -> Iterator[Host]:
    """The driver, and a network of its own, ``tor``."""
    host = Host(daemon)
    host.start_driver()
    try:
        host.docker(*create(daemon.lab), "tor")
        host.docker("network", "create", "plain")
        yield host
        host.docker("network", "rm", "tor", "plain")
    finally:
        host.stop_driver()


@pytest.fixture
def docker(driven: Host, engine: Dockerd) -> Host:
    """The host without a container, before the test and after it."""
    assert engine is driven.dockerd
    return driven
