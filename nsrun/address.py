"""Addresses inside a gateway. Pure.

A gateway needs four IPv4 ranges that never leave it: one address per workload link, fresh
addresses for renewed identities and for single connections, and virtual addresses for .onion
names. They only have to differ from the networks the host itself is on, because Tor must reach its
relays beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)

from nsrun.errors import NsrunError

# RFC 4193: unique local, so that no host network is likely to clash
LINKS6 = IPv6Network("fd74:7470:1:1::/64")
IDENTITIES6 = IPv6Network("fd74:7470:1:2::/64")
CONNECTIONS6 = IPv6Network("fd74:7470:1:3::/64")
AUTOMAP6 = IPv6Network("fd74:7470:1:1000::/64")
# not a network of gateways: where the Tor of a whole host listens for others
LISTENER6 = IPv6Address("fd74:7470:1:4::1")


@dataclass(frozen=True)
class AddressBlock:
    """The private ranges of one gateway. Number 1 of ``links`` is the gateway itself.

    ``connections`` is in class E, which is assigned to nobody (RFC 1112, 4): it must be large.
    """

    links: IPv4Network
    identities: IPv4Network
    connections: IPv4Network
    automap: IPv4Network
    links6: IPv6Network = LINKS6
    identities6: IPv6Network = IDENTITIES6
    connections6: IPv6Network = CONNECTIONS6
    automap6: IPv6Network = AUTOMAP6

    @property
    def gateway(self) -> IPv4Address:
        return self.links[1]

    @property
    def gateway6(self) -> IPv6Address:
        return self.links6[1]

    @property
    def capacity(self) -> int:
        """How many links, and how many renewed identities, one run of Tor can give out."""
        return min(self.links.num_addresses, self.identities.num_addresses) - 2

    def link(self, number: int) -> tuple[IPv4Address, IPv6Address]:
        """Addresses of workload ``number`` (from 2): also its first identity, as Tor sees it.

        Raises NsrunError when the range is used up: an address given out twice on a live Tor
        would share the earlier workload's circuits (P7).
        """
        return self._number(number, self.links), self.links6[number]

    def identity(self, number: int) -> tuple[IPv4Address, IPv6Address]:
        """Addresses of the ``number``-th renewed identity (from 1)."""
        return self._number(number, self.identities), self.identities6[number]

    def _number(self, number: int, network: IPv4Network) -> IPv4Address:
        if number > self.capacity:
            raise NsrunError(
                "give out a new identity",
                f"all {self.capacity} of this gateway are used",
                "restart it: ttp gateway down, then ttp gateway up",
            )
        return network[number]


BLOCKS = (
    AddressBlock(
        IPv4Network("10.64.0.0/10"),
        IPv4Network("10.128.0.0/10"),
        IPv4Network("240.0.0.0/5"),
        IPv4Network("10.192.0.0/10"),
    ),
    AddressBlock(
        IPv4Network("100.64.0.0/12"),
        IPv4Network("100.80.0.0/12"),
        IPv4Network("248.0.0.0/5"),
        IPv4Network("100.96.0.0/11"),
    ),
)


def choose_block(host_networks: Iterable[str]) -> AddressBlock:
    """The first block that overlaps none of the host's own networks (as ``10.0.0.0/24``).

    Raises NsrunError when every block clashes.
    """
    taken = [ip_network(text, strict=False) for text in host_networks]
    taken4 = [network for network in taken if isinstance(network, IPv4Network)]
    for block in BLOCKS:
        ours = (block.links, block.identities, block.connections, block.automap)
        if not any(mine.overlaps(theirs) for mine in ours for theirs in taken4):
            return block
    raise NsrunError(
        "choose addresses for the gateway",
        "the host's own networks overlap 10.64.0.0 to 10.255.255.255 or 240.0.0.0/5, "
        "and 100.64.0.0/10 or 248.0.0.0/5",
        "leave one of the two ranges free, or use another machine",
    )
