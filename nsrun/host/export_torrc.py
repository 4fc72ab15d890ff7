"""What has to be set up beside exported rules: Tor's listeners, and the resolver. Pure.

``ttp start`` does this itself. Source: tor(1), 0.4.9.
"""

from __future__ import annotations

from nsrun.host.policy import HostPolicy
from nsrun.host.steps import AddListeners


def heading(policy: HostPolicy, *, redirecting_to_loopback: bool = False) -> str:
    """Comment lines to stand above the rules, in any of their forms.

    ``redirecting_to_loopback`` is how pf does it; Linux drops packets of others that go there.
    pf cannot tell names of .onion from others, so all have to be asked of Tor.
    """
    hosts = []
    if policy.own != "none" or redirecting_to_loopback:
        hosts += ["127.0.0.1", "[::1]"] if policy.ipv6 else ["127.0.0.1"]
    if not redirecting_to_loopback:
        hosts += [f"[{at}]" if ":" in at else at for at in policy.listeners]
    torrc = [
        f"VirtualAddrNetworkIPv4 {policy.automap4}",
        f"VirtualAddrNetworkIPv6 {_bracketed(policy.automap6)}",
        "AutomapHostsOnResolve 1",
        *(f"TransPort {host}:{policy.trans_port}" for host in hosts),
        *(f"DNSPort {host}:{policy.dns_port}" for host in hosts),
    ]
    lines = ["torrc:", *(f"  {line}" for line in torrc)]
    if policy.own == "all" or (policy.own == "onion" and redirecting_to_loopback):
        lines += ["/etc/resolv.conf:", "  nameserver 127.0.0.1"]
    if policy.listeners and not redirecting_to_loopback:
        add = AddListeners(policy.listeners).describe().splitlines()
        lines += ["before Tor starts:", *(f"  {line}" for line in add)]
    return "".join(f"# {line}\n" for line in lines)


def _bracketed(network: str) -> str:
    address, _, length = network.partition("/")
    return f"[{address}]/{length}"
