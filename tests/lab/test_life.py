"""The life of a workload beyond its command: found by name, looked at, signalled as a whole."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_helpers import TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab


@contextmanager
def process(lab: Lab, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command as the lab's user, killed at the end of the block."""
    with subprocess.Popen(
        lab.command(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as found:
        try:
            yield found
        finally:
            found.kill()


@contextmanager
def workload(
    lab: Lab, name: str, *argv: str, options: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A command in the foreground, listed by the time that the block begins."""
    run = (TTP, "run", "-g", lab.name, "--name", name, *options, "--", *argv)
    with process(lab, *run) as found:
        eventually(lambda: name in names(lab), f"the workload {name}", 20)
        yield found


def names(lab: Lab) -> list[str]:
    return [one["name"] for one in json.loads(lab.ttp("ps", "--json").stdout)]


def inspect(lab: Lab, name: str) -> dict[str, Any]:
    done = lab.ttp("inspect", "--json", name)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# two in the background, one of them without its parent, and one in namespaces of its own
FAMILY = "sleep 501 & setsid sleep 502 & unshare -Un sleep 503 & wait"


@pytest.mark.promise("P8")
def test_kill_reaches_every_process_and_no_other(lab: Lab) -> None:
    """Orphans, and a sandbox in other namespaces, but no neighbour and nobody outside."""
    with (
        process(lab, "sleep", "60") as outside,
        workload(lab, "bystander", "sleep", "60") as bystander,
        workload(lab, "family", "sh", "-c", FAMILY) as family,
    ):
        eventually(lambda: len(inspect(lab, "family")["processes"]) == 4, "the whole family")
        pids = inspect(lab, "family")["processes"]
        assert family.pid in pids
        assert inspect(lab, "bystander")["processes"] == [bystander.pid]
        assert lab.ttp("kill", "family").returncode == 0
        assert family.wait(10) == -signal.SIGTERM
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their end")
        assert (outside.poll(), bystander.poll()) == (None, None)
        gateway = lab.gateway()
        assert gateway["ready"]
        assert Path(f"/proc/{gateway['pid']}").exists()


def test_kill_sends_what_it_is_told(lab: Lab) -> None:
    """A signal by name, with or without SIG, or by number; the command may do as it likes."""
    script = "trap 'echo one' USR1; trap 'echo two' USR2; echo up; while :; do sleep 0.05; done"
    with workload(lab, "listener", "sh", "-c", script) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        for given, heard in (("usr1", "one\n"), ("SIGUSR2", "two\n"), ("10", "one\n")):
            # its sleep dies of the signal; the shell sleeps anew
            done = lab.ttp("kill", "--signal", given, "--gateway", lab.name, "listener")
            assert done.returncode == 0, done.stderr
            assert listener.stdout.readline() == heard
        assert lab.ttp("kill", "-s", "KILL", "listener").returncode == 0
        assert listener.wait(10) == -signal.SIGKILL


# for ten seconds a process that is another one before it can be listed, and many that stay
RUNAWAY = """
import os, time
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    if os.fork():
        os._exit(0)
    if time.monotonic() % 0.1 < 0.01 and not os.fork():
        time.sleep(60)
"""


def test_processes_that_multiply_are_killed(lab: Lab) -> None:
    """Those that stay, and one that forks and ends faster than a list can be read."""
    with workload(lab, "runaway", "/usr/bin/python3", "-c", RUNAWAY):
        done = lab.ttp("kill", "-s", "KILL", "runaway")
        assert done.returncode == 0, done.stderr
        assert "runaway" not in names(lab)


def test_a_command_whose_time_is_over_is_ended(lab: Lab) -> None:
    """By TERM, its children too; one that is done earlier is left in peace."""
    started = time.monotonic()
    done = lab.run("sh", "-c", "sleep 504 & wait", options=["--timeout", "0.5"])
    assert done.returncode == -signal.SIGTERM
    assert 0.5 <= time.monotonic() - started < 10
    assert lab.run("sleep", "0.2", options=["--timeout", "20"]).returncode == 0
    tidy = "trap 'echo tidy; exit 3' TERM; while :; do sleep 0.05; done"
    done = lab.run("sh", "-c", tidy, options=["--timeout", "0.5"])
    assert (done.returncode, done.stdout) == (3, "tidy\n")


def test_a_command_that_does_not_heed_term_is_killed(lab: Lab) -> None:
    """Five seconds later."""
    deaf = "trap '' TERM; while :; do sleep 0.05; done"
    with workload(lab, "deaf", "sh", "-c", deaf, options=["--timeout", "0.5"]) as found:
        assert inspect(lab, "deaf")["until"] == pytest.approx(time.time(), abs=10)
        assert found.wait(30) == -signal.SIGKILL


def test_variables_come_from_files_and_options(lab: Lab) -> None:
    """After what we set ourselves; a name alone is as it is here."""
    file = lab.home / "variables"
    file.write_text("# ours\nONE=from the file\nTWO=2\nHOME=/nowhere\nSSL_CERT_FILE\n")
    file.chmod(0o644)
    options = ("--env-file", str(file), "--env", "TWO=zwei", "--env=THREE=", "--env", "HOME")
    run = (TTP, "run", "-g", lab.name, *options, "--", "env")
    here = lab.do("env", "-u", "SSL_CERT_FILE", "printenv", "HOME").stdout.strip()
    done = lab.do("env", "-u", "SSL_CERT_FILE", *run)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (found["ONE"], found["TWO"], found["THREE"]) == ("from the file", "zwei", "")
    assert found["HOME"] == here
    assert "SSL_CERT_FILE" not in found
    done = lab.run("no-such-program", options=["--env", "PATH=/nowhere"])
    assert done.returncode == 127


def test_a_command_works_where_it_is_told(lab: Lab) -> None:
    """--workdir, relative to where we are; not to be reached is an error, not another place."""
    assert lab.run("pwd", options=["--workdir", "/usr/lib"]).stdout == "/usr/lib\n"
    run = (TTP, "run", "-g", lab.name, "--workdir", "lib/..", "--", "pwd", "-P")
    assert lab.do(*run, cwd=Path("/usr")).stdout == "/usr\n"
    hidden = str(Path(str(lab.gateway()["runtime"])).parent)
    for directory in ("/no/such/directory", hidden):
        done = lab.run("pwd", options=["--workdir", directory])
        assert (done.returncode, done.stdout) == (125, "")
        assert f"cannot work in {directory}: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env", "=x"], "there is no name"),
        (["--env-file", "/no/such/file"], "cannot read /no/such/file"),
        (["--env-file", "/proc/self/mounts"], "/proc/self/mounts:1: "),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "-1"], "--timeout"),
    ],
)
def test_a_bad_option_starts_nothing(lab: Lab, options: list[str], words: str) -> None:
    """125, and what is wrong."""
    done = lab.run("echo", "started", options=options)
    assert (done.returncode, done.stdout) == (125, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_is_for_people_too(lab: Lab) -> None:
    """Name, command, identity, namespace, processes."""
    with workload(lab, "seen", "sleep", "60") as seen:
        text = lab.ttp("inspect", "seen").stdout
        found = inspect(lab, "seen")
    assert found["command"] == ["sleep", "60"]
    assert found["gateway"] == lab.name
    for words in ("sleep 60", str(found["network"]), found["identity"][0], str(seen.pid)):
        assert words in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kill", "nobody"], "there is none"),
        (["inspect", "nobody"], "there is none"),
        (["inspect", "-g", "no-gateway", "nobody"], "it is not up"),
        (["kill", "--signal", "NOSUCH", "nobody"], "there is no such signal"),
        (["kill", "--signal", "0", "nobody"], "there is no such signal"),
    ],
)
def test_who_is_not_there_is_not_found(lab: Lab, argv: list[str], words: str) -> None:
    """One line, and a code that is not success."""
    done = lab.ttp(*argv)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_on_two_gateways_is_ambiguous(lab: Lab) -> None:
    """Not the first of them: both are named, and --gateway chooses."""
    run = ("run", "--name", "twin", "--gateway")
    with (
        lab.other_gateway("slirp4netns") as other,
        process(lab, TTP, *run, lab.name, "--", "sleep", "60") as one,
        process(lab, *lab.inside_argv("host", TTP, *run, other, "--", "sleep", "60")),
    ):
        eventually(lambda: names(lab).count("twin") == 2, "the twins", 20)
        done = lab.ttp("kill", "twin")
        assert done.returncode == 2
        assert lab.name in done.stderr
        assert other in done.stderr
        assert "--gateway" in done.stderr
        assert lab.ttp("kill", "-g", other, "twin").returncode == 0
        eventually(lambda: names(lab).count("twin") == 1, "one to remain", 10)
        assert one.poll() is None
