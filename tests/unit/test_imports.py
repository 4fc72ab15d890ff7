"""The arrow ``cli → effects → pure``, who may print, and what the hot path must not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer import Typer
from typer.main import get_group

from harness import ROOT
from nsrun.cli import ABOUT_WORKLOADS, GROUPS, commands, workload

PACKAGE = ROOT / "nsrun"
PURE = (
    "nsrun.spec",
    "nsrun.plan",
    "nsrun.steps",
    "nsrun.ruleset",
    "nsrun.torrc",
    "nsrun.address",
    "nsrun.dns",
    "nsrun.errors",
    "nsrun.seccomp",
    "nsrun.prompt",
    "nsrun.containers.driver",
    "nsrun.containers.options",
    "nsrun.containers.pause",
    "nsrun.host.bridges",
    "nsrun.host.export_firehol",
    "nsrun.host.export_iptables",
    "nsrun.host.export_lan",
    "nsrun.host.export_pf",
    "nsrun.host.export_torrc",
    "nsrun.host.plan",
    "nsrun.host.policy",
    "nsrun.host.rule",
    "nsrun.host.rules",
    "nsrun.host.session",
    "nsrun.host.steps",
    "nsrun.host.units",
    "nsrun.lab.description",
    "nsrun.lab.topology",
    "nsrun.lab.torrcs",
    "nsrun.leak.attempts",
    "nsrun.leak.broken",
    "nsrun.leak.frames",
    "nsrun.leak.pcap",
    "nsrun.leak.probes.packets",
    "nsrun.leak.verdict",
)
# Of the standard library, what cannot touch the outside.
PURE_LIBRARY = """
__future__ abc base64 binascii bisect collections csv dataclasses enum functools hashlib heapq
ipaddress itertools json math operator re shlex string struct textwrap types typing
datetime.UTC datetime.datetime datetime.timedelta
pathlib.PurePath pathlib.PurePosixPath
socket.AF_INET socket.AF_INET6 socket.inet_ntop socket.inet_pton
"""
EFFECTS = {"open", "print", "input", "exec", "eval", "__import__", "now", "today", "utcnow"}
# Programs that need the whole command line interface.
ENTRANCES = {"nsrun.__main__", "nsrun.client", "nsrun.gateway.__main__"}
PRINTING = {"print", "pprint", "typer.echo", "typer.secho", "rich.print"}
SLOW = {"pyroute2", "stem", "docker", "typer", "rich", "json", "re", "socket", "ctypes", "pathlib"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def tree(module: str) -> ast.Module:
    assert module in MODULES, f"{module} is gone; if it was renamed, rename it here"
    return ast.parse(MODULES[module].read_text(), str(MODULES[module]))


def imported(module: str) -> set[str]:
    """What ``module`` imports anywhere, for type checking too: an arrow is an arrow.

    Modules by their name, other things as module.thing.
    """
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {
        name if name in MODULES else name.rpartition(".")[0]
        for name in names
        if within(name, "nsrun")
    }
    return ours | {name for name in names if not within(name, "nsrun")}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_only_pure_ones(module: str) -> None:
    """Pure: from the library what cannot touch the outside, from nsrun what is pure itself."""
    allowed = {*PURE_LIBRARY.split(), *PURE}
    foreign = {
        name
        for name in imported(module)
        if name not in allowed and name.partition(".")[0] not in allowed
    }
    assert not foreign, f"{module} is pure, but imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_calls_nothing_with_an_effect(module: str) -> None:
    """open() needs no import, and datetime.now() comes with one that is allowed."""
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
    assert not called & EFFECTS


@pytest.mark.parametrize("module", MODULES)
def test_nothing_below_the_cli_imports_it(module: str) -> None:
    """Only the entrances hand over to the CLI."""
    if within(module, "nsrun.cli") or module in ENTRANCES:
        return
    upward = {name for name in imported(module) if within(name, "nsrun.cli")}
    assert not upward, f"{module} imports {', '.join(sorted(upward))}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cli_prints(module: str) -> None:
    """Others return or raise; the client, which cannot load the CLI, may write to stderr."""
    if within(module, "nsrun.cli"):
        return
    prints = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTING:
            to = [ast.unparse(word.value) for word in node.keywords if word.arg == "file"]
            if not (module == "nsrun.client" and to == ["sys.stderr"]):
                prints.append(node.lineno)
    assert not prints, f"{module} prints in line {prints}"


def test_no_process_of_ours_takes_modules_from_the_working_directory() -> None:
    """Python puts that first in its search, but with -P: anybody's json.py would be run."""
    starts = re.findall(
        r'"([^"]*)", "-m", f?"nsrun', "".join(map(Path.read_text, MODULES.values()))
    )
    assert len(starts) > 5
    assert set(starts) == {"-P"}


@pytest.mark.parametrize("verb", [*GROUPS, "ps", "doctor"])
def test_what_is_started_often_loads_no_other_commands(verb: str) -> None:
    """All are loaded for what is not."""
    code = "import sys; from nsrun import cli; cli._app(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, verb]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "nsrun.cli.workload" in loaded or verb in GROUPS
    assert f"nsrun.cli.{verb}" in loaded or verb == "ps"
    assert ("nsrun.cli.doctor" in loaded) is (verb == "doctor")


def test_what_is_loaded_alone_is_whole() -> None:
    """A command about workloads that is forgotten would not be found."""
    app = Typer()
    workload.register(app)
    assert sorted(get_group(app).commands) == sorted(ABOUT_WORKLOADS)
    assert {group.name for group in commands.app.registered_groups} == set(GROUPS)


def test_the_hot_path_stays_light() -> None:
    """What ``ttp run`` imports, without site, loads none of the slow modules."""
    imports = "import nsrun.client, nsrun.enter"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {imports}; print(*sys.modules)"
    command = [sys.executable, "-IS", "-c", code, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    modules = set(loaded.stdout.split())
    assert "nsrun.client" in modules
    assert not (slow := SLOW & modules), f"the hot path loads {', '.join(sorted(slow))}"
