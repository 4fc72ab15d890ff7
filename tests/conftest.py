"""Fixtures and rules of every test: who it runs as, what stays as it was, and no skips in CI."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist import is_xdist_worker

import spread
from harness import ROOT, host_changes, host_state
from users import NOBODY, USER, home_of, is_hidden, prefix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from xdist.remote import Producer

HOST, CHANGES = pytest.StashKey[str](), pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave torture out unless it is asked for; begin with what takes long."""
    if "torture" not in config.option.markexpr:
        torture = [item for item in items if item.get_closest_marker("torture")]
        config.hook.pytest_deselected(items=torture)
        items[:] = [item for item in items if item not in torture]
    items.sort(key=lambda item: spread.order(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> spread.Spread:
    return spread.Spread(config, log)


# The host stays as it is. Of several processes, the one that only gives out tests looks after it.


def pytest_sessionstart(session: pytest.Session) -> None:
    if not is_xdist_worker(session):
        session.config.stash[HOST] = host_state()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After the last fixture."""
    if not is_xdist_worker(session) and (changes := host_changes(session.config.stash[HOST])):
        session.config.stash[CHANGES] = changes
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if changes := config.stash.get(CHANGES, ""):
        terminalreporter.section("the tests changed the host", red=True)
        terminalreporter.write_line(changes)


@pytest.fixture(autouse=True, scope="session")
def _hear_signals() -> None:
    """What a job in the background, or nohup(1), ignores, all that the tests start would, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if (
            signal.getsignal(number) is signal.SIG_IGN
        ):  # in a program, a handler becomes the default
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True, scope="session")
def _start_where_a_strict_command_can() -> None:
    if is_hidden():
        os.chdir("/")
        os.environ["PWD"] = "/"  # else each shell would say so in its own way


@pytest.fixture
def user_home() -> Iterator[Path]:
    """Home directory of ``as_user``, with ``run`` (XDG_RUNTIME_DIR) in it; goes with the test."""
    with home_of(USER) as home:
        yield home


@pytest.fixture
def as_user(user_home: Path) -> list[str]:
    """Prefix of a command that runs it as an unprivileged user: uid 54321, without a name, when
    the tests run as root, else the user who runs them. HOME and XDG_RUNTIME_DIR are fresh.
    """
    return prefix_of(USER, user_home)


@pytest.fixture
def as_nobody() -> Iterator[list[str]]:
    """Like ``as_user``, but a user with a name, ``nobody``, when the tests run as root."""
    with home_of(NOBODY) as home:
        yield prefix_of(NOBODY, home)


@pytest.fixture(scope="session")
def as_root() -> list[str]:
    """Prefix of a command that runs it as root."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n", "-E"]
    try:
        asked = subprocess.run([*sudo, "true"], capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        pytest.fail("this test needs root, and there is no sudo: run it as root", pytrace=False)
    if asked.returncode:
        why = asked.stderr.strip()
        pytest.fail(f"this test needs root: {why}: run `sudo -v` first", pytrace=False)
    return sudo


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: text equals tests/golden/NAME, or becomes it (--update-golden)."""

    def compare(name: str, text: str) -> None:
        file = ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            file.write_text(text)
        assert file.exists(), f"no {file.relative_to(ROOT)} yet: run make golden"
        assert text == file.read_text(), "not as in the golden file; if meant so: make golden"

    return compare


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome == "skipped" and os.environ.get("CI"):
        report.outcome = "failed"
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"in CI, a skip is a failure: {why}"
