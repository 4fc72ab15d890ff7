"""Tor's side of the lab: keys of the authorities, the relays, the onion service."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nsrun.errors import MissingError, NsrunError
from nsrun.lab import topology, torrcs
from nsrun.lab.programs import LOGS, RUN, Programs, wait_for
from nsrun.lab.topology import AUTHORITIES, Node, Role
from nsrun.lab.torrcs import Authority, FirstVote

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NODES_DIRECTORY = RUN / "nodes"
SERVICE = "onion"

#: What a Tor keeps of the network's directory; with it, it need not ask before it works.
CACHES = ("cached-certs", "cached-consensus", "cached-microdesc-consensus")
COPIES = "diff-cache"  # making them takes each relay 0.3 s
CACHED_DESCRIPTORS = ("cached-descriptors", "cached-microdescs")


def directory(name: str) -> Path:
    return NODES_DIRECTORY / name


def tor_version() -> str:
    """``0.4.9.11``. Raises MissingError."""
    return _tor_says().split()[2].rstrip(".")


def compressed_copies() -> int:
    """How many compressed copies of a consensus a relay makes: of two flavours, by each method."""
    said = _tor_says()
    return 2 * sum(f"{method} N/A" not in said for method in ("Zlib", "Liblzma", "Libzstd"))


def make_authorities() -> list[Authority]:
    """Make the keys of all authorities, in parallel: RSA of 3072 bits takes a while."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_make_keys, AUTHORITIES))
    return read_authorities()


def read_authorities() -> list[Authority]:
    """Raises OSError or ValueError when the keys on disk are not complete."""
    return [
        Authority(
            node,
            v3ident=_word_after("fingerprint", directory(node.name) / "keys/authority_certificate"),
            fingerprint=_word_after(node.name, directory(node.name) / "fingerprint"),
        )
        for node in AUTHORITIES
    ]


def start(
    programs: Programs,
    nodes: Iterable[Node],
    authorities: Sequence[Authority],
    vote: FirstVote | None,
) -> None:
    """Start relays and wait until they accept connections."""
    nodes = tuple(nodes)
    for node in nodes:
        _start_tor(
            programs,
            node.name,
            torrcs.node_torrc(node, str(directory(node.name)), authorities, vote),
        )
    for node in nodes:
        opened = (
            "Opened Directory listener" if node.role is Role.AUTHORITY else "Opened OR listener"
        )
        await_log(programs, node.name, opened, 10)


def start_service(programs: Programs, authorities: Sequence[Authority]) -> None:
    """Start the onion service, as a client that has seen the network's directory before."""
    own = directory(SERVICE)
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy_caches(directory(AUTHORITIES[0].name), own)
    _start_tor(programs, SERVICE, torrcs.service_torrc(str(own), authorities))


def onion_address() -> str:
    """Name of the onion service, once its Tor has made its keys."""
    hostname = directory(SERVICE) / "onion/hostname"
    wait_for(hostname.exists, 10, "the onion service's keys")
    return hostname.read_text().strip()


def await_onion(programs: Programs, seconds: float) -> None:
    """Wait until every directory that was sent the service's descriptor has it."""

    def published() -> bool:
        programs.check(SERVICE)
        log = (LOGS / f"{SERVICE}.log").read_text(errors="replace")
        sent, stored = log.count("initiated upload request"), log.count("finished with status 200")
        return 0 < sent <= stored

    hint = f"ttp lab logs {SERVICE}"
    wait_for(published, seconds, "the onion service's descriptor to be published", hint=hint)


def await_log(programs: Programs, name: str, words: str, seconds: float) -> None:
    def seen() -> bool:
        programs.check(name)
        return words in (LOGS / f"{name}.log").read_text(errors="replace")

    wait_for(seen, seconds, f"“{words}” from {name}", hint=f"ttp lab logs {name}")


def copy_caches(source: Path, target: Path) -> None:
    """Give one Tor what another one knows of the network."""
    for name in CACHES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    shutil.rmtree(target / COPIES, ignore_errors=True)
    if (source / COPIES).exists():
        shutil.copytree(source / COPIES, target / COPIES)
    for name in CACHED_DESCRIPTORS:
        # Tor appends to a journal, .new, and rewrites the main file now and then
        parts = [part for part in (source / name, source / f"{name}.new") if part.exists()]
        (target / name).write_bytes(b"".join(part.read_bytes() for part in parts))
        (target / f"{name}.new").unlink(missing_ok=True)


def _tor_says() -> str:
    try:
        done = subprocess.run(["tor", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError("run tor", error, "install the package tor") from error
    return done.stdout


def _start_tor(programs: Programs, name: str, torrc: str) -> None:
    directory(name).mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory(name).with_suffix(".torrc")
    path.write_text(torrc)
    # without it, glibc keeps the 20 MB that compressing a consensus took; after each vote
    frugal = ("env", "MALLOC_MMAP_THRESHOLD_=131072")
    programs.start(name, *frugal, "tor", *_defaults(), "-f", path)


def _defaults() -> tuple[str, str | Path]:
    """An empty file: the distribution's defaults are not for the lab."""
    path = RUN / "torrc-defaults"
    path.touch()
    return "--defaults-torrc", path


def _make_keys(node: Node) -> None:
    keys = directory(node.name) / "keys"
    keys.mkdir(mode=0o700, parents=True)
    run = partial(subprocess.run, capture_output=True, text=True)
    made = run(
        (
            *("tor-gencert", "--create-identity-key", "--passphrase-fd", "0", "-m", "12"),
            *("-i", keys / "authority_identity_key"),
            *("-s", keys / "authority_signing_key"),
            *("-c", keys / "authority_certificate"),
            *("-a", f"{node.address}:{topology.DIR_PORT}"),
        ),
        input=f"{secrets.token_hex(16)}\n",  # the identity key is not needed again
    )
    if made.returncode == 0:
        options = ("--orport", "1", "--nickname", node.name, "--datadirectory", keys.parent)
        made = run(
            (
                *("tor", "--list-fingerprint", *options),
                *(*_defaults(), "-f", _defaults()[1]),
            )
        )
    if made.returncode != 0:
        raise NsrunError(
            f"make the keys of {node.name}", made.stderr.strip() or made.stdout.strip()
        )


def _word_after(word: str, path: Path) -> str:
    """The fingerprint on the line of ``path`` that begins with ``word``."""
    for line in path.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if first == word:
            return rest.replace(" ", "")
    raise ValueError(f"{path} has no line {word}")
