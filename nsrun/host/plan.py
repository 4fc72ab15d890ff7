"""Decide all that is done to a host: a session in, steps out. Pure.

The rules come first and go last: closed from the first step on, and opened by nothing but the
last. Taking back is these steps' undos from the end, by whoever finds the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nsrun import torrc
from nsrun.host import bridges, session, units
from nsrun.host.policy import HostPolicy
from nsrun.host.rules import render, render_closed, render_lockdown
from nsrun.host.session import Session
from nsrun.host.steps import (
    AddListeners,
    BarUsers,
    CloseHost,
    CoverFile,
    HostStep,
    LeadResolved,
    OwnDirectory,
    StartUnit,
    TorifyHost,
)
from nsrun.steps import MakeDirectory, WriteFile


def policy(made: Session) -> HostPolicy:
    """What the rules let through, but for commands that bypass Tor."""
    spec, facts = made.spec, made.facts
    return HostPolicy(
        tor_uid=facts.tor_uid,
        tor_resolvers=tuple(one.partition("%")[0] for one in facts.tor_resolvers),
        tor_udp=facts.tor_udp,
        trans_port=spec.trans_port,
        dns_port=spec.dns_port,
        automap4=facts.automap4,
        own=spec.own,
        users=facts.only_uids,
        lan=spec.lan,
        ipv6=spec.own == "onion" or (spec.ipv6 and facts.ipv6),  # which is no matter of .onion
        allow_root=spec.allow_root,
        services=facts.services,
        bypass_users=facts.bypass_uids,
        bypass_groups=facts.bypass_gids,
        gateway_for=spec.gateway_for,
    )


def full_rules(made: Session) -> str:
    """The table of a session that is up."""
    exempt = session.BYPASS if has_bypass(made) else ""
    tor = session.TOR_SLICE if _has_slice(made) else ""
    return render(replace(policy(made), bypass_cgroup=exempt, tor_cgroup=tor))


def has_bypass(made: Session) -> bool:
    """Whether commands can be let past Tor: a control group that rules can name, and a reason."""
    return made.facts.cgroups and made.spec.own in ("all", "users")


def _has_slice(made: Session) -> bool:
    """Whether rules can tell our Tor's sockets from those of others."""
    return made.facts.cgroups and not made.spec.external


def locked_rules(made: Session) -> str:
    """The table of a session whose rules somebody has changed: who was caught has no network."""
    return render_closed() if made.spec.own == "all" else render_lockdown(policy(made))


def start_steps(made: Session, helpers: Mapping[str, str]) -> tuple[HostStep, ...]:
    """The host from as it was to behind Tor. ``helpers`` are programs for bridges, by transport."""
    spec, facts, rules = made.spec, made.facts, policy(made)
    closed = render_lockdown(rules)
    return (
        CloseHost(closed),
        *((BarUsers(made.barred),) if made.barred else ()),
        *(
            # before the rules that name it
            (StartUnit(f"{session.UNITS}/{session.BYPASS}", units.bypass()),)
            if has_bypass(made)
            else ()
        ),
        # before Tor, whose helpers may have theirs: a later mount over it would cover that, too
        *(_resolv_conf(made) if rules.own == "all" else ()),
        *(() if spec.external else _own_tor(made, helpers)),
        TorifyHost(full_rules(made), closed, rules),
        *(
            (LeadResolved(session.RESOLVED, units.resolved(spec.dns_port)),)
            if rules.own == "all" and facts.resolved
            else ()
        ),
        *(
            (
                StartUnit(
                    f"{session.UNITS}/{session.WATCHDOG}",
                    units.watchdog(facts.python, spec.interval),
                ),
            )
            if spec.watchdog
            else ()
        ),
    )


def tor_text(made: Session, helpers: Mapping[str, str]) -> str:
    """The torrc of the session."""
    return torrc.render_host(tor_config(made, helpers))


def _resolv_conf(made: Session) -> tuple[HostStep, ...]:
    return (
        WriteFile(session.RESOLV_CONF, units.resolv_conf(), 0o644, 0, 0),
        *((cover(made.facts.network_manager),) if made.facts.resolv_conf else ()),
    )


def cover(manager: bool) -> CoverFile:
    """Ours over the resolver's file of libc."""
    return CoverFile(session.RESOLVER, session.RESOLV_CONF, units.resolv_conf(), manager)


def _own_tor(made: Session, helpers: Mapping[str, str]) -> tuple[HostStep, ...]:
    facts, listeners = made.facts, policy(made).listeners
    owner = facts.tor_uid, facts.tor_gid
    return (
        *((AddListeners(listeners),) if listeners else ()),
        *(
            OwnDirectory(path, 0o700 if path == session.TOR_RUNTIME else 0o755, *owner)
            for path in facts.made
        ),
        MakeDirectory(session.TOR_STATE, 0o700, *owner),
        WriteFile(session.TORRC, tor_text(made, helpers), 0o600, *owner),
        *(
            WriteFile(path, text, 0o644, 0, 0)
            for path, text in units.tor_resolver(facts.tor_resolvers).items()
        ),
        *(
            (StartUnit(f"{session.UNITS}/{session.TOR_SLICE}", units.tor_slice()),)
            if _has_slice(made)
            else ()
        ),
        StartUnit(
            f"{session.UNITS}/{session.TOR_UNIT}",
            units.tor_unit(facts.tor, *owner, resolver=bool(facts.tor_resolvers)),
        ),
    )


def tor_config(made: Session, helpers: Mapping[str, str]) -> torrc.HostTor:
    """What the Tor of the session needs to know."""
    spec, facts, rules = made.spec, made.facts, policy(made)
    lines = spec.bridges
    fragments = (bridges.options(lines, helpers),) if lines else ()
    return torrc.HostTor(
        data=session.TOR_STATE,
        control=session.CONTROL,
        cookie=session.COOKIE,
        trans_port=spec.trans_port,
        dns_port=spec.dns_port,
        automap4=rules.automap4,
        automap6=rules.automap6,
        ipv6=spec.ipv6 and facts.ipv6,
        reaches_ipv6=facts.reaches_ipv6,
        others=rules.listeners,
        socks=session.SOCKS if rules.own in ("onion", "none") else "",  # for nsrun.host.oracle
        fragments=(*fragments, spec.torrc),
    )
