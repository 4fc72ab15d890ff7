"""``ttp docker run``: as docker run, behind Tor, and nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from docker_host import IMAGE, Dockerd, keepers
from driver_host import Host
from lab_helpers import PLAIN_ORACLE, TTP
from nsrun.containers import keeper
from nsrun.containers.options import FLAGS, SHORT, VALUES
from nsrun.leak import pcap
from town import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]


def is_tor(engine: Dockerd, text: str) -> bool:
    found = json.loads(text)
    return bool(found["IsTor"]) and found["IP"] in engine.lab.exits()


def has(file: Path, what: bytes) -> bool:
    """Whether a capture that is whole has these bytes in a packet."""
    seen, flaw = pcap.load(file.read_bytes())
    return not flaw and what in file.read_bytes() and bool(seen)


def asks_oracle(engine: Dockerd, *options: str) -> subprocess.CompletedProcess[str]:
    return engine.run("--rm", *options, IMAGE, "curl", "-sS", PLAIN_ORACLE)


@pytest.mark.promise("P1", "P2")
def test_a_container_comes_from_an_exit(engine: Dockerd) -> None:
    """And without ttp, on Docker's own bridge, from the lab's host."""
    done = asks_oracle(engine)
    assert done.returncode == 0, done.stderr
    assert is_tor(engine, done.stdout)
    bare = engine.docker("run", "--rm", IMAGE, "curl", "-sS", PLAIN_ORACLE)  # control
    assert json.loads(bare.stdout)["IsTor"] is False


@pytest.mark.promise("P1", "P5")
def test_proxies_are_there_for_who_asked(engine: Dockerd) -> None:
    """At the gateway's address, and in ALL_PROXY, which the container's own options overrule."""
    gateway = str(engine.lab.gateway()["address"][0])  # type: ignore[index]
    curl = f"curl -sS -w ' %{{remote_ip}}\\n' {PLAIN_ORACLE}"
    by_http = f"{curl} --proxytunnel --proxy http://{gateway}:8118"
    script = f"{curl}; {by_http}; ALL_PROXY= all_proxy= {curl}"
    done = engine.run("--rm", IMAGE, "sh", "-c", script, options=("--socks",))
    assert done.returncode == 0, done.stderr
    answers, reached = zip(*(line.rsplit(" ", 1) for line in done.stdout.splitlines()), strict=True)
    assert all(is_tor(engine, answer) for answer in answers)
    assert [address == gateway for address in reached] == [True, True, False]
    none = engine.run(
        "--rm", IMAGE, "curl", "-sS", "--proxy", f"socks5h://{gateway}:9050", "a.test"
    )
    assert "Failed to connect" in none.stderr
    own = engine.run("--rm", "-e", "ALL_PROXY=", IMAGE, "env", options=("--socks",))
    assert f"all_proxy=socks5h://{gateway}:9050" in own.stdout.splitlines()
    assert "ALL_PROXY=" in own.stdout.splitlines()


@pytest.mark.promise("P12")
def test_what_a_container_sends_is_recorded(engine: Dockerd) -> None:
    """From ttp's own lookup on; whole when ttp has ended, with -d when the container has."""
    for name, options in (("whole", ("--rm",)), ("detached", ("-d", "--name", "recorded"))):
        file = engine.directory / f"{name}.pcap"
        command = ("curl", "-sS", "-o", "/dev/null", f"http://11.200.0.80/?{name}")
        done = engine.run(*options, IMAGE, *command, options=("--pcap", str(file)))
        assert (done.returncode, done.stderr) == (0, "")
        if "-d" in options:
            engine.docker("wait", "recorded")
            engine.clear()
            eventually(partial(has, file, b"HTTP/1.1 404"), "the last packets to be written", 5)
        assert has(file, f"GET /?{name} HTTP/1.1".encode())
        assert has(file, b"HTTP/1.1 404")
        assert has(file, b"\5onion\0")
    again = engine.run("--rm", IMAGE, "true", options=("--pcap", str(file)))
    assert again.returncode == 125
    assert "there is a file that is not empty" in again.stderr


@pytest.mark.promise("P8")
def test_nothing_is_left_of_it(engine: Dockerd) -> None:
    """Neither container nor holder, nor workload, nor keeper."""
    engine.run("--rm", IMAGE, "true")
    eventually(lambda: not engine.containers(), "the holder to go")
    eventually(lambda: not engine.workloads(), "the workload to end")
    eventually(lambda: not keepers(engine), "its keeper to end")


@pytest.mark.promise("P8")
def test_nothing_is_left_though_nobody_asks_how_it_ended(engine: Dockerd) -> None:
    """A parent that is busy, or leaves zombies: docker has ended all the same."""
    command = (TTP, "docker", "run", "-g", engine.lab.name, "--", "--rm", IMAGE, "true")
    with subprocess.Popen(command, env=engine.environment) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        eventually(lambda: not engine.containers(), "the holder to go")


@pytest.mark.parametrize(
    ("command", "code"),
    [(("sh", "-c", "exit 42"), 42), (("true",), 0), (("nosuchcommand",), 127), (("/etc",), 126)],
)
def test_exit_codes_are_those_of_docker(
    engine: Dockerd, command: tuple[str, ...], code: int
) -> None:
    assert engine.run("--rm", IMAGE, *command).returncode == code
    assert engine.docker("run", "--rm", IMAGE, *command).returncode == code  # control


def test_what_is_typed_and_set_gets_there(engine: Dockerd) -> None:
    """Standard input, variables, a volume, a name, a host name, an entry of /etc/hosts."""
    words = (
        *("--rm", "-i", "-e", "A=b c", "-v", "kept:/kept", "--name", "one", "-h", "box"),
        *("--add-host", "db.test:192.0.2.7", "--entrypoint", "sh", IMAGE, "-c"),
        'cat; echo "$A"; echo x >/kept/x; hostname; getent ahostsv4 db.test',
    )
    command = (TTP, "docker", "run", "-g", engine.lab.name, "--", *words)
    done = subprocess.run(
        command,
        input="typed\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=engine.environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["typed", "b c", "box"]
    assert "192.0.2.7" in done.stdout
    engine.docker("volume", "rm", "kept")


def test_a_terminal_is_one(engine: Dockerd) -> None:
    """With -it: docker itself holds it, as ttp has become docker."""
    master, slave = pty.openpty()
    words = ("--rm", "-it", IMAGE, "sh", "-c", "tty; read x; echo got $x")
    command = (TTP, "docker", "run", "-g", engine.lab.name, "--", *words)
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=engine.environment
    ) as process:
        os.close(slave)
        said = ""
        while "got" not in said.replace("echo got", ""):
            assert select.select([master], [], [], 60)[0], said
            said += os.read(master, 1000).decode()
            if "/dev/pts/" in said and "typed" not in said:
                os.write(master, b"typed\n")
        assert process.wait(30) == 0
    os.close(master)
    assert "got typed" in said


def test_a_signal_reaches_the_command(engine: Dockerd) -> None:
    """TERM to ttp, which is docker by then, is proxied to the container."""
    script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    command = (TTP, "docker", "run", "-g", engine.lab.name, "--", "--rm", IMAGE, "sh", "-c", script)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=engine.environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "told\n"
        assert process.wait(30) == 3


@pytest.mark.promise("P7")
def test_a_detached_one_is_listed_and_renewed(engine: Dockerd) -> None:
    """`ttp docker ps`, `ttp ps`, `ttp refresh`, `ttp kill`: a workload like others."""
    for name in ("one", "two"):
        assert engine.run("-d", "--name", name, IMAGE, "sleep", "100").returncode == 0
    table = engine.do(TTP, "docker", "ps").stdout
    assert re.search(rf"^one +{IMAGE} +Up .*{engine.lab.name} +10\.64\.", table, re.MULTILINE)
    listed = json.loads(engine.do(TTP, "docker", "ps", "--json").stdout)
    identities = {one["container"]: one["identity"] for one in listed}
    assert identities["one"] != identities["two"]
    assert engine.lab.about("refresh", "one").returncode == 0
    renewed = json.loads(engine.do(TTP, "docker", "ps", "--json").stdout)
    after = {one["container"]: one["identity"] for one in renewed}
    assert after["one"] != identities["one"]
    assert after["two"] == identities["two"]
    assert engine.lab.about("kill", "-s", "KILL", "one").returncode == 0
    eventually(lambda: engine.workloads() == ["two"], "the workload to end")


@pytest.mark.promise("P12")
def test_all_containers_behind_tor_are_listed(docker: Host) -> None:
    """Those of ttp docker run, of the driver's networks, and attached ones; no other."""
    engine = docker.dockerd
    assert engine.run("-d", "--name", "held", IMAGE, "sleep", "100").returncode == 0
    for name, network in (("driven", "tor"), ("other", "plain"), ("lone", "none")):
        docker.begin(network, name)
    attached = engine.do(TTP, "docker", "attach-network", "-g", engine.lab.name, "lone")
    assert attached.returncode == 0, attached.stderr
    listed = json.loads(engine.do(TTP, "docker", "ps", "--json").stdout)
    assert sorted(one["container"] for one in listed) == ["driven", "held", "lone"]
    known = {one["name"]: " ".join(one["identity"]) for one in engine.listed()}
    assert {one["workload"]: one["identity"] for one in listed} == known
    docker.docker("network", "disconnect", "tor", "driven")
    assert "driven" not in engine.do(TTP, "docker", "ps").stdout


def test_a_restarted_one_keeps_its_network(engine: Dockerd) -> None:
    """By --restart, and by docker restart: the holder stays, and so does the identity."""
    script = "echo started; curl -sS http://check.torproject.org/api/ip; sleep 1; exit 1"
    engine.run("-d", "--restart", "on-failure:1", "--name", "again", IMAGE, "sh", "-c", script)
    eventually(
        lambda: engine.docker("logs", "again").stdout.count('"IsTor":true') == 2, "two runs", 40
    )
    engine.docker("restart", "-t", "0", "again")
    eventually(
        lambda: engine.docker("logs", "again").stdout.count('"IsTor":true') == 3, "one more", 40
    )
    engine.docker("rm", "-f", "again")
    eventually(lambda: not engine.containers(), "the holder to go")


@pytest.mark.promise("P4")
def test_it_cannot_start_without_its_holder(engine: Dockerd) -> None:
    """Who removes the holder gets a container that docker refuses to start."""
    engine.run("-d", "--name", "orphan", IMAGE, "sleep", "100")
    engine.docker("rm", "-f", "ttp-orphan")
    done = engine.docker("restart", "-t", "0", "orphan")
    assert done.returncode != 0
    assert "No such container" in done.stderr


@pytest.mark.promise("P6", "P10")
@pytest.mark.parametrize("options", [("-it", "--privileged"), ("-v", "/var/run/docker.sock:/s")])
def test_what_would_break_a_promise_is_refused_by_name(
    engine: Dockerd, options: tuple[str, ...]
) -> None:
    """One line with the option, exit code 125 as docker's own, nothing made."""
    done = engine.run("--rm", *options, IMAGE, "true")
    assert done.returncode == 125
    said = done.stderr.splitlines()
    assert said[0].startswith("ttp: cannot "), said
    assert len(said) <= 2, said
    assert not engine.containers()
    assert not engine.workloads()


def test_every_option_of_docker_is_known(engine: Dockerd) -> None:
    """Whether it takes a value, as docker's own help says: else an image is taken for a value."""
    text = engine.docker("run", "--help").stdout
    found = re.findall(r"^ {2,6}(?:-(\w), )?--([\w-]+)(?: (\w+))? {2,}", text, re.MULTILINE)
    assert len(found) > 80
    for short, name, kind in found:
        if name != "help":
            assert name in (VALUES if kind else FLAGS), name
            assert SHORT.get(short, name) == name


@pytest.mark.promise("P11")
def test_no_image_is_pulled_without_being_asked_for(engine: Dockerd) -> None:
    """A pull is the daemon's, by the host's network: it is said, and must be wanted."""
    done = engine.run("--rm", "nosuch/image", "true")
    assert done.returncode == 125
    assert "not on this machine" in done.stderr
    assert "outside of Tor" in done.stderr
    assert not engine.containers()
    asked = engine.run("--rm", "--pull", "missing", "nosuch.test/image", "true")
    assert "outside of Tor" in asked.stderr.splitlines()[0]
    eventually(lambda: not engine.containers(), "the holder to go")


@pytest.mark.promise("P8")
def test_after_a_kill_nothing_stays(engine: Dockerd) -> None:
    """kill -9 of ttp with a holder made and no container yet, and of the keeper."""
    command = (TTP, "docker", "run", "-g", engine.lab.name, "--", "--rm", IMAGE, "sleep", "100")
    with subprocess.Popen(command, env=engine.environment, stderr=subprocess.DEVNULL) as process:
        eventually(engine.containers, "a holder", 30)
        process.kill()
    for pid in keepers(engine):
        os.kill(pid, signal.SIGKILL)
    if IMAGE in engine.docker("ps", "--format", "{{.Image}}").stdout:
        engine.clear()  # it was quicker than we: the container is docker's
    keeper.lock(engine.host).touch()  # if it was killed before it made that
    engine.do(TTP, "docker", "ps")
    assert not engine.containers()
    eventually(lambda: not engine.workloads(), "the workload to end")
    eventually(lambda: not keeper.lock(engine.host).exists(), "its lock to go")


def test_a_failure_leaves_no_holder(engine: Dockerd) -> None:
    """A name that is taken, by a container or by a workload; no gateway; no daemon."""
    assert engine.run("-d", "--name", "taken", IMAGE, "sleep", "100").returncode == 0
    before = sorted(engine.containers())
    again = engine.run("-d", "--name", "taken", IMAGE, "true")
    assert again.returncode == 125
    assert "ttp-taken" in again.stderr
    other = engine.run("--rm", IMAGE, "true", options=("--name", "taken"))
    assert other.returncode == 125
    assert sorted(engine.containers()) == before
    words = ("docker", "run", "--", "--rm", IMAGE, "true")
    none = subprocess.run(
        [TTP, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**engine.environment, "DOCKER_HOST": "unix:///nonexistent/docker.sock"},
    )
    assert none.returncode == 125
    assert none.stderr.splitlines()[0] == (
        "ttp: cannot list the containers: there is no /nonexistent/docker.sock"
    )
    elsewhere = subprocess.run(
        [TTP, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**engine.environment, "DOCKER_HOST": "tcp://192.0.2.1:2375"},
    )
    assert "is another machine's" in elsewhere.stderr


@pytest.mark.promise("P1", "P12")
def test_a_running_container_is_attached(engine: Dockerd) -> None:
    """One on the network none; one on a bridge is not, nor one that has a link already."""
    engine.docker("run", "-d", "--network", "none", "--name", "lone", IMAGE, "sleep", "100")
    engine.docker("run", "-d", "--name", "bridged", IMAGE, "sleep", "100")
    attach = (TTP, "docker", "attach-network", "-g", engine.lab.name)
    done = engine.do(*attach, "lone")
    assert done.returncode == 0, done.stderr
    asked = engine.docker("exec", "lone", "curl", "-sS", PLAIN_ORACLE)
    assert is_tor(engine, asked.stdout)
    assert "lone" in engine.do(TTP, "docker", "ps").stdout
    assert "its network is default" in engine.do(*attach, "bridged").stderr
    assert "has links already" in engine.do(*attach, "lone", "--name", "other").stderr
    assert "No such container" in engine.do(*attach, "nobody").stderr
    engine.docker("restart", "-t", "0", "lone")  # a new network, with nothing in it
    failed = engine.docker("exec", "lone", "curl", "-sS", "-m", "5", "http://11.200.0.80/")
    assert failed.returncode != 0


@pytest.mark.promise("P2", "P3", "P5")
def test_inside_there_is_nothing_but_the_link(engine: Dockerd) -> None:
    """One link, one resolver, no raw socket, and nothing of the lab's LAN in reach."""
    script = (
        "ls /sys/class/net; cat /etc/resolv.conf; "
        "curl -sS -m 5 http://192.168.77.80/ && echo LAN; "
        "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)'"
    )
    done = engine.run("--rm", IMAGE, "sh", "-c", script)
    lines = done.stdout.split()
    assert lines[:2] == ["eth0", "lo"]
    assert lines[2] == "nameserver"
    assert "LAN" not in lines
    assert "PermissionError" in done.stderr
    lan = engine.docker("run", "--rm", IMAGE, "curl", "-sS", "http://192.168.77.80/")
    assert "LAN web server" in lan.stdout  # control


def test_who_is_not_root_is_told_so(as_user: list[str]) -> None:
    """At once: no gateway is started that could not be plugged in."""
    for words in (("run", "--", "image"), ("attach-network", "one")):
        done = subprocess.run(
            [*as_user, TTP, "docker", *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == (125 if words[0] == "run" else 2)
        assert done.stderr == (
            "ttp: cannot put a container behind Tor: only root can reach into the network of one\n"
            "hint: use sudo\n"
        )


@pytest.mark.promise("P9")
def test_who_has_its_labels_is_no_holder(engine: Dockerd) -> None:
    """A container, by itself or by its image, whatever the labels say; it is nobody's to remove."""
    labels = ("--label", "ttp.gateway=x", "--label", "ttp.creator=none")
    engine.docker("run", "-d", "--name", "theirs", *labels, IMAGE, "sleep", "100")
    assert engine.run("-d", "--name", "ours", *labels, IMAGE, "sleep", "100").returncode == 0
    listed = engine.do(TTP, "docker", "ps")
    assert (listed.returncode, "theirs" in listed.stdout) == (0, False), listed.stderr
    assert "ours" in listed.stdout
    assert {"/theirs", "/ours"} <= set(
        engine.docker(
            "inspect", "--format", "{{.Name}}", *engine.docker("ps", "-q").stdout.split()
        ).stdout.split()
    )


@pytest.mark.promise("P6", "P10")
def test_no_mount_is_a_way_out_by_another_spelling(engine: Dockerd) -> None:
    """A bind in capitals; a volume that is a name for /run, of a new container or a running one."""
    capital = engine.run("--rm", "--mount", "type=BIND,source=/run,target=/x", IMAGE, "ls", "/x")
    assert (capital.returncode, capital.stdout) == (125, "")
    as_run = ("--opt", "type=none", "--opt", "o=bind", "--opt", "device=/run")
    engine.docker("volume", "create", *as_run, "door")
    try:
        by_name = engine.run("--rm", "-v", "door:/x", IMAGE, "ls", "/x")
        assert (by_name.returncode, by_name.stdout) == (125, "")
        assert "leads to /run" in by_name.stderr
        engine.docker(
            "run",
            "-d",
            "--network",
            "none",
            "--name",
            "lone",
            "-v",
            "door:/x",
            IMAGE,
            "sleep",
            "100",
        )
        attach = (TTP, "docker", "attach-network", "-g", engine.lab.name, "lone")
        assert "leads to /run" in engine.do(*attach).stderr
        assert engine.run("--rm", "-v", "plain:/x", IMAGE, "ls", "/x").returncode == 0  # control
    finally:
        engine.clear()
        engine.docker("volume", "rm", "door", "plain")


def test_names_that_are_none_are_said_to_be(engine: Dockerd) -> None:
    """Empty, or a path; and a recording without a file."""
    attach = (TTP, "docker", "attach-network", "-g", engine.lab.name)
    for name in ("", "../info"):
        done = engine.do(*attach, name)
        assert done.stderr.startswith("ttp: cannot find the container"), done.stderr
    assert "it has no name" in engine.run(IMAGE, "true", options=("--pcap", "")).stderr
