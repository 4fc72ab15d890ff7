"""A bake: the lab's Tor network in an archive, as it is right after its first consensus.

Tor needs 6 s to agree on a first consensus, whatever the hardware: votes are cast by the clock.
So that is done once, and every lab starts from the archive. Its consensus stays valid for a
fortnight; the authorities of a lab go on from it with a vote at every full hour.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsrun.errors import NsrunError
from nsrun.lab import relays, torrcs
from nsrun.lab.programs import Programs, lock, wait_for
from nsrun.lab.topology import AUTHORITIES, NODES, Role
from nsrun.lab.torrcs import FirstVote

MAX_AGE = 12 * 3600.0  # seconds; relays publish themselves anew after 18 h
INTERVAL = 5  # seconds between attempts at a first consensus
# Seconds from the start of Tor to the first consensus. Relays publish after 1.5 s, votes are cast
# 2 s before. Who comes late waits for the next consensus, an hour: so try again, more patiently.
LEADS = (5.2, 9.2, 19.2)
CONSENSUS = "cached-microdesc-consensus"

Progress = Callable[[int, str], None]


def restore_or_make(cache: Path, programs: Programs, progress: Progress) -> bool:
    """Lay out the data directories of all nodes; return whether they come from a bake.

    Labs that start at the same time wait here for the first of them to bake.
    """
    archive = path(cache)
    with _locked(cache / "lab.lock"):
        if restore(archive):
            return True
        make(programs, progress)
        store(archive)
    return False


def path(cache: Path) -> Path:
    """Of the bake of this topology by the Tor that is installed."""
    return cache / f"lab-{relays.tor_version()}-{torrcs.fingerprint()}.tar.gz"


def restore(archive: Path) -> bool:
    """Unpack a bake; False when there is none that is fresh and whole."""
    try:
        if time.time() - archive.stat().st_mtime > MAX_AGE:
            return False
        shutil.rmtree(relays.NODES_DIRECTORY, ignore_errors=True)
        relays.NODES_DIRECTORY.mkdir()
        subprocess.run(
            ["tar", "-xzf", archive, "-C", relays.NODES_DIRECTORY], check=True, capture_output=True
        )
        relays.read_authorities()
        return _listed(relays.directory(AUTHORITIES[0].name)) == len(NODES)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return False  # absent or damaged: it can be made again


def store(archive: Path) -> None:
    """Write the data directories to ``archive``, at once or not at all; drop bakes gone stale."""
    handle, part = tempfile.mkstemp(prefix="lab-", suffix=".part", dir=archive.parent)
    os.close(handle)
    try:
        subprocess.run(
            ["tar", "-czf", part, "-C", relays.NODES_DIRECTORY, *(node.name for node in NODES)],
            check=True,
            capture_output=True,
        )
        Path(part).replace(archive)
    except subprocess.CalledProcessError as error:
        raise NsrunError("write the bake", error.stderr.decode().strip()) from error
    finally:
        Path(part).unlink(missing_ok=True)
    for old in archive.parent.glob("lab-*"):
        if time.time() - old.stat().st_mtime > MAX_AGE:
            old.unlink()


def make(programs: Programs, progress: Progress) -> None:
    """Run the network until its first consensus, then stop it and share what was agreed on.

    Raises NsrunError when some relay never makes it into the consensus.
    """
    first = relays.directory(AUTHORITIES[0].name)
    for lead in LEADS:
        shutil.rmtree(relays.NODES_DIRECTORY, ignore_errors=True)
        _agree(first, lead, programs, progress)
        programs.stop(*(node.name for node in NODES), seconds=0.5)
        if _listed(first) == len(NODES):
            break
    else:
        raise NsrunError(
            "make a first consensus",
            f"it lists {_listed(first)} of {len(NODES)} relays",
            "try again when the machine has less to do",
        )
    for node in NODES:
        if relays.directory(node.name) != first:
            relays.copy_caches(first, relays.directory(node.name))
        (relays.directory(node.name) / "lock").unlink(missing_ok=True)


def _agree(first: Path, lead: float, programs: Programs, progress: Progress) -> None:
    """Start the network ``lead`` seconds before a vote, and wait for the consensus."""
    progress(2, "making the authorities' keys")
    authorities = relays.make_authorities()
    boundary = math.ceil(time.time() + lead)
    vote = FirstVote(INTERVAL, boundary % INTERVAL)
    progress(10, "starting relays for a first consensus")
    # authorities first: an upload that fails is tried again only after a minute
    relays.start(programs, AUTHORITIES, authorities, vote)
    others = [node for node in NODES if node.role is not Role.AUTHORITY]
    relays.start(programs, others, authorities, vote)
    progress(20, "waiting for the first consensus")
    latest = boundary + 4 * INTERVAL - time.time()
    wait_for((first / CONSENSUS).exists, latest, "the first consensus")
    progress(60, "sharing the consensus")
    copies = relays.compressed_copies()
    with suppress(NsrunError):  # without them all, relays make their own
        wait_for(lambda: _count(first / relays.COPIES) >= copies, 3, "compressed copies")


def _listed(data: Path) -> int:
    """How many relays the consensus lists."""
    text = (data / CONSENSUS).read_text()
    return sum(line.startswith("r ") for line in text.splitlines())


def _count(directory: Path) -> int:
    return sum(1 for _ in directory.glob("*"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with path.open("w") as file:
        wait_for(lambda: lock(file), 90, "the bake of another lab")
        yield
