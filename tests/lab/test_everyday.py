"""Everyday programs, unchanged: each entry of README's table of them is a test here.

Their servers are in the lab's internet (tests/depot.py). Every script is what a user would type,
in a fresh directory that is also HOME, with an environment that has nothing of the machine's own
settings. While they run, the wires are watched, and judged when the last has ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from depot import HELLO, SITE, SSH_PORT
from harness import ROOT, SBIN
from lab_helpers import ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.capture import Tap
from nsrun.leak.verdict import Value, as_text, judge
from terminal import Terminal
from users import USER, is_hidden, place_seen, prefix_of

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

pytestmark = pytest.mark.lab

TOR = r'"IsTor":true'
SSH = f"ssh -F none -i key -p {SSH_PORT} -o UserKnownHostsFile=known_hosts -o BatchMode=yes"
#: A job that says when it has the terminal and when it is continued, in words that it puts
#: together: the echo of what is typed has neither.
JOB = """\
trap "echo res""umed" CONT
while read -r pid name state parent group session tty foreground rest </proc/$$/stat
    test $group != $foreground
do :; done
echo star""ted
while :; do read -r line; done"""
#: ssh asks for the name of its user, and the tests' user may have none: nobody has one.
SOMEBODY = "unshare --user --map-user=65534 --map-group=65534 --"


def program(name: str, script: str, shows: str, code: int = 0) -> ParameterSet:
    """One program of README's table: what is typed, what it prints, its exit code."""
    return pytest.param(script, shows, code, id=name, marks=pytest.mark.program(name))


PROGRAMS = [
    program("curl", f"ttp run -- curl -sS {ORACLE}", TOR),
    program("wget", f"ttp run -- wget -qO- {ORACLE}", TOR),
    program(
        "Python",
        f"""ttp run -- python3 -c '
import urllib.request
print(urllib.request.urlopen("{ORACLE}").read())'""",
        TOR,
    ),
    program(
        "Node",
        f"""ttp run -- node -e '
            require("dns").resolve4("www.test", (error, found) => {{
                console.log(error || found)
                require("https").get("{ORACLE}", page => page.pipe(process.stdout))
            }})'""",
        rf"'{topology.WEB}'(?s:.*){TOR}",
    ),
    program("Go's resolver", f"GODEBUG=netdns=go ttp run -- gron {ORACLE}", "json.IsTor = true"),
    program(
        "static musl",
        f"musl-gcc -static -o fetch {ROOT}/tests/fetch.c"
        " && ttp run -- ./fetch check.torproject.org /api/ip",
        TOR,
    ),
    program("dig (A)", "ttp run -- dig +short www.test A", f"^{topology.WEB}$"),
    program("dig (AAAA)", "ttp run -- dig +short www.test AAAA", f"^{topology.WEB6}$"),
    program("dig (PTR)", f"ttp run -- dig +short -x {topology.WEB}", r"^www\.test\.$"),
    program(
        "git (https)",
        f"ttp run -- git clone -q {SITE}/git/hello.git && cat hello/hello",
        HELLO,
    ),
    program(
        "git (ssh)",
        f"""GIT_SSH_COMMAND="{SSH}" ttp run -- $SOMEBODY \
            git clone -q ssh://lab@www.test:{SSH_PORT}/run/lab/www/git/hello.git
            cat hello/hello""",
        HELLO,
    ),
    program(
        "ssh", f"echo hello | ttp run -- $SOMEBODY {SSH} lab@www.test 'cat; exit 7'", "hello", 7
    ),
    program(
        "apt",
        f"""mkdir -p etc/apt.conf.d state/lists/partial cache/archives/partial
            echo "deb [trusted=yes] {SITE}/apt ./" >etc/sources.list
            : >state/status
            echo "Dir::Etc \\"$PWD/etc\\"; Dir::State \\"$PWD/state\\"; Dir::Cache \\"$PWD/cache\\";
                Dir::State::status \\"$PWD/state/status\\";" >conf
            export APT_CONFIG=$PWD/conf
            ttp run -- apt-get -qq update && ttp run -- apt-get -qq download lab-hello &&
            dpkg-deb --fsys-tarfile lab-hello_1.0_all.deb | tar -xO ./usr/share/lab-hello""",
        HELLO,
    ),
    program(
        "pip",
        f"""ttp run -- pip -q install --no-cache-dir -i {SITE}/pip/simple/ --target . lab-hello &&
            python3 lab_hello.py""",
        HELLO,
    ),
    program(
        "npm",
        f"""ttp run -- npm install --silent --no-audit --registry {SITE}/npm/ lab-hello &&
            node -e 'require("lab-hello")'""",
        HELLO,
    ),
    program("pipes", f"echo {ORACLE} | ttp run -- xargs curl -sS | tr a-z A-Z", r'"ISTOR":TRUE'),
    program("here-documents", f"ttp run -- sh <<END\ncurl -sS {ORACLE}\nexit 5\nEND", TOR, 5),
    program(
        "xargs -P",
        "printf '%s\\n' a b c | ttp run -- xargs -P 3 -I{} curl -sSo {}.out https://{}.test/api/ip"
        " && cat a.out b.out c.out",
        f"({TOR}.*){{3}}",
    ),
    program("timeout", "ttp run -- timeout 0.2 sleep 60", "^$", 124),
    program(
        "nohup",
        f"nohup ttp run -- sh -c 'kill -HUP $$; exec curl -sS {ORACLE}'",
        TOR,
    ),
    program("script", f"ttp run -- script -qec 'test -t 0 && curl -sS {ORACLE}' log", TOR),
    program("nested ttp run", "ttp run -- ttp run -- true", "is behind Tor already", 125),
]


# ---- actors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Desk:
    """A directory of the lab's user, and how to start what is typed there."""

    lab: Lab
    directory: Path
    strict: bool

    @property
    def sockets(self) -> str:
        """Where a server may have its socket: --strict knows only those in its /tmp as its own."""
        return "/tmp" if self.strict else str(self.directory)

    def command(self, script: str, **variables: str) -> list[str]:
        return self.lab.command(*self.shell(script, **variables))

    def shell(self, script: str, **variables: str) -> tuple[str, ...]:
        clean = {
            "HOME": str(self.directory),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(TTP).parent}:{os.environ['PATH']}{SBIN}",
            "PWD": str(self.directory),
            "SOMEBODY": SOMEBODY if self.lab.who == "user" else "",
            "TERM": "xterm",
            "TTP_GATEWAY": self.lab.name,
            "TTP_STRICT": str(int(self.strict)),
            "XDG_RUNTIME_DIR": str(self.lab.home / "run"),
            **variables,
        }
        settings = (f"{name}={value}" for name, value in clean.items())
        script = f"cd {self.directory} && {script}"
        return ("env", "-i", *settings, "sh", "-c", script)

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    @contextmanager
    def terminal(self, script: str) -> Iterator[Terminal]:
        terminal = Terminal(self.command(script))
        try:
            yield terminal
        finally:
            os.close(terminal.fd)  # what is left on it is hung up


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """A program outside of ttp, which ends with its standard input; the first line it prints."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.fixture(scope="module")
def depot(lab: Lab) -> Iterator[dict[str, str]]:
    """The servers of what programs fetch; what ssh needs to know of them."""
    with server(lab.inside("inet", sys.executable, str(ROOT / "tests" / "depot.py"))) as keys:
        yield json.loads(keys)


@pytest.fixture(scope="module")
def wires(lab: Lab) -> Iterator[tuple[Tap, Tap]]:
    """The gateway's uplink and the host's own wire, watched from the first program on."""
    with lab.tap("router", f"gw-{lab.name}") as uplink, lab.tap("router", "p-host") as host:
        yield uplink, host


@pytest.fixture(params=["unchanged", "strict"])
def desk(
    request: pytest.FixtureRequest, lab: Lab, depot: dict[str, str], wires: tuple[Tap, Tap]
) -> Iterator[Desk]:
    """A fresh directory, not in /tmp; readable for all, as apt fetches as a user of its own."""
    directory = tempfile.mkdtemp(prefix=".desk-", dir=place_seen())
    if lab.who == "user" and os.geteuid() == 0:
        os.chown(directory, USER, USER)
    made = Desk(lab, Path(directory), strict=request.param == "strict")
    try:
        for name, text in (("key", depot["key"]), ("known_hosts", depot["known_host"])):
            assert made.run(f"umask 077; echo {shlex.quote(text)} >{name}").returncode == 0
        assert lab.do("chmod", "755", directory).returncode == 0
        yield made
    finally:
        lab.do("rm", "-rf", directory)  # what it made
        shutil.rmtree(directory, ignore_errors=True)  # what we made


@pytest.fixture
def x_sockets() -> Iterator[None]:
    """The directory of X servers' sockets, with the mode that it has everywhere."""
    sockets = Path("/tmp/.X11-unix")
    missing = not sockets.exists()
    if missing:
        sockets.mkdir()
        sockets.chmod(0o1777)
    yield
    if missing:
        sockets.rmdir()


@pytest.fixture
def display(desk: Desk, x_sockets: None) -> Iterator[str]:
    """An X server outside, on a path socket and an abstract one, as is usual."""
    with server(desk.command("Xvfb -displayfd 1 -nolisten tcp & cat; kill $!; wait")) as number:
        yield f":{number}"


@pytest.fixture
def compositor(desk: Desk, x_sockets: None) -> Iterator[str]:
    """A Wayland compositor outside, without a screen. It refuses to be root's."""
    script = desk.shell(
        "exec cage -- sh -c 'echo $WAYLAND_DISPLAY; exec cat'",
        WLR_BACKENDS="headless",
        WLR_LIBINPUT_NO_DEVICES="1",
        WLR_RENDERER="pixman",
    )
    with server([*prefix_of(USER, desk.lab.home), *script]) as name:
        yield name


# ---- programs that are typed and answer --------------------------------------------------------


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.parametrize(("script", "shows", "code"), PROGRAMS)
def test_a_program_works_unchanged(desk: Desk, script: str, shows: str, code: int) -> None:
    """Its own output and its own exit code; what it fetched came through Tor."""
    if desk.strict and is_hidden() and "-- ttp" in script:
        shows, code = "cannot run ttp: not found", 127
    done = desk.run(script)
    assert re.search(shows, done.stdout, re.MULTILINE), done.stdout
    assert done.returncode == code, done.stdout


# ---- programs that own a terminal --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "stopped"),
    [
        pytest.param("bash --norc -i", "Stopped", marks=pytest.mark.program("bash")),
        pytest.param("zsh -f -i", "suspended", marks=pytest.mark.program("zsh")),
    ],
)
def test_a_shell_has_job_control(desk: Desk, shell: str, stopped: str) -> None:
    """Ctrl-Z suspends a job, fg brings it back, Ctrl-C ends it, exit is the shell's own."""
    with desk.terminal(f"PS1='ready> ' exec ttp run -- {shell}") as terminal:
        terminal.expect("ready> ")
        terminal.type(f"sh -c '{JOB}'\n")
        terminal.expect("started")
        terminal.type("\x1a")
        assert stopped in terminal.expect("ready> ")
        terminal.type("fg\n")
        terminal.expect("resumed")
        terminal.type("\x03")
        terminal.expect("ready> ")
        terminal.type("echo $((6*7)); exit 3\n")
        terminal.expect("42")
        assert os.waitstatus_to_exitcode(terminal.wait()) == 3


@pytest.mark.program("less")
def test_less_pages_a_pipe(desk: Desk) -> None:
    """Text from a pipe, keys from the terminal."""
    with desk.terminal("seq -f 'line %g' 5000 | ttp run -- less") as terminal:
        terminal.expect("line 3")
        terminal.type("G")
        terminal.expect("line 5000")
        terminal.type("q")
        assert terminal.wait() == 0


@pytest.mark.program("vi")
def test_vi_edits_a_file(desk: Desk) -> None:
    """Insert, save, leave."""
    with desk.terminal("exec ttp run -- vi text") as terminal:
        terminal.expect("text")
        terminal.type("ihello\x1b:wq\r")
        assert terminal.wait() == 0
    assert desk.run("cat text").stdout == "hello\n"


@pytest.mark.program("tmux")
def test_tmux_runs_inside(desk: Desk) -> None:
    """Client and server are both in the workload, and what is typed in a window is, too."""
    tmux = f"TMUX_TMPDIR={desk.sockets} ttp run -- tmux -L inside -f /dev/null"
    with desk.terminal(f"exec env {tmux} new-session sh") as terminal:
        terminal.type(f"curl -sS {ORACLE}; exit\n")
        terminal.expect(TOR)
        assert terminal.wait() == 0


@pytest.mark.program("ssh (interactive)")
def test_ssh_gives_a_terminal_there(desk: Desk) -> None:
    """A shell on the server, at the size of the terminal here."""
    with desk.terminal(
        f"stty rows 41 columns 97; exec ttp run -- $SOMEBODY {SSH} lab@www.test"
    ) as terminal:
        terminal.type("stty size; exit 7\n")
        terminal.expect("41 97")
        assert os.waitstatus_to_exitcode(terminal.wait()) == 7


# ---- programs with windows ---------------------------------------------------------------------


@pytest.mark.promise("P6")
@pytest.mark.program("X11")
def test_an_x_client_has_windows(desk: Desk, display: str) -> None:
    """xterm: the X server's path can be reached, though its abstract socket cannot."""
    allowed = f"--allow-socket /tmp/.X11-unix/X{display[1:]}" if desk.strict else ""
    done = desk.run(
        f"ttp run {allowed} -- xterm -e sh -c 'curl -sS {ORACLE} >out'; cat out", DISPLAY=display
    )
    assert TOR in done.stdout, done.stdout


@pytest.mark.promise("P6")
@pytest.mark.program("Wayland")
def test_a_wayland_client_has_windows(desk: Desk, compositor: str) -> None:
    """foot draws in a compositor outside, whose socket is in XDG_RUNTIME_DIR."""
    allowed = f"--allow-socket $XDG_RUNTIME_DIR/{compositor}" if desk.strict else ""
    done = desk.run(
        f"ttp run {allowed} -- foot sh -c 'curl -sS {ORACLE} >out'; cat out",
        WAYLAND_DISPLAY=compositor,
    )
    assert TOR in done.stdout, done.stdout


# ---- and the wires -----------------------------------------------------------------------------


@pytest.mark.promise("P1", "P2", "P3", "P12")
def test_all_of_them_were_contained(lab: Lab, depot: object, wires: tuple[Tap, Tap]) -> None:
    """The uplink carried TCP to relays, the host's wire nothing; without ttp it carries a clone."""
    uplink, host = wires
    lab.run("curl", "-sS", ORACLE)  # so that there is something, whichever tests were chosen
    gateway = (topology.GATEWAY, topology.GATEWAY6)
    verdicts = [
        judge("uplink", uplink.stop(), lab.rules(*gateway), expect_some=True),
        judge("host", host.stop(), [lab.neighbours()]),
    ]
    assert {verdict.value for verdict in verdicts} == {Value.CONTAINED}, as_text(verdicts)

    with lab.tap("router", "p-host") as host:
        argv = lab.inside("host", "git", "ls-remote", f"{SITE}/git/hello.git")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        control = judge("host", host.stop(), [])
    assert "refs/heads/main" in done.stdout, done.stderr
    assert control.value is Value.LEAK
