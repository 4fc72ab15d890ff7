"""``ttp run`` where things are odd: variables, limits, arguments, descriptors, directories."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab

pytestmark = pytest.mark.lab

NAMES = ("json", "socket", "stem", "subprocess")  # modules that ttp's processes import
FETCH = f"curl -sS --max-time 20 {PLAIN_ORACLE}"
TOR = b'"IsTor":true'


def shell(lab: Lab, script: str) -> subprocess.CompletedProcess[bytes]:
    """A script as the lab's user; ``$run`` in it begins a command behind Tor."""
    run = f'run="{TTP} run --gateway {lab.name} --"; {script}'
    return subprocess.run(lab.command("bash", "-c", run), capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param("-i", id="none"),
        pytest.param("-u HOME -u USER -u LOGNAME", id="no-home"),
        pytest.param("PATH=/usr/bin:/bin", id="no-sbin"),
        pytest.param("LC_ALL=C", id="c-locale"),
        pytest.param("LC_ALL=xx_YY.ISO-8859-15 LANG=junk", id="unknown-locale"),
        pytest.param("PYTHONHOME=/nowhere PYTHONPATH=/nowhere PYTHONMALLOC=x", id="python"),
        pytest.param("LD_PRELOAD=libnowhere.so", id="preload"),
        pytest.param("IFS=/ ENV=/nowhere BASH_ENV=/nowhere CDPATH=/", id="shell"),
        pytest.param(r"TTP_TEST=$'\xff' OTHER=$'\xfe\n'", id="not-utf-8"),
    ],
)
def test_variables_do_not_matter(lab: Lab, variables: str) -> None:
    """The program starts, and nothing of them is lost: those that it had it has inside."""
    keep = "" if lab.who == "root" else f"XDG_RUNTIME_DIR={lab.home}/run"
    done = shell(lab, f"env {variables} {keep} $run /bin/sh -c '{FETCH}'")
    assert TOR in done.stdout, done.stderr
    inside, outside = (
        shell(lab, f"env {variables} {keep} {run} /usr/bin/env -0").stdout.split(b"\0")
        for run in ("$run", "/bin/sh -c 'exec \"$@\"' sh")  # a shell, as ttp's launcher is one
    )
    assert set(outside) <= set(inside)


def test_arguments_need_not_be_text(lab: Lab) -> None:
    """Every byte but NUL passes, and a megabyte of arguments."""
    everything = "".join(f"\\x{byte:02x}" for byte in range(1, 256))
    done = shell(lab, rf"$run printf %s $'{everything}'")
    assert done.stdout == bytes(range(1, 256)), done.stderr
    done = shell(
        lab, "$run sh -c 'echo $#; echo ${#1}' sh $(yes $(printf %01000d 0) | head -n 1000)"
    )
    assert done.stdout.split() == [b"1000", b"1000"], done.stderr


def test_many_variables_pass(lab: Lab) -> None:
    """A large environment is the command's own business."""
    done = shell(lab, 'for i in {1..500}; do export "V$i=$(printf %01000d 0)"; done; $run env')
    assert done.stdout.count(b"=" + b"0" * 1000 + b"\n") == 500, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stay_closed(lab: Lab, closed: str) -> None:
    """No descriptor of ours takes their place, and the fetch works."""
    directory = lab.do("mktemp", "-d", "/tmp/ttp-test-XXXXXX").stdout.strip()
    look = f"ls /proc/$$/fd >{directory}/list; {FETCH} -o {directory}/page"
    try:
        shell(lab, f"$run sh -c '{look}' {closed}")
        listed = set(Path(directory, "list").read_text().split())
        assert TOR in Path(directory, "page").read_bytes()
    finally:
        lab.do("rm", "-r", directory)
    numbers = {"<&-": "0", ">&-": "1", "2>&-": "2"}
    # ls makes its output number 1
    assert not listed & ({numbers[one] for one in closed.split()} - {"1"})


def test_few_descriptors_are_enough(lab: Lab) -> None:
    """A shell itself needs eleven."""
    done = shell(lab, f"ulimit -n 13; $run sh -c 'ulimit -n; {FETCH}'")
    assert done.stdout.startswith(b"13\n"), done.stderr
    assert TOR in done.stdout


def test_the_directory_may_be_closed_and_read_only(lab: Lab) -> None:
    """As for any command, it is enough to be in it."""
    script = f"cd $(mktemp -d); chmod 500 .; pwd; $run sh -c 'pwd; {FETCH}'; rmdir $PWD"
    here, there, page = shell(lab, script).stdout.split(b"\n")
    assert here == there
    assert TOR in page


@pytest.mark.parametrize(
    "directory",
    [
        pytest.param("$(mktemp -d); rmdir $PWD", id="gone"),
        pytest.param("$XDG_RUNTIME_DIR; mkdir -p hidden; cd hidden", id="hidden"),
    ],
)
def test_a_command_does_not_begin_elsewhere(lab: Lab, directory: str) -> None:
    """Where its directory cannot be entered it is not run: it may be one that removes files."""
    session = f"export XDG_RUNTIME_DIR={lab.home}/run"
    done = shell(lab, f"{session}; cd {directory}; $run pwd; echo $?")
    assert done.stdout == b"125\n"
    assert b"ttp: cannot work in /" in done.stderr
    assert b"--workdir" in done.stderr


def test_modules_in_the_directory_are_not_ours(lab: Lab) -> None:
    """Whoever may write to a directory must not run code in every ttp that is started there."""
    make = "cd $(mktemp -d); " + "".join(
        f"echo 'raise SystemExit(\"trapped\")' >{name}.py; " for name in NAMES
    )
    # nor, in a process that lives on, what the shell that started it had set
    gateway = f"{TTP} lab run --lab {lab.name} -- env PYTHONHOME=/nowhere {TTP} gateway"
    ours = (
        f"{TTP} lab status; {TTP} doctor; $run true && echo ran;"
        f"{gateway} up trap --bootstrap-timeout 0.1; {gateway} down trap && echo up; rm -r $PWD"
    )
    done = shell(lab, make + ours)
    assert b"ran\nup\n" in done.stdout, done.stderr
    assert b"trapped" not in done.stdout + done.stderr
    control = shell(lab, make + f"{Path(TTP).with_name('python3')} -m json.tool; rm -r $PWD")
    assert b"trapped" in control.stderr
