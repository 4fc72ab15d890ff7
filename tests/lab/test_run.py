"""``ttp run``: as if we were not there, but for where the packets go."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from lab_helpers import ORACLE, TTP, Lab
from terminal import Terminal

pytestmark = pytest.mark.lab


@pytest.mark.promise("P1", "P12")
def test_the_web_sees_an_exit(lab: Lab) -> None:
    """The real URL, TLS and all: IsTor, from one of the exits' addresses."""
    done = lab.run("curl", "-sS", "--max-time", "20", ORACLE)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["IsTor"] is True
    assert answer["IP"] in lab.exits()


@pytest.mark.promise("P11", "P12")
def test_control_without_ttp_the_web_sees_no_exit(lab: Lab) -> None:
    """The oracle does not say yes to everybody."""
    done = subprocess.run(
        lab.inside("host", "curl", "-sS", "--max-time", "20", ORACLE),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["IsTor"] is False


def test_ipv6_only_sites_are_reached(lab: Lab) -> None:
    """By an exit that has IPv6, though the gateway may not."""
    done = lab.run("curl", "-sS", "-6", "--max-time", "20", "https://api6.my-ip.io/ip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in lab.exits()


def test_no_ipv6_means_none(lab: Lab) -> None:
    """--no-ipv6: not even an address."""
    done = lab.run("cat", "/proc/net/if_inet6", options=["--no-ipv6"])
    assert done.returncode == 0
    assert not done.stdout
    assert "eth0" in lab.run("cat", "/proc/net/if_inet6").stdout


@pytest.mark.promise("P2")
def test_names_are_resolved_by_tor(lab: Lab) -> None:
    """A and AAAA through libc; a name that is not there is not there."""
    done = lab.run("getent", "ahosts", "check.torproject.org")
    assert done.returncode == 0, done.stderr
    assert lab.run("getent", "ahosts", "nowhere.invalid").returncode == 2


@pytest.mark.promise("P2")
def test_onion_services_are_reached_by_name(lab: Lab) -> None:
    """By a program that looks names up itself; curl refuses such names (RFC 7686)."""
    onion = str(lab.status()["onion"])
    fetch = (
        f"import urllib.request as u; print(u.urlopen('http://{onion}/', timeout=40).read()[:80])"
    )
    done = lab.run("/usr/bin/python3", "-c", fetch)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["/nonexistent/program"], 127),
        ([""], 127),
        (["no-such-program-anywhere"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
    ],
)
def test_exit_codes_are_the_commands_own(lab: Lab, argv: list[str], code: int) -> None:
    """126 and 127 as env(1) and every shell."""
    assert lab.run(*argv).returncode == code


def test_death_by_signal_is_seen_as_such(lab: Lab) -> None:
    """No wrapper turns a signal into a number."""
    assert lab.run("sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    assert lab.run("sh", "-c", "kill -PIPE $$").returncode == -signal.SIGPIPE


def test_stdin_cwd_and_environment_pass(lab: Lab, tmp_path: Path) -> None:
    """What a pipe brings, where we are, and every variable."""
    command = lab.command(TTP, "run", "-g", lab.name, "--", "cat")
    done = subprocess.run(command, input=b"\0\xff a line", capture_output=True, timeout=30)
    assert done.stdout == b"\0\xff a line"
    assert lab.do(TTP, "run", "-g", lab.name, "--", "pwd", cwd=Path("/usr")).stdout == "/usr\n"
    with_us = set(lab.run("env", "-0").stdout.split("\0"))
    without = set(lab.do("env", "-0").stdout.split("\0"))
    changed = {line.partition("=")[0] for line in with_us ^ without}
    assert changed <= {
        *("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"),
        *("HOME", "LOGNAME", "USER"),
    }


def test_arguments_pass_as_they_are(lab: Lab) -> None:
    """Options of the command are not ours, and no byte of an argument is lost."""
    odd = ["-v", "--help", "--gateway", "x", "a b", "", "ü", "*", "--"]
    done = lab.run("printf", "%s\\n", *odd)
    assert done.stdout.split("\n")[:-1] == odd
    assert lab.ttp("run", "-g", lab.name, "printf", "%s", "--help").stdout == "--help"


def test_who_we_are_is_who_we_were(lab: Lab) -> None:
    """Same user and group; files made belong to them."""
    expected = "0" if lab.who == "root" else lab.do("id", "-u").stdout.strip()
    assert lab.run("id", "-u").stdout.strip() == expected
    assert lab.run("id", "-g").stdout.strip() == lab.do("id", "-g").stdout.strip()


@pytest.mark.promise("P10")
def test_a_command_has_no_power_over_its_network(lab: Lab) -> None:
    """No capability over it, none to come by, no way back; root keeps what files need."""
    status = lab.run("grep", "-E", "^(Cap(Eff|Prm|Bnd|Amb)|NoNewPrivs)", "/proc/self/status").stdout
    found = dict(line.split(":\t") for line in status.splitlines())
    dangerous = sum(1 << number for number in (12, 13, 16, 17, 19, 21, 22, 27, 38, 39))
    assert found["NoNewPrivs"] == "1"
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(found[name], 16) & dangerous == 0, name
    for attempt in (
        "ip link set eth0 down",
        "ip address add 192.0.2.1/32 dev eth0",
        "nft list ruleset",
        "nsenter --net=/proc/1/ns/net true",
        f"nsenter --net=/proc/{lab.gateway()['pid']}/ns/net true",
        "umount /run",
        "umount /etc/resolv.conf",
        "mount -t tmpfs none /mnt",
        "unshare -n true",
        "sysctl -qw net.ipv4.ip_forward=1",
        "sysctl -qw kernel.core_pattern=x",
    ):
        done = lab.run("sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {attempt}")
        assert done.returncode != 0, attempt


@pytest.mark.promise("P10")
@pytest.mark.parametrize("directory", ["/proc/sys", "/sys"])
def test_a_command_can_change_no_parameter_of_the_kernel(lab: Lab, directory: str) -> None:
    """Those outside of any namespace are root's by the files' mode alone; outside root may."""
    if lab.who == "root":
        find = ("find", directory, "-xdev", "-writable", "-type", "f", "-print", "-quit")
        assert not lab.run(*find).stdout
        assert lab.do(*find).stdout  # control


@pytest.mark.promise("P10")
def test_a_user_namespace_gives_no_power_either(lab: Lab) -> None:
    """In a namespace of its own the command is root, over what it makes there only."""
    script = (
        "ip link set eth0 down 2>/dev/null && exit 3; umount /run 2>/dev/null && exit 4;"
        f"nsenter --net=/proc/{lab.gateway()['pid']}/ns/net true 2>/dev/null && exit 5; id -u"
    )
    done = lab.run("unshare", "-Urm", "sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {script}")
    assert (done.returncode, done.stdout.strip()) in ((0, "0"), (1, "")), done.stderr


def test_sockets_of_the_host_are_not_inherited(lab: Lab) -> None:
    """A descriptor of a TCP or UDP socket would still be in the host's network."""
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "p = socket.socketpair()[0]; f = os.open('/etc/passwd', 0);"
        "[os.set_inheritable(x, True) for x in (s.fileno(), p.fileno(), f)];"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    look = "ls -l /proc/self/fd | grep -c socket; ls -l /proc/self/fd | grep -c /etc/passwd"
    run = [TTP, "run", "-g", lab.name, "--", "sh", "-c", look]
    with_us = lab.do("/usr/bin/python3", "-c", script, *run).stdout.split()
    without = lab.do("/usr/bin/python3", "-c", script, "/bin/sh", "-c", look).stdout.split()
    assert int(without[0]) - int(with_us[0]) == 1
    assert with_us[1] == without[1]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_terminal_is_the_commands_own(lab: Lab, recorded: bool) -> None:
    """Size and its changes, stop and continue, Ctrl-C: the command is the job, or seems to be."""
    options = ["--pcap", f"{lab.home}/terminal.pcap"] if recorded else []
    command = lab.command(TTP, "run", "-g", lab.name, *options, "--", "sh", "-c")
    terminal = Terminal(
        [*command, "stty size; trap 'stty size' WINCH; echo up; while :; do sleep 0.1; done"]
    )
    terminal.expect("up")
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("4H", 41, 97, 0, 0))
    terminal.expect("41 97")
    os.kill(terminal.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(terminal.wait(os.WUNTRACED))
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.type("\x03")
    status = terminal.wait()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_a_workload_has_its_name_and_is_listed(lab: Lab) -> None:
    """ttp ps shows it while it lives; a second one cannot have the name."""
    command = lab.command(TTP, "run", "-g", lab.name, "--name", "one", "--", "sleep", "100")
    with subprocess.Popen(command) as sleeper:
        try:
            deadline = time.monotonic() + 10
            while not (found := json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)):
                assert time.monotonic() < deadline
            assert [(w["name"], w["command"]) for w in found] == [("one", ["sleep", "100"])]
            taken = lab.run("true", options=["--name", "one"])
            assert taken.returncode == 125
            assert "has that name" in taken.stderr
        finally:
            sleeper.kill()
    deadline = time.monotonic() + 10
    while json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout):
        assert time.monotonic() < deadline, "the workload is still listed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gateway", "no-such-gateway"], "it is not up"),
        (["--gateway", "../x"], "as the name of a gateway"),
        (["--name", "a b"], "as the name of a workload"),
        (["--user", "no-such-user"], "run as the user"),
        (["--bogus"], "--bogus"),
        (["--bootstrap-timeout", "soon"], "--bootstrap-timeout"),
        (["--bootstrap-timeout", "nan"], "--bootstrap-timeout"),
    ],
)
def test_bad_input_is_125_and_one_clear_line(lab: Lab, options: list[str], words: str) -> None:
    """What was being done, why not, what to do; never a traceback."""
    done = lab.run("true", options=options)
    assert done.returncode == 125
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_verbose_echoes_every_effect(lab: Lab) -> None:
    """The steps of the supervisor and of the client, and the command's own output untouched."""
    done = lab.run("echo", "hi", options=["-v"])
    assert done.stdout == "hi\n"
    for effect in (
        "[#] ip -n workload link add eth0",
        "add element inet ttp sources4",
        "[#] join_network",
        "[#] no_new_privileges",
    ):
        assert effect in done.stderr


def test_a_plan_is_printed_and_nothing_done(lab: Lab) -> None:
    """ttp plan: every step, the ruleset, and no gateway afterwards."""
    ttp = (
        "env",
        f"TTP_RUNTIME_DIR={lab.home}/plans",
        TTP,
    )  # where nobody else starts one meanwhile
    before = lab.do(*ttp, "gateway", "ls")
    assert before.returncode == 0, before.stderr
    done = lab.do(*ttp, "plan", "--", "curl", "x")
    assert done.returncode == 0, done.stderr
    for line in ("ip netns add gateway", "table inet ttp", "pasta", "setpriv", "exec curl x"):
        assert line in done.stdout
    assert lab.do(*ttp, "gateway", "ls").stdout == before.stdout


def test_a_plan_on_a_gateway_that_is_up_is_what_is_done(lab: Lab) -> None:
    """A lab's, which nobody else could make: the command's own steps, one by one, as with -v."""
    done = lab.ttp("plan", "-g", lab.name, "--", "true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# the gateway is up\n\n# the workload, by the supervisor\n")
    rows = done.stdout.partition("# the command, by the client\n")[2].splitlines()
    verbs = [row.split()[0] for row in rows if not row.startswith(("export ", "exec "))]
    assert "export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt" in rows
    shown = lab.run("true", options=["--verbose"]).stderr.splitlines()
    effects = [line.split()[1] for line in shown if line.startswith("[#] ")]
    assert effects[-len(verbs) :] == verbs


def test_a_closed_standard_error_stays_the_commands(lab: Lab) -> None:
    """Nothing of ours takes its place, and our own complaint goes nowhere."""
    run = f"{TTP} run -g {lab.name} --"
    assert lab.do("sh", "-c", f"{run} no-such-program 2>&-").returncode == 127
    listed = lab.do("sh", "-c", f"{run} sh -c 'ls /proc/$$/fd' 2>&-").stdout.split()
    assert "2" not in listed


def test_a_tight_umask_is_the_commands_alone(lab: Lab) -> None:
    """Its files are as tight as it wants; what is made for it can be read, by other users too."""
    options = "--user nobody" if lab.who == "root" else ""
    run = f"umask 077; exec {TTP} run -g {lab.name} {options} --"
    done = lab.do("sh", "-c", f"{run} sh -c 'umask; cat /etc/resolv.conf'")
    assert done.stdout.startswith("0077\nnameserver"), done.stderr
