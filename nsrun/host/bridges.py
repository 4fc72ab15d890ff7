"""Bridge lines as people paste them, checked before Tor reads them. Pure.

A line is ``[transport] ADDRESS:PORT [FINGERPRINT] [key=value …]``, with or without the word
``Bridge`` before it (tor(1), Bridge). What has a newline in it would be an option of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

from nsrun.errors import MissingError, UsageError

#: Transport: programs that speak it, any of which will do, and Debian's package of the first.
HELPERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "obfs4": (("obfs4proxy", "lyrebird"), "obfs4proxy"),
    "meek_lite": (("obfs4proxy", "lyrebird"), "obfs4proxy"),
    "webtunnel": (("lyrebird", "webtunnel-client"), "lyrebird"),
    "snowflake": (("snowflake-client",), "snowflake-client"),
}


def lines_of(text: str) -> list[str]:
    """The lines of a bridge file; empty ones and comments are left out."""
    return [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]


def check(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines, without the word Bridge. Raises UsageError, which shows no more than is needed."""
    return tuple(map(_checked, lines))


def transport(line: str) -> str:
    """The transport that a checked line needs; empty if none."""
    first = line.split()[0]
    return first if first in HELPERS else ""


def transports(lines: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return [name for name in dict.fromkeys(map(transport, lines)) if name]


def options(lines: Iterable[str], programs: Mapping[str, str]) -> str:
    """Lines of a torrc. ``programs`` are paths of helpers by transport."""
    lines = tuple(lines)
    plugins = [f"ClientTransportPlugin {t} exec {programs[t]}" for t in transports(lines)]
    return "\n".join(["UseBridges 1", *plugins, *(f"Bridge {line}" for line in lines)])


def missing(name: str) -> MissingError:
    """What to say where no helper of the transport ``name`` is installed."""
    programs, package = HELPERS[name]
    cause = f"none of {', '.join(programs)} is installed"
    return MissingError(f"use a bridge by {name}", cause, f"sudo apt-get install {package}")


def _checked(line: str) -> str:
    doing = "use a bridge line"
    if not line.isprintable():
        raise UsageError(doing, "it has a newline, or something else that cannot be printed")
    words = line.split()
    if words[:1] and words[0].lower() == "bridge":
        words = words[1:]
    rest = words[1:] if words and words[0] in HELPERS else words
    if not rest:
        raise UsageError(doing, "it has no address", "[TRANSPORT] ADDRESS:PORT [FINGERPRINT] …")
    if not _is_endpoint(rest[0]):
        known = ", ".join(HELPERS)
        cause = f"{rest[0]!r} is neither ADDRESS:PORT nor one of {known}"
        raise UsageError(doing, cause, "https://bridges.torproject.org gives them out")
    if len(rest) > 1 and "=" not in rest[1] and not re.fullmatch(r"\$?[0-9A-Fa-f]{40}", rest[1]):
        raise UsageError(doing, f"{rest[1]!r} is no fingerprint: that is 40 hexadecimal digits")
    if rest is words and len(rest) > 2:
        raise UsageError(doing, f"{rest[2]!r} is for a transport, and none is named")
    if stray := [word for word in rest[2:] if "=" not in word]:
        raise UsageError(doing, f"{stray[0]!r} is not KEY=VALUE")
    return " ".join(words)


def _is_endpoint(word: str) -> bool:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", word)
    if found is None or not 0 < int(found[3]) < 65536:
        return False
    try:
        return ip_address(found[1] or found[2]).version == (6 if found[1] else 4)
    except ValueError:
        return False
