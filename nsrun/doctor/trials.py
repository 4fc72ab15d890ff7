"""What the kernel and the uplinks can do, by doing it in namespaces that go with this process.

The steps and rules are those of a real gateway, but for Tor: there is nobody who would send
anything, and nothing but loopback may when an uplink is tried.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

from nsrun import linux, ruleset, seccomp
from nsrun.address import choose_block
from nsrun.apply import Machine, apply
from nsrun.doctor import MISSING, OK, WARNING, Finding
from nsrun.errors import NsrunError, VerifyError
from nsrun.gateway import uplink
from nsrun.netlink import IFF_NOARP, IFF_UP
from nsrun.netns import Namespace
from nsrun.plan import LINK_MAC, LINK_PREFIX, MTU, UPLINK, Workload, workload_steps
from nsrun.steps import Ip, LoadRules, SetSysctl, Step
from nsrun.userns import own_user_namespace, refusal

PACKAGES = {"pasta": "passt", "slirp4netns": "slirp4netns"}
MODULES = "sudo modprobe -a nf_tables nft_chain_nat nft_ct nft_nat nft_reject_inet"
AF_VSOCK = 40  # a family that the filter of system calls refuses

Tell = Callable[[Finding], None]


def run(tell: Tell) -> None:
    """Try everything, in order, and tell each finding. What rests on a failure is not tried."""
    rootless = os.geteuid() != 0
    user = _user_namespaces(rootless)
    tell(user)
    if user.state == MISSING and rootless:
        return
    for finding in (_seccomp(), _overlay(), network := _network(), _sys()):
        tell(finding)
    if network.state == MISSING:
        return
    with tempfile.TemporaryDirectory(prefix="ttp-doctor-") as directory:
        _gateway(tell, directory, rootless)


def _user_namespaces(rootless: bool) -> Finding:
    """One for the gateway, if we are not root, and one in it for a command."""
    name = "user namespaces"
    try:
        if rootless:
            own_user_namespace()
        _in_child(lambda: linux.unshare(linux.CLONE_NEWUSER))
    except NsrunError as error:
        return Finding(name, MISSING, error.cause, error.hint)
    except OSError as error:
        why = refusal(error)
        return Finding(name, MISSING, why.cause, why.hint)
    return Finding(name, OK, "made one")


def _network() -> Finding:
    def make() -> None:
        linux.unshare(linux.CLONE_NEWNET)

    return _tried("network namespaces", make, "made one", MISSING)


def _seccomp() -> Finding:
    machine = os.uname().machine
    if not (program := seccomp.program(machine)):
        return Finding("seccomp", WARNING, f"no filter of system calls is known for {machine}")

    def filtered() -> None:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.set_seccomp_filter(program)
        with suppress(OSError):
            socket.socket(AF_VSOCK, socket.SOCK_STREAM).close()
            raise SystemExit("the filter lets through what it should refuse")

    return _tried("seccomp", filtered, "set a filter of system calls", MISSING)


def _overlay() -> Finding:
    with tempfile.TemporaryDirectory(prefix="ttp-doctor-") as stage:

        def cover() -> None:
            _own_mounts()
            linux.mount("ttp", "/etc", "overlay", linux.MS_RDONLY, f"lowerdir={stage}:/etc")

        worse = "over /etc: its files are covered one by one, which a rename on the host undoes"
        return _tried("overlay", cover, "covered /etc", WARNING, worse)


def _sys() -> Finding:
    def anew() -> None:
        linux.unshare(linux.CLONE_NEWNET)
        _own_mounts()
        linux.mount("sysfs", "/sys", "sysfs")

    worse = "for a new /sys: the host's interfaces are hidden there instead"
    return _tried("sysfs", anew, "mounted a new /sys", WARNING, worse)


def _gateway(tell: Tell, directory: str, rootless: bool) -> None:
    """A gateway step by step, each uplink for it, and a workload."""
    block, machine = choose_block(()), Machine()
    policy = ruleset.gateway_policy(block, os.getuid())
    rules = ruleset.render(policy, ruleset.FromInterface(LINK_PREFIX, UPLINK))
    forward, forward6 = "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"
    loaded = "rules loaded and read back"

    def done(
        name: str, found: str, do: str, *steps: Step, check: Callable[[], None] | None = None
    ) -> bool:
        try:
            with apply(steps, machine.do):
                if check is not None:
                    check()
                tell(Finding(name, OK, found))
        except NsrunError as error:
            tell(Finding(name, MISSING, error.cause, do))
            return False
        return True

    machine.namespaces["gateway"] = Namespace()
    with closing(machine.namespaces["gateway"]):
        if (
            done("sysctls", f"{forward}=0", "make /proc/sys writable", _off(forward))
            and done("ipv6", f"{forward6}=0", "boot without ipv6.disable=1", _off(forward6))
            and done("nftables", f"closed {loaded}", MODULES, _rules(ruleset.render_closed()))
        ):
            _uplinks(tell, machine.namespaces["gateway"], directory, rootless)
            if done("nat, conntrack", f"a gateway's {loaded}", MODULES, _rules(rules)):
                workload = Workload(block, 2)
                steps = (Ip("gateway", ("link set lo up",)), *workload_steps(workload))

                def check() -> None:
                    machine.namespaces["workload"].call(read_back, workload)

                found = "a workload plugged into it, and read back"
                done("veth", found, "sudo modprobe veth", *steps, check=check)


def read_back(workload: Workload) -> None:
    """Compare the workload's namespace, in which we are, with what was meant.

    By pyroute2 and not by our own netlink.py, which may be as wrong in reading as in writing.
    Raises VerifyError.
    """
    from pyroute2 import IPRoute  # 130 ms

    with IPRoute() as kernel:
        links = {link.get("ifname"): link for link in kernel.get_links()}
        addresses = {found.get("address") for found in kernel.get_addr(label="eth0")}
        addresses |= {found.get("address") for found in kernel.get_addr(family=socket.AF_INET6)}
        routes = {route["family"] for route in kernel.get_default_routes()}
    link = links.get("eth0", {})
    as_meant = {
        "links": set(links) == {"lo", "eth0"},
        "MTU": link.get("mtu") == MTU,
        "MAC address": link.get("address") == LINK_MAC,
        "flags": link.get("flags", 0) & (IFF_UP | IFF_NOARP) == IFF_UP | IFF_NOARP,
        "addresses": addresses - {"::1"} == {workload.address4, workload.address6},
        "default routes": routes == {socket.AF_INET, socket.AF_INET6},
    }
    if wrong := [what for what, right in as_meant.items() if not right]:
        raise VerifyError("plug a workload in", f"the kernel has other {', '.join(wrong)}")


def _off(key: str) -> Step:
    return SetSysctl("gateway", key, "0")


def _rules(text: str) -> Step:
    return LoadRules("gateway", text)


def _uplinks(tell: Tell, gateway: Namespace, directory: str, rootless: bool) -> None:
    """One must work, or for root veth, which is not tried, as it would change the host."""
    tun = _tun(rootless)
    tell(tun)
    found = []
    for kind, package in PACKAGES.items():
        try:
            link = uplink.start(uplink.value(kind, "doctor"), gateway, f"{directory}/{kind}")
        except NsrunError as error:
            do = tun.do or f"sudo apt-get install {package}"
            found.append(Finding(kind, WARNING, error.cause, do))
        else:
            addresses = " ".join(str(address) for address in link.addresses)
            link.stop()
            found.append(Finding(kind, OK, f"a link with {addresses}"))
    none = all(one.state != OK for one in found) and rootless
    for one in found:
        tell(replace(one, state=MISSING) if none else one)


def _tun(rootless: bool) -> Finding:
    """Without it neither pasta nor slirp4netns can make a link."""
    if (refusal := uplink.tun_refusal()) is None:
        return Finding("tun", OK, "opened /dev/net/tun")
    return Finding("tun", MISSING if rootless else WARNING, *refusal)


def _tried(name: str, trial: Callable[[], None], done: str, state: str, worse: str = "") -> Finding:
    try:
        _in_child(trial)
    except OSError as error:
        return Finding(name, state, f"{error.strerror} {worse}".strip())
    return Finding(name, OK, done)


def _own_mounts() -> None:
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)


def _in_child(trial: Callable[[], None]) -> None:
    """Do it in a process of its own, which ends with it. Raises OSError as the trial did."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            trial()
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))
