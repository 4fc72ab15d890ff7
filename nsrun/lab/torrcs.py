"""What every Tor of a lab is told: its torrc. Pure. Source: tor(1), 0.4.9."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsrun.lab.topology import (
    AUTHORITIES,
    DIR_PORT,
    EXITS,
    NODES,
    OR_PORT,
    ORACLES,
    SERVICE,
    SOCKS_PORT,
    WEB,
    Node,
    Role,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Authority:
    """A directory authority as its clients know it; both fingerprints are 40 hex digits."""

    node: Node
    v3ident: str
    fingerprint: str

    def line(self) -> str:
        return (
            f"DirAuthority {self.node.name} orport={OR_PORT} v3ident={self.v3ident}"
            f" {self.node.address}:{DIR_PORT} {self.fingerprint}"
        )


@dataclass(frozen=True)
class FirstVote:
    """When authorities that have no consensus yet make one: every ``interval`` s, at ``offset``."""

    interval: int
    offset: int


def client_torrc(authorities: Sequence[Authority]) -> str:
    """All that a Tor with production defaults needs, to use the lab instead of the real network.

    No TestingTorNetwork: it would, for one, let connections to internal addresses pass.
    """
    return "".join(f"{authority.line()}\n" for authority in authorities)


def node_torrc(
    node: Node, directory: str, authorities: Sequence[Authority], vote: FirstVote | None = None
) -> str:
    """The torrc of a relay; ``directory`` is its DataDirectory."""
    lines = [
        *_relay(node, directory),
        *(authority.line() for authority in authorities),
    ]
    if node.role is Role.AUTHORITY:
        lines += _authority(node, vote)
    if node.role is Role.EXIT:
        lines += _exit(node)
    return "".join(f"{line}\n" for line in lines)


def by_exit(node: Node) -> str:
    """The name by which the onion service's Tor reaches the oracle through one exit."""
    return f"{node.name}.oracle.test"


def service_torrc(directory: str, authorities: Sequence[Authority]) -> str:
    """The onion service, also the client that proves the network; production defaults."""
    lines = (
        f"DataDirectory {directory}",
        "Log notice stdout",
        "Log [rend]info stdout",  # tells when the descriptor is up
        *_frugal(),
        *(authority.line() for authority in authorities),
        f"OutboundBindAddress {SERVICE}",
        f"SocksPort 127.0.0.1:{SOCKS_PORT}",
        *(f"MapAddress {by_exit(node)} {ORACLES[0]}.{node.name}.exit" for node in EXITS),
        f"HiddenServiceDir {directory}/onion",
        f"HiddenServicePort 80 {WEB}:80",
    )
    return "".join(f"{line}\n" for line in lines)


def _frugal() -> tuple[str, ...]:
    return (
        "GeoIPFile /dev/null",  # 7 relays: 677 MB with, 108 MB without GeoIP and worker threads
        "GeoIPv6File /dev/null",
        "NumCPUs 1",
        "ShutdownWaitLength 0",
        "AvoidDiskWrites 1",
    )


def _relay(node: Node, directory: str) -> tuple[str, ...]:
    return (
        "TestingTorNetwork 1",
        f"Nickname {node.name}",
        f"ContactInfo lab {node.name}",
        f"DataDirectory {directory}",
        "Log notice stdout",
        *_frugal(),
        f"Address {node.address}",
        f"Address {node.address6}",
        f"ORPort {node.address}:{OR_PORT} IPv4Only",
        f"ORPort [{node.address6}]:{OR_PORT} IPv6Only",
        f"OutboundBindAddress {node.address}",
        f"OutboundBindAddress [{node.address6}]",
        "AssumeReachable 1",
        "SocksPort 0",
        "PathsNeededToBuildCircuits 0.67",
        "TestingClientMaxIntervalWithoutRequest 1 second",
        # what TestingTorNetwork opens and a lab of public addresses can keep shut
        "EnforceDistinctSubnets 1",
        "ExtendAllowPrivateAddresses 0",
        "ExitPolicyRejectPrivate 1",
        # as on the real network, where onion services count on it (shared random value: a day's
        # 24 consensuses); but valid for a fortnight, so that a bake can be restored
        "V3AuthVotingInterval 3600",
        "V3AuthVoteDelay 20",
        "V3AuthDistDelay 20",
        "V3AuthNIntervalsValid 336",
    )


def _authority(node: Node, vote: FirstVote | None) -> tuple[str, ...]:
    lines = (
        "AuthoritativeDirectory 1",
        "V3AuthoritativeDirectory 1",
        f"DirPort {node.address}:{DIR_PORT} IPv4Only",
        "AuthDirTestReachability 0",  # else the first consensus may list a single relay
        "AuthDirHasIPv6Connectivity 1",
        "TestingDirAuthVoteExit *",
        "TestingDirAuthVoteGuard *",
        "TestingDirAuthVoteHSDir *",
        "TestingMinExitFlagThreshold 0",
        "ExitPolicy reject *:*",
    )
    if vote is None:
        return lines
    return (
        *lines,
        f"TestingV3AuthInitialVotingInterval {vote.interval}",
        "TestingV3AuthInitialVoteDelay 2",
        "TestingV3AuthInitialDistDelay 2",
        f"TestingV3AuthVotingStartOffset {vote.offset}",
    )


def _exit(node: Node) -> tuple[str, ...]:
    return (
        "ExitRelay 1",
        "IPv6Exit 1",
        "ExitPolicy accept *:*",
        f"OutboundBindAddressExit {node.outbound}",
        f"OutboundBindAddressExit [{node.outbound6}]",
        "ServerDNSResolvConfFile /run/lab/resolv.inet",
        "ServerDNSDetectHijacking 0",
        "ServerDNSTestAddresses",
        "ServerDNSAllowBrokenConfig 1",
    )


def fingerprint() -> str:
    """Identifies this topology: a bake of another one is of no use."""
    authorities = tuple(Authority(node, "v3ident", "fingerprint") for node in AUTHORITIES)
    texts = (node_torrc(node, node.name, authorities) for node in NODES)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
