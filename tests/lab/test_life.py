"""The life of a workload beyond its command: found by name, looked at, signalled as a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_helpers import TTP, Lab
from terminal import Terminal
from town import eventually

pytestmark = pytest.mark.lab


@contextmanager
def process(lab: Lab, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command as the lab's user, killed at the end of the block."""
    with subprocess.Popen(
        lab.command(*argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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


def names(lab: Lab, *gateways: str) -> list[str]:
    """Names of all workloads of the lab's gateway, or of others."""
    # each by name: the machine may have gateways that are none of ours
    asked = [lab.ttp("ps", "-g", one, "--json") for one in gateways or (lab.name,)]
    return [one["name"] for done in asked for one in json.loads(done.stdout)]


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
        eventually(lambda: len(lab.workload("family")["processes"]) == 4, "the whole family")
        pids = lab.workload("family")["processes"]
        assert family.pid in pids
        assert lab.workload("bystander")["processes"] == [bystander.pid]
        assert lab.about("kill", "family").returncode == 0
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
        assert lab.about("kill", "-s", "KILL", "listener").returncode == 0
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
        done = lab.about("kill", "-s", "KILL", "runaway")
        assert done.returncode == 0, done.stderr
        assert "runaway" not in names(lab)


def look(lab: Lab, *way: str) -> dict[str, str]:
    """What a command sees of its confinement: capabilities, filters, files, namespaces."""
    script = (
        "grep -E '^(Cap|NoNewPrivs|Seccomp:|Uid)' /proc/self/status;"
        "for f in /run /etc/resolv.conf /sys/class/net; do echo $f: $(ls $f; cat $f 2>&1); done;"
        "for n in net mnt user; do echo $n: $(readlink /proc/self/ns/$n); done"
    )
    done = lab.ttp(*way, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return dict(line.split(":", 1) for line in done.stdout.splitlines())


@pytest.mark.promise("P6", "P10")
def test_exec_joins_the_network_and_nothing_else(lab: Lab) -> None:
    """The same namespace as the workload, and as confined as a command of its own."""
    with workload(lab, "joined", "sleep", "60"):
        first = look(lab, "exec", "-g", lab.name, "joined")
        found = lab.workload("joined")
        assert found["processes"] == [found["pid"]]
        for kind in ("mnt", "user"):
            theirs = Path(f"/proc/{found['pid']}/ns/{kind}").stat().st_ino
            assert first[kind].strip() != f"{kind}:[{theirs}]"
    other = look(lab, "run", "-g", lab.name, "--")
    own = {"net", "mnt", "user"}
    assert {k: v for k, v in first.items() if k not in own} == {
        k: v for k, v in other.items() if k not in own
    }
    assert first["net"].strip() == f"net:[{found['network']}]"
    assert other["net"] != first["net"]


def test_exec_is_a_command_like_any_other(lab: Lab) -> None:
    """Exit codes, stdin, variables, directory; it keeps the workload alive."""
    with workload(lab, "host", "sleep", "60") as host:
        assert lab.about("exec", "host", "sh", "-c", "exit 3").returncode == 3
        assert lab.about("exec", "host", "--", "no-such-program").returncode == 127
        done = lab.ttp(
            "exec", "--env", "A=1", "--workdir", "/usr", "host", "sh", "-c", "echo $A; pwd"
        )
        assert done.stdout == "1\n/usr\n"
        with process(lab, TTP, "exec", "-g", lab.name, "host", "cat") as guest:
            eventually(lambda: len(lab.workload("host")["processes"]) == 2, "the guest", 20)
            host.kill()
            host.wait()
            assert lab.workload("host")["processes"] == [guest.pid]
            assert guest.communicate("a line\n", timeout=10)[0] == "a line\n"
        eventually(lambda: "host" not in names(lab), "its end", 10)
    done = lab.about("exec", "host", "true")
    assert done.returncode == 125
    assert "there is none" in done.stderr


@pytest.mark.promise("P6")
def test_exec_into_a_strict_workload_is_strict(lab: Lab) -> None:
    """An untrusted program's network gives no other program less confinement."""
    with workload(lab, "untrusted", "sleep", "60", options=["--strict"]):
        done = lab.about("exec", "untrusted", "sh", "-c", "echo $$; cat /etc/hostname /proc/1/comm")
        assert done.returncode == 0, done.stderr
        run = ("run", "-g", lab.name, "--strict", "--")
        assert (
            done.stdout
            == lab.ttp(*run, "sh", "-c", "echo $$; cat /etc/hostname /proc/1/comm").stdout
        )
        assert lab.about("kill", "untrusted").returncode == 0
        eventually(lambda: "untrusted" not in names(lab), "its end", 10)


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_shell_says_where_it_is(lab: Lab, shell: str) -> None:
    """In its prompt, whatever start-up files say of it, and without a change to them."""
    (lab.home / ".bashrc").write_text("PS1='mine> '\n")
    (lab.home / ".bashrc").chmod(0o644)
    path = shutil.which(shell)
    variables = ("env", "-u", "SUDO_UID", f"HOME={lab.home}", f"SHELL={path}")
    terminal = Terminal(lab.command(*variables, TTP, "shell", "-g", lab.name, "--name", "inner"))
    terminal.expect("(ttp inner) mine> " if shell == "bash" else "(ttp inner) $ ")
    terminal.type("cat /run/ttp/workload && echo $((6*7)); exit 5\n")
    terminal.expect("42")
    assert os.waitstatus_to_exitcode(terminal.wait()) == 5


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
        assert lab.workload("deaf")["until"] == pytest.approx(time.time(), abs=10)
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
        text = lab.about("inspect", "seen").stdout
        found = lab.workload("seen")
    assert found["command"] == ["sleep", "60"]
    assert found["gateway"] == lab.name
    for words in ("sleep 60", str(found["network"]), found["identity"][0], str(seen.pid)):
        assert words in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kill", "nobody"], "there is none"),
        (["inspect", "nobody"], "there is none"),
        (["exec", "nobody", "true"], "there is none"),
        (["inspect", "-g", "no-gateway", "nobody"], "it is not up"),
        (["kill", "--signal", "NOSUCH", "nobody"], "there is no such signal"),
        (["kill", "--signal", "0", "nobody"], "there is no such signal"),
    ],
)
def test_who_is_not_there_is_not_found(lab: Lab, argv: list[str], words: str) -> None:
    """One line, and a code that is not success."""
    done = lab.ttp(*argv)
    assert done.returncode in (1, 2, 125)
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
        eventually(lambda: names(lab, lab.name, other).count("twin") == 2, "the twins", 20)
        done = lab.ttp("kill", "twin")
        assert done.returncode == 2
        assert lab.name in done.stderr
        assert other in done.stderr
        assert "--gateway" in done.stderr
        assert lab.ttp("kill", "-g", other, "twin").returncode == 0
        eventually(lambda: names(lab, lab.name, other).count("twin") == 1, "one to remain", 10)
        assert one.poll() is None
