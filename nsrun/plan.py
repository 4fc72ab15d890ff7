"""From what was asked and what was found to what will be done. Pure: no clock, no files, no luck.

A plan has three parts. The supervisor applies ``gateway`` once and ``workload`` for each command;
the client itself carries out ``enter`` and becomes the command. The order is what makes it
safe (docs/theory-of-operation.md): closed rules before there is a link, the full rules before Tor,
Tor before a workload, and a workload's right to speak last of all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from nsrun import ruleset, seccomp, torrc
from nsrun.address import AddressBlock, choose_block
from nsrun.errors import MissingError
from nsrun.spec import ROOT_KEEPS, Caller, GatewaySpec, RunSpec
from nsrun.steps import (
    AddLink,
    AttachNamespace,
    AwaitLink,
    Ip,
    LoadRules,
    MakeDirectory,
    MakeNamespace,
    OpenNamespace,
    SetElements,
    SetSysctl,
    StartRecorder,
    StartTor,
    StartUplink,
    Step,
    WriteFile,
)

LINK_PREFIX = "w"
UPLINK = "uplink"
MTU = 65520  # the largest a pasta or slirp4netns link takes; Tor's CPU per byte falls by 40 %

# Both ends of a link have this address and resolve no other: a NOARP link addresses frames to its
# own address, so no ARP or neighbour discovery is sent, answered or forged.
LINK_MAC = "02:00:00:00:00:01"

# What a program may see of /run. Everything else there is a door to a process outside, which could
# resolve or connect on its behalf (P6): nscd, systemd-resolved, avahi, D-Bus, Docker, Tor itself.
RUN_KEPT = (
    *("lock", "log", "media", "motd.d", "mount", "shm", "sshd", "udev", "utmp"),
    *("booted-system", "current-system", "opengl-driver", "wrappers"),  # NixOS keeps programs here
)
# The same for XDG_RUNTIME_DIR: displays, their keys, and agents that sign but do not connect.
SESSION_KEPT = (
    *("wayland-0", "wayland-1", "wayland-0.lock", "wayland-1.lock", "ICEauthority", "xauth"),
    *("ssh-agent.socket", "keyring"),
)

# What a strict workload sees of /run instead, and what else is its own.
STRICT_RUN_KEPT = RUN_KEPT[RUN_KEPT.index("booted-system") :]
STRICT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  to be mounted over
NEUTRAL_ETC = {
    "hostname": "localhost\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    # that of Whonix and Kicksecure, where every machine has it: what many have tells nothing
    "machine-id": "b08dfa6083e7567a1921a715000001fb\n",
}


@dataclass(frozen=True)
class Facts:
    """What was found on this machine. Made by facts.probe(), the only reader of the outside.

    ``tor_uid`` and ``tor_gid`` are as seen in the user namespace that the supervisor runs in.
    ``networks`` are those the host has an address in. ``nsswitch`` is the host's file.
    ``machine`` is that of uname(2).
    """

    supervisor: int
    tor_uid: int
    tor_gid: int
    networks: tuple[str, ...]
    ipv6: bool
    nsswitch: str
    machine: str


@dataclass(frozen=True)
class Workload:
    """One workload of a gateway, by number: its link, its addresses.

    ``given`` is the IPv4 address that somebody else chose for it. It may have been another one's
    before, and so is not what Tor is to see (P7).
    """

    block: AddressBlock
    number: int
    given: str = ""

    @property
    def link(self) -> str:
        return f"{LINK_PREFIX}{self.number}"

    @property
    def address4(self) -> str:
        return self.given or str(self.block.link(self.number)[0])

    @property
    def address6(self) -> str:
        return str(self.block.link(self.number)[1])


@dataclass(frozen=True)
class Joined:
    """A workload that exists: the inode number of its network namespace, and its processes."""

    network: int
    pids: tuple[int, ...]


Op = tuple[object, ...]


@dataclass(frozen=True)
class Plan:
    gateway: tuple[Step, ...]
    workload: tuple[Step, ...]
    enter: tuple[Op, ...]


def make_plan(
    gateway: GatewaySpec,
    facts: Facts,
    caller: Caller,
    nested: bool,
    spec: RunSpec,
    *,
    guest: int = 0,
) -> Plan:
    """Everything that the first ``ttp run`` on a gateway would do.

    ``guest`` is the process of a user with whom root shares the gateway.
    """
    block = choose_block(facts.networks)
    workload = Workload(block, 2)
    own = AttachNamespace("workload", guest, caller.uid) if guest else None
    return Plan(
        gateway_steps(gateway, facts, block),
        workload_steps(workload, own) + option_steps(workload, spec),
        enter_ops(gateway, facts, block, caller, nested, spec, guest=bool(guest)),
    )


def gateway_steps(spec: GatewaySpec, facts: Facts, block: AddressBlock) -> tuple[Step, ...]:
    """A gateway from nothing. No packet can leave before the last but two steps."""
    policy = ruleset.gateway_policy(block, facts.tor_uid)
    capture = ruleset.FromInterface(LINK_PREFIX, UPLINK)
    tor = f"{spec.runtime}/tor"
    config = torrc.TorConfig(
        block=block,
        data=f"{spec.state}/tor",
        control=f"{tor}/control",
        owner=facts.supervisor,
        ipv6=facts.ipv6,
        fragment=spec.torrc,
    )
    owner = (facts.tor_uid, facts.tor_gid)
    return (
        MakeNamespace("gateway"),
        *(SetSysctl("gateway", key, value) for key, value in _GATEWAY_SYSCTLS),
        LoadRules("gateway", ruleset.render_closed()),
        Ip(
            "gateway",
            (
                "link set lo up",
                f"address add {block.gateway}/32 dev lo",
                f"address add {block.gateway6}/128 dev lo nodad",
                # any route will do: without one, answers to a renewed identity are not routed
                f"route add {block.identities} dev lo",
                f"route add {block.identities6} dev lo",
                f"route add {block.connections} dev lo",
                f"route add {block.connections6} dev lo",
            ),
        ),
        MakeDirectory(f"{spec.state}/tor", 0o700, *owner),
        MakeDirectory(tor, 0o700, *owner),
        WriteFile(f"{tor}/torrc", torrc.render(config), 0o600, *owner),
        StartUplink(spec.uplinks),
        LoadRules("gateway", ruleset.render(policy, capture)),
        StartTor(f"{tor}/torrc", *owner, facts.supervisor),
    )


_GATEWAY_SYSCTLS = (
    # the kill switch: with it off, no packet of a workload is ever forwarded, rules or no rules
    # (a new namespace inherits the host's, which Docker turns on; of IPv6, on some hosts)
    ("net.ipv4.ip_forward", "0"),
    ("net.ipv6.conf.all.forwarding", "0"),
    # else the gateway would tell the uplink's neighbours that it has the links' address
    ("net.ipv4.conf.all.arp_ignore", "1"),
    # errors about Tor's connections come in, as path MTU discovery needs them; redirects are taken
    # for such, too, and a neighbour could lead Tor elsewhere (one of the two is enough for it)
    ("net.ipv4.conf.all.accept_redirects", "0"),
    ("net.ipv4.conf.default.accept_redirects", "0"),
    # refusals are never limited in rate: by default a busy workload gets one a second, and waits
    ("net.ipv4.icmp_ratemask", "0"),
    ("net.ipv6.icmp.ratelimit", "0"),
    # connections of a killed Tor keep the namespace, and workloads' links, for as long as the
    # kernel tries to close them: over a dead uplink about 100 s, thus 1 s
    ("net.ipv4.tcp_orphan_retries", "1"),
)


def workload_steps(
    workload: Workload, own: AttachNamespace | OpenNamespace | None = None
) -> tuple[Step, ...]:
    """A namespace whose only link ends in the gateway: ready to be joined, or somebody's own."""
    add = _add_link("eth0", workload.link)
    made: tuple[Step, ...]
    used: tuple[Step, ...] = ()
    if isinstance(own, OpenNamespace):
        used = (AwaitLink("workload", "eth0"), AwaitLink("gateway", workload.link))  # at once
        made = (
            own,
            AddLink("workload", add, workload.link),
            # an engine may have forbidden IPv6 to every link that comes
            SetSysctl("workload", "net.ipv6.conf.eth0.disable_ipv6", "0"),
            # nothing that would stay when the link goes: no rules
            Ip("workload", _near_end(workload)),
        )
    else:
        made = (
            own or MakeNamespace("workload"),
            Ip("workload", ("link set lo up", add, *_near_end(workload), *_RESOLVERS)),
            SetSysctl("workload", "net.ipv4.conf.eth0.route_localnet", "1"),
        )
    return (*made, *_gateway_end(workload, deaf=own is not None), *used)


def loose_link_steps(workload: Workload, engine: OpenNamespace, link: str) -> tuple[Step, ...]:
    """A link from an engine's namespace, for the engine to move into a container and set up.

    It keeps the address of its link layer, and resolves nothing, wherever it is moved to.
    """
    return (
        engine,
        AddLink(engine.name, _add_link(link, workload.link), workload.link),
        Ip(engine.name, (f"link set {link} addrgenmode none", f"link set {link} arp off")),
        *_gateway_end(workload, deaf=True),
    )


def _add_link(name: str, peer: str) -> str:
    end = f"mtu {MTU} address {LINK_MAC}"
    return f"link add {name} {end} type veth peer name {peer} {end} netns @gateway"


def _near_end(workload: Workload) -> tuple[str, ...]:
    return (
        "link set eth0 addrgenmode none",  # first: going up makes a link-local address
        "link set eth0 arp off up",
        f"address add {workload.address4}/32 dev eth0",
        f"address add {workload.address6}/128 dev eth0",
        "route add 0.0.0.0/0 dev eth0",
        "route add ::/0 dev eth0",
    )


# Resolvers on loopback (127.0.0.53, 127.0.0.11) are the gateway's: a program with such an address
# in an old resolv.conf would otherwise get no answer.
_RESOLVERS = (
    "route add 0.0.0.0/0 dev eth0 table 53",
    "rule add pref 1 lookup local",
    "rule del pref 0",
    "rule add pref 0 to 127.0.0.0/8 ipproto udp dport 53 lookup 53",
)


def _gateway_end(workload: Workload, *, deaf: bool) -> tuple[Step, ...]:
    """The right to speak, last of all. ``deaf`` to neighbours, where others own the other end."""
    link, address4, address6 = workload.link, workload.address4, workload.address6
    return (
        # who owns the other end can send what it likes; the rules drop these, and this is depth
        *(SetSysctl("gateway", f"net.{key}", "0") for key in _deaf(link) if deaf),
        Ip(
            "gateway",
            (
                f"link set {link} addrgenmode none",
                f"link set {link} arp off up",
                f"route add {address4}/32 dev {link}",
                f"route add {address6}/128 dev {link}",
            ),
        ),
        SetElements(
            "gateway",
            ruleset.add_link(link, address4, address6),
            ruleset.remove_link(link, address4, address6),
        ),
    )


def option_steps(workload: Workload, spec: RunSpec, *, plugged: bool = False) -> tuple[Step, ...]:
    """What a workload is given, or denied, that was asked for; before its first process.

    A ``plugged`` one gets no rules, and finds the proxies at the gateway's address.
    """
    steps: list[Step] = []
    if not spec.ipv6:
        steps.append(SetSysctl("workload", "net.ipv6.conf.all.disable_ipv6", "1"))
    if elements := ruleset.link_options(workload.link, spec.isolate, spec.socks):
        add, remove = ruleset.add_elements(elements), ruleset.remove_elements(elements)
        steps.append(SetElements("gateway", add, remove))
    if spec.socks and not plugged:  # by the link, as with resolvers on loopback
        ports = (ruleset.SOCKS_AT, ruleset.HTTP_AT)
        to = "to 127.0.0.1/32 ipproto tcp dport"
        rules = tuple(f"rule add pref 0 {to} {port} lookup 53" for port in ports)
        steps.append(Ip("workload", rules))
    if spec.pcap:
        steps.append(StartRecorder(workload.link, spec.pcap))
    return tuple(steps)


def _deaf(link: str) -> tuple[str, ...]:
    """What lets a neighbour on ``link`` change routes: redirects, router advertisements."""
    return (
        f"ipv4.conf.{link}.accept_redirects",
        f"ipv6.conf.{link}.accept_redirects",
        f"ipv6.conf.{link}.accept_ra",
    )


def enter_ops(
    gateway: GatewaySpec,
    facts: Facts,
    block: AddressBlock,
    caller: Caller,
    nested: bool,
    spec: RunSpec,
    *,
    guest: bool = False,
    joined: Joined | None = None,
) -> tuple[Op, ...]:
    """What the client does to itself before it becomes the command. See nsrun/enter.py.

    ``nested`` says that the gateway's user namespace is not the client's own (rootless, or a
    lab's): the client joins it to get at the network namespace, and makes a user namespace of
    its own inside, so that it has no capability over either.
    ``guest`` says that root shares the gateway with the client's user: the first operation makes
    both namespaces, and the supervisor is told before it plugs a link in.
    ``joined`` is the workload to enter, if it is there already.
    """
    apart, strict = nested or guest, spec.strict
    if strict and facts.machine not in seccomp.STRICT:
        raise MissingError(
            "confine the command strictly",
            f"no filter of system calls is known for {facts.machine}",
            f"leave out --strict; it knows {', '.join(seccomp.STRICT)}",
        )
    ops: list[Op] = [("own_network",)] if guest and not joined else []
    ops.append(("close_all_doors",) if strict else ("close_doors",))
    if joined:
        ops.append(("join_workload", joined.network, list(joined.pids)))
    else:
        ops += [("join_user",)] * nested + [("join_network",)] * (not guest)
    if strict:
        ops.append(("stay_outside",))
    ops.append(("new_mounts",))
    if strict and strict.sockets:
        ops.append(("hold_sockets", list(strict.sockets)))
    ops += _files(gateway, facts, block, caller, apart, spec)
    if caller.uid == 0:
        ops += [("read_only", "/proc/sys"), ("read_only", "/sys")]
    ops.append(("new_user", caller.uid, caller.gid) if apart else ("new_users",))
    if strict:
        many = caller.uid == 0 and not apart
        set_ids = list(seccomp.SET_IDS[facts.machine]) if many else []
        ops.append(("stay_as_init", caller.uid, caller.gid, list(caller.groups), set_ids))
    ops.append(("drop_capabilities", [] if caller.uid else list(ROOT_KEEPS)))
    if caller.switched:
        ops.append(("become", caller.uid, caller.gid, list(caller.groups)))
    ops.append(("no_new_privileges",))
    if strict:
        program, number = seccomp.strict_program(facts.machine), seccomp.STRICT[facts.machine][2]
        ops.append(("filter_connects", program.hex(), number))
    else:
        ops.append(("filter_calls", seccomp.program(facts.machine).hex()))
    return tuple(ops)


def _files(
    gateway: GatewaySpec,
    facts: Facts,
    block: AddressBlock,
    caller: Caller,
    apart: bool,
    spec: RunSpec,
) -> tuple[Op, ...]:
    """What the command sees of the file system, in a mount namespace of its own."""
    owner = (0, 0) if apart else (caller.uid, caller.gid)
    covered = caller.uid != 0
    files = {
        # `search .`: else libc would take the host's own domain and send it to exits
        "resolv.conf": f"nameserver {block.gateway}\nsearch .\n",
        "nsswitch.conf": hosts_by_dns(facts.nsswitch),
    }
    hidden = {_root(gateway.runtime), _root(gateway.state), caller.bus, *caller.own} - {""}
    hide = [("hide", path) for path in sorted(hidden)]
    arrive = ("come_back",) if spec.workdir is None else ("work_in", spec.workdir)
    if spec.strict is None:
        return (
            ("hide_run", list(RUN_KEPT), caller.runtime_dir, list(SESSION_KEPT), *owner),
            *hide,
            ("replace_etc", files, covered),
            ("new_sys",),
            arrive,
        )
    return (
        ("hide_run", list(STRICT_RUN_KEPT), "", [], *owner),
        ("own_directories", list(STRICT_DIRECTORIES), caller.runtime_dir, *owner),
        *hide,
        ("replace_etc", files | NEUTRAL_ETC, covered),
        ("new_proc",),
        ("new_sys_only",),
        ("new_terminals",),
        ("new_queues",),
        ("put_file", "/var/lib/dbus/machine-id", NEUTRAL_ETC["machine-id"]),
        ("be_anonymous",),
        ("show_sockets",),
        arrive,
    )


def _root(directory: str) -> str:
    """ttp's own directory above one gateway's, where those of other gateways are too."""
    path = PurePosixPath(directory)
    return str(path.parents[1] if path.parent.name == "gateways" else path)


def hosts_by_dns(nsswitch: str) -> str:
    """nsswitch.conf(5) with names looked up in /etc/hosts and by DNS, and by nothing else."""
    kept = [line for line in nsswitch.splitlines() if not re.match(r"\s*hosts\s*:", line)]
    return "\n".join([*kept, "hosts: files dns", ""])
