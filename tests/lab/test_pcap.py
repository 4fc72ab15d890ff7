"""``--pcap``: what a command sent and received, whole and from the first packet on, in a file."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from lab_helpers import TTP, Lab
from nsrun.leak import frames, pcap
from terminal import Terminal
from town import eventually

pytestmark = pytest.mark.lab

SITE = "http://11.200.0.80/"
TOKEN = "a-query-to-be-found-again"


def recorded(lab: Lab, file: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    file.unlink(missing_ok=True)
    return lab.run(*argv, options=("--pcap", str(file)))


def load(file: Path) -> tuple[frames.Frame, ...]:
    seen, flaw = pcap.load(file.read_bytes())
    assert not flaw
    return seen


@pytest.mark.promise("P12")
def test_the_file_is_complete_when_the_command_has_ended(lab: Lab) -> None:
    """Lookup, handshake, request and answer, to the last segment; also what was refused."""
    file = lab.home / "complete.pcap"
    script = (
        f"curl -sS {SITE}?{TOKEN}; curl -sS4 http://check.torproject.org/ -o /dev/null;"
        "echo | socat -t0 - UDP:11.200.0.80:7; true"
    )
    done = recorded(lab, file, "sh", "-c", script)
    assert (done.returncode, "incomplete" in done.stderr) == (0, False), done.stderr
    shown = subprocess.run(
        ["tcpdump", "-nnr", str(file)], capture_output=True, text=True, timeout=20, check=True
    ).stdout.splitlines()
    assert len(shown) == len(load(file))
    assert "11.200.0.80.80: Flags [S]" in shown[0], "the first packet that there was"
    for part in (f"GET /?{TOKEN}", "HTTP/1.1 200", "A? check.torproject.org", "11.200.0.80.7: UDP"):
        assert any(part in line for line in shown), part
    assert sum("Flags [F" in line for line in shown) >= 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    who = (0, 0) if lab.who == "root" else (54321, 54321)
    assert (file.stat().st_uid, file.stat().st_gid) == who or os.geteuid() != 0


@pytest.mark.promise("P5", "P12")
def test_a_big_answer_is_whole_and_nobody_elses_is_there(lab: Lab) -> None:
    """Packets of 64 KiB, and a neighbour who talks meanwhile."""
    file = lab.home / "big.pcap"
    neighbour = lab.command(TTP, "run", "-g", lab.name, "--", "sh", "-c")
    talk = f"while :; do curl -sS {SITE}?neighbour -o /dev/null; done"
    with subprocess.Popen([*neighbour, talk], stderr=subprocess.DEVNULL) as talking:
        try:
            done = recorded(lab, file, "curl", "-sSf", f"{SITE}bytes/3000000", "-o", "/dev/null")
        finally:
            talking.kill()
    assert done.returncode == 0, done.stderr
    content = file.read_bytes()
    assert b"neighbour" not in content
    assert len(content) > 3_000_000
    assert "incomplete" not in done.stderr


@pytest.mark.parametrize("strict", [(), ("--strict",)])
@pytest.mark.parametrize(
    ("script", "code"), [("exit 42", 42), ("kill -TERM $$", -15), ("kill -KILL $$", -9)]
)
def test_the_end_is_the_commands_own(
    lab: Lab, script: str, code: int, strict: tuple[str, ...]
) -> None:
    """Though here the command is a child."""
    file = lab.home / f"end{code}{len(strict)}.pcap"
    done = lab.run("sh", "-c", f"curl -s {SITE}; {script}", options=("--pcap", str(file), *strict))
    assert (done.returncode, done.stderr) == (code, "")
    assert load(file)


def test_signals_and_stops_are_the_commands(lab: Lab) -> None:
    """Of the two processes the outer one is known to who started it."""
    file = lab.home / "signals.pcap"
    script = "trap 'echo told; exit 7' TERM; echo up; while :; do sleep 0.05; done"
    command = lab.command(TTP, "run", "-g", lab.name, "--name", "heard", "--pcap", str(file), "--")
    with subprocess.Popen(
        [*command, "sh", "-c", script],
        stdout=subprocess.PIPE,
        process_group=0,  # signal(7): in an orphaned group, which ours may be, nothing stops
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        listed = json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)
        inner = next(w["pid"] for w in listed if w["name"] == "heard")
        outer = process.pid

        def state(pid: int) -> str:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

        if lab.who == "root":  # pids are those of our own namespace
            os.kill(outer, signal.SIGTSTP)
            eventually(lambda: state(outer) == state(inner) == "T", "both to stop")
            os.kill(outer, signal.SIGCONT)
            eventually(lambda: "T" not in state(outer) + state(inner), "both to go on")
        process.terminate()
        assert process.stdout.readline() == b"told\n"
        assert process.wait(10) == 7


def test_an_interactive_shell_has_job_control(lab: Lab) -> None:
    """Suspend a job, bring it back, leave: the terminal is the shell's, though it is a child."""
    options = ("--pcap", f"{lab.home}/shell.pcap")
    shell = ("bash", "--norc", "-i")
    terminal = Terminal(lab.command(TTP, "run", "-g", lab.name, *options, "--", *shell))
    terminal.expect("bash-")
    terminal.type("sleep 100\n")
    terminal.expect("sleep 100")
    time.sleep(0.3)  # until the shell has put the job into the foreground: that cannot be seen
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.type("fg\n")
    terminal.expect("sleep 100")
    time.sleep(0.3)  # as above
    terminal.type("\x03")
    terminal.type("echo $((6*7)); exit 3\n")
    terminal.expect("42")
    assert os.waitstatus_to_exitcode(terminal.wait()) == 3


def test_the_command_does_not_outlive_its_parent(lab: Lab) -> None:
    """kill -9 of ttp run is the end of the command, as if the two were one."""
    file = lab.home / "orphan.pcap"
    command = lab.command(TTP, "run", "-g", lab.name, "--name", "orphan", "--pcap", str(file), "--")
    script = f"curl -sS {SITE} -o /dev/null; echo up; exec sleep 100"
    with subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()

    def listed() -> bool:
        return "orphan" in lab.ttp("ps", "-g", lab.name, "--json").stdout

    eventually(lambda: not listed(), "the command to end", 10)
    eventually(lambda: load(file), "the recorder to have written what there was")


def test_no_file_is_overwritten_and_a_bad_path_starts_nothing(lab: Lab) -> None:
    """An empty file is taken: nothing is lost, and mktemp makes one."""
    file, mark = lab.home / "kept.pcap", lab.home / "mark"
    assert lab.do("sh", "-c", f"echo precious > {file}").returncode == 0
    for path in (file, lab.home / "no" / "such", lab.home):
        refused = lab.run("touch", str(mark), options=("--pcap", str(path)))
        assert refused.returncode == 125
        assert f"cannot write the capture to {path}" in refused.stderr
    assert file.read_text() == "precious\n"
    assert not mark.exists()
    assert lab.do("sh", "-c", f": > {file}").returncode == 0
    assert lab.run("curl", "-sS", SITE, options=("--pcap", str(file))).returncode == 0
    assert load(file)


def test_into_a_pipe(lab: Lab) -> None:
    """As wireshark -i - and tcpdump -r - want it."""
    script = f"{TTP} run -g {lab.name} --pcap /dev/stdout -- curl -sS {SITE} -o /dev/null"
    done = lab.do("sh", "-c", f"{script} | tcpdump -nnr -")
    assert "Flags [S]" in done.stdout


@pytest.mark.promise("P4", "P12")
def test_a_recording_that_breaks_is_told_and_opens_nothing(lab: Lab) -> None:
    """The reader of the pipe goes: the command goes on, behind Tor, and the user is told."""
    fifo = lab.home / "fifo"
    assert lab.do("sh", "-c", f"rm -f {fifo}; mkfifo {fifo}").returncode == 0
    fetch = f"curl -sS {SITE}; sleep 0.3; curl -sS {SITE}; exit 5"
    with lab.tap("router", "gw-" + lab.name) as wire:
        run = lab.command(TTP, "run", "-g", lab.name, "--pcap", str(fifo), "--", "sh", "-c", fetch)
        with subprocess.Popen(
            run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            with fifo.open("rb") as reader:
                reader.read(24)
            output, errors = process.communicate(timeout=40)
        wire.stop()
    assert process.returncode == 5
    assert output.count("an exit of the lab") == 2
    assert f"ttp: the capture in {fifo} is incomplete: Broken pipe" in errors
