"""Gateways, and clients, that leak, each as some program in this field does or did. Pure.

The battery must turn red on every one of them: that is the proof that it can. ``open`` has no
guard at all, and is what a probe's control is made in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from nsrun.ruleset import DNS_PORT, TRANS_PORT
from nsrun.steps import LoadRules, SetSysctl, StartTor, Step

FORWARDING = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")


@dataclass(frozen=True)
class Defect:
    """``rules`` replace those of the gateway; ``caught`` are probes that must be found leaking."""

    name: str
    title: str
    rules: str
    caught: tuple[str, ...]
    forwards: bool = True

    def breaks(self, steps: Iterable[Step]) -> list[Step]:
        """A gateway's steps with this defect, without Tor: what leaks does not need it."""
        made: list[Step] = []
        for step in steps:
            match step:
                case LoadRules("gateway") | StartTor():
                    continue
                case SetSysctl("gateway", key) if key in FORWARDING and self.forwards:
                    made.append(replace(step, value="1"))
                case _:
                    made.append(step)
        return [*made, LoadRules("gateway", self.rules)]


Op = list[Any]


@dataclass(frozen=True)
class Careless:
    """A defect of how a command is entered: operations (nsrun/enter.py) left out, or done by half.

    ``caught`` are probes that must be found leaking.
    """

    name: str
    title: str
    caught: tuple[str, ...]
    without: frozenset[str] = frozenset()
    """Verbs of operations that are left out."""
    shown: tuple[str, ...] = ()
    """Entries of /run that are not hidden."""

    def changes(self, ops: Iterable[Op]) -> list[Op]:
        """What is done instead of ``ops``."""
        made = []
        for verb, *arguments in ops:
            if verb == "hide_run":
                kept, *rest = arguments
                made.append([verb, [*kept, *self.shown], *rest])
            elif verb not in self.without:
                made.append([verb, *arguments])
        return made


@dataclass(frozen=True)
class Confused:
    """The gateway takes two workloads for one."""

    name: str
    title: str
    caught: tuple[str, ...]


MASQUERADE = """ chain leave {
  type nat hook postrouting priority 100; policy accept;
  oifname "uplink" masquerade
 }
"""


def _table(*chains: str) -> str:
    return "table inet broken {\n" + "".join(chains) + MASQUERADE + "}\n"


def _nat(*rules: str) -> str:
    body = "".join(f"  {rule}\n" for rule in rules)
    return f" chain catch {{\n  type nat hook prerouting priority -100; policy accept;\n{body} }}\n"


def _filter(hook: str, policy: str, *rules: str) -> str:
    body = "".join(f"  {rule}\n" for rule in rules)
    head = f"type filter hook {hook} priority 0; policy {policy};"
    return f" chain {hook} {{\n  {head}\n{body} }}\n"


_PORT_53 = f"udp dport 53 redirect to :{DNS_PORT}"
_DNS = f'iifname "w*" {_PORT_53}'
_TCP = f'iifname "w*" meta l4proto tcp redirect to :{TRANS_PORT}'
_SYN = f'iifname "w*" tcp flags syn / fin,syn,rst,ack redirect to :{TRANS_PORT}'
_LAN = 'iifname "w*" ip daddr { 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16 } accept'
_TRACKED = "ct state established,related accept"
_V4 = "meta nfproto ipv4"

OPEN = Defect("open", "no guard at all", _table(), ())

DEFECTS = (
    Defect(
        "redirect-only",
        "redirects and nothing else, as jessfraz/onion: what is no TCP SYN and no DNS passes",
        _table(_nat(_DNS, _SYN), _filter("forward", "accept", "meta l4proto udp drop")),
        ("icmp-echo", "ip-gre", "ip-sctp", "tcp-ack", "tcp-fin-ack"),
    ),
    Defect(
        "no-last-rule",
        "no refusal at the end, as tor-router: UDP and ping pass",
        _table(_nat(_DNS, _TCP)),
        ("udp", "udp-quic", "udp-ntp", "icmp-echo", "udp-stun"),
    ),
    Defect(
        "udp-and-icmp",
        "UDP and ICMP refused, policy accept, as nipe: other protocols pass",
        _table(
            _nat(_DNS, _TCP),
            _filter("forward", "accept", "meta l4proto { udp, icmp, ipv6-icmp } reject"),
        ),
        ("ip-gre", "ip-sctp", "ip-esp", "ip-dccp"),
    ),
    Defect(
        "no-ipv6",
        "rules for IPv4 only, as orjail and flungo/tor-router",
        _table(
            _nat(f"{_V4} {_DNS}", f"{_V4} {_TCP}"),
            _filter("forward", "accept", f"{_V4} reject"),
            _filter("input", "accept", f'{_V4} iifname "w*" ct status ! dnat drop'),
        ),
        ("udp6", "udp-quic6", "dns-udp6", "tcp6", "icmp6-echo", "gateway6-ssh"),
    ),
    Defect(
        "lan-bypass",
        "private addresses exempt before DNS, as anonsurf: the LAN sees names and traffic",
        _table(
            _nat(_LAN, _DNS, _TCP),
            _filter("forward", "accept", _TRACKED, "ip daddr != 192.168.0.0/16 reject"),
        ),
        ("dns-lan", "tcp-lan", "udp-lan", "udp-router", "dns-tcp-lan"),
    ),
    Defect(
        "established",
        "what is known or looks like it may pass, as before 2014 (tor-talk 032503)",
        _table(
            _nat(_DNS, _SYN),
            _filter("forward", "drop", _TRACKED, "ct state new tcp flags ! syn accept"),
        ),
        ("tcp-ack", "tcp-psh-ack"),
    ),
    Defect(
        "weak-host",
        "no rule for the gateway's own services: it answers at all of its addresses",
        _table(_nat(_DNS)),
        ("gateway-ssh", "uplink-ssh", "gateway-control", "gateway-udp", "icmp-uplink"),
        forwards=False,
    ),
    Defect(
        "open-ports",
        "SOCKS and control port accepted on every address, as flungo/tor-router",
        _table(
            _nat(_DNS),
            _filter("input", "drop", 'iifname "lo" accept', "tcp dport { 9050, 9051 } accept"),
        ),
        ("gateway-socks", "gateway-control", "uplink-socks"),
        forwards=False,
    ),
    Defect(
        "neighbours",
        "forwarding between links, as on a Docker bridge: workloads reach each other",
        _table(
            _nat(_DNS), _filter("forward", "drop", 'iifname "w*" oifname "w*" accept', _TRACKED)
        ),
        ("neighbour-tcp", "neighbour-udp"),
    ),
    Defect(
        "resolv-conf",
        "resolv.conf alone leads to Tor, as torctl: other resolvers are asked in clear",
        _table(_nat(f'iifname "w*" fib daddr type local {_PORT_53}', _TCP)),
        ("dns-udp", "dns-udp6", "dns-site", "dns-lan", "dns-router"),
    ),
    Defect(
        "flushed",
        "somebody ran nft flush ruleset where forwarding was on",
        "flush ruleset\n",
        ("udp", "tcp", "icmp-echo", "dns-lan"),
    ),
)

USERS = frozenset({"new_user", "new_users"})

CARELESS = (
    Careless(
        "host-sockets",
        "/run left as it is, as oniux and orjail: daemons outside are asked by their sockets",
        ("socket-resolved", "socket-nscd", "socket-dbus", "socket-docker", "socket-systemd"),
        shown=("systemd", "nscd", "avahi-daemon", "dbus", "docker.sock"),
    ),
    Careless(
        "capabilities",
        "capabilities kept, in the namespace's own user namespace: it changes its network",
        (
            *("power-raw", "power-packet", "power-address", "power-rules", "power-sysctl"),
            *("power-mount", "power-setns"),
        ),
        without=USERS | {"drop_capabilities", "read_only"},
    ),
    Careless(
        "same-user",
        "no user namespace of its own: what else this user runs, outside, is looked into",
        ("power-walk",),
        without=USERS,
    ),
    Careless(
        "privileges",
        "no_new_privs and the filter of system calls left out: setuid programs, io_uring",
        ("power-gain", "power-ring", "power-key"),
        without=frozenset({"no_new_privileges", "filter_calls"}),
    ),
)

CONFUSED = Confused(
    "one-identity",
    "one client to Tor for everybody, as jessfraz/onion and anonsurf: circuits are shared",
    ("identity",),
)
