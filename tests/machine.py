"""A whole Debian machine in a lab: systemd, resolved, sshd, and ttp installed as a user would.

    web, DNS ══ router ═p-host═ switch ═ eth0 of the machine (192.168.77.10)
                     └─p-lan── LAN

It is booted by systemd-nspawn on a root of roots.py, with every namespace its own but the users'.
Every packet of it passes ``p-host``, which stays when the machine is rebooted, so that a tap there
(``machine.lab.tap("router", "p-host")``) sees the whole of a boot. Its network namespace is a new
one with each boot: no rule, route or setting survives that a real reboot would not leave.

How to use it, in tests/machines:

    def test_…(machine: Machine) -> None:        # booted once per session: leave it as it was
        before = machine.state()
        machine.run("ttp", "start", check=True)  # as root, in the machine's own cgroup
        machine.run("curl", …, user="alice")     # alice and bob may use sudo
        machine.run("ttp", "stop", check=True)
        assert machine.changes(before) == ""

    with debian("sid") as machine: …             # one of its own, with a lab of its own
    def test_…(crowded: Machine) -> None:        # beside firewalls and resolvers of others

What is as on a Debian with the default installation, and what is not:

- /etc/resolv.conf is resolved's stub; resolved asks the LAN's resolver, and nobody else. LLMNR and
  multicast DNS are off (/etc/systemd/resolved.conf.d/lab.conf), as they talk by themselves.
- lab-network.service gives eth0 its addresses, after network-pre.target, as ifupdown does.
- The services of tor and docker.io are installed and not enabled: start what a test is about.
- /etc/ttp/lab.torrc has the lab's authorities, and /etc/ttp/config.toml names it for the gateway
  `default`: without it Tor would look for the public network. Programs trust the lab's web.
- /proc/sys is read-only but for net. The clock, the kernel and its modules are the host's.
"""

from __future__ import annotations

import difflib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import roots
from lab_helpers import TTP, Lab
from nsrun.lab import topology
from nsrun.leak.frames import Frame, Icmp, Ip
from nsrun.leak.verdict import Rule
from town import eventually

SUITE = "trixie"  # Debian 13: docker 26.1, podman 5.4, compose 2.26, nftables 1.1
START = 60.0  # seconds for a boot: it takes one, on a machine that does nothing else
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAC = "02:00:00:00:77:10"
NUMBERS = count(1)  # of machines of this process: two may be up at once
REBOOTED = 133  # what systemd-nspawn --keep-unit ends with, to be started again

# One shell holds the mounts and starts the machine again after each reboot. Its cgroups are its
# own, and are removed at the end; where version 1 is there too, systemd-nspawn wants it named.
BOOT = f"""set -u
cd "$1"; shift
groups=
for top in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    [ -e $top/cgroup.procs ] || continue
    mkdir $top/ttp-machine-$$ && echo $$ >$top/ttp-machine-$$/cgroup.procs
    groups="$groups $top/ttp-machine-$$"
done
mount -t overlay overlay -o "lowerdir=$1,upperdir=upper,workdir=work" top || exit 1
shift
ended={REBOOTED}
while [ $ended = {REBOOTED} ] || rm again 2>/dev/null; do
    umount net 2>/dev/null # the network of the boot before
    unshare --net=net sh -c '
        cd /proc/sys/net/ipv6/conf/default
        echo 0 >router_solicitations; echo 0 >accept_dad' &&
    ip link add name m0 type veth peer name m1 &&
    ip link set m1 netns ./net &&
    nsenter --net=net ip link set m1 name eth0 address {MAC} addrgenmode none &&
    ip link set m0 addrgenmode none master switch up || break
    systemd-nspawn --boot --directory=top --network-namespace-path="$PWD/net" "$@"
    ended=$?
    ip link del m0 2>/dev/null
done
for group in $groups; do
    echo $$ >${{group%/*}}/cgroup.procs
    find $group -depth -type d -exec rmdir {{}} +
done
exit $ended
"""
NSPAWN = (
    *("--quiet", "--register=no", "--keep-unit", "--console=pipe", "--link-journal=no"),
    *("--resolv-conf=off", "--timezone=off"),
    # for Docker: all powers of a machine's root, keys, and cgroup filters of devices
    *("--capability=all", "--system-call-filter=add_key keyctl bpf"),
)
ENVIRONMENT = {
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",  # as Debian's own machines have it
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",  # /proc/sys/net
}

# The lab's host becomes a switch between its wire and the machine; a switch has no address.
SWITCH = """set -e
ip link add switch address 02:00:00:00:77:02 type bridge mcast_snooping 0
for name in switch eth0; do echo 1 >/proc/sys/net/ipv6/conf/$name/disable_ipv6; done
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
ip address flush dev eth0
ip link set eth0 master switch
ip link set switch up
"""

FILES = {
    "etc/hostname": "machine\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 machine\n::1 localhost ip6-localhost\n",
    "etc/systemd/resolved.conf.d/lab.conf": (
        f"[Resolve]\nDNS={topology.RESOLVER} {topology.RESOLVER6}\nFallbackDNS=\n"
        "LLMNR=no\nMulticastDNS=no\n"
    ),
    "etc/network.batch": topology.host_links().replace("link set lo up\n", ""),
    "etc/systemd/system/lab-network.service": """[Unit]
Description=Addresses and routes of eth0
DefaultDependencies=no
After=local-fs.target network-pre.target systemd-sysctl.service
Before=network.target network-online.target shutdown.target
Wants=network.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip -batch /etc/network.batch

[Install]
WantedBy=multi-user.target network-online.target
""",
    "etc/ttp/config.toml": '[gateway.default]\ntorrc = "lab.torrc"\n',
}

# What resolvconf, which has no interface to hear of, says in resolved's place.
BESIDE = {
    "etc/resolvconf/resolv.conf.d/base": topology.resolv_conf(
        (topology.RESOLVER, topology.RESOLVER6)
    ),
}

# Without counters, lifetimes, and what systemd loads and forgets by itself. What is enabled or
# masked is told by links: to ask systemd for it takes longer than all else.
STATE = """
ip -o link; ip -o address | sed -E 's/(valid|preferred)_lft [^ ]+//g'
for family in -4 -6; do ip $family route show table all; ip $family rule; done
nft --stateless list ruleset
grep -H . /proc/sys/net/ipv[46]/conf/*/*forwarding /proc/sys/net/ipv4/conf/*/route_localnet \\
    /proc/sys/net/ipv4/ip_forward
findmnt --raw --noheadings --output TARGET,SOURCE,FSTYPE,OPTIONS | grep -v ^/run/credentials
ls -l /etc/resolv.conf; cat /etc/resolv.conf; resolvectl dns; resolvectl domain
systemctl list-units --no-legend --plain --full --state=active,failed \\
    --type=service,socket,timer,mount |
    awk '{print $1, $3}' | grep -v -e ^user -e ^systemd-tmpfiles -e ^run-credentials \\
        -e ^netavark-dhcp-proxy
find /etc /usr/lib/systemd /run/systemd/system* /run/systemd/generator* /run/systemd/transient/* \\
    /run/ttp /run/tor /usr/local -xdev -printf '%p %M %u %l\\n' 2>/dev/null | sort
find /etc -xdev -type f -exec sha256sum {} + | sort -k 2
"""


@dataclass(frozen=True)
class GroupReports:
    """What the kernel says of the groups that a link listens to when it comes up (RFC 3810)."""

    sources: frozenset[str]
    name: str = "of a link that came up"

    def covers(self, frame: Frame) -> bool:
        match frame.body:
            case Ip(source=source, target="ff02::16", hop_limit=1, body=Icmp(version=6, kind=143)):
                return source in self.sources
        return False


@dataclass
class Machine:
    """One that runs. ``lab``: its network, in which it is the host."""

    lab: Lab
    suite: str
    directory: Path
    process: subprocess.Popen[bytes]
    leader: int = 0  # its process 1

    def command(self, *argv: str, user: str = "root") -> list[str]:
        """What runs ``argv`` in the machine: in its cgroup, with the environment of a login."""
        home = "/root" if user == "root" else f"/home/{user}"
        clean = ("env", "-i", f"PATH={PATH}", f"HOME={home}", f"USER={user}", "LANG=C.UTF-8")
        become = () if user == "root" else ("setpriv", f"--reuid={user}", f"--regid={user}")
        groups = ("--init-groups",) if become else ()
        join = 'echo $$ >"$0" && exec "$@"'
        enter = ("nsenter", f"--target={self.leader}", "--all", f"--wdns={home}", "--")
        return ["sh", "-c", join, str(self._cgroup()), *enter, *clean, *become, *groups, *argv]

    def run(
        self,
        *argv: str,
        user: str = "root",
        check: bool = False,
        seconds: float = 120,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end; ``text`` is its standard input."""
        done = subprocess.run(
            self.command(*argv, user=user),
            input=text,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done

    def start(self, *argv: str, user: str = "root", **options: Any) -> subprocess.Popen[str]:
        """Start a command that runs beside the test, who ends it."""
        return subprocess.Popen(self.command(*argv, user=user), text=True, **options)

    def rules(self) -> list[Rule]:
        """What its wire, ``p-host``, may carry while only Tor sends, over a reboot too."""
        own = (topology.HOST, topology.HOST6, topology.HOST_LINK)
        tor = self.lab.rules(topology.HOST, topology.HOST6)
        return [*tor, self.lab.neighbours(*own), GroupReports(frozenset(("::", own[-1])))]

    def path(self, path: str) -> Path:
        """A file of the machine's, from outside."""
        return Path(f"/proc/{self.leader}/root{path}")

    def state(self) -> str:
        """Everything that a command which was undone has left as it was, as text."""
        return self.run("sh", "-c", STATE).stdout

    def changes(self, before: str, seconds: float = 15) -> str:
        """Differences from ``before``, as a diff; empty if there are none.

        The kernel and systemd take things apart in the background: they get ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while (after := self.state()) != before and time.monotonic() < deadline:
            time.sleep(0.1)  # the interval of the poll
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=0
        )
        return "\n".join(lines)

    def journal(self, unit: str) -> str:
        """What a unit has logged since the boot."""
        return self.run("journalctl", "--boot", "--no-pager", "--output=cat", "-u", unit).stdout

    def reboot(self, *argv: str) -> None:
        """`systemctl reboot`, or what is given; returns when it is up again."""
        before = os.pidfd_open(self.leader)
        try:
            # the one who asks is ended as well
            self.run(*(argv or ("systemctl", "reboot")))
            assert select.select([before], [], [], START)[0], f"no reboot: {self._log()}"
        finally:
            os.close(before)
        self.await_boot()

    def crash(self) -> None:
        """As if the power failed, and came back: nothing is told, nothing is tidied up."""
        (self.directory / "again").touch()
        os.kill(self.leader, signal.SIGKILL)
        eventually(lambda: not (self.directory / "again").exists(), "the machine to end", START)
        self.await_boot()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """As when it is suspended: nothing of it runs, and its link is down; its kernel forgets
        nothing. It wakes with the link as it was.
        """
        group = self._cgroup().parent.parent
        frozen, state = group / "cgroup.freeze", group / "cgroup.events"
        frozen.write_text("1")
        try:
            eventually(lambda: "frozen 1" in state.read_text(), "all of it to be frozen")
            self._link("down")
            yield
        finally:
            self._link("up")
            frozen.write_text("0")

    def _link(self, state: str) -> None:
        """The other end of its wire."""
        done = self.lab.do(*self.lab.inside_argv("host", "ip", "link", "set", "m0", state))
        assert done.returncode == 0, done.stderr

    def await_boot(self) -> None:
        """Wait until it has booted, and every service is up."""
        eventually(self._is_up, f"the machine to boot: {self._log()}", START)
        told = self.run("systemctl", "is-system-running", "--wait", seconds=START).stdout.strip()
        failed = self.run("systemctl", "--failed", "--no-legend").stdout
        assert told == "running", f"{told}: {failed}"

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self._log()
        self.leader = _leader(self.process.pid)
        return bool(self.leader) and self.path("/run/systemd/private").exists()

    def _cgroup(self) -> Path:
        """Where the machine's systemd lets others be."""
        for line in Path(f"/proc/{self.leader}/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                top = Path("/sys/fs/cgroup")
                top = top if (top / "cgroup.procs").exists() else top / "unified"
                ours = top / path.strip("/").removesuffix("/init.scope") / "tests"
                ours.mkdir(exist_ok=True)
                return ours / "cgroup.procs"
        raise AssertionError("no cgroups of version 2")

    def _log(self) -> str:
        return (self.directory / "log").read_text()[-2000:]


@contextmanager
def machine(lab: Lab, suite: str = SUITE, *, beside: bool = False) -> Iterator[Machine]:
    """A machine that has booted, as the host of ``lab``; one at a time."""
    ttp, below = roots.installed(suite)
    layers = (ttp, *((roots.beside(suite),) if beside else ()), below)
    with tempfile.TemporaryDirectory(prefix="ttp-machine-", dir="/var/tmp") as name:
        directory = Path(name)
        for part in ("upper", "work", "top", "docker", "containers"):
            (directory / part).mkdir()
        (directory / "net").touch()
        _furnish(directory / "upper", lab, BESIDE if beside else {})
        switch = subprocess.run(lab.inside("host", "sh", "-c", SWITCH), capture_output=True)
        assert switch.returncode == 0, switch.stderr
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                lab.inside(
                    *("host", "unshare", "--mount", "--propagation", "private"),
                    *("sh", "-c", BOOT, "sh", name, ":".join(map(str, layers)), *NSPAWN),
                    # Docker and podman cannot have their own overlays on top of one
                    f"--bind={name}/docker:/var/lib/docker",
                    f"--bind={name}/containers:/var/lib/containers",
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
            )
        made = Machine(lab, suite, directory, process)
        try:
            made.await_boot()
            yield made
        finally:
            made.leader = 0
            if leader := _leader(process.pid):
                os.kill(leader, signal.SIGKILL)  # with it goes all that runs in it
            process.wait(20)


@contextmanager
def debian(suite: str = SUITE, *, gateway: bool = False, beside: bool = False) -> Iterator[Machine]:
    """A machine, and a lab of root's for it; ``gateway``: whether the lab has one as well.

    ``beside``: with firewalls and resolvers of others installed, and without systemd-resolved.
    """
    name = f"m{os.getpid() % 100000}-{next(NUMBERS)}"
    with tempfile.TemporaryDirectory(prefix="ttp-lab-") as home:
        lab = Lab(name, "root", (), Path(home))
        network = "--gateway" if gateway else "--no-gateway"
        up = lab.do(TTP, "lab", "up", name, network, seconds=100)  # the first one bakes
        assert up.returncode == 0, up.stderr
        try:
            with machine(lab, suite, beside=beside) as made:
                yield made
        finally:
            down = lab.ttp("lab", "down", name)
            assert down.returncode == 0, down.stderr


def _furnish(upper: Path, lab: Lab, more: dict[str, str]) -> None:
    """Put the files of this lab into a root that has not booted yet."""
    told = lab.status()
    files = {
        **FILES,
        **more,
        "etc/ttp/lab.torrc": str(told["client_torrc"]),
        "etc/ssl/certs/ca-certificates.crt": Path(str(told["ca_bundle"])).read_text(),
    }
    for name, text in files.items():
        file = upper / name
        for parent in reversed(file.relative_to(upper).parents):
            (upper / parent).mkdir(exist_ok=True)
            (upper / parent).chmod(0o755)
        file.write_text(text)
        file.chmod(0o644)
    wants = upper / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    wants.chmod(0o755)
    (wants / "lab-network.service").symlink_to("/etc/systemd/system/lab-network.service")


def _leader(shell: int) -> int:
    """Process 1 of the machine that ``shell`` has booted, seen from here; 0 while there is none."""
    for nspawn in _children(shell):
        for leader in _children(nspawn):
            if _told(leader, "comm") == "systemd\n":
                return leader
    return 0


def _children(process: int) -> list[int]:
    return list(map(int, _told(process, f"task/{process}/children").split()))


def _told(process: int, what: str) -> str:
    """A file of a process in /proc; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/{what}").read_text()
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or since
        return ""
