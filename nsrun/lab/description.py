"""What a lab's holder is told, and what it tells. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """What the holder is told; paths are those outside of the lab, which it cannot work out."""

    name: str
    directory: str  # of this lab, below the runtime directory
    runtime: str
    cache: str
    gateway: str  # runtime directory of the gateway to start; empty for none
    onion: bool  # whether to be ready only when the onion service is
    ca_bundle: str  # the system's certificates, or empty
    started: float  # seconds of the epoch


@dataclass(frozen=True)
class Description:
    """What is true of a running lab from its start to its end."""

    name: str
    pid: int  # of the holder
    since: float  # seconds of the epoch
    boot_seconds: float
    baked: bool  # whether it came from a bake
    gateway: bool
    tor: str  # version
    onion: str
    ca_bundle: str
    exits: dict[str, tuple[str, str]]  # IPv4 and IPv6 address that servers see
    relays: dict[str, tuple[str, str]]  # IPv4 and IPv6 address of the ORPort
    or_port: int
    client_torrc: str
    wires: dict[str, tuple[str, str]]  # where to capture: namespace and interface
    programs: dict[str, int]  # process ids
