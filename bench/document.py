"""docs/benchmarks.md: the machine, the table, how it was measured; and its plots, as plain SVG."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from figures import Figure, table
from labs import run

PLOTS = {
    "starts": "Start of a command, median",
    "live": "Start of one more, by workloads that live",
    "traffic": "The redirect, in proportion to SOCKS on the same Tor (more is better)",
    "uplinks": "Download by one stream",
    "cpu": "CPU of Tor and uplink for a megabyte",
}
ROW, LEFT, WIDTH, RIGHT = 24, 300, 320, 110  # pixels


def machine() -> list[str]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpus if line.startswith("model name")), "")
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    busy = "otherwise idle" if load < 0.5 else "**not idle**: take times as upper bounds"
    return [
        f"{model or platform.machine()}, {cores} cores, kernel {platform.release()}",
        f"Python {platform.python_version()}, {_words('tor')}, {_words('nft')}",
        f"as {'an unprivileged user' if os.geteuid() else 'root'}, {time.strftime('%Y-%m-%d')}",
        f"load average when it began: {load:.2f}, so the machine was {busy}",
    ]


def _words(program: str) -> str:
    """Name and version, as the program says it."""
    first = run(program, "--version").splitlines()[0]
    return first.partition(" (")[0].replace("version ", "").rstrip(".")


def plots(figures: Sequence[Figure]) -> dict[str, str]:
    """Each plot's SVG, by its name."""
    drawn = {}
    for name, title in PLOTS.items():
        bars = [figure for figure in figures if figure.plot == name]
        if bars:
            drawn[name] = _bars(title, bars)
    return drawn


def _bars(title: str, bars: Sequence[Figure]) -> str:
    """Horizontal bars from zero on, each with its label before it and its value behind it."""
    height = ROW * (len(bars) + 1) + 10
    longest = max(bar.value for bar in bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" '
        f'height="{height}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars, 1):
        top, long = ROW * number + 6, max(1, round(WIDTH * bar.value / longest))
        colour = "#7d4698" if bar.ours else "#9aa5ad"
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{long}" height="{ROW - 8}" fill="{colour}"/>',
            f'<text x="{LEFT + long + 6}" y="{top + 13}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def document(
    about: Sequence[str], figures: Sequence[Figure], drawn: Sequence[str], seconds: float
) -> str:
    missed = [figure.what for figure in figures if "not met" in figure.cells()[-1]]
    lines = "".join(f"- {line}\n" for line in about)
    pictures = "".join(f"![{PLOTS[name]}](benchmarks-{name}.svg)\n\n" for name in drawn)
    return f"""# Benchmarks

Made by `make bench` (`bench/run.py --write`) in {seconds:.0f} s. Times depend on the machine,
and on a busy one so do ratios. All of it ran in a lab, so the network takes no time.

{lines}
{table(figures)}
{f"Not met: {'; '.join(missed)}." if missed else "Every target is met."}

{pictures}How it was measured:

- What is compared was run in turns; ratios and differences are those of one round. The range is
  from the least to the greatest.
- *lab*: from the start of `ttp lab up` to its end, when it has asked an address oracle through
  three relays and been seen as an exit. Memory is the proportional set size of all its programs.
- *start*: on the lab's simulated host, with the lab's authorities. `ttp gateway up` ends when its
  Tor has bootstrapped. *Tor alone* waits a second for the first tick of its clock; a Tor with
  `__OwningControllerProcess` and a control connection, as every gateway has, does not. So only the
  difference to the latter tells what ttp adds: command line, supervisor, uplink, rules.
- *commands*: from before `posix_spawn` to after `waitpid`, without `PYTHON*` variables. The floor
  is the interpreter of ttp in an empty venv: what lies in its site-packages is not its own cost.
  `ttp run` is on a gateway that is up, and keeps a few workloads ready. orjail starts a Tor for
  each command; it is measured where `ORJAIL` names its script and iptables is installed.
- *redirect, SOCKS*: `bench/visitor.py` in a workload with `--socks`, on one Tor, a new workload and
  so a new circuit each time. SOCKS looks names up by Tor's own command RESOLVE. A ratio of
  1 or more says that the redirect is as good.
- *CPU*: of Tor and of the uplink's process, on a CPU; the kernel's own, for veth, is not counted.
- *live*: `ttp run -- sleep` that many times; then the start of one more. Kernel memory is the
  growth of slab (but caches), stacks, page tables, per-CPU memory and vmalloc. The end is from the
  first SIGKILL until the gateway has no workload, link, set element and descriptor but those of
  its stock.
- *starts a second*: one every 20 ms for a minute, late or not.
- *docker run*: by a dockerd of its own on the lab's host, as root, where docker is installed.
  ttp's takes a second container, the holder, whose end is awaited, but not counted. *By the
  driver*: on a network of ttp's driver, which serves on the lab's host.
- *supervisor*: the proportional set size is less when other Python programs share its pages.
"""
