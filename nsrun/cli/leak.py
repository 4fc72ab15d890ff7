"""``ttp leaktest``: try every known way around, in a lab, and prove that none leads out."""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsrun.errors import NsrunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsrun.leak.bench import Bench
    from nsrun.leak.probes import Probe
    from nsrun.leak.results import Result
    from nsrun.leak.verdict import Verdict

Wanted = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PROBE]…", help="Only these probes; * stands for anything."),
]
File = Path | None


def leaktest(
    wanted: Wanted = None,
    lab: Annotated[
        str, typer.Option("--lab", envvar="TTP_LAB", help="Name of the lab to test in.")
    ] = "lab",
    defect: Annotated[
        str | None,
        typer.Option("--defect", help="Test a gateway with this defect, which must be found out."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the probes and the defects, and do nothing.")
    ] = False,
    fuzz: Annotated[
        int, typer.Option("--fuzz", min=0, help="Send so many random packets instead of probes.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of random packets; the same makes the same ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    junit: Annotated[
        File, typer.Option("--junit", help="Write JUnit XML to this file.", dir_okay=False)
    ] = None,
    pcap: Annotated[
        File,
        typer.Option("--pcap", help="Write the packets that leaked to this file.", dir_okay=False),
    ] = None,
) -> None:
    """Try every known way around the gateway of a lab; judge every packet on every wire.

    Exit code 0 if all is contained; 1 if anything leaked, or if it could not be proven.
    """
    from nsrun.lab import control
    from nsrun.leak import battery, results
    from nsrun.leak.bench import Bench
    from nsrun.leak.broken import CARELESS, CONFUSED, DEFECTS, Defect
    from nsrun.leak.verdict import Value

    probes = _chosen(wanted or ["*"])
    broken = {one.name: one for one in (*DEFECTS, *CARELESS, CONFUSED)}
    if defect is not None and defect not in broken:
        raise UsageError(f"test the defect {defect}", "there is none", "ttp leaktest --list")
    if list_:
        _list(probes, as_json)
        return
    if fuzz and (wanted or defect or junit):
        cause = "random packets are sent instead of probes, to a gateway without a defect"
        raise UsageError("make probes and --fuzz", cause, "leave out probes, --defect and --junit")
    for file in filter(None, (junit, pcap)):
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UsageError(f"write {file}", "that is not possible there")
    described = control.describe(lab)
    if not described.gateway:
        raise UsageError(f"test in the lab {lab}", "it has no gateway", f"ttp lab up {lab}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ttp-leaktest-") as files:
        bench = Bench(described, program(), Path(files))
        if fuzz:
            _fuzz(bench, fuzz, seed, as_json, pcap)
            return
        match broken.get(defect or ""):
            case None:
                found, verdicts = battery.battery(bench, lab, probes, _say)
            case Defect() as one:
                found, verdicts = battery.defective(bench, lab, one, probes, _say)
            case one:
                found, verdicts = battery.flawed(bench, lab, one, probes, _say)
    seconds = time.monotonic() - began
    print(results.as_json(found, verdicts) if as_json else _table(found, verdicts, seconds))
    _keep(junit, results.as_junit(found).encode())
    _keep(pcap, results.evidence(verdicts))
    if results.worst(found) is not Value.CONTAINED:
        raise typer.Exit(1)


def _fuzz(bench: Bench, count: int, seed: int | None, as_json: bool, pcap: Path | None) -> None:
    from nsrun.leak import fuzzing, results
    from nsrun.leak.verdict import Value, as_text
    from nsrun.leak.verdict import as_json as as_dict

    seed = secrets.randbelow(1 << 32) if seed is None else seed
    found = fuzzing.fuzz(bench, bench.lab.name, seed, count, _say)
    if as_json:
        fields = {name: getattr(found, name) for name in ("value", "seed", "sent", "control")}
        print(json.dumps({**fields, "reason": found.reason, **as_dict(found.verdicts)}, indent=2))
    else:
        print(as_text(found.verdicts))
        print(
            f"{found.value}: {found.sent} random packets, --seed {found.seed}; "
            f"without the guard {found.control} were on the wire"
            + (f"; {found.reason}" if found.reason else "")
        )
    _keep(pcap, results.evidence(found.verdicts))
    if found.value is not Value.CONTAINED:
        raise typer.Exit(1)


def _keep(file: File, content: bytes) -> None:
    """After the verdict has been told: that is not to be lost with a file."""
    try:
        if file is not None:
            file.write_bytes(content)
    except OSError as error:
        raise NsrunError(f"write {file}", error.strerror) from error


def _chosen(wanted: Sequence[str]) -> list[Probe]:
    from nsrun.leak.probes.table import PROBES

    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(probe.name, pattern) for probe in PROBES):
            raise UsageError(f"make the probe {pattern}", "there is none", "ttp leaktest --list")
    return [one for one in PROBES if any(fnmatch.fnmatchcase(one.name, p) for p in wanted)]


def program() -> str:
    """The ``ttp`` that runs now, for the processes that it starts."""
    beside = Path(sys.executable).with_name("ttp")
    return str(beside) if beside.exists() else "ttp"


def _list(probes: Sequence[Probe], as_json: bool) -> None:
    from nsrun.leak.broken import CARELESS, CONFUSED, DEFECTS

    if as_json:
        keys = ("name", "promises", "expect", "title")
        found = {
            "probes": [{key: getattr(one, key) for key in keys} for one in probes],
            "defects": [
                {key: getattr(one, key) for key in ("name", "title")}
                for one in (*DEFECTS, *CARELESS, CONFUSED)
            ],
        }
        print(json.dumps(found, indent=2))
        return
    for probe in probes:
        print(f"{probe.name:<20} {' '.join(probe.promises):<9} {probe.expect:<12} {probe.title}")
    print()
    for defect in (*DEFECTS, *CARELESS, CONFUSED):
        print(f"--defect {defect.name:<16} {defect.title}")


def _table(found: Sequence[Result], verdicts: Sequence[Verdict], seconds: float) -> str:
    from nsrun.leak import results

    rows = [
        (
            one.name,
            " ".join(one.promises),
            str(one.outcome),
            f"seen ({one.control})" if one.control else "not seen",
            str(one.value).upper() if one.reason else str(one.value),
        )
        for one in found
    ]
    heads = ("PROBE", "PROMISE", "SENDER WAS", "CONTROL", "VERDICT")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row, one in zip((heads, *rows), (None, *found), strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if one is not None and one.reason:
            lines += [f"    {one.reason}", *(f"    {line}" for line in one.evidence[:5])]
            if one.guards:
                lines.append(f"    not stopped by: {'; '.join(one.guards)}")
    controls = sum(bool(one.control) for one in found)
    packets = sum(verdict.judged for verdict in verdicts)
    lines.append(
        f"{results.worst(found)}: {len(found)} probes, {controls} controls seen, "
        f"{packets} packets judged on {len(verdicts)} wires, {seconds:.0f} s"
    )
    return "\n".join(lines)


def _say(what: str) -> None:
    print(f"leaktest: {what}", file=sys.stderr, flush=True)
