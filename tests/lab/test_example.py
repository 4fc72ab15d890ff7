"""The pytest plugin, as another project would use it: pytest in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from harness import ROOT
from lab_helpers import Lab
from nsrun.leak import pcap

pytestmark = pytest.mark.lab

EXAMPLE = ROOT / "examples" / "weather"


def run(lab: Lab, *arguments: str, own_lab: bool = False) -> subprocess.CompletedProcess[str]:
    options = ["-p", "no:cacheprovider", "--strict-markers", "-W", "error"]
    options += ["--basetemp", f"{lab.home}/tmp", "--rootdir", str(lab.home)]
    options += [] if own_lab else ["--tor-lab", lab.name]
    wide = ("env", "COLUMNS=200")  # of the summary
    return lab.do(*wide, sys.executable, "-Bm", "pytest", *options, *arguments, seconds=110)


def write(lab: Lab, text: str) -> str:
    """A file of tests; its name is new each time, as it is what Python imports."""
    file = lab.home / f"test_written_{len(list(lab.home.glob('test_written_*')))}.py"
    file.write_text(f"import socket\nimport pytest\n\n{text}")
    file.chmod(0o644)
    return str(file)


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    last = done.stdout.strip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)}


@pytest.mark.promise("P12")
def test_the_example_leaks_and_its_mended_twin_does_not(lab: Lab) -> None:
    """In a lab of the plugin's own; each packet is named, and is in the evidence."""
    evidence = lab.home / "evidence"
    done = run(lab, str(EXAMPLE), "--leak-evidence", str(evidence), own_lab=True)
    assert counts(done) == {"failed": 2, "passed": 2}, done.stdout + done.stderr
    assert "test_weather.py FF" in done.stdout
    assert "test_mended.py .." in done.stdout
    for line in (
        "11.200.0.80.3478: udp",
        "leak: UDP (STUN), which Tor does not carry",
        "leak: UDP (SSDP) to everybody on the LAN",
        "8.8.8.8.53: udp, A? www.test",
        "leak: DNS to 8.8.8.8, not the resolver",
        "stopped here by: P2 DNS goes to Tor, ipv4",
        "stopped here by: P3 all else is refused",
    ):
        assert done.stdout.count(line) >= 2, f"{line}\n{done.stdout}"
    files = re.findall(r"^(?:E\s+)?evidence: (.*)$", done.stdout, re.MULTILINE)
    assert len(set(files)) == 2
    for file in files:
        content = subprocess.run(lab.command("cat", file), capture_output=True, timeout=20).stdout
        frames, flaw = pcap.load(content)
        assert (len(frames), flaw) == (3, "")
    left = [one["name"] for one in json.loads(lab.ttp("lab", "status", "--json").stdout)]
    assert not [name for name in left if name.startswith("py")], "its lab has gone"


@pytest.mark.promise("P12")
def test_the_verdict_is_the_tests(lab: Lab) -> None:
    """A leak, by marker or fixture, a wire that carried something, and what is not proven: all
    fail; an allowance covers what it says; a test that fails anyway keeps its own failure."""
    file = write(
        lab,
        """import subprocess

def udp(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
        it.sendto(b"x", (address, port))

@pytest.mark.no_leaks
def test_leak_marked(torified):
    torified.call(udp, "11.200.0.80", 123)

@pytest.mark.no_leaks
def test_unproven_idle():
    pass

def test_leak_other(torified, leaks):
    leaks.allow("11.200.0.80", port=7)
    torified.call(udp, "11.200.0.80", 123)

def test_own_failure(torified, leaks):
    torified.call(udp, "11.200.0.80", 123)
    assert [one.why for one in leaks.attempts] == ["UDP (NTP), which Tor does not carry"]
    assert not "its own failure"

def test_unproven_lost(torified, leaks):
    torified.run(["true"])
    torified.records[0].file.unlink()

def test_ok_unwatched(torified):
    torified.call(udp, "11.200.0.80", 123)

def test_ok_allowed(torified, leaks):
    leaks.allow("11.200.0.0/16", port=123, protocol="udp")
    torified.call(udp, "11.200.0.80", 123)
    with pytest.raises(Exception, match="neither address, port nor protocol"):
        leaks.allow()
    with pytest.raises(Exception, match="is no IP protocol"):
        leaks.allow(protocol="upd")
    with pytest.raises(Exception, match="cannot allow packets"):
        leaks.allow("11.200.0.80/8")

def test_ok_neighbours(torified, leaks, wires):
    torified.run(["true"])
    # the host asks whether the router is there still, as it does 5 s after it last heard of it
    on_host = [*wires.bench.inside("host"), "ip", "neighbour"]
    router = ["192.168.77.1", "dev", "eth0"]
    ask = ["replace", *router, "lladdr", "02:00:00:00:77:01", "nud", "probe"]
    subprocess.run([*on_host, *ask], check=True)
    while b"PROBE" in subprocess.check_output([*on_host, "show", *router]):
        pass
    (host,) = [one for one in wires.judge() if one.wire == "host"]
    assert dict(host.allowed)["between neighbours"]

def test_leak_wire(torified, leaks, wires):
    torified.run(["true"])
    # beside ttp, as if a gateway had let it out; broadcast, as ARP would go on after the test
    to = "UDP-DATAGRAM:255.255.255.255:9,broadcast"
    send = ["sh", "-c", f"echo | socat -t0 - {to}"]
    subprocess.run([*wires.bench.inside("host"), *send], check=True)
""",
    )
    done = run(lab, file)
    assert counts(done) == {"failed": 6, "passed": 3}, done.stdout + done.stderr
    summary = done.stdout.partition("short test summary info")[2]
    for name in ("leak_marked", "leak_other"):
        assert f"test_{name} - Failed: leak: 1 packets would have leaked" in summary, summary
    assert "test_own_failure - AssertionError" in summary
    assert "Captured leaks" in done.stdout
    assert "test_leak_wire - Failed: leak: 0 packets would have leaked" in summary, summary
    for line in ("host: leak:", "255.255.255.255.9: udp", "wire-host.pcap"):
        assert line in done.stdout
    for name in ("idle", "lost"):
        assert f"test_unproven_{name} - Failed: inconclusive:" in summary, summary
    assert "no command was run behind Tor" in done.stdout
    assert "not proven: its record cannot be read" in done.stdout


def test_processes_of_xdist_have_a_lab_each(lab: Lab) -> None:
    """Side by side, and gone with them; in one lab they would see each other, and are refused."""
    file = write(
        lab,
        """
@pytest.mark.no_leaks
@pytest.mark.parametrize("turn", range(4))
def test_it(torified, turn):
    assert "an exit" in torified.run(["curl", "-sS", "http://www.test/"]).stdout
""",
    )
    done = run(lab, file, "-n", "2", own_lab=True)
    assert counts(done) == {"passed": 4}, done.stdout + done.stderr
    assert "2 workers" in done.stdout
    left = [one["name"] for one in json.loads(lab.ttp("lab", "status", "--json").stdout)]
    assert not [name for name in left if name.startswith("py")]
    refused = run(lab, file, "-n", "2")
    assert refused.returncode == 4
    assert "cannot share the lab of --tor-lab" in refused.stderr
    assert counts(run(lab, file, "-n", "1")) == {"passed": 4}


def test_commands_and_functions_behave_as_without_tor(lab: Lab) -> None:
    """Values, exceptions, output, input, codes, time limits."""
    file = write(
        lab,
        """import subprocess, sys, urllib.request

class OwnError(Exception):
    pass

def double(number, *, plus=0):
    print("said so")
    return {"value": number * 2 + plus}

def fail(error):
    raise error

def lambdas():
    return lambda: None

def not_found():
    urllib.request.urlopen("http://www.test/nowhere", timeout=20)

def die():
    import os
    os._exit(3)

def test_values(torified, capfd):
    assert torified.call(double, 20, plus=2) == {"value": 42}
    assert "said so" in capfd.readouterr().err

def test_exceptions(torified):
    with pytest.raises(OwnError, match="why") as caught:
        torified.call(fail, OwnError("why"))
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(SystemExit):
        torified.call(sys.exit, 4)
    with pytest.raises(RuntimeError, match="HTTPError: HTTP Error 404"):
        torified.call(not_found)
    with pytest.raises(TypeError, match="cannot be sent back"):
        torified.call(lambdas)
    with pytest.raises(Exception, match="top of a module|pickle"):
        torified.call(lambda: None)
    with pytest.raises(Exception, match="ended with status 3"):
        torified.call(die)

def test_commands(torified, tmp_path):
    done = torified.run(["sh", "-c", "cat; pwd; echo $A >&2; exit 7"],
                        input="in\\n", env={"A": "b"}, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"in\\n{tmp_path}\\n", "b\\n")
    with pytest.raises(subprocess.CalledProcessError):
        torified.run(["false"], check=True)
    assert "an exit" in torified.run(["curl", "-sS", "http://www.test/"]).stdout

@pytest.mark.no_leaks
def test_a_server_that_never_ends(torified):
    with pytest.raises(subprocess.TimeoutExpired):
        torified.run(["sh", "-c", "curl -sS http://www.test/; sleep 50"], timeout=2)
""",
    )
    done = run(lab, file)
    assert counts(done) == {"passed": 4}, done.stdout + done.stderr
