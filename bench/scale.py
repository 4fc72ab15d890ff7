"""Many workloads: a thousand at once, fifty starts a second for a minute, and a gateway at rest."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from figures import Figure
from labs import (
    MEGA,
    TTP,
    Gateway,
    Lab,
    cpu_ms,
    gateway,
    memory,
    plain_environment,
    run,
    spawn,
)
from nsrun.errors import NsrunError

LIVE = (1, 10, 100, 1000)
TRUE = (TTP, "run", "--", "true")
SLEEP = (TTP, "run", "--", "sleep", "3600")
SAMPLES = 20
AT_ONCE = 4  # starts that are under way while workloads are brought up
IDLE = 5.0  # seconds
RATE, MINUTE = 50, 60.0
BACKLOG = 50  # starts under way; a machine that cannot keep up starts fewer, which is seen
PATIENCE = 60.0  # seconds for anything that is awaited
KERNEL = ("SUnreclaim", "KernelStack", "PageTables", "Percpu", "VmallocUsed")  # not caches


@dataclass(frozen=True)
class Traces:
    """What workloads leave in a gateway while they live, and nothing of afterwards."""

    workloads: int
    links: int
    elements: int
    descriptors: int

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in vars(self).items())


def live_workloads(lab: Lab) -> Iterator[Figure]:
    """1, 10, 100, 1,000 at once: the start of one more, what each takes, and their end."""
    own = gateway(lab.name, run(TTP, "gateway", "inspect", lab.name))
    environment = plain_environment(lab)
    sleeping: list[subprocess.Popen[bytes]] = []
    starts: list[Figure] = []
    try:
        settle(own, 0)
        kernel, supervisor = kernel_memory(), memory(own.supervisor, "Rss")
        for count in LIVE:
            bring_up(own, sleeping, count, environment)
            values = [spawn(TRUE, environment) for _ in range(SAMPLES)]
            settle(own, count)
            what = f"`ttp run -- true` beside {count:,} live"
            starts.append(Figure(what, values, "ms", plot="live", label=f"{count:,}"))
            yield starts[-1]
        slower = starts[-1].value / min(figure.value for figure in starts)
        yield Figure("slowest of these to the fastest", [slower], "", most=1.5)
        told = own.asked()["workloads"]
        identities = {address for one in told for address in one["identity"]}
        yield Figure("identities of a thousand", [len(identities)], "", least=2 * LIVE[-1])
        users = median(memory(process.pid, "Pss") for process in sleeping[::10])
        per = (kernel_memory() - kernel) / len(sleeping)
        yield Figure("kernel memory of each of a thousand", [per * 1000], "kB")
        yield Figure("user memory of each (`sleep`), proportional", [users * 1000], "kB")
        what = "supervisor beside a thousand, resident set size"
        yield Figure(what, [memory(own.supervisor, "Rss")], "MB", most=40)
        yield Figure("the same before them", [supervisor], "MB", most=40)
        yield rest(own, "beside a thousand")
        begin = time.perf_counter()
        for process in sleeping:
            process.kill()
        settle(own, 0)
        cleared = time.perf_counter() - begin
        yield Figure("from kill -9 of a thousand until nothing is left", [cleared], "s", most=2)
    finally:
        for process in sleeping:
            process.kill()
            process.wait()


def bring_up(
    own: Gateway, sleeping: list[subprocess.Popen[bytes]], count: int, environment: dict[str, str]
) -> None:
    while len(sleeping) < count:
        more = min(AT_ONCE, count - len(sleeping))
        sleeping += [subprocess.Popen(SLEEP, env=environment) for _ in range(more)]
        await_names(sleeping[-AT_ONCE:])
    settle(own, count)


def await_names(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until each process has become its command."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            if process.poll() is not None or time.monotonic() > deadline:
                raise NsrunError("start a workload", f"exit code {process.returncode}")
            time.sleep(0.001)  # the interval of the poll


def sustained(lab: Lab) -> Iterator[Figure]:
    """Starts at a fixed rate, late or not, and what they leave behind."""
    own = gateway(lab.name, run(TTP, "gateway", "inspect", lab.name))
    environment = plain_environment(lab)
    settle(own, 0)
    before, connections = traces(own), tracked(own)
    kernel, supervisor = kernel_memory(), memory(own.supervisor, "Rss")
    took: list[float] = []
    running: dict[int, tuple[int, float]] = {}  # pidfd: pid, begin
    begin = time.perf_counter()
    count = int(RATE * MINUTE)
    for number in range(count):
        reap(running, took, until=begin + number / RATE)
        while len(running) >= BACKLOG:
            reap(running, took, until=time.perf_counter() + 1 / RATE)
        now = time.perf_counter()
        pid = os.posix_spawnp(TRUE[0], TRUE, environment)
        running[os.pidfd_open(pid)] = pid, now
    launched = time.perf_counter() - begin
    while running:
        reap(running, took, until=time.perf_counter() + 0.1)
    settle(own, 0)
    yield Figure(f"starts a second, of {RATE} asked for", [count / launched], "", least=RATE * 0.98)
    yield Figure("`ttp run -- true` meanwhile", took, "ms")
    left = sum(abs(count - vars(before)[name]) for name, count in vars(traces(own)).items())
    yield Figure("workloads, links, elements, descriptors that they left", [left], "", most=0)
    yield Figure("connections more that the gateway tracks", [tracked(own) - connections], "", 5)
    grown = memory(own.supervisor, "Rss") - supervisor
    yield Figure(f"growth of the supervisor by {count:,} starts", [grown], "MB", most=2)
    yield Figure("growth of the kernel's memory", [kernel_memory() - kernel], "MB", most=20)


def reap(running: dict[int, tuple[int, float]], took: list[float], *, until: float) -> None:
    """Note how long those took that end before ``until``. Raises NsrunError if one failed."""
    ends = select.poll()
    for pidfd in running:
        ends.register(pidfd, select.POLLIN)
    while (left := until - time.perf_counter()) > 0:
        for ended, _ in ends.poll(left * 1000):
            ends.unregister(ended)
            pid, begin = running.pop(ended)
            took.append((time.perf_counter() - begin) * 1000)
            os.close(ended)
            if status := os.waitpid(pid, 0)[1]:
                raise NsrunError(f"run {' '.join(TRUE)}", f"wait status {status}")


def at_rest(lab: Lab) -> Iterator[Figure]:
    """The supervisor of the lab's gateway, after all the workloads above."""
    own = gateway(lab.name, run(TTP, "gateway", "inspect", lab.name))
    yield Figure("supervisor, resident set size", [memory(own.supervisor, "Rss")], "MB", most=40)
    yield Figure("supervisor, proportional", [memory(own.supervisor, "Pss")], "MB")
    yield rest(own, "without a workload")
    found = json.loads(run(TTP, "lab", "status", "--json", lab.name))[0]["memory_mb"]
    yield Figure("memory of the lab's network after all this", [found], "MB", most=250)


def rest(own: Gateway, when: str) -> Figure:
    before = cpu_ms(own.supervisor)
    time.sleep(IDLE)  # nothing is awaited: this is the interval that is measured
    used = cpu_ms(own.supervisor) - before
    return Figure(f"supervisor, CPU in {IDLE:g} s {when}", [used], "ms", most=1)


def settle(own: Gateway, count: int) -> None:
    """Wait until the gateway has ``count`` workloads, and no trace of others.

    The stock of ready ones has links and elements too, so these are awaited to stay the same.
    """
    deadline = time.monotonic() + PATIENCE
    seen = [traces(own)]
    while seen[-1].workloads != count or len(set(seen[-2:])) != 1 or len(seen) < 2:
        if time.monotonic() > deadline:
            raise NsrunError(f"wait for {count} live workloads", f"there are {seen[-1]}")
        time.sleep(0.02)  # the interval of the poll
        seen.append(traces(own))


def traces(own: Gateway) -> Traces:
    links = run(*own.inside, "ip", "-oneline", "link", "show", "type", "veth")
    sets = run(*own.inside, "nft", "list", "table", "inet", "ttp")
    return Traces(
        workloads=len(own.asked()["workloads"]),
        links=len(re.findall(r"^\d+: w\d+", links, re.MULTILINE)),
        elements=len(re.findall(r'"w\d+" \. ', sets)),
        descriptors=len([*Path(f"/proc/{own.supervisor}/fd").iterdir()]),
    )


def tracked(own: Gateway) -> int:
    """Connections in the gateway's conntrack table, Tor's own among them."""
    return int(run(*own.inside, "sysctl", "-n", "net.netfilter.nf_conntrack_count"))


def kernel_memory() -> float:
    """In MB, of the whole machine: what namespaces, links and tables are made of."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sum(found[key] for key in KERNEL) * 1024 / MEGA
