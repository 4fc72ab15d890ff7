"""The lab's namespaces: made once by its holder, named only in its private /run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from nsrun import linux
from nsrun.errors import MissingError, NsrunError
from nsrun.lab import topology
from nsrun.lab.programs import RUN
from nsrun.netns import Namespace


def unshare(keep: str) -> None:
    """Move this process, of one thread, into namespaces of its own; its network becomes `inet`.

    As a user other than root we become root of a new user namespace. ``keep`` is a directory
    that stays shared with the outside although it may lie below /run, which becomes private.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        linux.unshare(linux.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)

    shared = os.open(keep, os.O_PATH)
    linux.mount("lab", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    if not Path(keep).exists():
        Path(keep).mkdir(parents=True)
        linux.mount(f"/proc/self/fd/{shared}", keep, flags=linux.MS_BIND)
    os.close(shared)
    RUN.mkdir()
    _private_etc()


def _private_etc() -> None:
    """Let programs of the lab see, and change, an /etc of their own."""
    upper, work = RUN / "etc", RUN / "etc.work"
    upper.mkdir()
    work.mkdir()
    (upper / "resolv.conf").write_text(
        topology.resolv_conf((topology.RESOLVER, topology.RESOLVER6))
    )
    (RUN / "resolv.inet").write_text(topology.resolv_conf((topology.DNS, topology.DNS6)))
    linux.mount(
        "lab", "/etc", "overlay", 0, f"lowerdir=/etc,upperdir={upper},workdir={work},userxattr"
    )


def connect() -> None:
    """Make the other namespaces and every link between them."""
    for name in ("host", "router", "lan"):
        _ip("netns", "add", name)
    _ip("netns", "attach", "inet", str(os.getpid()))
    for name in topology.NAMESPACES:
        _inside(name, _keep_still)
    _ip("-batch", "-", text=topology.inet_links())
    _ip("-netns", "router", "-batch", "-", text=topology.router_links())
    _ip("-netns", "host", "-batch", "-", text=topology.host_links())
    _ip("-netns", "lan", "-batch", "-", text=topology.lan_links())
    _answer_anywhere()
    _inside("router", _forward)
    _inside("lan", _let_dns_bind)


def path(name: str) -> str:
    """Where the lab itself finds the network namespace ``name``."""
    return f"/run/netns/{name}"


def _inside(name: str, prepare: Callable[[], None]) -> None:
    namespace = Namespace(path(name))
    try:
        namespace.call(prepare)
    finally:
        namespace.close()


def _keep_still() -> None:
    """No chatter of the kernel itself on wires that are watched, once they are up (RFC 4861)."""
    _set("ipv6/conf/default/router_solicitations", 0)
    _set("ipv6/conf/default/accept_dad", 0)
    _set("ipv6/conf/default/mldv2_unsolicited_report_interval", 1)  # ms


def _answer_anywhere() -> None:
    """Let servers answer over UDP from whatever address they were asked at."""
    _set("ipv6/ip_nonlocal_bind", 1)
    _let_dns_bind()


def _let_dns_bind() -> None:
    """dnsmasq runs without privileges; its port is the lowest that needs none."""
    _set("ipv4/ip_unprivileged_port_start", 53)


def _forward() -> None:
    _set("ipv4/ip_forward", 1)
    _set("ipv6/conf/all/forwarding", 1)
    # a redirect to the metadata service would be one packet more on a wire that is watched
    _set("ipv4/conf/all/send_redirects", 0)
    _set("ipv4/conf/lan0/send_redirects", 0)
    for family in ("ip", "ip6", "arp"):  # a switch does not translate addresses
        if Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}tables").exists():
            _set(f"bridge/bridge-nf-call-{family}tables", 0)
    _command(["nft", "-f", "-"], topology.router_rules())


def _set(switch: str, value: int) -> None:
    """Set a sysctl of the calling thread's network namespace."""
    try:
        Path("/proc/sys/net", switch).write_text(str(value))
    except OSError as error:
        hint = "in a container, give it a writable /proc/sys"
        raise NsrunError(f"set net/{switch}", error.strerror, hint) from error


def _ip(*arguments: str, text: str = "") -> None:
    _command(["ip", *arguments], text)


def _command(command: list[str], text: str) -> None:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MissingError("lay the lab's links", error, f"install {command[0]}") from error
    if done.returncode != 0:
        raise NsrunError("lay the lab's links", f"{' '.join(command)}: {done.stderr.strip()}")
