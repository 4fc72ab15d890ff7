"""``ttp run --strict``: what an untrusted command can neither reach nor learn."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import ROOT
from lab_helpers import TTP, Lab
from nsrun.lab import topology
from nsrun.plan import NEUTRAL_ETC
from terminal import Terminal
from town import eventually
from users import USER, place_seen, scripts_seen

pytestmark = pytest.mark.lab

PYTHON = "/usr/bin/python3"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
ATTACKER = str(scripts_seen() / "attacker.py")


@pytest.fixture
def place(lab: Lab) -> Iterator[Path]:
    """A directory of the user's that --strict does not hide: like a home, unlike /tmp."""
    with tempfile.TemporaryDirectory(prefix=".strict-", dir=place_seen()) as name:
        Path(name).chmod(0o755)
        if lab.who == "user" and os.geteuid() == 0:
            os.chown(name, USER, USER)
        yield Path(name)


@contextmanager
def decoys(lab: Lab, *paths: str, where: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Servers of the user's, outside."""
    listen = lab.command(*where, PYTHON, str(ROOT / "tests" / "decoys.py"), *paths)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(listen, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            lab.do(*where, "rm", "-rf", *(path for path in paths if path[0] == "/"))


def visited(listening: subprocess.Popen[str]) -> list[str]:
    return sorted(json.loads(listening.communicate("", timeout=10)[0]))


def strict(lab: Lab, *options: str) -> tuple[str, ...]:
    return (TTP, "run", "-g", lab.name, "--strict", *options, "--")


@pytest.mark.promise("P6", "P10")
@pytest.mark.parametrize("doors", ["closed", "control"])
def test_no_socket_file_outside_is_reached(lab: Lab, place: Path, doors: str) -> None:
    """Nor by datagram: in a home, in /tmp, in /run; without --strict all but those in /run are."""
    name = f"ttp-test-{os.getpid()}"
    outside = [f"{place}/server", f"{place}/.ssh/control", f"{place}/messages.dgram"]
    outside += [f"{lab.home}/.X11-unix/X7", f"{lab.home}/ssh-1/agent.1", f"{lab.home}/log.dgram"]
    outside += [f"/var/tmp/{name}", f"/dev/shm/{name}"]
    in_run = ["/run/user/0/bus", "/run/user/0/wayland-0", "/run/dbus/system_bus_socket"]
    command = strict(lab) if doors == "closed" else (TTP, "run", "-g", lab.name, "--")
    environment = ("env", "XDG_RUNTIME_DIR=/run/user/0", "DISPLAY=:7", "WAYLAND_DISPLAY=wayland-0")
    host = lab.inside_argv("host")  # whose /run is not the machine's; other files are
    with decoys(lab, *outside, *in_run, "@abstract", where=host) as listening:
        knock = (PYTHON, ATTACKER, "knock", *outside, *in_run, "@abstract")
        met = lab.do(*host, *environment, *command, *knock)
        came = visited(listening)
    assert met.returncode == 0, met.stderr
    expected = [] if doors == "closed" else sorted([*outside, "/run/user/0/wayland-0"])
    assert sorted(json.loads(met.stdout)) == came == expected


@pytest.mark.promise("P6", "P10")
def test_an_address_that_changes_while_it_is_looked_at(lab: Lab, place: Path) -> None:
    """Thousands of connect() whose address, link or descriptor another thread exchanges."""
    with decoys(lab, f"{place}/server") as listening:
        race = (PYTHON, ATTACKER, "race", "4", "/tmp/own", f"{place}/server")
        done = lab.do(*strict(lab), *race)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert listening.poll() is None
        assert visited(listening) == []
    assert sum(found.values()) > 1000, found
    for kind in ("address", "link"):  # the race was one: each of both was met
        assert found[f"{kind} connected"] > 10, found
        assert found[f"{kind} EACCES"] > 10, found
    assert "descriptor connected" not in found
    assert found["descriptor EACCES"] > 10, found


@pytest.mark.promise("P6")
def test_control_without_strict_the_race_is_won(lab: Lab, place: Path) -> None:
    """The same attacker gets there when nobody is in his way."""
    own = f"{place}/own"
    with decoys(lab, f"{place}/server") as listening:
        race = (PYTHON, ATTACKER, "race", "0.5", own, f"{place}/server")
        done = lab.run(*race)
        assert done.returncode == 0, done.stderr
        assert visited(listening)


@pytest.mark.promise("P6", "P10")
def test_namespaces_of_its_own_open_no_door(lab: Lab, place: Path) -> None:
    """A socket file that is mounted elsewhere, or seen from another root, is the same one."""
    script = (
        'set -e; touch /tmp/there; mount --bind "$1" /tmp/there; mkdir /tmp/root;'
        'mount --rbind / /tmp/root; "$2" "$3" knock /tmp/there;'
        '/usr/sbin/chroot /tmp/root "$2" "$3" knock "$1" /tmp/there'
    )
    with decoys(lab, f"{place}/server") as listening:
        attack = ("unshare", "-Urm", "sh", "-c", script, "sh", f"{place}/server", PYTHON, ATTACKER)
        become = NOBODY if lab.who == "root" else ()  # root's command may not map its own uid
        done = lab.do(*strict(lab), *become, *attack)
        assert (done.returncode, done.stdout) == (0, "[]\n[]\n"), done.stderr
        assert visited(listening) == []


@pytest.mark.promise("P6")
@pytest.mark.parametrize("where", ["here", "as the lab's root"])
def test_an_allowed_socket_is_reached_and_no_other(lab: Lab, place: Path, where: str) -> None:
    """By its path, in a hidden directory too; its variable stays, and those of others do not."""
    agent, other, display = f"{lab.home}/agent", f"{place}/other", f"{lab.home}/.X11-unix/X7"
    show = 'echo "[$SSH_AUTH_SOCK] [$DISPLAY] [$TMUX]"'
    environment = ("env", f"SSH_AUTH_SOCK={agent}", "DISPLAY=:7", "TMUX=/tmp/t,1,0")
    with decoys(lab, agent, other, display) as listening:
        knock = f'{show}; exec {PYTHON} {ATTACKER} knock "$@"'
        command = ("sh", "-c", knock, "sh", agent, other, display)
        options = ("--allow-socket", agent)
        host = () if where == "here" else lab.inside_argv("host")
        done = lab.do(*host, *environment, *strict(lab, *options), *command)
        assert visited(listening) == [agent], done.stderr
    variables, met = done.stdout.splitlines()
    assert variables == f"[{agent}] [] []"
    assert json.loads(met) == [agent]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strict", "--allow-socket", "/nowhere"], "allow the socket /nowhere: No such"),
        (["--strict", "--allow-socket", "/etc/passwd"], "allow the socket /etc/passwd: it is no"),
        (["--allow-socket", "/etc/passwd"], "add --strict"),
    ],
)
def test_what_cannot_be_allowed_is_said(lab: Lab, options: list[str], words: str) -> None:
    """A socket that is not there, a file that is none, an option that would mean nothing."""
    done = lab.run("true", options=options)
    assert done.returncode == 125
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_servers_of_its_own_work(lab: Lab) -> None:
    """A socket in /tmp, by absolute and relative path and by /proc/self; a Manager; tmux."""
    script = f"""
import multiprocessing, os, socket, subprocess, sys
sys.path.insert(0, {str(scripts_seen())!r})
import attacker
servers = []
for path in ("/tmp/a", "/tmp/deep/b", "/dev/shm/c", os.environ["XDG_RUNTIME_DIR"] + "/d", "\\0e"):
    os.makedirs(os.path.dirname(path) or "/tmp", exist_ok=True)
    servers.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if path == "/tmp/a" else 1))
    servers[-1].bind(path)
    servers[-1].listen()
packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
packets.connect("/tmp/a")
os.chdir("/tmp/deep")
for path in ("b", "/proc/self/cwd/b", "/proc/thread-self/cwd/../deep/b", "@e"):
    assert attacker.knock(path) == [path], path
caller = socket.socket(socket.AF_UNIX)
caller.connect("b")
for _ in range(4):
    served = servers[1].accept()[0]
pid, uid, gid = __import__("struct").unpack("3i", served.getsockopt(1, socket.SO_PEERCRED, 12))
assert (uid, gid) == (os.getuid(), os.getgid())
shared = multiprocessing.Manager().dict()
shared["a"] = 1
assert dict(shared) == {{"a": 1}}
tmux = ["tmux", "-L", "own", "-f", "/dev/null"]
subprocess.run([*tmux, "new-session", "-d", "sleep 60"], check=True)
shown = subprocess.run([*tmux, "list-sessions"], check=True, capture_output=True, text=True).stdout
assert "1 windows" in shown, shown
subprocess.run([*tmux, "kill-server"], check=True)
print("all work")
"""
    environment = ("env", f"XDG_RUNTIME_DIR={lab.home}/run", "TERM=xterm", "LC_ALL=C.UTF-8")
    done = lab.do(*environment, *strict(lab), PYTHON, "-c", script)
    assert (done.returncode, done.stdout) == (0, "all work\n"), done.stderr


def test_connect_answers_as_the_kernel_does(lab: Lab) -> None:
    """Whatever is wrong with a connect(), it fails in the same way as without --strict."""
    answers = [
        json.loads(lab.run(PYTHON, ATTACKER, "errors", options=options).stdout)
        for options in (["--strict"], [])
    ]
    assert answers[0] == answers[1]
    assert answers[0]["no memory"] == "EFAULT"


@pytest.mark.promise("P5", "P10")
def test_processes_outside_are_not_there(lab: Lab) -> None:
    """Neither to be seen nor to be killed; init and its helper cannot be looked into."""
    with subprocess.Popen(lab.command("sleep", "4711")) as sleeper:
        try:
            name = f"/proc/{sleeper.pid}/comm"
            eventually(lambda: Path(name).read_text() == "sleep\n", "the sleeper to sleep")
            seen = lab.run("cat", name).stdout
            assert seen == "sleep\n"  # control: without --strict
            script = (
                "ls /proc | grep -c '^[0-9]';"
                "for n in KILL TERM STOP; do kill -$n 1; done;"
                "cat /proc/[13]/mem /proc/[13]/environ 2>/dev/null | wc -c;"
                "readlink /proc/[13]/root /proc/[13]/fd/0 /proc/[13]/ns/net; kill -KILL -1"
            )
            done = lab.run("sh", "-c", script, options=["--strict"])
            shown = done.stdout.split()
            assert int(shown[0]) < 8, done.stdout
            assert shown[1:] == ["0"], (done.stdout, done.stderr)
            assert sleeper.poll() is None
        finally:
            sleeper.kill()


FIND = """
import os, sys
most, *texts = sys.argv[1:]
texts, found = [text.encode() for text in texts], 0
skipped = {"kmsg", "kcore", "kpagecount", "kpageflags", "kpagecgroup", "pagemap", "mem"}
skipped |= {"cmdline", "environ", "clear_refs", "sysrq-trigger", "trace_pipe"}
for top in ("/proc", "/sys"):
    for directory, below, files in os.walk(top):
        below[:] = [name for name in below if name not in ("task", "map_files", "attr", "slab")]
        for name in files:
            if name in skipped:
                continue
            try:
                fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_NONBLOCK)
                with open(fd, "rb") as file:
                    content = file.read(1 << 20) or b""
            except (OSError, OverflowError):
                continue
            if any(text in content for text in texts):
                print(f"{directory}/{name}")
                found += 1
                if found == int(most):
                    sys.exit()
"""


@pytest.mark.promise("P5")
@pytest.mark.parametrize("options", [["--strict"], []], ids=["strict", "control"])
def test_no_file_of_the_kernel_tells_the_hosts_addresses(lab: Lab, options: list[str]) -> None:
    """Not /proc, of no process, nor /sys: IPv4 in two notations, IPv6, MAC."""
    host, host6 = topology.HOST, topology.HOST6
    look = lab.inside("host", "cat", "/sys/class/net/eth0/address", "/proc/net/if_inet6")
    mac, *lines = subprocess.run(look, capture_output=True, text=True, timeout=20).stdout.split(
        "\n"
    )
    six = next(line.split()[0] for line in lines if line.startswith("20010db8"))
    little_endian = "".join(f"{int(byte):02X}" for byte in reversed(host.split(".")))
    texts = (host, host6, mac, six, little_endian)
    with subprocess.Popen(lab.inside("host", "sleep", "60")) as stays:  # somebody to ask about
        try:
            done = lab.do(
                *lab.inside_argv("host", TTP, "run", "-g", lab.name, *options, "--"),
                *(PYTHON, "-c", FIND, "1000" if options else "1", *texts),
            )
        finally:
            stays.kill()
    assert done.returncode == 0, done.stderr
    if options:
        assert done.stdout == ""
    else:
        assert done.stdout.startswith("/proc/")
        assert "/net/" in done.stdout


@pytest.mark.promise("P6")
def test_the_machine_has_no_name(lab: Lab) -> None:
    """Host name, machine id, boot id, uptime, firmware, kernel arguments and variables."""
    script = """
uname -n; hostname -f; cat /etc/machine-id /etc/hostname; cat /var/lib/dbus/machine-id 2>/dev/null
cat /proc/sys/kernel/random/boot_id; cut -d. -f1 /proc/uptime; grep btime /proc/stat
cat /proc/cmdline
ls -A /sys/firmware /sys/class/dmi/id /sys/fs/cgroup 2>/dev/null | grep -v -e : -e '^$'
cat /proc/self/cgroup | grep -v ':/$'
env | grep -E '^(SSH_|DBUS_|TMUX)'; echo "end $KEPT"
"""
    variables = ("SSH_CONNECTION=192.0.2.1 1 192.0.2.2 22", "DBUS_SESSION_BUS_ADDRESS=unix:path=/x")
    command = ("env", *variables, "TMUX=/tmp/x,1,0", "KEPT=1", *strict(lab), "sh", "-c", script)
    shown = lab.do(*command).stdout.splitlines()
    plain = lab.run("sh", "-c", script).stdout.splitlines()
    machine = NEUTRAL_ETC["machine-id"].strip()
    assert shown[:2] == ["localhost", "localhost"], shown
    ids = [machine] * Path("/etc/machine-id").exists() + ["localhost"]
    ids += [machine] * Path("/var/lib/dbus/machine-id").exists()
    assert shown[2 : 2 + len(ids)] == ids, shown
    boot_id, uptime, btime, *rest = shown[2 + len(ids) :]
    assert len(boot_id) == 36
    assert int(uptime) < 30
    assert boot_id not in plain
    assert btime not in plain
    assert rest == ["end 1"]


@pytest.mark.promise("P10")
def test_other_terminals_are_out_of_reach(lab: Lab) -> None:
    """What is typed on another terminal of the user's cannot be read by its name; its own works."""
    uid = USER if lab.who == "user" and os.geteuid() == 0 else os.geteuid()

    def terminal(*argv: str) -> tuple[Terminal, str]:
        made = Terminal(lab.command(*argv))
        os.chown(made.name(), uid, -1)  # whose it is on a desktop
        return made, made.name()

    other, name = terminal("sleep", "60")
    try:
        look = f"(: <{name}) 2>/dev/null && echo open; "
        own = 'tty; echo "u""p" >$(tty); script -qec "test -t 0 && tty" /dev/null'
        inside, _ = terminal(*strict(lab), "sh", "-c", f"read go; {look} {own}")
        inside.type("\n")
        shown = inside.expect("/dev/pts/0")
        assert "open" not in shown
        assert re.search(r"/dev/console\s+up\s", shown), shown
        assert inside.wait() == 0
        assert lab.run("sh", "-c", look).stdout == "open\n"  # control: without --strict
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()


def test_what_is_inherited_is_closed(lab: Lab) -> None:
    """Directories and sockets of every kind; pipes and files are the caller's to give."""
    script = (
        "import os, socket, sys; a, b = socket.socketpair(); r, w = os.pipe();"
        "f = os.open('/etc/passwd', 0); d = os.open('/', 0); e = os.eventfd(0);"
        "[os.set_inheritable(x, True) for x in (a.fileno(), r, f, d, e)];"
        "print(a.fileno(), r, f, d, e, flush=True);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    listed = 'for n in "$@"; do [ -e /proc/self/fd/$n ] && echo $n; done; true'
    numbers = [str(number) for number in range(3, 12)]
    run = [*strict(lab), "sh", "-c", listed, "sh", *numbers]
    first, *kept = lab.do(sys.executable, "-c", script, *run).stdout.splitlines()
    _, pipe, file, _, _ = first.split()
    assert set(kept) == {pipe, file}


def test_a_stream_that_is_a_door_is_refused(lab: Lab) -> None:
    """Standard input that is a datagram socket needs no connect() to send anywhere."""
    script = (
        "import os, socket, sys; s = socket.socketpair(1, int(sys.argv[1]))[0];"
        "os.dup2(s.fileno(), 0); os.execv(sys.argv[2], sys.argv[2:])"
    )
    refused = lab.do(PYTHON, "-c", script, "2", *strict(lab), "true")
    assert refused.returncode == 125
    assert "standard stream 0 is a socket" in refused.stderr
    assert lab.do(PYTHON, "-c", script, "1", *strict(lab), "true").returncode == 0


@pytest.mark.promise("P10")
def test_another_abi_is_the_end(lab: Lab) -> None:
    """A filter reads other numbers there: int 0x80 is i386's way, with a socketcall of its own."""
    if os.uname().machine != "x86_64":
        return  # has no second ABI that a program could slip into
    call = (
        "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7);"
        "m.write(bytes.fromhex('b814000000cd80c3'));"  # mov eax, 20 (getpid); int 0x80; ret
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())"
    )
    done = lab.run(PYTHON, "-c", call, options=["--strict"])
    assert done.returncode == -signal.SIGSYS, done.stdout
    assert lab.run(PYTHON, "-c", call).returncode == 0  # control: it would work


@pytest.mark.promise("P1", "P2")
def test_the_network_is_as_ever(lab: Lab) -> None:
    """Names, TCP, IPv6 and refusals, in threads and without blocking."""
    done = lab.run(
        "curl",
        "-sS",
        "--max-time",
        "20",
        "https://check.torproject.org/api/ip",
        options=["--strict"],
    )
    assert json.loads(done.stdout)["IsTor"] is True, done.stderr
    script = (
        "import asyncio, urllib.request as u\n"
        "from concurrent.futures import ThreadPoolExecutor as T\n"
        "get = lambda _: u.urlopen('http://check.torproject.org/api/ip', timeout=20).status\n"
        "print(sorted(set(T(8).map(get, range(16)))))\n"
        "async def one():\n"
        "  r, w = await asyncio.open_connection('check.torproject.org', 80); w.close()\n"
        "asyncio.run(one())\n"
    )
    done = lab.run(PYTHON, "-c", script, options=["--strict"])
    assert (done.returncode, done.stdout) == (0, "[200]\n"), done.stderr
    assert lab.run("curl", "-sS", f"http://{topology.HOST}/", options=["--strict"]).returncode == 7


def test_root_s_command_is_each_of_its_users_to_servers_inside(lab: Lab) -> None:
    """Who connects is told by the kernel, and may what he may: init lends nobody its own rights."""
    if lab.who == "user":
        return  # there is one user only
    script = """
import os, socket, struct
server = socket.socket(socket.AF_UNIX); server.bind("/tmp/s"); server.listen()
os.chmod("/tmp/s", 0o777)
closed = socket.socket(socket.AF_UNIX); closed.bind("/tmp/closed"); closed.listen()
os.chmod("/tmp/closed", 0o700)
if os.fork() == 0:
    os.setgroups([5]); os.setgid(7); os.setuid(8)
    socket.socket(socket.AF_UNIX).connect("/tmp/s")
    try: socket.socket(socket.AF_UNIX).connect("/tmp/closed")
    except PermissionError: os._exit(0)
    os._exit(1)
peer = struct.unpack("3i", server.accept()[0].getsockopt(1, socket.SO_PEERCRED, 12))
print(peer[1:], os.wait()[1])
"""
    done = lab.run(PYTHON, "-c", script, options=["--strict"])
    assert done.stdout == "(8, 7) 0\n", done.stderr


def test_root_can_confine_another_user(lab: Lab) -> None:
    """--user: init is that user too, with power over the workload's processes alone."""
    if lab.who == "user":
        return  # only root can
    script = "id -u; id -G; grep -h ^Uid /proc/1/status; grep ^CapEff /proc/1/status"
    done = lab.run("sh", "-c", script, options=["--strict", "--user", "nobody"])
    assert done.stdout.split() == [
        *("65534", "65534"),
        *("Uid:", "65534", "65534", "65534", "65534", "CapEff:", "00000000000c0000"),
    ], done.stderr


def test_nothing_stays_when_all_has_ended(lab: Lab) -> None:
    """Neither the workload nor a process of it."""
    before = json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout)
    assert lab.run("true", options=["--strict"]).returncode == 0
    eventually(
        lambda: json.loads(lab.ttp("ps", "-g", lab.name, "--json").stdout) == before,
        "the workload to be gone",
    )
