"""Ways around the namespace that lead through another process, a terminal or the kernel."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_helpers import PLAIN_ORACLE, TTP, Lab
from nsrun.lab import topology
from nsrun.leak.verdict import Value, as_text, judge
from terminal import Terminal
from town import eventually
from users import NOBODY as NOBODY_UID
from users import home_of

pytestmark = pytest.mark.lab

PYTHON = "/usr/bin/python3"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@contextmanager
def sleeper(lab: Lab) -> Iterator[int]:
    """A process of the user's own, outside any workload."""
    command = (*(NOBODY if lab.who == "root" else ()), "sleep", "60")
    with subprocess.Popen(lab.command(*command)) as process:
        name = Path(f"/proc/{process.pid}/comm")
        eventually(lambda: name.read_text() == "sleep\n", "the sleeper to sleep")
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.promise("P6", "P10")
def test_processes_outside_cannot_be_looked_into(lab: Lab) -> None:
    """The user's own shell is a way out, if it can be traced; so can the user do, outside."""
    options = ("--user", "nobody") if lab.who == "root" else ()
    outside = NOBODY if lab.who == "root" else ()
    with sleeper(lab) as pid:
        look = ("readlink", f"/proc/{pid}/ns/net", f"/proc/{pid}/root", f"/proc/{pid}/fd/0")
        assert lab.do(*outside, *look).returncode == 0
        inside = lab.run(*look, options=options)
        assert (inside.returncode, inside.stdout) == (1, "")


@pytest.mark.promise("P10")
def test_a_terminal_takes_no_input_from_the_command(lab: Lab) -> None:
    """TIOCSTI: what is pushed into the terminal would be run by the shell outside."""
    push = (
        "import fcntl\n"
        "try: fcntl.ioctl(0, 0x5412, b'x'); print('pushed')\n"
        "except OSError as e: print('refused', e.errno)"
    )
    inside = Terminal(lab.command(TTP, "run", "-g", lab.name, "--", PYTHON, "-c", push))
    inside.expect("refused 1")
    inside.wait()
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    outside = Terminal(lab.command(PYTHON, "-c", push))
    outside.expect("refused 5" if legacy.exists() and legacy.read_text() == "0\n" else "pushed")
    outside.wait()


@pytest.mark.promise("P3", "P10")
def test_sockets_that_no_namespace_holds_are_refused(lab: Lab) -> None:
    """AF_VSOCK leads to the hypervisor from any network namespace; IP and Unix sockets work."""
    ask = (
        "import errno, socket\n"
        "for family in (40, 31, 2, 10, 1):\n"
        "  try: socket.socket(family, 1).close(); print(family, 'made')\n"
        "  except OSError as e: print(family, errno.errorcode[e.errno])"
    )
    done = lab.run(PYTHON, "-c", ask)
    expected = ["40 EAFNOSUPPORT", "31 EAFNOSUPPORT", "2 made", "10 made", "1 made"]
    assert done.stdout.splitlines() == expected
    status = lab.run("grep", "Seccomp:", "/proc/self/status").stdout.split()
    assert status == ["Seccomp:", "2"]


@pytest.mark.promise("P11")
def test_no_command_of_ours_talks_to_anybody(lab: Lab) -> None:
    """Every command, on the simulated host: its wire carries Tor to relays, and no more."""
    with lab.tap("router", "p-host") as host, lab.other_gateway("slirp4netns") as name:
        for command in (
            ("gateway", "ls"),
            ("gateway", "inspect", name),
            ("gateway", "logs", name),
            ("ps",),
            ("plan", "--", "curl", PLAIN_ORACLE),
            ("run", "-g", name, "--", "curl", "-sS", PLAIN_ORACLE),
            ("--version",),
            ("lab", "status"),
        ):
            done = lab.do(*lab.inside_argv("host", TTP, *command))
            assert done.returncode == 0, done.stderr
        ours = lab.rules(topology.HOST, topology.HOST6)
        verdict = judge("host", host.stop(), ours, expect_some=True)
    assert verdict.value is Value.CONTAINED, as_text([verdict])


@pytest.mark.promise("P8", "P9")
def test_what_a_killed_veth_uplink_leaves_is_swept(lab: Lab) -> None:
    """Its table and forwarding switch stay on the host, closed; the next start removes them."""
    if lab.who == "user":  # where the kernel allows no such link, nothing is made at all
        refused = lab.ttp("gateway", "up", f"{lab.name}-v", "--uplink", "veth")
        assert refused.returncode == 1
        return

    def tables() -> str:
        return lab.do(*lab.inside_argv("host", "nft", "list", "tables")).stdout

    before = tables()
    with lab.other_gateway("veth", stays=False) as name:
        found = json.loads(lab.do(*lab.inside_argv("host", TTP, "gateway", "inspect", name)).stdout)
        assert tables() != before
        os.kill(found["pid"], 9)
        eventually(lambda: not Path(f"/proc/{found['pid']}").exists(), "its end")
        with lab.other_gateway("slirp4netns"):
            assert tables() == before


@pytest.mark.promise("P5", "P6")
def test_neither_cwd_nor_a_directory_passed_on_lead_around(lab: Lab) -> None:
    """What is hidden by path is hidden from where the command stands, too."""
    gateway = Path(str(lab.gateway()["runtime"]))
    run = (TTP, "run", "-g", lab.name, "--")
    inside = lab.do(*run, "sh", "-c", "pwd; ls -a . ..", cwd=gateway)
    assert (inside.returncode, inside.stdout) == (125, "")
    assert f"cannot work in {gateway}" in inside.stderr
    passing = f"exec 7<{gateway}; exec {' '.join(run)} ls -l /proc/self/fd"
    listed = lab.do("sh", "-c", passing).stdout
    assert str(gateway) not in listed
    control = lab.do("sh", "-c", f"exec 7<{gateway}; exec ls -l /proc/self/fd").stdout
    assert str(gateway) in control


@pytest.mark.promise("P2", "P6")
def test_the_kernel_starts_no_helper_for_a_key(lab: Lab) -> None:
    """request_key(2) of type dns_resolver has a name looked up outside of every namespace."""
    ask = (
        "import ctypes, platform\n"
        "number = {'x86_64': 249, 'aarch64': 218, 'riscv64': 218, 'ppc64le': 270}\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.syscall(number[platform.machine()], b'user', b'ttp', None, 0)\n"
        "print(ctypes.get_errno())"
    )
    enosys, enokey = "38", "126"
    assert lab.do(PYTHON, "-c", ask).stdout.strip() == enokey  # control
    assert lab.run(PYTHON, "-c", ask).stdout.strip() == enosys


@pytest.mark.promise("P3", "P10")
def test_no_ring_makes_a_socket(lab: Lab) -> None:
    """io_uring_setup(2): what is done by a ring is done without a call that could be filtered."""
    ask = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.syscall(425, 1, None)\n"
        "print(ctypes.get_errno())"
    )
    enosys = "38"
    outside = lab.do(PYTHON, "-c", ask).stdout.strip()
    assert outside != "0", "control: no parameters are a mistake"
    assert lab.run(PYTHON, "-c", ask).stdout.strip() == enosys


@pytest.mark.promise("P5")
def test_the_hosts_interfaces_are_not_in_sys(lab: Lab) -> None:
    """Their names and hardware addresses say which machine this is."""
    shown = lab.run("sh", "-c", "ls /sys/class/net").stdout.split()
    assert shown in (["eth0", "lo"], [])
    assert set(lab.do("ls", "/sys/class/net").stdout.split()) > {"eth0", "lo"}  # control


@pytest.mark.promise("P4")
def test_no_query_ends_tor(lab: Lab) -> None:
    """An empty datagram made Tor 0.4.9 end with a fault; it does not get that far."""
    send = (
        "import socket\n"
        "for size in (*range(0, 20), 511, 4000):\n"
        "  for host in ('9.9.9.9', '2620:fe::fe'):\n"
        "    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, 2)\n"
        "    s.sendto(bytes(size), (host, 53))"
    )
    before = lab.gateway()["tor"]
    assert lab.run(PYTHON, "-c", send).returncode == 0
    assert lab.run("getent", "ahosts", "check.torproject.org").returncode == 0
    assert lab.gateway()["tor"] == before


def test_a_socket_of_somebody_else_is_not_believed(lab: Lab) -> None:
    """We do what a supervisor says, so it must be our own user's."""
    if lab.who == "user":
        return  # it takes root to be somebody else here
    serve = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "print('ready', flush=True); s.accept(); print('believed')"
    )
    with home_of(NOBODY_UID) as base:
        trap = base / "gateways" / "evil"
        trap.mkdir(parents=True)
        os.chown(trap, NOBODY_UID, NOBODY_UID)
        command = (*NOBODY, PYTHON, "-c", serve, str(trap / "api"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as evil:
            eventually(lambda: (trap / "api").exists(), "the trap")
            done = lab.do("env", f"TTP_RUNTIME_DIR={base}", TTP, "run", "-g", "evil", "--", "true")
            evil.kill()
    assert done.returncode == 125
    assert "belongs to another user" in done.stderr
