"""Every guard there is to take away or to weaken, read off the plan as it is now.

A mutant is text appended to modules of a copy of the checkout (mutation.py): it wraps what the plan
returns, in every process that imports it. So there is no hook for it in the product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nsrun import plan
from nsrun.address import BLOCKS
from nsrun.host import rules
from nsrun.host.policy import HostPolicy
from nsrun.ruleset import PRIVATE4, PRIVATE6
from nsrun.spec import Caller, GatewaySpec, RunSpec, Strict
from nsrun.steps import AttachNamespace, Ip, LoadRules, SetSysctl, StartTor, Step

PLAN, STEPS, SECCOMP = "nsrun/plan.py", "nsrun/steps.py", "nsrun/seccomp.py"
RULES = "nsrun/host/rules.py"

# Selections of tests, each in the order in which they are quick to notice.
START = ("tests/stories/test_tor_start.py",)
STORIES = tuple(f"tests/stories/test_{name}.py" for name in ("workload", "identity", "closed"))
GUESTS = ("tests/stories/test_guest.py",)
RUN = tuple(f"tests/lab/test_{name}.py" for name in ("escape", "masks", "run"))
STRICT = ("tests/lab/test_strict.py",)
FAILURES = (
    "tests/lab/test_routes.py::test_no_redirect_of_the_network_changes_a_route",
    "tests/lab/test_gateway.py",
    "tests/lab/test_faults.py::test_the_supervisor_dies_and_takes_all_along",
)
AS_ROOT, AS_USER = ("-m", "root or not lab"), ("-m", "lab and not root")


@dataclass(frozen=True)
class Mutant:
    """``patch`` is what is appended, by file. One of the tests ``killers`` must fail."""

    name: str
    patch: dict[str, str]
    killers: tuple[str, ...]


def mutants() -> list[Mutant]:
    """Every one, from what the plan holds now."""
    found = [
        *(*_rules(), *_weaker_rules(), *_private_addresses(), *_policies()),
        *_host_rules(),
        *(*_parameters(), *_links()),
        *(*_operations(), *_weaker_operations(), *_strict_operations()),
        *(*_capabilities(), *_calls(), *_strict_calls(), *_tor()),
    ]
    assert len({one.name for one in found}) == len(found)
    return found


# ---- rules -------------------------------------------------------------------------------------

FACTS = plan.Facts(1, 100, 100, (), True, "", "x86_64")
GATEWAY = GatewaySpec("x", "/run/ttp/gateways/x", "/var/lib/ttp/gateways/x")

# of rules that accept: without one of their conditions
WEAKER = (
    ("what was redirected is asked for", 'iifname "w[*]" ct status dnat', 'iifname "w*"'),
    ("whose source, ipv4", "iifname [.] ip saddr @sources4", "meta nfproto ipv4"),
    ("whose source, ipv6", "iifname [.] ip6 saddr @sources6", "meta nfproto ipv6"),
    ("answers only", "ct state established,related accept", "accept"),
    ("Tor's user", r"meta skuid \d+ ", ""),
    ("TCP of Tor's", r"(meta skuid \d+) meta l4proto tcp", r"\1"),
    ("neighbours in", "icmpv6 type { nd-router-advert[^}]*}", "meta l4proto ipv6-icmp"),
    ("neighbours out", "icmpv6 type { nd-router-solicit[^}]*}", "meta l4proto ipv6-icmp"),
    ("a header of 12 bytes", "udp length < 20", "udp length < 19"),
)


def _rules() -> Iterator[Mutant]:
    for table, chain, why in _found(r'comment "([^"]+)"'):
        line = f'\n[^\n]*comment "{re.escape(why)}"'
        yield _in_table(f"rule {table}, {chain}: {why}", table, chain, line, "")


def _weaker_rules() -> Iterator[Mutant]:
    for why, old, new in WEAKER:
        for table, chain, _ in _found(f"({old})"):
            yield _in_table(f"condition {table}, {chain}: {why}", table, chain, old, new)


def _private_addresses() -> Iterator[Mutant]:
    for network in map(re.escape, (*PRIVATE4, *PRIVATE6)):
        old = f"(?<= ){network}, |, {network}(?= )"
        yield _in_table(f"private: {network}".replace("\\", ""), "full", "catch", old, "")


def _policies() -> Iterator[Mutant]:
    for table, chain, _ in _found("policy (drop);"):
        name = f"policy {table}: {chain}"
        yield _in_table(name, table, chain, "policy drop;", "policy accept;")


def _tables() -> dict[str, str]:
    loads = [step.text for step in _gateway() if isinstance(step, LoadRules)]
    return dict(zip(("closed", "full"), loads, strict=True))


def _found(pattern: str) -> Iterator[tuple[str, str, str]]:
    """Table, chain and what was found, for each place that matches."""
    for table, text in _tables().items():
        chain = ""
        for line in text.splitlines():
            if begins := re.match(r" chain (\S+) {", line):
                chain = begins[1]
            elif match := re.search(pattern, line):
                yield table, chain, match[1]


def _in_table(name: str, table: str, chain: str, old: str, new: str) -> Mutant:
    """Within one chain of the ruleset, ``new`` for what matches ``old``."""
    index = list(_tables()).index(table)
    nth = f"[one for one in steps if isinstance(one, LoadRules)][{index}]"
    text = f"_mutated(step.text, {chain!r}, {old!r}, {new!r})"
    changed = f"tuple(replace(step, text={text}) if step == {nth} else step for step in steps)"
    patch = _wrapped("gateway_steps", changed)
    return Mutant(name, {PLAN: _MUTATED + patch[PLAN]}, STORIES)


_MUTATED = """
def _mutated(text, chain, old, new):
    begin, head, rest = text.partition(f" chain {chain} {{\\n")
    body, tail, end = rest.partition("\\n }\\n")
    changed = re.sub(old, new, body)
    assert changed != body
    return begin + head + changed + tail + end
"""


# ---- rules of the whole host -------------------------------------------------------------------

HOST = HostPolicy(tor_uid=100)
MODES = (
    replace(HOST, allow_root=True, bypass_users=(1,), bypass_groups=(1,), bypass_cgroup="x"),
    replace(HOST, tor_cgroup="x"),
    replace(HOST, ipv6=False, gateway_for=("x",)),
    replace(HOST, own="users", users=(1,)),
    replace(HOST, own="onion"),
    replace(HOST, gateway_for=("x",)),
    replace(HOST, own="none", gateway_for=("x",)),
    replace(HOST, tor_resolvers=("192.0.2.1", "2001:db8::1"), tor_udp=True),
)


def _host_rules() -> Iterator[Mutant]:
    """One form is enough: the others are made from the same values."""
    killers = ("tests/stories/test_host_rules.py", "-k", "not iptables and not firehol")
    found = (
        (chain.name, rule.why)
        for mode in MODES
        for chain in rules.chains(mode)
        for rule in chain.rules
    )
    for name, why in dict.fromkeys(found):
        left = f"(one.name, rule.why) != ({name!r}, {why!r})"
        text = f"""
_chains = chains
def chains(policy):
    return tuple(
        replace(one, rules=tuple(rule for rule in one.rules if {left}))
        for one in _chains(policy)
    )
"""
        yield Mutant(f"host rule {name}: {why}", {RULES: text}, killers)


# ---- kernel parameters and links ---------------------------------------------------------------


def _gateway() -> tuple[Step, ...]:
    return plan.gateway_steps(GATEWAY, FACTS, BLOCKS[0])


def _workload(own: AttachNamespace | None = None) -> tuple[Step, ...]:
    return plan.workload_steps(plan.Workload(BLOCKS[0], 2), own)


# Depth that no packet can show: a redirect is believed from the next hop of a route, and those over
# the links have none.
UNSEEN = ("net.ipv4.conf.w2.accept_redirects", "net.ipv6.conf.w2.accept_redirects")


def _parameters() -> Iterator[Mutant]:
    """Each as the kernel has it by default, or, where that is the same, as it must not be."""
    default = {"net.ipv4.icmp_ratemask": "6168", "net.ipv6.icmp.ratelimit": "1000"}
    guest = AttachNamespace("workload", 1, 1)
    options = plan.option_steps(plan.Workload(BLOCKS[0], 2), RunSpec(("true",), ipv6=False))
    mine = set(_workload())
    for maker, steps, killers in (
        ("gateway_steps", _gateway(), (*STORIES, *FAILURES, *AS_ROOT)),
        ("workload_steps", _workload(), STORIES),
        ("workload_steps", [one for one in _workload(guest) if one not in mine], GUESTS),
        ("option_steps", options, (*RUN, *AS_USER)),
    ):
        for step in steps:
            if isinstance(step, SetSysctl) and step.key not in UNSEEN:
                key, other = step.key, default.get(step.key, {"0": "1", "1": "0"}[step.value])
                same = f"re.sub('[.]w[0-9]+[.]', '.w2.', getattr(step, 'key', '')) == {key!r}"
                change = f"replace(step, value={other!r}) if {same}"
                changed = f"tuple({change} else step for step in steps)"
                name = f"parameter {key}={step.value}"
                yield Mutant(name, _wrapped(maker, changed), killers)


def _links() -> Iterator[Mutant]:
    """What keeps a link from resolving, and from having addresses of the kernel's choice."""
    for step in _workload():
        for command in step.commands if isinstance(step, Ip) else ():
            if match := re.search(r" (?:arp off|addrgenmode none)", command):
                less = command.replace(match[0], "").replace(" up", " up")
                lines = f"tuple({less!r} if one == {command!r} else one for one in step.commands)"
                if less == command.partition(" addrgenmode")[0]:
                    lines = f"tuple(one for one in step.commands if one != {command!r})"
                change = f"replace(step, commands={lines}) if isinstance(step, Ip) else step"
                changed = f"tuple({change} for step in steps)"
                yield Mutant(f"link: {command}", _wrapped("workload_steps", changed), STORIES)


# ---- what the client does before it becomes the command ------------------------------------------

USER = Caller(1000, 1000, (1000,), "/tmp/bus", "/tmp/session", own=("/own",))
ROOT = Caller(0, 0, (0,))
ANOTHER = Caller(1000, 1000, (1000,), switched=True)
CALLERS = (
    ("root", ROOT, False, (*RUN, *AS_ROOT)),
    ("user", USER, True, (*RUN, *AS_USER)),
    ("root to another", ANOTHER, False, (*RUN, *STRICT, *AS_ROOT)),
)


def _operations() -> Iterator[Mutant]:
    """Without one of them, whoever calls: the tests are those of the first whose plan has it."""
    seen = {"hide"}  # several, of which some hide what is hidden with /run already
    for who, caller, nested, killers in CALLERS:
        for op in _enter(caller, nested):
            if _title(op) not in seen:
                seen.add(_title(op))
                yield Mutant(f"enter, {who}: {_title(op)}", _without(op), killers)


def _weaker_operations() -> Iterator[Mutant]:
    kept = ("systemd", "nscd", "dbus", "docker.sock", "avahi-daemon")
    for entry in kept:
        change = f"(op[0], [*op[1], {entry!r}], *op[2:]) if op[0] == 'hide_run' else op"
        yield Mutant(
            f"enter: hide_run keeps {entry}",
            _wrapped("enter_ops", f"tuple({change} for op in steps)"),
            (*RUN, *AS_ROOT),
        )
    session = "(op[0], op[1], '', *op[3:]) if op[0] == 'hide_run' else op"
    yield Mutant(
        "enter: hide_run keeps the session",
        _wrapped("enter_ops", f"tuple({session} for op in steps)"),
        (*RUN, *AS_USER),
    )
    for file in ("resolv.conf", "nsswitch.conf"):
        less = f"{{k: v for k, v in op[1].items() if k != {file!r}}}"
        change = f"(op[0], {less}, op[2]) if op[0] == 'replace_etc' else op"
        yield Mutant(
            f"enter: replace_etc without {file}",
            _wrapped("enter_ops", f"tuple({change} for op in steps)"),
            (*RUN, *AS_USER),
        )
    change = "tuple(op for op in steps if op[0] != 'hide' or op[1] != given[3].bus)"
    yield Mutant("enter: hide the bus", _wrapped("enter_ops", change), (*RUN, *AS_USER))
    change = "(*op[:2], False) if op[0] == 'replace_etc' else op"
    yield Mutant(
        "enter, user: replace_etc covers files only",
        _wrapped("enter_ops", f"tuple({change} for op in steps)"),
        (*RUN, *AS_USER),
    )


def _strict_operations() -> Iterator[Mutant]:
    plain = {op[0] for op in _enter(ROOT, False)}
    plain.add("new_queues")  # it does nothing on a machine without /dev/mqueue
    for op in _enter(ROOT, False, Strict(("/x",))):
        if op[0] not in plain:
            yield Mutant(f"enter, strict: {op[0]}", _without(op), (*STRICT, *AS_ROOT))


def _enter(caller: Caller, nested: bool, strict: Strict | None = None) -> tuple[plan.Op, ...]:
    spec = RunSpec(("true",), strict=strict)
    return plan.enter_ops(GATEWAY, FACTS, BLOCKS[0], caller, nested, spec)


def _title(op: plan.Op) -> str:
    return f"{op[0]} {op[1]}" if op[0] == "read_only" else str(op[0])


def _without(op: plan.Op) -> dict[str, str]:
    """No operation with this verb; with read_only, none of this path."""
    same = f"op[0] == {op[0]!r}" + (f" and op[1] == {op[1]!r}" if op[0] == "read_only" else "")
    return _wrapped("enter_ops", f"tuple(op for op in steps if not ({same}))")


def _capabilities() -> Iterator[Mutant]:
    """Root's command keeps one more."""
    for name, number in (
        *(("NET_ADMIN", 12), ("NET_RAW", 13), ("SYS_MODULE", 16), ("SYS_RAWIO", 17)),
        *(("SYS_PTRACE", 19), ("SYS_ADMIN", 21), ("SYS_BOOT", 22), ("MKNOD", 27)),
        *(("PERFMON", 38), ("BPF", 39)),
    ):
        patch = {
            "nsrun/linux.py": f"CAPABILITIES[{name!r}] = {number}\n",
            PLAN: f"ROOT_KEEPS += ({name!r},)\n",
        }
        yield Mutant(f"capability kept: {name}", patch, (*RUN, *AS_ROOT))


# ---- system calls ------------------------------------------------------------------------------


def _calls() -> Iterator[Mutant]:
    for index, name in enumerate(("ioctl", "socket", "io_uring_setup", "request_key"), 1):
        never = f"tuple(9999 if i == {index} else number for i, number in enumerate(calls))"
        text = f"CALLS = {{k: tuple({never} for calls in found) for k, found in CALLS.items()}}\n"
        yield Mutant(f"call let through: {name}", {SECCOMP: text}, (*RUN, *AS_ROOT))


def _strict_calls() -> Iterator[Mutant]:
    changes = {
        "connect": "_NOTIFY = _ALLOW",
        "another architecture": "_KILL = _ALLOW",
        "Unix datagram sockets": "def _no_datagrams(number): return []",
    }
    for name, text in changes.items():
        yield Mutant(f"strict call let through: {name}", {SECCOMP: f"{text}\n"}, STRICT + AS_ROOT)


def _tor() -> Iterator[Mutant]:
    """Of how Tor is started: each option of setpriv(1)."""
    (start,) = (step for step in _gateway() if isinstance(step, StartTor))
    for option in start.command():
        if option.startswith(("--inh-caps", "--bounding", "--no-new", "--pdeath")):
            text = (
                "_command = StartTor.command\n"
                f"StartTor.command = lambda self: tuple(one for one in _command(self)"
                f" if one != {option!r})\n"
            )
            yield Mutant(f"tor: {option}", {STEPS: text}, (*START, *FAILURES, *AS_ROOT))


def _wrapped(function: str, changed: str) -> dict[str, str]:
    """``function`` of the plan returns ``changed``, an expression over its ``steps``."""
    text = f"""
from dataclasses import replace
_{function} = {function}
def {function}(*given, **named):
    steps = _{function}(*given, **named)
    return {changed}
"""
    return {PLAN: text}
