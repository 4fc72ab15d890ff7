"""The lab that everything is measured in; running programs; reading clocks and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure
from nsrun import linux
from nsrun.errors import NsrunError

TTP = str(Path(sys.executable).with_name("ttp"))
NETNS = Path("/run/netns")
MEGA = 1e6


@dataclass(frozen=True)
class Lab:
    """A running lab, and the way to its simulated host: a command prefix that costs 2 ms."""

    name: str
    files: Path
    torrc: str
    host: tuple[str, ...]


@dataclass(frozen=True)
class Gateway:
    """A gateway that is up: its name, the processes to be watched, and the way into it."""

    name: str
    supervisor: int
    tor: int
    uplink: int | None
    inside: tuple[str, ...]

    def asked(self) -> Any:
        """What the supervisor says of itself."""
        return json.loads(ttp("gateway", "inspect", self.name))


@contextmanager
def lab_up(name: str, files: Path) -> Iterator[tuple[Lab, list[Figure]]]:
    """A lab with its gateway, and how long that took until ``ttp run`` had brought an answer."""
    try:
        elapsed: list[float] = []
        with timed(elapsed):
            ttp("lab", "up", name)
            answer = ttp("run", "-g", name, "--", "curl", "-sS", "http://torproject.org/api/ip")
        assert json.loads(answer)["IsTor"] is True
        found = json.loads(ttp("lab", "status", "--json", name))[0]
        pid = found["pid"]
        user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        network = f"--net=/proc/{pid}/root/run/netns/host"
        host = ("nsenter", f"--target={pid}", *user, "--mount", network, "--")
        if user:  # root of the lab, to whom /var/lib is still closed
            run(*host, "mount", "--bind", str(files / "lib"), "/var/lib")
        (files / "fragment").write_text(found["client_torrc"])
        what = "lab with gateway from a bake, to the answer to a first `ttp run -- curl`"
        memory = Figure("memory of the lab's network after boot", [found["memory_mb"]], "MB", 250)
        yield Lab(name, files, found["client_torrc"], host), [Figure(what, elapsed, "s"), memory]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough: the lab still has to go
        subprocess.run((TTP, "lab", "down", name), capture_output=True)


def gateway(name: str, told: str) -> Gateway:
    """The gateway ``name`` of a lab, by what ``ttp gateway inspect`` told of it."""
    found = json.loads(told)
    tor, uplink = found["tor"]["pid"], found["uplink"]["pid"]
    user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
    inside = ("nsenter", f"--target={tor}", *user, "--net", "--")
    return Gateway(name, found["pid"], tor, uplink, inside)


@contextmanager
def kept_apart(files: Path) -> Iterator[None]:
    """Let this process and its children see a cache, a state and `ip netns` of their own."""
    files.chmod(0o711)  # the gateway's Tor is another user
    for name in ("cache", "lib"):
        (files / name).mkdir()
    if os.geteuid() != 0:
        os.environ |= {"XDG_CACHE_HOME": f"{files}/cache", "XDG_STATE_HOME": f"{files}/lib"}
        yield
        return
    made = not NETNS.exists()
    NETNS.mkdir(exist_ok=True)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount(f"{files}/cache", "/var/cache", flags=linux.MS_BIND)
    linux.mount(f"{files}/lib", "/var/lib", flags=linux.MS_BIND)
    linux.mount("bench", str(NETNS), "tmpfs")
    try:
        yield
    finally:
        linux.umount(str(NETNS))
        if made:
            NETNS.rmdir()


def run(*command: str, seconds: float = 120) -> str:
    """Standard output of a command. Raises NsrunError with its last words when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise NsrunError(f"run {' '.join(command[:4])} …", f"{seconds:g} s passed") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NsrunError(f"run {' '.join(command[:4])} …", last)
    return done.stdout


def ttp(*arguments: str) -> str:
    return run(TTP, *arguments)


def spawn(command: tuple[str, ...], environment: dict[str, str]) -> float:
    """Milliseconds from before the command is started until it has ended."""
    begin = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, environment)
    _, status = os.waitpid(pid, 0)
    elapsed = time.perf_counter() - begin
    if status:
        raise NsrunError(f"run {' '.join(command)}", f"wait status {status}")
    return elapsed * 1000


def plain_environment(lab: Lab) -> dict[str, str]:
    """Ours without what would slow Python down, for the lab's gateway."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return {**kept, "TTP_GATEWAY": lab.name}


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)


def memory(pid: int, key: str) -> float:
    """In MB; proportional set size shares what is mapped by several processes among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / MEGA


def cpu_ms(pid: int) -> float:
    """Of all threads that live, on a CPU (schedstat, nanoseconds)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / MEGA


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)
