"""``ttp rules``: print the rules of the whole host, for nft and for other packet filters."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from nsrun.errors import UsageError
from nsrun.host import export_firehol, export_iptables, export_lan, export_pf, export_torrc, people
from nsrun.host import rules as host_rules
from nsrun.host.policy import DNS_PORT, TRANS_PORT, HostPolicy, Own

DOING = "print rules"
Format = Literal["nft", "iptables", "firehol", "pf", "pf-rdr", "dnsmasq", "dhcpd", "kea", "radvd"]


def rules(
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="For which filter; pf-rdr: pf before OpenBSD 4.7, FreeBSD. Or for which server, "
            "what tells the hosts at --gateway-for that this machine is their router.",
        ),
    ] = "nft",
    only_user: Annotated[
        list[str] | None,
        typer.Option("--only-user", help="Catch what these users send, and nobody else."),
    ] = None,
    onion_only: Annotated[
        bool,
        typer.Option("--onion-only", help="Catch names and services of .onion, and nothing else."),
    ] = False,
    gateway_for: Annotated[
        list[str] | None,
        typer.Option(
            "--gateway-for",
            metavar="INTERFACE",
            help="Catch what arrives there to be forwarded; * at the end: any that begins so.",
        ),
    ] = None,
    gateway_only: Annotated[
        bool, typer.Option("--gateway-only", help="Leave what this machine itself sends alone.")
    ] = False,
    allow_root: Annotated[bool, typer.Option("--allow-root", help="Exempt root.")] = False,
    no_lan_bypass: Annotated[
        bool, typer.Option("--no-lan-bypass", help="Refuse private and link-local addresses.")
    ] = False,
    no_ipv6: Annotated[bool, typer.Option("--no-ipv6", help="Refuse IPv6.")] = False,
    bypass_user: Annotated[
        list[str] | None, typer.Option("--bypass-user", help="Users who are exempt: a,b.")
    ] = None,
    bypass_group: Annotated[
        list[str] | None, typer.Option("--bypass-group", help="Groups that are exempt: a,b.")
    ] = None,
    service: Annotated[
        list[int],
        typer.Option(
            "--service",
            min=1,
            max=65535,
            help="TCP port whose connections go on, though older than the rules.",
        ),
    ] = [22],  # noqa: B006  typer makes a new one for each call
    tor_uid: Annotated[
        str, typer.Option("--tor-uid", help="User that Tor runs as.", show_default="the package's")
    ] = "",
    transport_port: Annotated[
        int, typer.Option("--transport-port", "-t", min=1, max=65535, help="Tor's TransPort.")
    ] = TRANS_PORT,
    dns_port: Annotated[
        int, typer.Option("--dns-port", "-d", min=1, max=65535, help="Tor's DNSPort.")
    ] = DNS_PORT,
) -> None:
    """Print rules that put this machine, or a LAN behind it, behind Tor. Nothing is changed."""
    policy = HostPolicy(
        tor_uid=_tor_uid(tor_uid),
        trans_port=transport_port,
        dns_port=dns_port,
        own=_own(only_user, onion_only=onion_only, gateway_only=gateway_only),
        users=people.users(DOING, only_user or ()),
        lan=not no_lan_bypass,
        ipv6=not no_ipv6,
        allow_root=allow_root,
        bypass_users=people.exempt_users(DOING, bypass_user or ()),
        bypass_groups=people.exempt_groups(DOING, bypass_group or ()),
        services=tuple(dict.fromkeys(service)),
        gateway_for=tuple(gateway_for or ()),
    )
    match form:
        case "nft":
            text = export_torrc.heading(policy) + host_rules.render(policy)
        case "iptables":
            text = export_iptables.script(policy)
        case "firehol":
            text = export_firehol.configuration(policy)
        case "pf" | "pf-rdr":
            text = export_pf.rules(policy, rdr=form == "pf-rdr")
        case "dnsmasq" | "dhcpd" | "kea" | "radvd":
            from nsrun.host import facts

            text = export_lan.configuration(facts.lans(DOING, policy.gateway_for), form)
    print(text, end="")


def _own(only_user: list[str] | None, *, onion_only: bool, gateway_only: bool) -> Own:
    modes = {"--only-user": bool(only_user), "--onion-only": onion_only}
    modes["--gateway-only"] = gateway_only
    given = [option for option, is_given in modes.items() if is_given]
    if len(given) > 1:
        raise UsageError(DOING, f"{' and '.join(given)} exclude each other", "ttp rules --help")
    own: dict[str, Own] = {"--only-user": "users", "--onion-only": "onion"}
    return own.get(given[0], "none") if given else "all"


def _tor_uid(word: str) -> int:
    if word:
        return people.users(DOING, [word])[0]
    found = people.tor_user()
    if found is None:
        raise UsageError(DOING, "there is no user for Tor on this machine", "--tor-uid UID")
    return found
