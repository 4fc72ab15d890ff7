"""How tests handle a lab: run commands as its user, on its gateway, and in its namespaces."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT
from nsrun.lab import topology
from nsrun.leak.bench import AMONG_MACHINES, MACHINES, NEIGHBOURS
from nsrun.leak.capture import Tap, tap
from nsrun.leak.verdict import Neighbours, TcpToRelays

TTP = str(ROOT / ".venv" / "bin" / "ttp")
ORACLE = "https://check.torproject.org/api/ip"
PLAIN_ORACLE = "http://check.torproject.org/api/ip"


@dataclass(frozen=True)
class Lab:
    """A lab that is up, and how to run commands as the user it belongs to."""

    name: str
    who: str
    prefix: tuple[str, ...]
    home: Path

    def command(self, *argv: str) -> list[str]:
        return [*self.prefix, *argv]

    def do(
        self,
        *argv: str,
        cwd: Path | None = None,
        seconds: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the lab's user."""
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=seconds, cwd=cwd
        )

    def ttp(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.do(TTP, *argv)

    def run(self, *argv: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """``ttp run`` on the lab's gateway."""
        return self.ttp("run", "--gateway", self.name, *options, "--", *argv)

    def about(self, verb: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """A command about workloads of the lab's gateway."""
        return self.ttp(verb, "-g", self.name, *argv)

    def workload(self, name: str) -> dict[str, Any]:
        """What ``ttp inspect`` tells of a workload."""
        done = self.about("inspect", "--json", name)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def inside(self, place: str, *argv: str) -> list[str]:
        """A command in one of the lab's own namespaces."""
        return self.command(*self.inside_argv(place, *argv))

    def inside_argv(self, place: str, *argv: str) -> tuple[str, ...]:
        return (TTP, "lab", "run", "--lab", self.name, "--in", place, "--", *argv)

    def status(self) -> dict[str, object]:
        found = json.loads(self.ttp("lab", "status", "--json", self.name).stdout)
        assert isinstance(found, list)
        return dict(found[0])

    def gateway(self) -> dict[str, object]:
        return dict(json.loads(self.ttp("gateway", "inspect", self.name).stdout))

    def exits(self) -> set[str]:
        """Every address that traffic may come from when it went through Tor."""
        exits = self.status()["exits"]
        assert isinstance(exits, dict)
        return {address for addresses in exits.values() for address in addresses}

    @contextmanager
    def tap(self, place: str, interface: str) -> Iterator[Tap]:
        file = self.home / f"{place}-{interface}.pcap"
        with tap(interface, file, self.inside(place)) as found:
            yield found

    def rules(self, *ours: str) -> list[TcpToRelays | Neighbours]:
        """What a wire may carry on which a gateway, or its host, has the addresses ``ours``."""
        relays = self.status()["relays"]
        assert isinstance(relays, dict)
        ports = {(a, topology.OR_PORT) for addresses in relays.values() for a in addresses}
        look = Neighbours(frozenset((*ours, *NEIGHBOURS)), frozenset(NEIGHBOURS))
        return [TcpToRelays(frozenset(ours), frozenset(ports)), look, AMONG_MACHINES]

    def neighbours(self, *ours: str) -> Neighbours:
        """The lab's machines and ``ours`` look for each other now and then, whatever is sent."""
        return Neighbours(frozenset((*ours, *MACHINES)), frozenset(NEIGHBOURS))

    @contextmanager
    def other_gateway(
        self, uplink: str, *options: str, stays: bool = True, prefix: Sequence[str] = ()
    ) -> Iterator[str]:
        """A gateway on the simulated host: the lab's authorities, otherwise Tor's defaults."""
        name = f"{self.name}-{uplink[:5]}"
        fragment = self.home / "fragment"
        fragment.write_text(str(self.status()["client_torrc"]))
        fragment.chmod(0o644)
        up = self.do(
            *self.inside_argv("host", *prefix, TTP, "gateway", "up", name, "--uplink", uplink),
            *options,
            *("--torrc", str(fragment), "--bootstrap-timeout", "40"),
        )
        assert up.returncode == 0, up.stderr
        try:
            yield name
        finally:
            down = self.do(*self.inside_argv("host", TTP, "gateway", "down", name))
            assert down.returncode == 0 or not stays, down.stderr
