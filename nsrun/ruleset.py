"""The nftables ruleset: a policy and a capture point in, the text of whole tables out. Pure.

These are the rules for packets that arrive on a wire we own, a command's or a container's link.
For those that are born in this namespace, the whole host's, nsrun.host.rules has the rules and
this module the words.

Every rule's comment begins with the promise it keeps (docs/threat-model.md), so that
``nft list ruleset`` explains itself and a reader of the kernel's state can check it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from nsrun.address import AddressBlock
from nsrun.spec import Isolation

# Tor's listeners: one for each isolation that Tor does by listener, see torrc.render()
TRANS_PORT, TRANS_PORT_BY_DESTINATION = 9040, 9041
DNS_PORT, DNS_PORT_BY_DESTINATION = 9053, 9054
SOCKS_PORT, SOCKS_PORT_BY_DESTINATION = 9060, 9061
HTTP_PORT, HTTP_PORT_BY_DESTINATION = 9080, 9081

# Where a workload that asked for them finds Tor's proxies: at 127.0.0.1, or if it is a container,
# whose loopback is its own, at the gateway's address; on the ports that programs have as their
# default (tor's own for SOCKS, Privoxy's for HTTP).
SOCKS_AT, HTTP_AT = 9050, 8118

# Reserved and private destinations (IANA special-purpose registries, RFC 6890). Tor would refuse
# them too, but only after it accepted the connection: a refusal here reaches the program at once.
PRIVATE4 = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
)
PRIVATE6 = ("::/127", "::ffff:0.0.0.0/96", "64:ff9b::/96", "fc00::/7", "fe80::/10", "ff00::/8")


@dataclass(frozen=True)
class FromInterface:
    """Packets that arrive on the links named ``prefix``*; Tor itself leaves by ``uplink``."""

    prefix: str
    uplink: str

    @property
    def caught(self) -> str:
        return f'iifname "{self.prefix}*" '


@dataclass(frozen=True)
class Policy:
    """What is let through, and where to: Tor's listeners and the ranges that mean .onion.

    ``gateway`` is its address; ``connections4`` and ``connections6`` are the identities of single
    connections.
    ``tor_uid`` is the user that Tor runs as, in the user namespace that loads the rules.
    """

    trans4: str
    trans6: str
    dns4: str
    dns6: str
    automap4: str
    automap6: str
    tor_uid: int
    table: str = "ttp"
    gateway: str = ""
    connections4: IPv4Network | None = None
    connections6: IPv6Network | None = None


def gateway_policy(block: AddressBlock, tor_uid: int) -> Policy:
    """The policy of a gateway namespace, where Tor listens on the gateway's link address.

    On which port is the link's to say, by the maps of _sets().
    """
    return Policy(
        trans4=f"{block.gateway}:iifname map @trans",
        trans6=f"[{block.gateway6}]:iifname map @trans",
        dns4=f"{block.gateway}:iifname map @dns",
        dns6=f"[{block.gateway6}]:iifname map @dns",
        automap4=str(block.automap),
        automap6=str(block.automap6),
        tor_uid=tor_uid,
        gateway=str(block.gateway),
        connections4=block.connections,
        connections6=block.connections6,
    )


def render(policy: Policy, at: FromInterface) -> str:
    """The whole table, to be loaded by one ``nft -f -``: it replaces an older one in one step.

    Replacing takes the kernel 13 ms; the tables for namespaces that are new are without it.
    """
    chains = (
        chain("catch", "nat", "prerouting priority -100", "accept", _redirects(policy, at)),
        chain("rest", "filter", "prerouting priority -90", "accept", _refusals(at)),
        chain("forward", "filter", "forward priority 0", "drop"),
        chain("sources", "filter", "prerouting priority -300", "accept", _sources(at)),
        chain("identity", "nat", "input priority 100", "accept", _identities(policy)),
        chain("input", "filter", "input priority 0", "drop", _input(at)),
        chain("output", "filter", "output priority 0", "drop", _output(policy, at)),
    )
    return replacing(policy.table, _sets() + "".join(chains))


def render_closed(table: str = "ttp") -> str:
    """The table of a new namespace to start from: not one packet, by loopback neither (P4)."""
    hooks = ("input", "forward", "output")
    return _table(
        table, "".join(chain(hook, "filter", f"{hook} priority 0", "drop") for hook in hooks)
    )


def add_link(name: str, address4: str, address6: str, table: str = "ttp") -> str:
    """Let the link ``name`` speak, and only as these two addresses."""
    return (
        f'add element inet {table} sources4 {{ "{name}" . {address4} }}\n'
        f'add element inet {table} sources6 {{ "{name}" . {address6} }}\n'
    )


def remove_link(name: str, address4: str, address6: str, table: str = "ttp") -> str:
    return (
        f'delete element inet {table} sources4 {{ "{name}" . {address4} }}\n'
        f'delete element inet {table} sources6 {{ "{name}" . {address6} }}\n'
    )


def link_options(name: str, isolate: Isolation, socks: bool) -> tuple[str, ...]:
    """The elements that let the link ``name`` have more than every link has.

    By workload needs none: Tor isolates by address.
    """
    by_destination = isolate == "destination"
    elements = []
    if by_destination:
        elements.append(f'trans {{ "{name}" : {TRANS_PORT_BY_DESTINATION} }}')
        elements.append(f'dns {{ "{name}" : {DNS_PORT_BY_DESTINATION} }}')
    if isolate == "connection":
        elements.append(f'connections {{ "{name}" }}')
    if socks:
        socks_port = SOCKS_PORT_BY_DESTINATION if by_destination else SOCKS_PORT
        http_port = HTTP_PORT_BY_DESTINATION if by_destination else HTTP_PORT
        elements.append(f'proxies {{ "{name}" . {SOCKS_AT} : {socks_port} }}')
        elements.append(f'proxies {{ "{name}" . {HTTP_AT} : {http_port} }}')
    return tuple(elements)


def add_elements(elements: Iterable[str], table: str = "ttp") -> str:
    return "".join(f"add element inet {table} {element}\n" for element in elements)


def remove_elements(elements: Iterable[str], table: str = "ttp") -> str:
    return "".join(f"delete element inet {table} {element}\n" for element in elements)


def set_identity(link: str, identity: str, previous: str | None, table: str = "ttp") -> str:
    """From its next connection on, Tor sees the workload at ``link`` as ``identity`` (P7)."""
    name = "identities6" if ":" in link else "identities4"
    lines = [f"add element inet {table} {name} {{ {link} : {identity} }}\n"]
    if previous is not None:  # one transaction: no connection falls between the two
        lines.insert(0, f"delete element inet {table} {name} {{ {link} : {previous} }}\n")
    return "".join(lines)


def drop_identity(link: str, identity: str, table: str = "ttp") -> str:
    name = "identities6" if ":" in link else "identities4"
    return f"delete element inet {table} {name} {{ {link} : {identity} }}\n"


def outline(text: str) -> tuple[str, ...]:
    """What must survive the way into the kernel and back: chains, hooks, policies and comments.

    Works on rendered text and on the answer of ``nft list table`` alike, so the two can be
    compared (P12). Numbers that nft prints by name (priorities) are left out.
    """
    found = []
    for line in text.splitlines():
        words = line.strip()
        if match := re.match(r"chain (\S+) \{", words):
            found.append(f"chain {match[1]}")
        elif match := re.match(r"type (\S+) hook (\S+) priority [^;]+;(?: policy (\S+);)?", words):
            found.append(f"{match[1]} {match[2]} {match[3]}")
        elif match := re.search(r'comment "([^"]*)"', words):
            found.append(match[1])
    return tuple(found)


def _redirects(policy: Policy, at: FromInterface) -> Iterator[str]:
    """DNS before anything, whatever its address: a resolver on the LAN is a resolver. Then .onion,
    whose virtual addresses are private ones, and proxies, which are looked for on loopback, or at
    the gateway; then private addresses fall through to be refused."""
    port = "iifname . tcp dport map @proxies"
    yield rule(
        "P5 Tor's proxies, for links that asked for them",
        f"{at.caught}ip daddr {{ 127.0.0.1, {policy.gateway} }} meta l4proto tcp "
        f"dnat ip to {policy.gateway}:{port}",
    )
    families = (
        ("ipv4", "ip", policy.dns4, policy.trans4, policy.automap4, PRIVATE4),
        ("ipv6", "ip6", policy.dns6, policy.trans6, policy.automap6, PRIVATE6),
    )
    for name, ip, dns, trans, automap, private in families:
        yield rule(
            f"P2 DNS goes to Tor, {name}",
            f"{at.caught}meta nfproto {name} udp dport 53 dnat {ip} to {dns}",
        )
        yield rule(
            f"P1 .onion goes to Tor, {name}",
            f"{at.caught}{ip} daddr {automap} meta l4proto tcp dnat {ip} to {trans}",
        )
        yield rule(
            f"P5 private addresses are refused below, {name}",
            f"{at.caught}{ip} daddr {{ {', '.join(private)} }} return",
        )
        yield rule(
            f"P1 TCP goes to Tor, {name}",
            f"{at.caught}meta nfproto {name} meta l4proto tcp dnat {ip} to {trans}",
        )


def _refusals(at: FromInterface) -> Iterator[str]:
    """After the redirects: what was not redirected is refused, fast, so that programs fall back.

    That includes packets of a flow that conntrack does not remember, which NAT does not touch:
    FIN, RST and late data of redirected connections leaked so in 2014 (tor-talk 032503), where
    only what was invalid was dropped, and the rest accepted.
    """
    yield rule("P1 P2 what was redirected", f"{at.caught}ct status dnat accept")
    yield rule("P3 other TCP is refused", f"{at.caught}meta l4proto tcp reject with tcp reset")
    yield rule("P3 all else is refused", f"{at.caught}reject with icmpx admin-prohibited")


def _sets() -> str:
    return (
        " set sources4 { type ifname . ipv4_addr; }\n"
        " set sources6 { type ifname . ipv6_addr; }\n"
        " map identities4 { type ipv4_addr : ipv4_addr; }\n"
        " map identities6 { type ipv6_addr : ipv6_addr; }\n"
        # which listener a link's TCP and DNS go to: "*" is every link that has no element
        f" map trans {{ type ifname : inet_service; elements = {{ * : {TRANS_PORT} }}; }}\n"
        f" map dns {{ type ifname : inet_service; elements = {{ * : {DNS_PORT} }}; }}\n"
        " map proxies { type ifname . inet_service : inet_service; }\n"
        " set connections { type ifname; }\n"
    )


def _sources(at: FromInterface) -> Iterator[str]:
    """Before conntrack sees anything: a link speaks only as itself."""
    # Tor 0.4.9 dies of an empty one; 12 bytes is the header of a query (RFC 1035, 4.1.1)
    yield rule("P4 no DNS without a header", f"{at.caught}udp dport 53 udp length < 20 drop")
    itself = "P5 a link speaks only as itself"
    yield rule(f"{itself}, ipv4", f"{at.caught}iifname . ip saddr @sources4 accept")
    yield rule(f"{itself}, ipv6", f"{at.caught}iifname . ip6 saddr @sources6 accept")
    yield rule("P5 no spoofing, no link-local", f"{at.caught}drop")


def _identities(policy: Policy) -> Iterator[str]:
    """Whom Tor sees. A chain of kind nat is asked once for each connection, by its first packet.

    For an identity of its own that packet is given the next number in the place of its source
    address, and conntrack the address that it has then: ``snat to numgen`` would take the number
    in the byte order of the machine (nft 1.0.6). In IPv6 the number fits the last 32 bits only;
    written there, it does not correct the checksum, which a veth's packets do not have yet. One
    that has it fails, and is refused.
    """
    mine = "iifname @connections"
    if policy.connections4 and policy.connections6:
        first, count = int(policy.connections4[1]), policy.connections4.num_addresses - 2
        yield rule(
            "P7 an identity for each connection, ipv4",
            f"{mine} ip saddr set numgen inc mod {count} offset {first} snat ip to ip saddr",
        )
        prefix, number = policy.connections6[0], f"numgen inc mod {2**32 - 2} offset 1"
        yield rule(
            "P7 an identity for each connection, ipv6",
            f"{mine} ip6 saddr set {prefix} @nh,160,32 set {number} snat ip6 to ip6 saddr",
        )
    yield rule("P7 a renewed identity, ipv4", "snat ip to ip saddr map @identities4")
    yield rule("P7 a renewed identity, ipv6", "snat ip6 to ip6 saddr map @identities6")


def _input(at: FromInterface) -> Iterator[str]:
    known = "nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert"
    yield rule("P4 loopback, by interface", 'iifname "lo" accept')
    yield rule("P5 only what was redirected reaches Tor", f"{at.caught}ct status dnat accept")
    yield rule("P4 answers to Tor", f'iifname "{at.uplink}" ct state established,related accept')
    yield rule(
        "P4 neighbours of the uplink", f'iifname "{at.uplink}" icmpv6 type {{ {known} }} accept'
    )


def _output(policy: Policy, at: FromInterface) -> Iterator[str]:
    known = "nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert"
    yield rule("P4 loopback, by interface", 'oifname "lo" accept')
    yield rule("P3 answers and refusals to workloads", f'oifname "{at.prefix}*" accept')
    yield rule(
        "P4 only Tor leaves, only by TCP",
        f'oifname "{at.uplink}" meta skuid {policy.tor_uid} meta l4proto tcp accept',
    )
    yield rule(
        "P4 neighbours of the uplink", f'oifname "{at.uplink}" icmpv6 type {{ {known} }} accept'
    )


def rule(why: str, rule: str) -> str:
    return f'{rule} comment "{why}"'


def chain(name: str, kind: str, hook: str, policy: str, rules: Iterable[str] = ()) -> str:
    lines = [f" chain {name} {{", f"  type {kind} hook {hook}; policy {policy};"]
    return "\n".join([*lines, *(f"  {rule}" for rule in rules), " }", ""])


def _table(name: str, body: str) -> str:
    return f"table inet {name} {{\n{body}}}\n"


def replacing(name: str, body: str) -> str:
    """The table in the place of an older one, if there is one."""
    # `table` first, so that `delete` never fails; nft 1.0.6 knows no `destroy`
    return f"table inet {name}\ndelete table inet {name}\n" + _table(name, body)
