"""Root's gateway, used by members of a group: what they can do, and what not to each other.

The gateway is on the lab's simulated host; its users are on the real one, and have no privilege.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import ROOT
from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun import paths
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from town import eventually
from users import USER, home_of, prefix_of

# root's, as nobody else can share one
ROOTS = pytest.mark.parametrize(
    "lab", [pytest.param("root", marks=pytest.mark.root)], indirect=True, scope="session"
)
pytestmark = [pytest.mark.lab, ROOTS]

GROUP = 54300
OTHER = 54322  # another member
STRANGER = 54323  # no member
PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class Person:
    """A user of this machine, and the shared gateway."""

    uid: int
    home: Path
    prefix: tuple[str, ...]
    gateway: str

    def command(self, *argv: str) -> list[str]:
        return [*self.prefix, "env", f"PYTHONPATH={ROOT}", *argv]

    def do(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=60)

    def ttp(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.do(TTP, *argv)

    def run(self, *argv: str, name: str = "") -> subprocess.CompletedProcess[str]:
        options = ("--name", name) if name else ()
        return self.ttp("run", "-g", self.gateway, *options, "--", *argv)

    @contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[str]]:
        """A workload that executes lines of Python, and answers each by a line."""
        loop = "import sys\nfor line in sys.stdin: exec(line, globals()); print(end='', flush=True)"
        argv = self.command(
            TTP, "run", "-g", self.gateway, "--name", name, "--", PYTHON, "-c", loop
        )
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert tell(process, "print('up')") == "up"
            yield process
            process.kill()

    def sees(self) -> list[str]:
        """Names of the workloads that are shown to this user."""
        found = json.loads(self.ttp("ps", "-g", self.gateway, "--json").stdout)
        return [workload["name"] for workload in found]

    @contextmanager
    def by_hand(self, mode: str) -> Iterator[subprocess.Popen[str]]:
        argv = self.command(sys.executable, str(ROOT / "tests" / "guest.py"), self.gateway, mode)
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield process
            process.kill()


def tell(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def gateway(lab: Lab) -> Iterator[str]:
    with lab.other_gateway("slirp4netns", "--group", str(GROUP), stays=False) as name:
        yield name


def person(gateway: str, uid: int, *groups: int) -> Iterator[Person]:
    with home_of(uid) as home:
        yield Person(uid, home, tuple(prefix_of(uid, home, *groups)), gateway)


@pytest.fixture
def alice(gateway: str) -> Iterator[Person]:
    yield from person(gateway, USER, GROUP)


@pytest.fixture
def bob(gateway: str) -> Iterator[Person]:
    yield from person(gateway, OTHER, GROUP)


@pytest.fixture
def eve(gateway: str) -> Iterator[Person]:
    yield from person(gateway, STRANGER)


def inspect(lab: Lab, gateway: str) -> dict[str, Any]:
    """As root sees it."""
    return dict(json.loads(lab.ttp("gateway", "inspect", gateway).stdout))


def names(lab: Lab, gateway: str) -> set[str]:
    return {workload["name"] for workload in inspect(lab, gateway)["workloads"]}


@pytest.mark.promise("P1", "P10")
def test_a_member_uses_it_without_privilege_or_tor(lab: Lab, alice: Person) -> None:
    """The command is the member's own, has no capability, and leaves by Tor; no Tor is started."""
    done = alice.run("curl", "-sS", PLAIN_ORACLE)
    assert json.loads(done.stdout) == {"IsTor": True, "IP": json.loads(done.stdout)["IP"]}
    assert json.loads(done.stdout)["IP"] in lab.exits()
    show = "id -u; id -g; pwd; grep -h -e CapEff -e CapBnd /proc/self/status; exit 7"
    shown = alice.run("sh", "-c", show)
    assert shown.returncode == 7
    uid, gid, _, *capabilities = shown.stdout.split("\n")
    assert (uid, gid) == (str(alice.uid), str(alice.uid))
    assert [line.split()[1] for line in capabilities if line] == ["0" * 16] * 2
    assert not (alice.home / "run" / "ttp").exists()
    listed = alice.ttp("gateway", "ls").stdout
    assert alice.gateway in listed
    assert "ip netns attach workload" in alice.ttp("plan", "-g", alice.gateway, "--", "true").stdout


@pytest.mark.promise("P5", "P7")
def test_a_member_has_the_options_of_ones_own_gateway(alice: Person) -> None:
    """But for the recording: root's supervisor takes no file of another user's."""
    run = ("run", "-g", alice.gateway)
    fetch = ("curl", "-sS", "--max-time", "20", PLAIN_ORACLE)
    for isolate in ("destination", "connection"):
        done = alice.ttp(*run, "--isolate", isolate, "--socks", "--", *fetch)
        assert json.loads(done.stdout)["IsTor"] is True, done.stderr
    file = alice.home / "file.pcap"
    refused = alice.ttp(*run, "--pcap", str(file), "--", "true")
    assert refused.returncode == 125
    assert "takes no file of another user" in refused.stderr
    assert not file.exists()


@pytest.mark.promise("P5")
@pytest.mark.parametrize(
    ("options", "command", "words"),
    [
        ("--strict", "id -u", str(USER)),
        (
            "--socks",
            "curl -sS -x socks5h://127.0.0.1:9050 http://check.torproject.org/api/ip",
            "true",
        ),
        ("--isolate connection", "curl -sS http://check.torproject.org/api/ip", "true"),
        ("--no-ipv6", "sh -c 'ip -6 route show default | wc -l'", "0"),
        ("--workdir /etc", "pwd", "/etc"),
        ("--timeout 0.5", "sh -c 'trap \"echo ended; exit\" TERM; sleep 30 & wait'", "ended"),
        ("--pcap x.pcap", "true", "takes no file of another user"),
    ],
)
def test_options_do_for_a_member_what_they_do(
    alice: Person, options: str, command: str, words: str
) -> None:
    """All but the one for which root's supervisor would have to write to a member's file."""
    argv = (*shlex.split(options), "--", *shlex.split(command))
    done = alice.ttp("run", "-g", alice.gateway, *argv)
    assert words in done.stdout + done.stderr


@pytest.mark.promise("P3", "P5")
def test_what_leaves_is_tor_alone(lab: Lab, alice: Person) -> None:
    """Probes of a member: on the wires of the gateway's host, and of the real one, nothing."""
    with lab.tap("router", "p-host") as host:
        probe = (PYTHON, str(ROOT / "tests" / "probe.py"))
        probes = alice.run(*probe, "udp", "quic6", "ping", "lan-tcp", "lan-dns", "host-tcp")
        fetched = alice.run("curl", "-sS", PLAIN_ORACLE)
        ours = lab.rules(topology.HOST, topology.HOST6)
        verdict = judge("host", host.stop(), ours, expect_some=True)
    assert json.loads(fetched.stdout)["IsTor"] is True
    assert json.loads(probes.stdout)["lan-tcp"].startswith("ConnectionRefused")
    assert verdict.value is Value.CONTAINED, as_text([verdict])


def test_a_member_may_be_strict(alice: Person) -> None:
    """In namespaces of her own making, too: her command is alone in /proc, and reaches the web."""
    script = f"ls /proc | grep -c '^[0-9]'; id -u; curl -sS --max-time 20 {PLAIN_ORACLE}"
    done = alice.ttp("run", "-g", alice.gateway, "--strict", "--", "sh", "-c", script)
    processes, uid, answer = done.stdout.splitlines()
    assert int(processes) < 8
    assert uid == str(alice.uid)
    assert json.loads(answer)["IsTor"] is True, done.stderr


@pytest.mark.promise("P5")
def test_who_is_no_member_stays_out(alice: Person, eve: Person) -> None:
    """By the mode of the socket; what root alone may do, a member may not."""
    done = eve.run("true")
    assert done.returncode == 125
    assert "it is not up" in done.stderr
    assert alice.run("true").returncode == 0  # control
    for argv in (("down",), ("logs",), ("up", "--group", str(GROUP))):
        refused = alice.ttp("gateway", argv[0], alice.gateway, *argv[1:])
        assert refused.returncode in (1, 2)
        assert "only root can" in refused.stderr
    assert alice.run("true").returncode == 0


@pytest.mark.promise("P5", "P10")
def test_nobody_becomes_somebody_else(alice: Person) -> None:
    """Neither by an option nor by the variables of sudo."""
    for extra in (("--user", "0"), ("--user", str(OTHER))):
        done = alice.ttp("run", "-g", alice.gateway, *extra, "--", "id", "-u")
        assert done.returncode == 125
        assert "only root can" in done.stderr
    done = alice.do("env", "SUDO_UID=0", TTP, "run", "-g", alice.gateway, "--", "id", "-u")
    assert done.stdout == f"{alice.uid}\n"


@pytest.mark.promise("P5", "P7")
def test_users_do_not_see_each_other(lab: Lab, alice: Person, bob: Person) -> None:
    """Neither in lists nor by name, though the names are the same; root sees all."""
    with alice.running("same"), alice.running("hers"), bob.running("same"):
        assert sorted(alice.sees()) == ["hers", "same"]
        assert bob.sees() == ["same"]
        found = inspect(lab, alice.gateway)["workloads"]
        owners = sorted((one["name"], one["guest"]) for one in found)
        assert owners == [("hers", USER), ("same", USER), ("same", OTHER)]
        refused = bob.ttp("refresh", "-g", bob.gateway, "hers")
        assert "there is none" in refused.stderr
        before = {one["guest"]: one["identity"] for one in found if one["name"] == "same"}
        assert bob.ttp("refresh", "-g", bob.gateway, "same").returncode == 0  # control
        found = inspect(lab, alice.gateway)["workloads"]
        after = {one["guest"]: one["identity"] for one in found if one["name"] == "same"}
        assert after[USER] == before[USER]
        assert after[OTHER] != before[OTHER]
        taken = alice.run("true", name="hers")
        assert "has that name" in taken.stderr
    log = lab.do(*lab.inside_argv("host", "stat", "-c", "%a", f"{log_of(lab, alice)}"))
    assert log.stdout == "600\n"


@pytest.mark.promise("P5", "P10")
def test_users_cannot_touch_each_others_commands(lab: Lab, alice: Person, bob: Person) -> None:
    """Neither join nor signal them; their own they can. Root can signal, but not join, a user's."""
    with alice.running("hers") as hers, bob.running("his"):
        theirs = f"import os; print(os.stat('/proc/{hers.pid}/ns/net').st_ino)"
        seen = "import os; print(os.stat('/proc/self/ns/net').st_ino)"
        joined = alice.ttp("exec", "-g", alice.gateway, "hers", PYTHON, "-c", seen)
        assert joined.returncode == 0, joined.stderr
        assert joined.stdout == lab.do(PYTHON, "-c", theirs).stdout
        for verb in (["exec"], ["kill"]):
            refused = bob.ttp(*verb, "-g", bob.gateway, "hers", *(["true"] * (verb == ["exec"])))
            assert refused.returncode != 0
            assert "there is none" in refused.stderr
        refused = lab.ttp("exec", "-g", alice.gateway, "hers", "true")
        assert refused.returncode == 125
        assert "another user's" in refused.stderr
        assert hers.poll() is None
        assert alice.ttp("kill", "-g", alice.gateway, "hers").returncode == 0
        assert hers.wait(10) == -signal.SIGTERM
        assert lab.ttp("kill", "-g", alice.gateway, "-s", "KILL", "his").returncode == 0
    limit = ("--timeout", "0.5", "--", "sleep", "60")
    done = alice.ttp("run", "-g", alice.gateway, *limit)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.promise("P5")
def test_a_users_detached_commands_are_his(lab: Lab, alice: Person, bob: Person) -> None:
    """Their records are in his home, and no other user reads, waits for or removes them."""
    job = ("--detach", "--name", "job", "--", "sh", "-c", "echo secret; exit 4")
    done = alice.ttp("run", "-g", alice.gateway, *job)
    assert done.stdout == "job\n", done.stderr
    assert alice.ttp("wait", "-g", alice.gateway, "job").returncode == 4
    assert alice.ttp("logs", "-g", alice.gateway, "job").stdout == "secret\n"
    for verb in ("wait", "logs", "rm"):
        refused = bob.ttp(verb, "-g", bob.gateway, "job")
        assert (refused.returncode != 0, refused.stdout) == (True, "")
        assert "there is none" in refused.stderr
    kept = next(alice.home.rglob("job/log"))
    assert bob.do("cat", str(kept)).returncode == 1
    assert kept.stat().st_uid == alice.uid
    assert alice.ttp("rm", "-g", alice.gateway, "job").returncode == 0
    assert not list(alice.home.rglob("job"))


def log_of(lab: Lab, someone: Person) -> str:
    return paths.log(str(inspect(lab, someone.gateway)["state"]))


@pytest.mark.promise("P7")
def test_users_share_no_circuit(lab: Lab, alice: Person, bob: Person) -> None:
    """By Tor's own events: each has circuits, and none of them is the other's."""
    control = f"{inspect(lab, alice.gateway)['runtime']}/tor/control"
    watch = lab.inside("host", sys.executable, "-m", "nsrun.leak.circuits", control)
    fetch = "import urllib.request as u; print(len(u.urlopen('http://11.200.0.80/').read()) > 0)"
    with subprocess.Popen(
        watch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        with alice.running("one") as one, bob.running("two") as two:
            for process in (one, two, one, two):
                assert tell(process, fetch) == "True"
        found = json.loads(watcher.communicate("", timeout=20)[0])
    identities = sorted({identity for identity, _, _ in found})
    assert len(identities) == 2
    first, second = ({c for who, _, c in found if who == identity} for identity in identities)
    assert not first & second


@pytest.mark.promise("P5", "P8")
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("new", ["plugged in"]),
        ("host", ["the user did not make it"]),
        ("linked", ["it has links already: lo two one"]),
        ("twice", ["plugged in", "it has links already: lo eth0"]),
    ],
)
def test_whose_namespace_gets_a_link(lab: Lab, alice: Person, mode: str, words: list[str]) -> None:
    """One that the guest made, with nothing in it; what has a link could join host and gateway."""
    before = inspect(lab, alice.gateway)["workloads"]
    with alice.by_hand(mode) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in words] == words
        assert len(names(lab, alice.gateway)) == words.count("plugged in")
    assert before == []
    eventually(lambda: not names(lab, alice.gateway), "the workload to end")


@pytest.mark.promise("P4", "P8")
def test_a_client_that_dies_midway_leaves_nothing(lab: Lab, alice: Person) -> None:
    """Told to make its namespaces, it is killed; so is one that was served already."""

    def links() -> list[str]:
        pid = inspect(lab, alice.gateway)["tor"]["pid"]
        shown = lab.do("nsenter", "--net", "--target", str(pid), "ip", "-br", "link").stdout
        return [line.split("@")[0] for line in shown.splitlines() if line.startswith("w")]

    with alice.running("served") as process:
        before = set(links())
        tell(process, "import os; os.kill(os.getpid(), 9)")
        process.wait()
    for _ in range(3):
        with alice.by_hand("mute") as dying:
            dying.wait()
    eventually(lambda: not names(lab, alice.gateway), "the workload to end")
    eventually(lambda: len(links()) < len(before), "its link to go")
    assert alice.run("true").returncode == 0


@pytest.mark.promise("P5")
def test_one_user_cannot_keep_the_others_waiting(lab: Lab, alice: Person, bob: Person) -> None:
    """Requests without end, of every ill form; the next one is told so, bob is served."""
    hold = (
        "import socket, sys\n"
        "path, held, words = sys.argv[1], [], []\n"
        "for number in range(300):\n"
        "  s = socket.socket(socket.AF_UNIX); s.connect(path); held.append(s)\n"
        "for s in held[64:]:\n"
        "  words.append('at once already' in s.recv(1000).decode())\n"
        "print(words.count(True), flush=True); sys.stdin.read()"
    )
    path = paths.sockets(alice.gateway)[0]
    argv = alice.command(PYTHON, "-c", hold, path)
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "236\n"
        assert bob.run("true").returncode == 0
        refused = alice.run("true")
        assert refused.returncode == 125
        assert "at once already" in refused.stderr
        process.kill()
    assert alice.run("true").returncode == 0


@pytest.mark.promise("P4", "P5")
def test_ill_requests_end_no_supervisor(lab: Lab, alice: Person, bob: Person) -> None:
    """Too long, too deep, no JSON, of wrong types, with descriptors: refused, and that is all."""
    speak = (
        "import array, socket, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import guest\n"
        "from nsrun import client\n"
        "name, kept = sys.argv[2], [socket.socket() for _ in range(5)]\n"
        "lines = [b'\\n', b'[' * 100000 + b'\\n', b'{}\\n', b'[1]\\n', b'\\xff\\n', b'7\\n',\n"
        '  b\'{"do": {}}\\n\', b\'{"do": "wait", "timeout": "nan"}\\n\', b\'x\' * (1 << 22),\n'
        '  b\'{"do": "refresh", "name": 1}\\n\']\n'
        "for line in lines:\n"
        "  s = socket.socket(fileno=client.reach(name).detach())\n"
        "  try: s.sendall(line); s.shutdown(1); s.recv(1000)\n"
        "  except OSError: pass\n"
        "  s.close()\n"
        "toml = {'environment': {}, 'files': [['f', 'x' * (1 << 17)]]}\n"
        "for change in ({'arguments': [1]}, {'arguments': 'x'}, {'caller': 1}, {'caller': {}},\n"
        "    {'descriptors': 7, 'caller': {}}, {'version': 1}, {'shell': 1}, {'defaults': 1},\n"
        "    {'defaults': {}}, {'defaults': toml}, {'caller': {'own': [1]}}):\n"
        "  s = guest.ask(name, **change); s.settimeout(5)\n"
        "  assert 'error' in guest.hear(s), change\n"
        "toml['files'] = [['f', 'a=' + '[' * 60000]]\n"
        "guest.hear(guest.ask(name, defaults=toml))\n"
        "s = socket.socket(fileno=client.reach(name).detach())\n"
        "fds = array.array('i', [one.fileno() for one in kept])\n"
        's.sendmsg([b\'{"do": "inspect"\'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])\n'
        "s.sendall(b'}\\n'); print('ready' in guest.hear(s))\n"
    )
    supervisor = Path(f"/proc/{inspect(lab, alice.gateway)['pid']}/fd")
    before = len(list(supervisor.iterdir()))
    done = alice.do(sys.executable, "-c", speak, str(ROOT / "tests"), alice.gateway)
    assert done.stdout == "True\n", done.stderr
    assert bob.run("true").returncode == 0
    eventually(lambda: len(list(supervisor.iterdir())) <= before, "descriptors to be closed")
    log = lab.do(*lab.inside_argv("host", "cat", log_of(lab, alice))).stdout
    assert "Traceback" not in log


def test_a_group_that_is_none_starts_nothing(lab: Lab) -> None:
    """One line that says how to make one."""
    done = lab.ttp("gateway", "up", f"{lab.name}-none", "--group", "no-such-group")
    assert done.returncode == 2
    assert "groupadd --system no-such-group" in done.stderr


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process has ended after the block, however that ends."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.promise("P8")
def test_in_the_foreground_a_gateway_is_a_service(lab: Lab) -> None:
    """It says when it answers, serves, ends by SIGTERM with 0, and nothing of it stays."""
    name, fragment = f"{lab.name}-fg", lab.home / "fragment"
    fragment.write_text(str(lab.status()["client_torrc"]))
    up = (
        "gateway",
        "up",
        name,
        "--foreground",
        "--uplink",
        "slirp4netns",
        "--torrc",
        str(fragment),
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(lab.home / "notify"))
        manager.settimeout(30)
        notify = f"NOTIFY_SOCKET={lab.home / 'notify'}"
        argv = lab.inside("host", "env", notify, TTP, *up)
        service = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        with stopped(service):
            told = ""
            while told != "READY=1":
                told = manager.recv(200).decode()
            assert lab.ttp("run", "-g", name, "--", "true").returncode == 0
            found = inspect(lab, name)
            assert found["pid"] == service.pid
            service.terminate()
            assert service.communicate(timeout=20)[1] == ""
            assert service.returncode == 0
    gone = (f"/proc/{found['tor']['pid']}", f"/proc/{found['uplink']['pid']}", found["runtime"])
    eventually(lambda: not any(Path(path).exists() for path in gone), "all of it to go")


@pytest.mark.promise("P4", "P8")
def test_a_killed_supervisor_closes_and_nothing_remains(lab: Lab, alice: Person) -> None:
    """The member's command lives on without a link; the next start serves. Last: it ends ours."""
    connect = (
        "import socket; s = socket.socket(); s.settimeout(5); "
        "print(s.connect_ex(('11.200.0.80', 80)), [n for _, n in socket.if_nameindex()])"
    )
    with alice.running("orphan") as process:
        assert tell(process, connect) == "0 ['lo', 'eth0']"  # control
        found = inspect(lab, alice.gateway)
        os.kill(found["pid"], 9)
        eventually(lambda: "eth0" not in tell(process, connect), "the link to go", 20)
        assert tell(process, connect) == "101 ['lo']"
        assert "it is not up" in alice.run("true").stderr
        with lab.other_gateway("slirp4netns", "--group", str(GROUP)):
            assert alice.run("true").returncode == 0
            assert tell(process, connect) == "101 ['lo']"
    eventually(lambda: not Path(found["runtime"]).exists(), "its directory to go")
