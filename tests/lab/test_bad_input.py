"""Bad input and bad surroundings: one clear line, the right code, nothing left, nothing opened."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from disturbances import IN_TIME
from harness import ROOT
from lab_helpers import TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, one line that begins as ours do and has the words, at most one hint."""
    assert done.returncode == code, done.stderr
    line, *hints = done.stderr.splitlines()
    assert line.startswith("ttp: ")
    assert not (missing := [word for word in words if word not in line]), (missing, done.stderr)
    assert len(hints) <= 1
    assert all(hint.startswith("hint: ") for hint in hints)


@contextmanager
def stopped(lab: Lab) -> Iterator[int]:
    """The gateway's supervisor, stopped like a job by Ctrl-Z."""
    pid = int(str(lab.gateway()["pid"]))
    lab.do("kill", "-STOP", str(pid))
    try:
        yield pid
    finally:
        lab.do("kill", "-CONT", str(pid))


@pytest.mark.promise("P4")
def test_a_stopped_supervisor_is_not_waited_for(lab: Lab) -> None:
    """The process is named, and how to go on; once it goes on, so does the gateway."""
    run = (
        "import nsrun.client as c\nc.PATIENCE = 1\n"
        f"try: c.become(['true'], {lab.name!r}, c.defaults())\n"
        "except c.RefusedError as e: c.fail(e)"
    )
    with stopped(lab) as pid:
        done = lab.do(str(Path(TTP).with_name("python")), "-c", run)
        refused(done, 125, f"(process {pid}) is silent for 1 s")
        assert f"kill -CONT {pid}" in done.stderr
        rows = [line.split() for line in lab.ttp("gateway", "ls").stdout.splitlines()]
        assert [lab.name, "silent"] in rows
    assert lab.run("true").returncode == 0


def test_one_stopped_supervisor_hides_no_other(lab: Lab) -> None:
    """``ttp ps`` lists what others say, and what records say of its own; it names it, and fails."""

    def on_host(*argv: str) -> subprocess.CompletedProcess[str]:
        return lab.do(*lab.inside_argv("host", TTP, *argv))

    with lab.other_gateway("slirp4netns") as name:
        for gateway, workload in ((name, "there"), (lab.name, "here")):
            detach = ("run", "--detach", "-g", gateway, "--name", workload, "--", "sleep", "60")
            assert on_host(*detach).returncode == 0
        with stopped(lab) as pid:
            done = on_host("ps")
            rows = [line.split()[:3] for line in done.stdout.splitlines()]
            assert ["there", name, "running"] in rows
            assert ["here", lab.name, "silent"] in rows
            refused(done, 1, f"{lab.name}: its supervisor (process {pid}) is silent for 5 s")
            assert on_host("kill", "-s", "KILL", "-g", name, "there").returncode == 0
        assert on_host("kill", "-s", "KILL", "here").returncode == 0
        assert on_host("rm", "here", "there").returncode == 0


@pytest.mark.parametrize("verb", ["gateway", "lab"])
def test_a_directory_that_others_may_write_to_is_refused(lab: Lab, verb: str) -> None:
    """Somebody could exchange what is in it."""
    open_to_all = lab.home / "open"
    lab.do("install", "-d", "-m", "777", str(open_to_all))
    up = ("env", f"TTP_RUNTIME_DIR={open_to_all}", TTP, verb, "up", "nowhere")
    refused(lab.do(*up), 1, f"use the directory {open_to_all}", "owned or writable by another")
    assert not list(open_to_all.iterdir())


# What a machine may lack: shell commands that take it away in a mount namespace of the lab's host,
# then `ttp gateway up`, its exit code, and words of the line that says why.
SMALL = "mount -t tmpfs -o size=1m none /mnt && head -c 2M /dev/zero 2>/dev/null >/mnt/fill; "
LACKING = {
    "tun": ("mount -t tmpfs none /dev/net", 1, 'open("/dev/net/tun"): No such file'),
    "tor": ("mount --bind /dev/null $(which tor)", 1, "the program tor is not installed"),
    "old tor": ("PATH=$0:$PATH", 1, "its version is 0.4.6, and 0.4.7 is the oldest"),
    "room for state": (SMALL + "export TTP_STATE_DIR=/mnt/s", 1, "no space is left in /mnt/s"),
    "room for sockets": (SMALL + "export TTP_RUNTIME_DIR=/mnt/r", 1, "No space left on device"),
    "inodes": (
        "mount -t tmpfs -o nr_inodes=4 none /mnt; export TTP_STATE_DIR=/mnt/s",
        1,
        "No space left on device: /mnt/s/gateways/",
    ),
    "addresses": (
        "ip link add v0 type veth peer v1; ip address add 10.70.1.1/16 dev v0; "
        "ip address add 100.64.3.1/24 dev v1",
        1,
        "choose addresses for the gateway",
    ),
    "a default route": ("true", 1, "pasta: "),
}


def start(lab: Lab, name: str, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``ttp gateway up`` on a copy of the lab's host after ``script``, without a network."""
    old = lab.home / "old"
    old.mkdir(exist_ok=True)
    (old / "tor").write_text("#!/bin/sh\necho Tor version 0.4.6.9.\n")  # no such tor is to be had
    (old / "tor").chmod(0o755)
    up = (TTP, "gateway", "up", name, "--bootstrap-timeout", "3", *words)
    shell = ("sh", "-c", f'{script}\nexec "$@"', str(old))
    return lab.do(*lab.inside_argv("host", "unshare", "--mount", "--net", *shell, *up))


@pytest.mark.promise("P8")
@pytest.mark.parametrize("what", LACKING)
def test_a_start_without_what_it_needs(lab: Lab, what: str) -> None:
    """Says what is missing, and leaves no gateway, not even the beginning of one."""
    script, code, words = LACKING[what]
    uplinks = ("--uplink", "pasta" if what == "a default route" else "slirp4netns")
    name = f"{lab.name}-no"
    refused(start(lab, name, script, *uplinks), code, words)
    assert name not in lab.do(*lab.inside_argv("host", TTP, "gateway", "ls")).stdout
    left = lab.do(*lab.inside_argv("host", "sh", "-c", f"ls -d $TTP_RUNTIME_DIR/gateways/{name}"))
    assert left.returncode == 2, left.stdout


@pytest.mark.parametrize(
    ("skew", "words"),
    [("-3d", "our clock is behind by 3 days"), ("+3d", "certificate expired")],
)
def test_a_clock_that_is_far_off(lab: Lab, skew: str, words: str) -> None:
    """Tor itself tells; libfaketime moves its clock, since CLOCK_REALTIME is in no namespace."""
    shifted = lab.home / "shifted"
    shifted.mkdir(exist_ok=True)
    real = "$(PATH=${PATH#*:} command -v tor)"
    (shifted / "tor").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\n'
        f'exec faketime -f {skew} {real} "$@"\n'
    )
    (shifted / "tor").chmod(0o755)
    lab.home.chmod(0o711)  # Tor's user comes this way
    fragment = lab.home / "fragment"
    fragment.write_text(str(lab.status()["client_torrc"]))
    name = f"{lab.name}-{'behind' if skew[0] == '-' else 'ahead'}"
    up = ("gateway", "up", name, "--uplink", "slirp4netns", "--bootstrap-timeout", "4")
    shell = ("unshare", "--mount", "sh", "-c", IN_TIME, str(shifted))
    command = (*shell, TTP, *up, "--torrc", str(fragment))
    try:
        done = lab.do(*lab.inside_argv("host", *command))
        refused(done, 1, "cannot reach the Tor network", "the clock of this machine", words)
    finally:
        lab.do(*lab.inside_argv("host", TTP, "gateway", "down", name))


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (
            ["run", "-g", "nobody-knows", "--", "true"],
            125,
            "use the gateway nobody-knows: it is not",
        ),
        (["run", "-g", "../x", "--", "true"], 125, "as the name of a gateway"),
        (["gateway", "down", "nobody-knows"], 2, "reach the gateway nobody-knows: it is not up"),
        (["gateway", "inspect", "nobody-knows"], 2, "it is not up"),
        (["gateway", "logs", "nobody-knows"], 2, "it never ran"),
        (["lab", "down", "nobody-knows"], 2, "there is none"),
        (["ps", "-g", "nobody-knows"], 2, "it is not up"),
        (["ps", "-g", ""], 2, "use '' as the name of a gateway"),
        (["check-leak", "-g", ""], 2, "use '' as the name of a gateway"),
        (["lab", "status", ""], 2, "use '' as the name of a lab"),
        (["run", "-g", "nobody-knows", "--pcap", "", "--", "true"], 125, "record in the file ''"),
        (["run", "-g", "nobody-knows", "--workdir", "", "--", "true"], 125, "it has no name"),
        (["leaktest", "--fuzz", "2", "udp"], 2, "random packets are sent instead of probes"),
        (["leaktest", "--junit", "/no/such/x", "udp"], 2, "cannot write /no/such/x"),
        (["nonsense"], 2, "no such command 'nonsense'"),
        (["run"], 125, "missing"),
    ],
)
def test_who_is_not_known(lab: Lab, argv: list[str], code: int, words: str) -> None:
    """A wrong request is 2, or 125 where the command's own codes begin."""
    refused(lab.ttp(*argv), code, words)


def test_what_is_printed_cannot_be_kept_or_is_not_read(lab: Lab) -> None:
    """A full disk is told of; whoever has read enough need not hear that there is more."""

    def shell(script: str) -> subprocess.CompletedProcess[str]:
        return lab.do("sh", "-c", script, TTP, lab.name)

    for words in ("ps", "--version", "leaktest --list"):
        refused(shell(f'"$0" {words} >/dev/full'), 1, "cannot print: No space left on device")
    unread, pipe = os.pipe()
    os.close(unread)
    listing = lab.command(TTP, "leaktest", "--list")
    with open(pipe, "wb") as closed:
        done = subprocess.run(listing, stdout=closed, stderr=-1, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    done = shell('"$0" run -g "$1" --detach --name untold -- sleep 100 >/dev/full')
    refused(done, 1, "cannot say that the workload untold runs")
    for verb in ("kill -s KILL", "wait", "rm"):
        shell(f'"$0" {verb} untold')


def test_where_nothing_can_be_printed_nothing_is(lab: Lab) -> None:
    """Standard output is closed: no complaint, as of other commands that have only that to do."""
    done = lab.run("echo", "something", options=["--detach", "--name", "unheard"])
    assert done.returncode == 0, done.stderr
    lab.about("wait", "unheard")
    logs = ("logs -g $1 unheard", "gateway logs $1", "lab logs --lab $1 gateway", "lab status $1")
    try:
        for words in logs:
            done = lab.do("sh", "-c", f'"$0" {words} >&-', TTP, lab.name)
            assert (done.returncode, done.stderr) == (0, ""), words
    finally:
        lab.about("rm", "unheard")


def test_a_file_in_the_place_of_a_directory(lab: Lab) -> None:
    """What runs is in no file: there is nothing, and nothing unforeseen about it."""
    for variable, words, code, told in (
        ("RUNTIME", ("lab", "status"), 0, "no lab is up"),
        ("RUNTIME", ("lab", "down"), 2, "there is none"),
        ("RUNTIME", ("lab", "logs"), 2, "it is not up"),
        ("STATE", ("gateway", "logs", "nobody-knows"), 2, "it never ran"),
        ("RUNTIME", ("lab", "up", lab.name), 1, "use the directory /etc/passwd"),
    ):
        done = lab.do("env", f"TTP_{variable}_DIR=/etc/passwd", TTP, *words)
        assert done.returncode == code, done.stderr
        assert told in (done.stderr.splitlines()[0] if code else done.stdout)


def test_a_command_or_a_user_that_is_not_known(lab: Lab) -> None:
    """127 is env(1)'s; a user is asked for before anything is done."""
    refused(lab.run("no-such-program"), 127, "cannot run no-such-program: not found")
    who = {"root": "there is no such user", "user": "only root can"}[lab.who]
    refused(lab.run("true", options=["--user", "nobody-knows"]), 125, who)


ESCAPES = "\x1b]0;x\x07\n\u202e"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "-g", "LAB", "--", ESCAPES],
        ["run", "-g", "LAB", "--user", ESCAPES, "--", "true"],
        ["run", "-g", ESCAPES, "--", "true"],
        ["run", f"--{ESCAPES}", "--", "true"],
        ["gateway", "down", ESCAPES],
        ["gateway", "up", "--uplink", ESCAPES],
        ["refresh", "-g", "LAB", ESCAPES],
        ["lab", "run", "--lab", "LAB", "--", ESCAPES],
        [ESCAPES],
    ],
)
def test_control_characters_do_not_reach_the_terminal(lab: Lab, argv: list[str]) -> None:
    """Wherever they are repeated they are escaped, in one line."""
    done = lab.ttp(*(lab.name if word == "LAB" else word for word in argv))
    assert done.returncode in (1, 2, 125, 127)
    assert "\\x1b" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) <= 2


def test_control_characters_do_not_reach_the_log(lab: Lab) -> None:
    """Nor a table: a command's name cannot write lines that nobody logged."""
    program = lab.home / f"x{ESCAPES}INFO forged"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen(lab.command(TTP, "run", "-v", "-g", lab.name, "--", str(program), "9")):
        listed = ""
        while "forged" not in listed:
            listed = lab.ttp("ps", "-g", lab.name).stdout
        name = next(line for line in listed.splitlines() if "forged" in line).split()[0]
        assert lab.ttp("kill", "-s", "KILL", "-g", lab.name, name).returncode == 0
    logged = lab.ttp("gateway", "logs", lab.name).stdout
    assert "forged" in logged
    for line in [*listed.splitlines(), *logged.splitlines()]:
        assert line.isprintable()
        assert not line.startswith("INFO")


def test_a_working_directory_that_was_removed(lab: Lab) -> None:
    """It is named, as nothing can be done in it; a lab's command begins in / instead."""
    gone = f'mkdir {lab.home}/run/gone && cd {lab.home}/run/gone && rmdir ../gone && exec "$@"'
    done = lab.do("sh", "-c", gone, "sh", TTP, "run", "-g", lab.name, "--", "true")
    assert done.returncode == 125
    assert f"ttp: cannot work in {lab.home}/run/gone" in done.stderr  # after a word of sh's own
    inside = (TTP, "lab", "run", "--lab", lab.name, "--", "readlink", "/proc/self/cwd")
    assert lab.do("sh", "-c", gone, "sh", *inside).stdout == "/\n"


def interrupted(lab: Lab, seconds: float, *argv: str) -> tuple[int, str]:
    """Ctrl-C after a while: to the whole process group, as a terminal does it.

    What Python itself says before it has begun with ours counts as death by the signal.
    """
    with subprocess.Popen(
        lab.command(*argv), stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        begun = Path(f"/proc/{process.pid}/cmdline")

        def ours() -> bool:
            words = begun.read_text().split("\0")[:-1]
            return words[-1:] == [argv[-1]] and str(ROOT / "tests" / "harness.py") not in words

        eventually(ours, "ttp to begin")
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        code = process.wait(30)
    early = said.startswith("Fatal Python error: init_") or '"<string>", line 0' in said
    if said.startswith("Exception ignored in: <function _get_module_lock"):
        return code, ""  # CPython loses a signal that comes while it locks a module to import
    return (-signal.SIGINT, "") if early else (code, said)


LINE = "ttp: interrupted\n"
BY_SIGNAL = (-signal.SIGINT, "")  # before Python can take it, or once it is the command's


@pytest.mark.promise("P4", "P8")
def test_ctrl_c_at_any_moment_of_a_start(lab: Lab) -> None:
    """One line and 130, and no gateway remains, not even the beginning of one."""
    fragment = lab.home / "fragment"
    fragment.write_text(str(lab.status()["client_torrc"]))
    name = f"{lab.name}-int"
    up = (TTP, "gateway", "up", name, "--uplink", "slirp4netns", "--torrc", str(fragment))
    look = ("sh", "-c", f"ls -d $TTP_RUNTIME_DIR/gateways/{name}")

    def gone() -> bool:
        return lab.do(*lab.inside_argv("host", *look)).returncode != 0

    seen = set()
    for seconds in (0.1, 0.4, 0.6, 0.7, 0.8, 1.0, 1.3):
        code, said = interrupted(lab, seconds, *lab.inside_argv("host", *up))
        seen.add((code, said))
        now = (TTP, "run", "--gateway", name, "--bootstrap-timeout", "0", "--", "true")
        if code == 0 or lab.do(*lab.inside_argv("host", *now)).returncode == 0:
            # it was up before, or at that very moment
            assert lab.do(*lab.inside_argv("host", TTP, "gateway", "down", name)).returncode == 0
        eventually(gone, "the beginning of a gateway to go", 10)
    assert (130, LINE) in seen
    assert seen <= {(130, LINE), BY_SIGNAL, (0, "")}


@pytest.mark.promise("P4", "P8")
def test_ctrl_c_at_any_moment_of_a_run(lab: Lab) -> None:
    """The same on the way through a gateway that is up; its workload goes."""
    not_run = "ttp: interrupted; the command was not run\n"
    for step in range(0, 60, 6):
        seen = interrupted(lab, step / 1000, TTP, "run", "-g", lab.name, "--", "sleep", "60")
        assert seen in {(130, LINE), (130, not_run), BY_SIGNAL}
    eventually(lambda: len(lab.ttp("ps", "-g", lab.name).stdout.splitlines()) == 1, "their end", 10)
