"""``ttp run --detach``: what becomes of a command that nobody sits in front of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab


def run(
    lab: Lab, *argv: str, name: str = "job", options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return lab.ttp("run", "-g", lab.name, "--detach", "--name", name, *options, "--", *argv)


@contextmanager
def job(lab: Lab, *argv: str, name: str = "job", options: Sequence[str] = ()) -> Iterator[str]:
    """A detached workload; at the end of the block there is none, and no record of it."""
    started = time.monotonic()
    done = run(lab, *argv, name=name, options=options)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 30, "it waits for the command"
    try:
        yield done.stdout.strip()
    finally:
        lab.about("kill", "-s", "KILL", name)
        lab.about("wait", name)
        assert lab.about("rm", name).returncode == 0
        assert name not in [one["name"] for one in listed(lab)]


def listed(lab: Lab) -> list[dict[str, Any]]:
    return list(json.loads(lab.about("ps", "--json").stdout))


def records(lab: Lab) -> Path:
    """Where the records of the lab's user are; only root, or he, can look."""
    found = lab.do(
        *(str(Path(TTP).with_name("python")), "-c"),
        "from nsrun import records; print(records.directory())",
    )
    return Path(found.stdout.strip())


def test_a_detached_command_runs_on_by_itself(lab: Lab) -> None:
    """A name at once, without a pipe of ours held; what it prints, and how it ends, is kept."""
    script = "echo out; echo err >&2; cat; read line < /dev/tty || echo alone; sleep 1; exit 7"
    with job(lab, "sh", "-c", script) as name:
        assert name == "job"
        assert [(one["name"], one["state"]) for one in listed(lab)] == [("job", "running")]
        assert lab.about("wait", "job").returncode == 7
        log = lab.about("logs", "job").stdout.splitlines()
        assert log[:2] == ["out", "err"]
        assert log[-1] == "alone"
        (ended,) = listed(lab)
        assert (ended["state"], ended["exit_code"]) == ("ended", 7)
        assert "exit 7" in lab.about("ps").stdout
        assert lab.about("wait", "job").returncode == 7


@pytest.mark.promise("P1")
def test_a_detached_command_is_behind_tor(lab: Lab) -> None:
    """By an exit of the lab's, under a name that it was not given."""
    done = lab.ttp("run", "-g", lab.name, "-d", "--", "curl", "-sS", PLAIN_ORACLE)
    name = done.stdout.strip()
    assert name.startswith("curl-")
    assert lab.about("wait", name).returncode == 0
    assert json.loads(lab.about("logs", name).stdout)["IsTor"] is True
    again = lab.ttp("run", "-g", lab.name, "-d", "--", "curl", "--version").stdout.strip()
    assert again.startswith("curl-")
    assert again != name
    assert lab.about("wait", again).returncode == 0
    assert lab.about("rm", name, again).returncode == 0


def test_its_surroundings_are_those_it_was_started_in(lab: Lab) -> None:
    """Directory, variables, limits; but a session of its own, and signals as if nobody cared."""
    look = "pwd; ulimit -n; ps -o pid=,sid=,pgid=,tty= -p $$; grep SigIgn /proc/$$/status; env -0"
    start = f"ulimit -n 77; A=1 exec {TTP} run -g {lab.name} -d --name job -- sh -c '{look}'"
    done = lab.do("sh", "-c", start, cwd=Path("/usr"))
    assert done.stdout == "job\n", done.stderr
    try:
        assert lab.about("wait", "job").returncode == 0
        log = lab.about("logs", "job").stdout
    finally:
        lab.about("rm", "job")
    where, limit, job, ignored, rest = log.split("\n", 4)
    pid, session, group, terminal = job.split()
    assert (where, limit, terminal) == ("/usr", "77", "?")
    assert pid == session == group
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGINT - 1)) == 0
    theirs = {line.partition("=")[0] for line in rest.split("\0")}
    ours = lab.do("env", "-0").stdout
    assert "A" in theirs
    unset = {line.partition("=")[0] for line in ours.split("\0")} - theirs
    assert unset <= {"OLDPWD", "_"}


def test_death_by_signal_is_told_as_a_shell_does(lab: Lab) -> None:
    """128 and the signal's number."""
    with job(lab, "sleep", "60"):
        assert lab.about("rm", "job").returncode == 2, "it runs"
        assert lab.about("kill", "job").returncode == 0
        assert lab.about("wait", "job").returncode == 128 + signal.SIGTERM
        eventually(lambda: listed(lab)[0]["state"] == "ended", "its end")
        refused = lab.about("kill", "job")
        assert refused.returncode == 2
        assert "it has ended" in refused.stderr
        for command in (["refresh", "job"], ["exec", "job", "true"]):
            assert "it has ended" in lab.about(*command).stderr


def test_logs_are_followed_to_the_end(lab: Lab) -> None:
    """Line by line as they come, and no longer than the command."""
    with job(lab, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.3; done"):
        started = time.monotonic()
        follow = lab.command(TTP, "logs", "-g", lab.name, "--follow", "job")
        with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            assert process.stdout.read() == "2\n3\n"
            assert process.wait(10) == 0
        assert time.monotonic() - started < 20
        head = lab.do("sh", "-c", f"{TTP} logs -g {lab.name} job | head -c 2")
        assert (head.stdout, head.stderr) == ("1\n", "")


def test_a_log_may_be_emptied_while_it_is_written(lab: Lab) -> None:
    """What comes after begins at its beginning, also for who follows: all who write append."""
    script = "echo before; until [ -e go ]; do sleep 0.05; done; echo after"
    room = lab.home / "emptied"
    lab.do("mkdir", str(room))
    with job(lab, "sh", "-c", script, options=("--workdir", str(room))):
        follow = lab.command(TTP, "logs", "-g", lab.name, "--follow", "job")
        with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "before\n"
            lab.do("truncate", "--size", "0", str(lab.workload("job")["log"]))
            lab.do("touch", str(room / "go"))
            assert process.stdout.read() == "after\n"
        assert lab.about("logs", "job").stdout == "after\n"


@pytest.mark.parametrize(
    ("argv", "options", "code", "words"),
    [
        (["no-such-program"], [], 127, "no-such-program: not found"),
        (["/etc/passwd"], [], 126, "Permission denied"),
        (["true"], ["--workdir", "/no/where"], 125, "cannot work in /no/where"),
        (["true"], ["--user", "no-such-user"], 125, "no-such-user"),
        (["true"], ["--json-status-fd", "99"], 125, "it is not open"),
        (["true"], ["--pcap", "/no/where/file"], 125, "/no/where/file"),
    ],
)
def test_what_does_not_begin_leaves_no_record(
    lab: Lab, argv: list[str], options: list[str], code: int, words: str
) -> None:
    """The caller hears why, and has the same exit code as without --detach."""
    done = run(lab, *argv, options=options)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not [one for one in listed(lab) if one["name"] == "job"]
    kept = lab.do("ls", "-A", str(records(lab)))
    assert lab.name not in kept.stdout.split()
    assert not [name for name in kept.stdout.split() if name.startswith(".")]


def test_a_name_is_free_again_when_its_workload_has_ended(lab: Lab) -> None:
    """Not before; and then the new one takes the place of the record."""
    with job(lab, "sh", "-c", "echo first; sleep 60"):
        taken = run(lab, "true")
        assert taken.returncode == 125
        assert "has that name" in taken.stderr
        assert lab.about("logs", "job").stdout == "first\n"
        assert lab.about("kill", "-s", "KILL", "job").returncode == 0
        assert lab.about("wait", "job").returncode == 137
        with job(lab, "echo", "second"):
            assert lab.about("wait", "job").returncode == 0
            assert lab.about("logs", "job").stdout == "second\n"
        run(lab, "true")  # for the block around this one


def test_what_is_not_detached_has_no_record(lab: Lab) -> None:
    """Its output and its end are its caller's."""
    command = lab.command(TTP, "run", "-g", lab.name, "--name", "here", "--", "sleep", "60")
    with subprocess.Popen(command) as here:
        eventually(lambda: [one["name"] for one in listed(lab)] == ["here"], "the workload", 20)
        for verb, code in (("wait", 125), ("logs", 2)):
            refused = lab.about(verb, "here")
            assert refused.returncode == code
            assert "it was not detached" in refused.stderr
        here.kill()


@pytest.mark.promise("P4", "P8")
@pytest.mark.parametrize("how", ["down", "kill"])
def test_a_command_outlives_its_gateway_and_reaches_nothing(lab: Lab, how: str) -> None:
    """Cut off; it can be waited for and killed, and the next gateway is as new."""
    loop = (
        "while sleep 0.1; do curl -sS --max-time 5 http://11.200.0.80/ >/dev/null || exit 9; done"
    )

    def ask(*argv: str) -> subprocess.CompletedProcess[str]:
        return lab.do(*lab.inside_argv("host", TTP, *argv))

    tries, sleeps = f"tries-{how}", f"sleeps-{how}"
    try:
        with lab.other_gateway("slirp4netns", stays=False) as name:
            for job, argv in ((tries, ("sh", "-c", loop)), (sleeps, ("sleep", "60"))):
                done = ask("run", "-g", name, "-d", "--name", job, "--", *argv)
                assert done.stdout == f"{job}\n", done.stderr
            found = json.loads(ask("inspect", "-g", name, "--json", sleeps).stdout)
            gateway = json.loads(ask("gateway", "inspect", name).stdout)
            if how == "down":
                assert ask("gateway", "down", name).returncode == 0
            else:
                assert lab.do("kill", "-9", str(gateway["pid"])).returncode == 0
            assert ask("wait", "-g", name, tries).returncode == 9
            told = json.loads(ask("ps", "-g", name, "--json").stdout)
            assert {one["name"]: one["state"] for one in told} == {
                tries: "ended",
                sleeps: "cut off",
            }
            links = Path(f"/proc/{found['pid']}/net/dev")
            eventually(lambda: "eth0" not in links.read_text(), "the link to go", 15)
            for command in ((sleeps, "true"), (sleeps,)):
                verb = "exec" if "true" in command else "refresh"
                assert "its gateway is gone" in ask(verb, "-g", name, *command).stderr
        with lab.other_gateway("slirp4netns") as name:
            taken = ask("run", "-g", name, "-d", "--name", sleeps, "--", "true")
            assert taken.returncode == 125
            assert "still runs" in taken.stderr
            assert ask("kill", "-g", name, "-s", "KILL", sleeps).returncode == 0
            assert ask("wait", "-g", name, sleeps).returncode == 137
    finally:
        ask("kill", "-g", name, "-s", "KILL", sleeps)
        ask("wait", "-g", name, sleeps)
        ask("rm", "-g", name, tries, sleeps)
    assert json.loads(ask("ps", "-g", lab.name, "--json").stdout) == []


def test_a_gateway_is_started_for_it_and_may_end_before_we_ask(lab: Lab) -> None:
    """A job over night: its gateway ended unused long ago, and what it printed is still there."""
    name = f"{lab.name}-day"
    fragment, file = lab.home / "authorities", lab.home / "config.toml"
    fragment.write_text(str(lab.status()["client_torrc"]))
    file.write_text(
        f"[gateway.{name}]\nuplink = ['slirp4netns']\ntorrc = 'authorities'\nidle = 1\n"
    )
    for one in (fragment, file):
        one.chmod(0o644)

    def ask(*argv: str) -> subprocess.CompletedProcess[str]:
        return lab.do(*lab.inside_argv("host", "env", f"TTP_CONFIG={file}", TTP, *argv))

    try:
        script = "curl -sS http://11.200.0.80/ >/dev/null && echo fetched; exit 3"
        done = ask("run", "-g", name, "-d", "--name", "night", "--", "sh", "-c", script)
        assert done.stdout == "night\n", done.stderr
        eventually(lambda: name not in ask("gateway", "ls").stdout, "the end of the gateway", 30)
        assert ask("wait", "night").returncode == 3
        assert ask("logs", "night").stdout == "fetched\n"
        (found,) = json.loads(ask("ps", "-g", name, "--json").stdout)
        assert (found["state"], found["exit_code"]) == ("ended", 3)
        assert ask("rm", "night").returncode == 0
    finally:
        ask("gateway", "down", name)
        for one in (fragment, file):
            one.unlink()


def monitor_of(lab: Lab, name: str) -> int:
    status = Path(f"/proc/{lab.workload(name)['pid']}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def test_a_monitor_is_small(lab: Lab) -> None:
    """As docs/workloads.md says: well below a megabyte of its own."""
    with job(lab, "sleep", "60"):
        monitor = Path(f"/proc/{monitor_of(lab, 'job')}")
        text = (monitor / "smaps_rollup").read_text()
        own = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))
        assert own < 1024, text
        assert (monitor / "cwd").readlink() == Path("/")
        assert lab.workload("job")["processes"] == [lab.workload("job")["pid"]]


def test_a_killed_monitor_takes_only_the_exit_code_along(lab: Lab) -> None:
    """The command runs on; that nobody knows how it ended is said, not guessed."""
    with job(lab, "sleep", "60"):
        monitor = monitor_of(lab, "job")
        os.kill(monitor, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{monitor}").exists(), "its end")
        assert listed(lab)[0]["state"] == "running"
        assert lab.about("kill", "-s", "KILL", "job").returncode == 0
        eventually(lambda: listed(lab)[0]["state"] == "lost", "the end of the command")
        waited = lab.about("wait", "job")
        assert waited.returncode == 125
        assert "nobody knows how it ended" in waited.stderr
        assert "nobody knows" in lab.about("kill", "job").stderr


@pytest.mark.promise("P8")
def test_callers_killed_at_any_moment_leave_no_half_of_it(lab: Lab) -> None:
    """Either a workload with a record, or neither."""
    command = lab.command(TTP, "run", "-g", lab.name, "-d", "--", "sleep", "60")
    for delay in range(0, 80, 8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as caller:
            time.sleep(delay / 1000)  # the moment that is tested
            caller.kill()
    with job(lab, "true"):  # sweeps what has no name
        assert lab.about("wait", "job").returncode == 0

    def settled() -> bool:
        kept = lab.do("ls", "-A", str(records(lab))).stdout.split()
        return not [name for name in kept if name.startswith(".")]

    eventually(settled, "no record without a name")
    for one in listed(lab):
        assert one["log"] is not None, one
        lab.about("kill", "-s", "KILL", one["name"])
        lab.about("wait", one["name"])
        assert lab.about("rm", one["name"]).returncode == 0
    assert listed(lab) == []


def test_a_full_disk_is_the_commands(lab: Lab) -> None:
    """Its writes fail, and it runs on; how it ends is written where room was kept."""
    if lab.who != "root":
        return  # only root can mount a small disk; what happens on it is the same
    disk = lab.home / "disk"
    disk.mkdir(exist_ok=True)
    script = f"""
        mount -t tmpfs -o size=32k none {disk}
        export TTP_STATE_DIR={disk}/state
        ttp() {{ {TTP} "$@" -g {lab.name}; }}
        {TTP} run -d -g {lab.name} --name full -- \
            sh -c 'head -c 1M /dev/zero || echo failed >&2; sleep 0.3; exit 5'
        {TTP} wait -g {lab.name} full; echo $?
        {TTP} run -d -g {lab.name} --name second -- true; echo $?
        {TTP} logs -g {lab.name} full | wc -c
        {TTP} rm -g {lab.name} full; echo $?
    """
    done = lab.do("unshare", "-m", "sh", "-c", script)
    lines = done.stdout.split()
    assert lines[:2] == ["full", "5"], done
    assert lines[2] == "125", done
    assert "No space left on device" in done.stderr
    assert 0 < int(lines[3]) < 32768
    assert lines[4] == "0"


def test_a_status_descriptor_tells_what_runs(lab: Lab, tmp_path: Path) -> None:
    """One line before the command starts; of a detached one another line at its end."""
    tmp_path = lab.home / "status"
    start = f"exec {TTP} run -g {lab.name} --name told --json-status-fd 9"
    done = lab.do("sh", "-c", f"{start} -- sh -c 'ls /proc/$$/fd' 9>{tmp_path}")
    assert "9" not in done.stdout.split()
    (line,) = tmp_path.read_text().splitlines()
    told = json.loads(line)
    assert (told["name"], told["gateway"]) == ("told", lab.name)
    assert told["command"][0] == "sh"
    assert told["identity"]
    assert told["network"]
    done = lab.do("sh", "-c", f"{start} -d -- sh -c 'exit 4' 9>{tmp_path}")
    assert done.stdout == "told\n", done.stderr
    assert lab.about("wait", "told").returncode == 4
    first, second = tmp_path.read_text().splitlines()
    assert json.loads(first)["pid"] != told["pid"]
    assert json.loads(second) == {"exit_code": 4}
    assert lab.about("rm", "told").returncode == 0
    done = lab.run("echo", "started", options=["--json-status-fd", "9"])
    assert (done.returncode, done.stdout) == (125, "")
    assert "it is not open" in done.stderr


def test_a_status_pipe_ends_with_the_command(lab: Lab) -> None:
    """Nobody else holds it: who reads it to its end need not know how many lines there are."""
    reading, writing = os.pipe()
    try:
        options = ("--json-status-fd", str(writing))
        command = lab.command(TTP, "run", "-g", lab.name, "-d", *options, "--", "sleep", "1")
        done = subprocess.run(command, pass_fds=[writing], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.close(writing)
        with os.fdopen(reading) as pipe:
            started, ended = map(json.loads, pipe)
        assert started["command"] == ["sleep", "1"]
        assert ended == {"exit_code": 0}
    finally:
        lab.about("wait", done.stdout.strip())
        assert lab.about("rm", done.stdout.strip()).returncode == 0


@pytest.mark.parametrize("option", ["--strict", "--pcap"])
def test_others_processes_around_the_command_do_not_keep_it(lab: Lab, option: str) -> None:
    """With those of --strict or --pcap in between, it begins and ends in the same way."""
    options = [option] if option == "--strict" else [option, str(lab.home / "job.pcap")]
    with job(lab, "sh", "-c", "echo inside; sleep 0.5; exit 6", options=options):
        assert lab.about("wait", "job").returncode == 6
        assert lab.about("logs", "job").stdout == "inside\n"
    (lab.home / "job.pcap").unlink(missing_ok=True)


def test_the_log_is_the_commands_to_open(lab: Lab) -> None:
    """Programs write to /dev/stderr; with --user that is another user's."""
    options = ["--user", "daemon"] if lab.who == "root" else []
    with job(lab, "sh", "-c", "id -u; echo again >> /dev/stderr", options=options):
        assert lab.about("wait", "job").returncode == 0
        uid = "1" if lab.who == "root" else lab.do("id", "-u").stdout.strip()
        assert lab.about("logs", "job").stdout == f"{uid}\nagain\n"


def test_closed_standard_streams_stay_out_of_the_way(lab: Lab) -> None:
    """No file of ours takes their place."""
    start = f"exec {TTP} run -g {lab.name} -d --name job -- sh -c 'echo inside; exit 3'"
    done = lab.do("sh", "-c", f"{start} <&- >&- 2>&-")
    assert done.returncode == 0
    assert lab.about("wait", "job").returncode == 3
    assert lab.about("logs", "job").stdout == "inside\n"
    assert lab.about("rm", "job").returncode == 0


def test_a_shell_cannot_be_detached(lab: Lab) -> None:
    """It has nobody to talk to."""
    done = lab.ttp("shell", "-g", lab.name, "--detach")
    assert done.returncode == 125
    assert "--detach" in done.stderr
