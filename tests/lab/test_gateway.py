"""``ttp gateway``: up, down, what it says of itself, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab
from town import eventually

pytestmark = pytest.mark.lab


def on_host(lab: Lab, *argv: str) -> subprocess.CompletedProcess[str]:
    return lab.do(*lab.inside_argv("host", TTP, *argv))


@pytest.mark.promise("P12")
def test_inspect_tells_what_is_there(lab: Lab) -> None:
    """Tor's version and progress, the uplink, the rules as the kernel has them."""
    found = lab.gateway()
    tor = found["tor"]
    assert isinstance(tor, dict)
    assert found["ready"] is True
    assert tor["percent"] == 100
    assert tor["version"].startswith("0.4.")
    rules = found["rules"]
    assert isinstance(rules, list)
    assert "P5 no spoofing, no link-local" in rules
    listed = lab.ttp("gateway", "ls").stdout
    assert lab.name in listed
    assert "ready" in listed
    assert "Bootstrapped 100%" in lab.ttp("gateway", "logs", lab.name).stdout


@pytest.mark.promise("P8", "P9")
def test_down_leaves_nothing_but_guards(lab: Lab) -> None:
    """No process and no runtime directory; the guards stay, and are the same next time."""

    def guards(state: str) -> list[str]:
        text = lab.do(*lab.inside_argv("host", "cat", f"{state}/tor/state")).stdout
        return sorted(line.split()[3] for line in text.splitlines() if line.startswith("Guard "))

    with lab.other_gateway("slirp4netns") as name:
        first = json.loads(on_host(lab, "gateway", "inspect", name).stdout)
        run = on_host(lab, "run", "-g", name, "--", "curl", "-sS", PLAIN_ORACLE)
        assert json.loads(run.stdout)["IsTor"] is True
    pids = [first["pid"], first["tor"]["pid"], first["uplink"]["pid"]]
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their end")
    gone = lab.do(*lab.inside_argv("host", "ls", first["runtime"]))
    assert gone.returncode == 2
    before = guards(first["state"])
    assert before
    with lab.other_gateway("slirp4netns"):
        pass
    assert guards(first["state"]) == before
    assert "Bootstrapped 100%" in on_host(lab, "gateway", "logs", name).stdout


def test_an_idle_gateway_ends(lab: Lab) -> None:
    """After so many seconds without a workload, and not while there is one."""
    with lab.other_gateway("slirp4netns", "--idle", "4", stays=False) as name:
        stay = "sleep 5; echo still here; exec sleep 60"
        command = lab.inside("host", TTP, "run", "-g", name, "--", "sh", "-c", stay)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "still here\n"
                assert name in on_host(lab, "gateway", "ls").stdout
            finally:
                process.kill()
        eventually(lambda: name not in on_host(lab, "gateway", "ls").stdout, "its end", 15)


def test_two_starts_at_once_make_one_gateway(lab: Lab) -> None:
    """Whoever loses the race uses what the winner made, or is told that it is up."""
    fragment = lab.home / "fragment"
    fragment.write_text(str(lab.status()["client_torrc"]))
    name = f"{lab.name}-race"
    up = ("gateway", "up", name, "--uplink", "slirp4netns", "--torrc", str(fragment))
    command = lab.inside("host", TTP, *up)
    try:
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        errors = [process.communicate(timeout=60)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes[0] == 0, errors
        assert set(codes) <= {0, 2}, errors
        assert all("it is up" in error for error in errors if error), errors
        assert len(json.loads(on_host(lab, "gateway", "ls", "--json").stdout)) >= 1
    finally:
        assert on_host(lab, "gateway", "down", name).returncode == 0


@pytest.mark.promise("P8")
def test_a_start_waits_for_the_end_of_another_one(lab: Lab) -> None:
    """A supervisor that is not there yet, or not any more, holds the lock and does not answer."""
    held = 'mkdir -p -m 711 "$0"; exec flock "$0/lock" sleep 1'
    directory = f"$TTP_RUNTIME_DIR/gateways/{lab.name}-slirp"
    holding = lab.inside("host", "sh", "-c", f"exec sh -c '{held}' \"{directory}\"")
    with subprocess.Popen(holding):
        taken = lab.inside_argv("host", "sh", "-c", f"! flock --nonblock {directory}/lock true")
        eventually(lambda: lab.do(*taken).returncode == 0, "the lock")
        with lab.other_gateway("slirp4netns") as name:
            assert on_host(lab, "run", "-g", name, "--", "true").returncode == 0


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        ("SocksPort 9050\n", "line 1: SocksPort is not allowed"),
        ("NoSuchOption 1\n", "Unknown option 'NoSuchOption'"),
        ("EntryNodes {\n", "EntryNodes"),
    ],
)
def test_a_bad_fragment_starts_nothing(lab: Lab, fragment: str, words: str) -> None:
    """Ours are refused by name and reason; of what Tor rejects, its own line is shown."""
    file = lab.home / "bad-fragment"
    file.write_text(fragment)
    file.chmod(0o644)
    name = f"{lab.name}-bad"
    up = ("gateway", "up", name, "--uplink", "slirp4netns", "--torrc", str(file))
    done = on_host(lab, *up)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert name not in on_host(lab, "gateway", "ls").stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gateway", "down", "nobody-knows"], "it is not up"),
        (["gateway", "inspect", "nobody-knows"], "it is not up"),
        (["gateway", "logs", "nobody-knows"], "it never ran"),
        (["gateway", "up", "x", "--uplink", "carrier-pigeon"], "carrier-pigeon"),
        (["gateway", "up", "x", "--torrc", "/no/such/file"], "/no/such/file"),
        (["gateway", "up", "../x"], "as the name of a gateway"),
        (["gateway", "up", "x", "--idle", "nan"], "--idle"),
        (["gateway", "up", "x", "--bootstrap-timeout", "inf"], "--bootstrap-timeout"),
        (["refresh", "nobody-knows"], "there is none"),
    ],
)
def test_bad_input_changes_nothing(lab: Lab, argv: list[str], words: str) -> None:
    """One line that says what to do, and no gateway."""
    done = lab.ttp(*argv)
    assert done.returncode in (1, 2), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    names = [line.split()[0] for line in lab.ttp("gateway", "ls").stdout.splitlines()]
    assert lab.name in names
    assert "x" not in names


def test_another_version_is_not_asked(lab: Lab) -> None:
    """A supervisor that outlived an upgrade says so, and what to do."""
    request = (
        "import nsrun.client as c\nc.__version__ = '0.0.0'\n"
        f"try: c.become(['true'], {lab.name!r}, c.defaults())\n"
        "except c.RefusedError as e: print(e.cause, '|', e.hint)"
    )
    done = lab.do(str(Path(TTP).with_name("python")), "-c", request)
    assert "of version" in done.stdout, done.stderr
    assert "ttp gateway down" in done.stdout


def test_an_unwritable_directory_is_named(lab: Lab) -> None:
    """Who may not write where the gateway's files go learns the path."""
    done = lab.do("env", "TTP_STATE_DIR=/proc/nowhere", TTP, "gateway", "up", f"{lab.name}-nw")
    assert done.returncode == 1
    assert "/proc/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.promise("P10")
def test_whom_a_command_of_root_runs_as(lab: Lab) -> None:
    """The invoking user under sudo, --user if given; nobody else can choose."""
    sudo = ("env", "SUDO_UID=65534", "SUDO_GID=65534", TTP, "run", "-g", lab.name)
    if lab.who == "user":
        done = lab.do(*sudo, "--user", "nobody", "--", "id", "-u")
        assert done.returncode == 125
        assert "only root can" in done.stderr
        return
    assert lab.do(*sudo, "--", "sh", "-c", "id -u; echo $HOME").stdout == "65534\n/nonexistent\n"
    assert lab.do(*sudo, "--user", "0", "--", "id", "-u").stdout == "0\n"
    assert lab.run("id", "-u", options=["--user", "daemon"]).stdout == "1\n"
    assert lab.run("id", options=["--user", "12345"]).stdout.startswith("uid=12345 gid=12345")
    status = lab.run("grep", "CapBnd", "/proc/self/status", options=["--user", "daemon"]).stdout
    assert int(status.split()[1], 16) == 0


@pytest.mark.promise("P4")
def test_tor_has_no_power(lab: Lab) -> None:
    """Nor can it come by any: not even what the supervisor would have it inherit."""
    inheriting = ("setpriv", "--inh-caps=+net_raw")
    with lab.other_gateway("slirp4netns", prefix=inheriting) as name:
        found = json.loads(lab.do(*lab.inside_argv("host", TTP, "gateway", "inspect", name)).stdout)
        lines = Path(f"/proc/{found['tor']['pid']}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        supervisor = Path(f"/proc/{found['pid']}/status").read_text()
        assert "CapInh:\t0000000000002000" in supervisor  # control
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert int(status[f"Cap{kind}"], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
