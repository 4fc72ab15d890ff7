"""Bridge lines as people paste them, checked before Tor reads them. Pure.

A line is ``[transport] ADDRESS:PORT [FINGERPRINT] [key=value …]``, with or without the word
``Bridge`` before it (tor(1), Bridge). What has a newline in it would be an option of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from nsrun.errors import MissingError, UsageError


@dataclass(frozen=True)
class Transport:
    """``programs`` speak it, any of which will do; ``package`` is Debian's of the first.

    ``needs``: keys without which they cannot use a line; of those with ``|`` between, any.
    ``direct``: they connect to the line's address; else it stands for nothing, and they to hosts
    that the line names. ``udp``: not by TCP only.
    """

    programs: tuple[str, ...]
    package: str
    needs: tuple[str, ...]
    direct: bool = False
    udp: bool = False


#: Sources: obfs4-spec, meek's and webtunnel's READMEs, snowflake-client(1).
HELPERS: Mapping[str, Transport] = {
    "obfs4": Transport(
        ("obfs4proxy", "lyrebird"), "obfs4proxy", ("cert|node-id", "iat-mode"), direct=True
    ),
    "meek_lite": Transport(("obfs4proxy", "lyrebird"), "obfs4proxy", ("url",)),
    "webtunnel": Transport(("lyrebird", "webtunnel-client"), "lyrebird", ("url",)),
    "snowflake": Transport(
        ("snowflake-client", "lyrebird"), "snowflake-client", ("url|sqsqueue",), udp=True
    ),
}
#: Keys whose values are, with commas between, hosts, URLs or servers as ``stun:HOST:PORT``.
HOSTS = ("url", "front", "fronts", "ice", "ampcache", "sqsqueue")


def lines_of(text: str) -> list[str]:
    """The lines of a bridge file; empty ones and comments are left out."""
    return [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]


def check(lines: Iterable[str]) -> tuple[str, ...]:
    """The lines, each once, without the word Bridge.

    Raises UsageError, which shows no more than is needed.
    """
    return tuple(dict.fromkeys(map(_checked, lines)))


def transport(line: str) -> str:
    """The transport that a checked line needs; empty if none."""
    first = line.split()[0]
    return first if first in HELPERS else ""


def transports(lines: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return [name for name in dict.fromkeys(map(transport, lines)) if name]


def need_udp(lines: Iterable[str]) -> bool:
    """Whether a helper sends by UDP, and to whom nobody knows beforehand."""
    return any(HELPERS[name].udp for name in transports(lines))


def hosts(line: str) -> list[str]:
    """Whom the keys of a checked line name, by name or address."""
    values = [
        value
        for word in line.split()
        if (key := word.partition("=")[0]) in HOSTS
        for value in word.removeprefix(f"{key}=").split(",")
    ]
    return list(filter(None, map(_host, values)))


def need_names(lines: Iterable[str]) -> bool:
    """Whether a helper has to look up a name before Tor, who would, has a connection."""
    named = (host for line in lines if transport(line) for host in hosts(line))
    return not all(map(_is_address, named))


def direct(lines: Iterable[str]) -> Iterator[str]:
    """Addresses that Tor or a helper connects to, as far as the lines tell them."""
    for line in lines:
        name = transport(line)
        if not name or HELPERS[name].direct:
            yield line.removeprefix(name).split()[0].rpartition(":")[0].strip("[]")


def options(lines: Iterable[str], programs: Mapping[str, str]) -> str:
    """Lines of a torrc. ``programs`` are paths of helpers by transport."""
    lines = tuple(lines)
    plugins = [f"ClientTransportPlugin {t} exec {programs[t]}" for t in transports(lines)]
    return "\n".join(["UseBridges 1", *plugins, *(f"Bridge {line}" for line in lines)])


def missing(name: str) -> MissingError:
    """What to say where no helper of the transport ``name`` is installed."""
    helper = HELPERS[name]
    cause = f"none of {', '.join(helper.programs)} is installed"
    return MissingError(f"use a bridge by {name}", cause, f"sudo apt-get install {helper.package}")


def without_secrets(text: str, torrc: str) -> str:
    """``text`` without what could tell one of the bridges of ``torrc``.

    That is the words of their lines, and what Tor calls a relay: ``$FINGERPRINT~NICKNAME [ID]``.
    """
    secrets = set()
    for line in re.findall(r"^\s*Bridge\s+(.*)", torrc, re.MULTILINE | re.IGNORECASE):
        words = {word for word in line.split() if word not in HELPERS}
        secrets |= words | {word.rpartition(":")[0].strip("[]") for word in words if ":" in word}
        secrets |= {*hosts(line), *(word.lstrip("$").upper() for word in words)}
    for secret in sorted(secrets - {""}, key=len, reverse=True):  # the whole before its parts
        text = text.replace(secret, "…")
    return re.sub(r"'[^']*' \(\w+\): \S+( \[[^]]*\])?|\$[0-9A-F]{40}\S*( \[[^]]*\])?", "…", text)


def _checked(line: str) -> str:
    doing = "use a bridge line"
    if not (line.isprintable() and line.isascii()):
        raise UsageError(doing, "it has a newline, or something else that cannot be printed")
    if sign := re.search(r"[#\\]", line):  # torrc: a comment, and a line that goes on
        raise UsageError(doing, f"it has a {sign[0]}, which Tor takes for the end of the line")
    words = line.split()
    if words[:1] and words[0].lower() == "bridge":
        words = words[1:]
    helper = HELPERS.get(words[0]) if words else None
    rest = words[1:] if helper else words
    if not rest:
        raise UsageError(doing, "it has no address", "[TRANSPORT] ADDRESS:PORT [FINGERPRINT] …")
    if not _is_endpoint(rest[0]):
        known = ", ".join(HELPERS)
        cause = f"{rest[0]!r} is neither ADDRESS:PORT nor one of {known}"
        raise UsageError(doing, cause, "https://bridges.torproject.org gives them out")
    if len(rest) > 1 and "=" not in rest[1] and not re.fullmatch(r"\$?[0-9A-Fa-f]{40}", rest[1]):
        raise UsageError(doing, f"{rest[1]!r} is no fingerprint: that is 40 hexadecimal digits")
    if helper is None and len(rest) > 2:
        raise UsageError(doing, f"{rest[2]!r} is for a transport, and none is named")
    if helper is None and len(rest) > 1 and "=" in rest[1]:
        raise UsageError(doing, f"{rest[1]!r} is for a transport, and none is named")
    if stray := [word for word in rest[2:] if "=" not in word]:
        raise UsageError(doing, f"{stray[0]!r} is not KEY=VALUE")
    keys = {word.partition("=")[0] for word in rest[1:] if word.partition("=")[2]}
    for need in helper.needs if helper else ():
        if keys.isdisjoint(need.split("|")):
            raise UsageError(
                doing, f"{words[0]} needs {need.replace('|', ' or ')}=, and it has none"
            )
    return " ".join(words)


def _is_endpoint(word: str) -> bool:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", word)
    if found is None or not 0 < int(found[3]) < 65536:
        return False
    try:
        return ip_address(found[1] or found[2]).version == (6 if found[1] else 4)
    except ValueError:
        return False


def _host(value: str) -> str:
    """Of ``https://HOST:PORT/…``, ``stun:HOST:PORT``, ``HOST:PORT`` or a host alone."""
    place = re.sub(r"^(\w+://|(stun|turn)s?:)", "", value).partition("/")[0]
    found = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", place)
    return (found[1] or found[2]) if found else place


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
