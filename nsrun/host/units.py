"""Texts of what ttp adds to a host for one session: a unit of systemd, a resolver. Pure.

All of it is below /run, and gone at reboot. Sources: systemd.exec(5), resolved.conf(5).
"""

from __future__ import annotations

from collections.abc import Sequence

from nsrun.host import session


def tor_unit(tor: str, uid: int, gid: int, *, resolver: bool = False) -> str:
    """Tor of the session: it says itself when it listens (sd_notify(3)), and owns two directories.

    It starts again when it dies; until then every connection is refused, as the rules stand.
    With ``resolver`` its helpers find the files of ``tor_resolver`` in the place of the host's.
    """
    mounts = (
        f"BindReadOnlyPaths={session.TOR_RESOLV_CONF}:/etc/resolv.conf"
        f" {session.TOR_NSSWITCH}:/etc/nsswitch.conf\n"
        if resolver
        else ""
    )
    return f"""\
[Unit]
Description=Tor of the whole host, by ttp
StartLimitIntervalSec=0

[Service]
Slice={session.TOR_SLICE}
Type=notify
NotifyAccess=all
User={uid}
Group={gid}
ExecStart={tor} --defaults-torrc /dev/null --hush -f {session.TORRC}
ExecReload=/bin/kill -HUP $MAINPID
KillSignal=SIGINT
TimeoutStartSec=60
TimeoutStopSec=10
Restart=on-failure
RestartSec=1
LimitNOFILE=65536
UMask=0077

CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={session.TOR_STATE} {session.TOR_RUNTIME}
{mounts}\
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
"""


def tor_resolver(resolvers: Sequence[str]) -> dict[str, str]:
    """Files, by path, by which helpers ask the host's own resolvers, and nobody on their behalf.

    Whom others ask (nss-resolve) is Tor.
    """
    if not resolvers:
        return {}
    servers = "".join(f"nameserver {one}\n" for one in resolvers)
    return {
        session.TOR_RESOLV_CONF: f"{servers}search .\n",
        session.TOR_NSSWITCH: "passwd: files\ngroup: files\nhosts: files dns\n",
    }


def bypass() -> str:
    """Where commands of ``ttp bypass`` are; the rules know it by its control group."""
    return "[Unit]\nDescription=Commands that bypass Tor, by ttp\n"


def tor_slice() -> str:
    """Where Tor is: the rules know its control group by a number, which outlives Tor."""
    return "[Unit]\nDescription=Tor of the whole host, by ttp\n"


def watchdog(python: str, interval: float) -> str:
    """It outlives Tor, which it starts again; however often it is killed, it comes back itself.

    In the host's mounts, where it mends the resolver: options that give it its own are left out.
    """
    return f"""\
[Unit]
Description=Watchdog of the whole host behind Tor, by ttp
After={session.TOR_UNIT}
StartLimitIntervalSec=0

[Service]
ExecStart={python} -P -m nsrun.host.watchdog {interval:g}
Restart=on-failure
RestartSec=1
UMask=0022

CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service @mount
"""


def resolv_conf() -> str:
    """resolv.conf(5): an address that nobody need listen at, as port 53 is redirected anyway.

    ``search .``: else libc would take the host's own domain and send it to exits.
    """
    return "# The whole host is behind Tor, by ttp: `ttp stop` gives back your own file.\n" + (
        "nameserver 127.0.0.1\nsearch .\n"
    )


def resolved(dns_port: int) -> str:
    """systemd-resolved asks Tor for every name, and keeps and shares none.

    Who asks it by its own socket, and not by DNS, is served so as well. An empty list forgets those
    of other files.
    """
    return f"""\
# The whole host is behind Tor, by ttp: gone with `ttp stop`.
[Resolve]
DNS=
DNS=127.0.0.1:{dns_port}
FallbackDNS=
Domains=
Domains=~.
DNSSEC=no
DNSOverTLS=no
LLMNR=no
MulticastDNS=no
Cache=no
"""
