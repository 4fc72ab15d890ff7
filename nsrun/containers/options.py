"""A ``docker run`` line: what it asks for, and what it may not ask for behind Tor. Pure.

Each option is known by name, and whether it takes a value, or the image could not be told from a
value. One that is not known is refused: it may be newer than this table, and open something.
Sources: docker-run(1) of 20.10 to 28; capabilities(7); pflag, which docker parses by.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nsrun.errors import UsageError
from nsrun.spec import ROOT_KEEPS

_FLAGS = """
detach disable-content-trust init interactive no-healthcheck oom-kill-disable privileged
publish-all quiet read-only rm sig-proxy tty use-api-socket
"""
_VALUES = """
add-host annotation attach blkio-weight blkio-weight-device cap-add cap-drop cgroup-parent
cgroupns cidfile cpu-count cpu-percent cpu-period cpu-quota cpu-rt-period cpu-rt-runtime
cpu-shares cpus cpuset-cpus cpuset-mems detach-keys device device-cgroup-rule device-read-bps
device-read-iops device-write-bps device-write-iops dns dns-opt dns-option dns-search domainname
entrypoint env env-file expose gpus group-add health-cmd health-interval health-retries
health-start-interval health-start-period health-timeout hostname io-maxbandwidth io-maxiops ip
ip6 ipc isolation kernel-memory label label-file link link-local-ip log-driver log-opt
mac-address memory memory-reservation memory-swap memory-swappiness mount name net net-alias
network network-alias oom-score-adj pid pids-limit platform publish pull restart runtime
security-opt shm-size stop-signal stop-timeout storage-opt sysctl tmpfs ulimit user userns uts
volume volume-driver volumes-from workdir
"""
FLAGS, VALUES = frozenset(_FLAGS.split()), frozenset(_VALUES.split())
SHORT = {
    "a": "attach",
    "c": "cpu-shares",
    "d": "detach",
    "e": "env",
    "h": "hostname",
    "i": "interactive",
    "l": "label",
    "m": "memory",
    "p": "publish",
    "P": "publish-all",
    "q": "quiet",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}

#: Of Docker's default capabilities all but NET_RAW, and what root's commands keep.
CAPABILITIES = {
    *ROOT_KEEPS,
    *("FOWNER", "MKNOD", "SETFCAP", "SETPCAP", "SYS_CHROOT", "IPC_LOCK", "WAKE_ALARM"),
}
#: Drivers that write on this machine; the others have the daemon send what a container prints.
LOG_DRIVERS = ("json-file", "local", "journald", "none")
DEVICES = ("/dev/dri", "/dev/snd", "/dev/kvm", "/dev/fuse", "/dev/nvidia", "/dev/kfd")
_NVIDIA = re.compile(r"/dev/nvidia(\d+|ctl|-uvm|-uvm-tools|-modeset)")
#: What ``--mount`` makes of this machine; docker takes them in any case.
MOUNTS = ("bind", "volume", "tmpfs", "image")

_NETWORK = "its network is what ttp sets up"
_SERVER = "nobody can connect to a container behind Tor"
REFUSED = {
    **dict.fromkeys(("network", "network-alias", "link", "link-local-ip"), _NETWORK),
    **dict.fromkeys(("ip", "ip6", "mac-address"), _NETWORK),
    **dict.fromkeys(("dns", "dns-option", "dns-search"), "names are looked up by Tor (P2)"),
    **dict.fromkeys(("publish", "publish-all", "expose"), _SERVER),
    "privileged": "it could change its own network, and the host's (P10)",
    "use-api-socket": "the daemon outside would connect for it (P6)",
    "device-cgroup-rule": "it could make any device, disks among them (P10)",
    "runtime": "another runtime may make another network (P3)",
    "userns": "it would have power over the network of its holder (P10)",
    "volumes-from": "they may lead to sockets of the host; mount what you need (P6)",
}
#: Options of ``ttp run`` that docker has no word for: why not, and what to do.
OF_COMMANDS = {
    "strict": ("Docker confines it", "ttp docker run -- --read-only --user … IMAGE"),
    "allow-socket": ("Docker confines it", "ttp docker run -- --volume … IMAGE"),
    "timeout": ("it is docker's to end a container", "docker stop, or timeout(1) in it"),
    "json-status-fd": ("docker tells what runs", "docker inspect, or ttp docker ps --json"),
}


@dataclass(frozen=True)
class Wanted:
    """What a line asks for. ``kept`` are the options that docker is given as they are.

    ``binds`` are paths of the host that it mounts, ``volumes`` names of volumes. Names of the host
    and of others, which belong to a network, are not for the container itself: ``hostname``,
    ``domainname``, ``hosts``.
    """

    kept: tuple[str, ...]
    image: str
    command: tuple[str, ...]
    name: str = ""
    hostname: str = ""
    domainname: str = ""
    hosts: tuple[str, ...] = ()
    binds: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    pull: str = ""
    log_driver: str = ""


def parse(words: list[str]) -> Wanted:
    """What the words after ``docker run`` ask for. Raises UsageError with the option and why."""
    left = list(words)
    found = list(_options(left))
    if not left or not left[0]:
        raise UsageError(
            "run a container", "no image is given", "ttp docker run -- [OPTIONS] IMAGE"
        )
    for name, value, _ in found:
        if why := _refusal(name, value):
            raise UsageError(f"run a container with --{name}", why)
    ours = {"hostname", "domainname", "add-host", "pull"}
    last = {name: value for name, value, _ in found}
    mounts = [_source(name, value) for name, value, _ in found if name in ("volume", "mount")]
    sources = [source for source in mounts if source]
    return Wanted(
        tuple(word for name, _, said in found if name not in ours for word in said),
        left[0],
        tuple(left[1:]),
        last.get("name", ""),
        last.get("hostname", ""),
        last.get("domainname", ""),
        tuple(value for name, value, _ in found if name == "add-host"),
        tuple(source for source in sources if _is_path(source)),
        tuple(source for source in sources if not _is_path(source)),
        last.get("pull", ""),
        last.get("log-driver", ""),
    )


def misplaced(option: str) -> tuple[str, str]:
    """Why an option is none of ttp's, before ``--``, and what to do; empty if it is a mistake."""
    name = SHORT.get(option.lstrip("-"), option.removeprefix("--"))
    if name in FLAGS | VALUES:
        return "it is docker's, whose options stand after --", f"ttp docker run -- {option} … IMAGE"
    return OF_COMMANDS.get(name, ("", ""))


def check_made(limits: dict[str, Any], runtime: str) -> None:
    """The same of a container that is there already, by its HostConfig. Raises UsageError.

    ``runtime`` is the daemon's default.
    """
    asked = [("pid", limits["PidMode"]), ("ipc", limits["IpcMode"] or "private")]
    asked += [("cap-add", one) for one in limits["CapAdd"] or ()]
    asked += [("security-opt", one) for one in limits["SecurityOpt"] or ()]
    asked += [("device", one["PathOnHost"]) for one in limits["Devices"] or ()]
    asked += [("log-driver", limits["LogConfig"]["Type"])]
    asked += [("privileged", "true")] if limits["Privileged"] else []
    asked += [("device-cgroup-rule", one) for one in limits.get("DeviceCgroupRules") or ()]
    asked += [("volumes-from", one) for one in limits.get("VolumesFrom") or ()]
    asked += [("sysctl", one) for one in limits.get("Sysctls") or ()]
    asked += [("volume-driver", limits.get("VolumeDriver") or "local")]
    asked += [("userns", limits["UsernsMode"])] if limits.get("UsernsMode") else []
    if limits.get("Runtime", runtime) not in ("", runtime):
        asked.append(("runtime", limits["Runtime"]))
    for name, value in asked:
        if why := _refusal(name, value):
            raise UsageError(f"use a container with --{name}", why)


Option = tuple[str, str, tuple[str, ...]]  # name, value, and the words it was said by


def _options(left: list[str]) -> Iterator[Option]:
    """Take the options off the front of ``left``, as pflag does: up to the image, or ``--``."""
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            return
        if word.startswith("--"):
            yield _long(word, left)
        else:
            yield from _cluster(word, left)


def _long(word: str, left: list[str]) -> Option:
    name, equals, value = word[2:].partition("=")
    if name in FLAGS:
        return name, value or "true", (word,)
    if name not in VALUES:
        cause = "ttp does not know this option, nor what it may open"
        raise UsageError(f"run a container with --{name}", cause)
    said = {"net": "network", "net-alias": "network-alias", "dns-opt": "dns-option"}.get(name, name)
    if equals:
        return said, value, (word,)
    value = _next(f"--{name}", left)
    return said, value, (word, value)


def _cluster(word: str, left: list[str]) -> Iterator[Option]:
    """``-it``, ``-v/a:/b``, ``-e A=B``, ``-itv /a:/b``: flags, then at most one with a value."""
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in SHORT:
            cause = "ttp does not know this option, nor what it may open"
            raise UsageError(f"run a container with -{letter}", cause)
        name = SHORT[letter]
        if name not in FLAGS:
            value = letters.removeprefix("=") or _next(f"-{letter}", left)
            yield name, value, (f"-{letter}", value)
            return
        if letters.startswith("="):
            yield name, letters[1:], (f"-{letter}{letters}",)
            return
        yield name, "true", (f"-{letter}",)


def _next(option: str, left: list[str]) -> str:
    if not left:
        raise UsageError(f"run a container with {option}", "it needs a value")
    return left.pop(0)


def _refusal(name: str, value: str) -> str:
    """Why an option with this value may not be; empty if it may."""
    if name in FLAGS and value.lower() in ("0", "f", "false"):
        return ""
    if name in REFUSED:
        return REFUSED[name]
    return _BY_VALUE[name](value) if name in _BY_VALUE else ""


def _capability(value: str) -> str:
    wanted = value.upper().removeprefix("CAP_")
    return "" if wanted in CAPABILITIES else f"{wanted} is power over the network or the host (P10)"


def _process_space(value: str) -> str:
    shared = value not in ("", "private")
    return "what it could look into there may have another network (P10)" if shared else ""


def _memory_space(value: str) -> str:
    shared = value == "host" or value.startswith("container:")
    return "it would share memory with what is outside (P6)" if shared else ""


def _security(value: str) -> str:
    return "it confines the container no more (P10)" if "unconfined" in value else ""


def _device(value: str) -> str:
    path = value.partition(":")[0]
    known = any(path == one or path.startswith(f"{one}/") for one in DEVICES)
    known = (known and ".." not in path.split("/")) or bool(_NVIDIA.fullmatch(path))
    return "" if known else f"{path} may be a way out; known not to be: {' '.join(DEVICES)} (P3)"


def _log_driver(value: str) -> str:
    sends = value not in LOG_DRIVERS
    return "the daemon outside would send what the container prints (P6)" if sends else ""


def _sysctl(value: str) -> str:
    return _NETWORK if value.startswith(("net.", "net/")) else ""


def _volume_driver(value: str) -> str:
    return "" if value == "local" else "its driver outside may connect for it (P6)"


def _mount(value: str) -> str:
    words = _words(value)
    if (kind := words.get("type", "volume").lower()) not in MOUNTS:
        return f"{kind} is none of {', '.join(MOUNTS)} (P6)"
    by_other = words.get("volume-driver", "local") != "local" or "volume-opt" in words
    return "its driver outside may connect for it (P6)" if by_other else ""


def _words(mount: str) -> dict[str, str]:
    """The fields of ``--mount``: one line of CSV, and of each key the last."""
    try:
        fields = next(csv.reader([mount]), [])
    except csv.Error as error:
        raise UsageError("run a container with --mount", error) from error
    pairs = [field.partition("=")[::2] for field in fields]
    return {{"src": "source"}.get(key.lower(), key.lower()): value for key, value in pairs}


def _pull(value: str) -> str:
    return "" if value in ("always", "missing", "never") else "it is always, missing or never"


_BY_VALUE: dict[str, Callable[[str], str]] = {
    "cap-add": _capability,
    "pid": _process_space,
    "ipc": _memory_space,
    "security-opt": _security,
    "device": _device,
    "log-driver": _log_driver,
    "sysctl": _sysctl,
    "volume-driver": _volume_driver,
    "mount": _mount,
    "pull": _pull,
}


def _source(name: str, value: str) -> str:
    """What of the host is mounted: a path, or the name of a volume; empty if it is nothing."""
    if name == "volume":
        source, colon, _ = value.partition(":")
        return source if colon else ""
    words = _words(value)
    kind = words.get("type", "volume").lower()
    return words.get("source", "") if kind in ("bind", "volume") else ""


def _is_path(source: str) -> bool:
    return "/" in source or source.startswith((".", "~"))
