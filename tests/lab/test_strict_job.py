"""``ttp run --strict`` as a job: two processes around the command, and nobody notices."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_helpers import TTP, Lab
from terminal import Terminal
from town import eventually

pytestmark = pytest.mark.lab


def command(lab: Lab, *argv: str) -> list[str]:
    return lab.command(TTP, "run", "-g", lab.name, "--strict", "--", *argv)


def run(lab: Lab, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(lab, *argv), capture_output=True, text=True, timeout=30)


@contextmanager
def running(lab: Lab, script: str) -> Iterator[subprocess.Popen[str]]:
    """A shell script as a process group of its own, once it has printed a line."""
    argv = command(lab, "bash", "-c", script)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


def left(mark: str) -> list[str]:
    """The processes on this machine that have ``mark`` in their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in file.read_bytes():
                found.append(file.parent.name)
        except OSError:
            continue
    return found


def marked() -> str:
    """An unusual time to sleep, to be recognised by: a minute, lest a failed test leaves it."""
    return f"60.{time.monotonic_ns() % 10**9:09}"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "exit 255"], 255),
        (["/nonexistent/program"], 127),
        (["no-such-program-anywhere"], 127),
        (["/etc/passwd"], 126),
        *(
            (["sh", "-c", f"kill -{name} $$"], -number)
            for name, number in (
                ("TERM", 15),
                ("KILL", 9),
                ("PIPE", 13),
                ("SEGV", 11),
                ("INT", 2),
                ("QUIT", 3),
            )
        ),
    ],
)
def test_it_ends_as_the_command_does(lab: Lab, argv: list[str], code: int) -> None:
    """Every exit code, and every signal as a signal."""
    assert run(lab, *argv).returncode == code


def test_streams_directory_and_variables_pass(lab: Lab) -> None:
    """What a pipe brings and takes, where we are, what is set; its end is seen while it runs."""
    done = subprocess.run(
        command(lab, "cat"), input=b"\0\xff line", capture_output=True, timeout=30
    )
    assert done.stdout == b"\0\xff line"
    assert lab.do("sh", "-c", f"cd /usr; {TTP} run -g {lab.name} --strict pwd").stdout == "/usr\n"
    shown = lab.do(
        "env", "A=b", TTP, "run", "-g", lab.name, "--strict", "--", "sh", "-c", "echo $A"
    )
    assert shown.stdout == "b\n"
    with running(lab, "echo up; exec >&-; sleep 60") as process:
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.poll() is None


def test_orphans_are_reaped_and_may_outlive_the_command(lab: Lab) -> None:
    """As without --strict: a command's end is not that of what it left running; no zombies."""
    mark = marked()
    script = (
        "for i in 1 2 3 4 5; do (sleep 0.01 &); done; sleep 0.3; ps -eo stat= | grep -c Z;"
        f"setsid sleep {mark} >/dev/null 2>&1 </dev/null &"
    )
    done = run(lab, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "0\n")
    eventually(lambda: sleepers(mark) != [], "the sleeper to sleep")
    assert json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)
    os.kill(sleepers(mark)[0], signal.SIGKILL)
    eventually(lambda: not left(mark), "init to end with the last process")


def sleepers(mark: str) -> list[int]:
    return [int(pid) for pid in left(mark) if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]


@pytest.mark.promise("P4", "P8")
@pytest.mark.parametrize("victim", ["outside", "init", "command"])
def test_kill_9_leaves_nothing_running(lab: Lab, victim: str) -> None:
    """Whichever of the three is killed, all end, and it looks like a kill."""
    mark = marked()
    with running(lab, f"setsid sleep {mark} & echo up; wait") as process:
        outside = process.pid
        eventually(lambda: sleepers(mark) != [], "the sleeper to sleep")
        init = children(outside)[0]
        target = {"outside": outside, "init": init, "command": children(init)[0]}[victim]
        os.kill(target, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
        if victim == "command":  # what it left behind goes on, confined, as without --strict
            os.kill(sleepers(mark)[0], signal.SIGKILL)
        eventually(lambda: not left(mark), "all of it to end")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


COUNT = (
    "trap 'n=$((n+1))' USR1; trap 'echo $n; exit 7' TERM; n=0;echo up; while :; do sleep 0.05; done"
)


@pytest.mark.parametrize("to", ["process", "group"])
def test_a_signal_arrives_once(lab: Lab, to: str) -> None:
    """Sent to ttp alone, or to its whole process group, in which the command is too."""
    with running(lab, COUNT) as process:
        send = os.kill if to == "process" else os.killpg
        for _ in range(3):
            send(process.pid, signal.SIGUSR1)
            time.sleep(0.2)  # two of a kind, pending at once, are one
        send(process.pid, signal.SIGTERM)
        assert process.wait(20) == 7
        assert process.stdout is not None
        assert process.stdout.read() == "3\n"


def test_it_stops_and_goes_on_as_the_command_does(lab: Lab) -> None:
    """SIGTSTP and SIGCONT to ttp alone; and a command that stops itself."""
    with running(lab, "echo up; kill -STOP $$; echo on; while :; do sleep 0.05; done") as process:
        assert os.WSTOPSIG(os.waitpid(process.pid, os.WUNTRACED)[1]) == signal.SIGSTOP
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        # not ours to stop by SIGTSTP: the group has no parent in its session (setpgid(2))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def test_a_terminal_is_the_commands_own(lab: Lab) -> None:
    """Size and its changes, Ctrl-C; no second of either."""
    script = "stty size; trap 'stty size' WINCH; echo up; while :; do sleep 0.1; done"
    terminal = Terminal(command(lab, "sh", "-c", script))
    terminal.expect("up")
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("4H", 41, 97, 0, 0))
    terminal.expect("41 97")
    terminal.type("\x03")
    status = terminal.wait()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_ctrl_z_and_back_from_a_shell_outside(lab: Lab) -> None:
    """The shell sees the job stop, and continues it in the foreground, where it can be read."""
    terminal = Terminal(lab.command("bash", "--norc", "-i"))
    quoted = " ".join(["$TTP", "run", "-g", lab.name, "--strict", "--"])
    terminal.type(
        f"TTP={TTP}; PS1='> '; {quoted} sh -c 'echo u\"\"p; read a; echo got $a; exit 5'\n"
    )
    terminal.expect("up")
    time.sleep(0.3)  # until it reads: that cannot be seen
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.type("echo $((6*7))\n")
    terminal.expect("42")
    terminal.type("fg\n")
    terminal.expect("sh -c")
    time.sleep(0.3)  # as above
    terminal.type("text\n")
    terminal.expect("got text")
    terminal.type("echo code=$?\n")
    terminal.expect("code=5")
    terminal.type(f"{quoted} sh -c 'echo beg\"\"un; exec sleep 100' &\n")
    terminal.expect("begun")
    time.sleep(0.5)  # it must neither stop for being in the background, nor take the terminal
    terminal.type("kill %1; wait %1; echo code=$?\n")
    terminal.expect("code=143")
    terminal.type("exit 3\n")
    assert os.waitstatus_to_exitcode(terminal.wait()) == 3


def test_an_interactive_shell_inside_has_job_control(lab: Lab) -> None:
    """Suspend a job, bring it back, leave; who comes next has the terminal."""
    shell = f"{TTP} run -g {lab.name} --strict -- bash --norc -i"
    terminal = Terminal(lab.command("sh", "-c", f"{shell}; echo left $?; read a; echo got $a"))
    terminal.type("PS1='> '; sleep 100\n")
    terminal.expect("sleep 100")
    time.sleep(0.3)  # until the shell has put the job into the foreground: that cannot be seen
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.type("fg\n")
    terminal.expect("sleep 100")
    time.sleep(0.3)  # as above
    terminal.type("\x03")
    terminal.type("echo $((6*7)); exit 3\n")
    assert "42" in terminal.expect("left 3")
    terminal.type("text\n")
    terminal.expect("got text")
    assert os.waitstatus_to_exitcode(terminal.wait()) == 0
