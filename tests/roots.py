"""Root file systems of whole Debian machines, with ttp installed in them: made once, and kept.

In root's cache directory, each under a checksum of what it is made of:

    root-SUITE-…     Debian, by debootstrap from apt's own mirror        a minute, 900 MB
    beside-SUITE-…   what else may share a machine, added to a root         40 s, 100 MB
    wheels-…         what pip needs to install ttp without a network     5 s, 5 MB
    ttp-SUITE-…      what `make install` of this checkout adds to a root   10 s, 40 MB
    package-NAME-…   the files of one package of sid's                     5 s, 10 MB

Nobody writes into them: a machine has them below a directory of its own (overlay), see machine.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from harness import ROOT, SBIN
from nsrun import paths

DAY = 86400
DAYS = 30  # until a root is made anew
BASE = (
    *("systemd-sysv", "systemd-resolved", "libnss-resolve", "dbus", "openssh-server", "sudo"),
    *("iproute2", "iputils-ping", "procps", "nftables", "iptables", "ufw", "tcpdump"),
    *("python3", "python3-venv", "make", "curl", "ca-certificates", "openssl", "socat"),
    *("tor", "passt", "slirp4netns", "dnsmasq-base", "bind9-dnsutils"),
)
CONTAINERS = ("docker.io", "docker-cli", "docker-compose", "podman")
#: Firewalls, resolvers and managers of networks, and who serves a LAN; resolvconf takes
#: systemd-resolved's place.
BESIDE = (
    *("firewalld", "network-manager", "resolvconf", "isc-dhcp-client"),
    *("wireguard-tools", "wireguard-go", "radvd", "isc-dhcp-server", "kea-dhcp4-server"),
)
#: What would use the network, or the host's disk, by itself; a test starts what it is about.
DISABLED = (
    *("tor.service", "docker.service", "docker.socket", "containerd.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
)
DISABLED_BESIDE = (
    *("firewalld.service", "NetworkManager.service", "NetworkManager-dispatcher.service"),
    *("NetworkManager-wait-online.service", "radvd.service", "isc-dhcp-server.service"),
    "kea-dhcp4-server.service",
)
OLD = "bookworm"  # Debian 12: without containers, which are tested on others
#: Of the kernel, which is everybody's.
MASKED = ("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-modules-load.service")
USERS = ("alice", "bob")

BOOTSTRAP = """set -eu
mkdir -p "$1/etc/dpkg/dpkg.cfg.d"
{
    echo force-unsafe-io # a machine that fails meanwhile has made nothing
    printf 'path-exclude=/usr/share/%s/*\\n' doc locale man
} >"$1/etc/dpkg/dpkg.cfg.d/small"
debootstrap --variant=minbase --include="$4" "$2" "$1" "$3"
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
for user in $5; do
    chroot "$1" useradd --create-home --shell /bin/bash "$user"
    echo "$user ALL=(ALL) NOPASSWD: ALL" >"$1/etc/sudoers.d/$user"
done
systemctl --quiet --root="$1" disable $6
systemctl --quiet --root="$1" mask $7
"""

ADD = """set -eu
mkdir "$1/work" "$1/top" "$1/added"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/added,workdir=$1/work" "$1/top"
mount -t tmpfs none "$1/top/run"
mkdir -p "$1/top/run/systemd/resolve" # where its resolv.conf leads to
cp /etc/resolv.conf "$1/top/run/systemd/resolve/stub-resolv.conf"
policy="$1/top/usr/sbin/policy-rc.d" # nothing is started here
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
export DEBIAN_FRONTEND=noninteractive
chroot "$1/top" apt-get -qq update
chroot "$1/top" apt-get -qq install --yes --no-install-recommends $3
rm -rf "$policy" "$1"/top/var/cache/apt/* "$1"/top/var/lib/apt/lists/*
systemctl --quiet --root="$1/top" disable $4
umount "$1/top/run" "$1/top"
"""

INSTALL = """set -eu
mkdir "$1/work" "$1/top" "$1/added"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/added,workdir=$1/work" "$1/top"
systemd-nspawn --quiet --register=no --keep-unit --private-network --directory="$1/top" \\
    --resolv-conf=off --timezone=off --link-journal=no --console=pipe \\
    --tmpfs=/mnt --bind-ro="$3:/mnt/wheels" --bind-ro="$4:/mnt/ttp" \\
    --setenv=PIP_NO_INDEX=1 --setenv=PIP_FIND_LINKS=/mnt/wheels \\
    sh -ec 'cp -R /mnt/ttp /root/ttp && cd /root/ttp && make install && cd / && rm -r /root/ttp'
umount "$1/top"
"""


def root(suite: str) -> Path:
    """A Debian of ``suite`` (a name, or `sid`) with BASE, and mostly CONTAINERS; two users who may
    use sudo."""
    packages, disabled = [*BASE, *CONTAINERS], list(DISABLED)
    if suite == OLD:
        packages = [*BASE]
        disabled = [unit for unit in DISABLED if not unit.startswith(("docker", "containerd"))]
    words = (",".join(packages), " ".join(USERS), " ".join(disabled), " ".join(MASKED))

    def make(part: Path) -> None:
        # in a mount namespace: what debootstrap mounts goes with it, however it ends
        script = ("unshare", "--mount", "--propagation", "private", "sh", "-c", BOOTSTRAP, "sh")
        _do(*script, str(part), suite, _mirror(), *words)

    return _kept(f"root-{suite}", BOOTSTRAP + "".join(words), make, DAYS)


def beside(suite: str) -> Path:
    """What BESIDE adds to a root; all of it disabled."""
    below = root(suite)
    words = (" ".join(BESIDE), " ".join(DISABLED_BESIDE))

    def make(part: Path) -> None:
        script = ("unshare", "--mount", "--propagation", "private", "sh", "-c", ADD, "sh")
        _do(*script, str(part), str(below), *words)

    return _kept(f"beside-{suite}", f"{ADD}{below}" + "".join(words), make, DAYS) / "added"


def installed(suite: str) -> tuple[Path, Path]:
    """The layers of a root with ttp in /usr/local, the upper one first."""
    below, needed = root(suite), wheels()
    files = sorted(p for p in (ROOT / "nsrun").rglob("*") if p.suffix != ".pyc" and p.is_file())
    files += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile")]
    files += [ROOT / ".ci" / name for name in ("setup", "man.py", "completions")]

    def make(part: Path) -> None:
        source = part / "source"
        for file in files:
            to = source / file.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
        script = ("unshare", "--mount", "--propagation", "private", "sh", "-c", INSTALL, "sh")
        _do(*script, str(part), str(below), str(needed), str(source))
        shutil.rmtree(source)

    what = hashlib.sha256(f"{below}{needed}".encode())
    for file in files:
        what.update(f"{file.relative_to(ROOT)} {file.stat().st_mode:o}\0".encode())
        what.update(file.read_bytes())
    return _kept(f"ttp-{suite}", INSTALL + what.hexdigest(), make, 1) / "added", below


def wheels() -> Path:
    """What ttp depends on, and what builds it, for any version of Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]

    def make(part: Path) -> None:
        # its wheels in the index are compiled, for one version each
        pure = ("--no-binary", "charset-normalizer")
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        _do(*pip, "wheel", "--wheel-dir", str(part), *pure, *wanted)

    return _kept("wheels", "\n".join(wanted), make, DAYS)


def unpacked(package: str) -> Path:
    """The files of a package of sid's that no stable Debian has; without what it depends on."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

    def make(part: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            sources = Path(name, "sources.list")
            sources.write_text(f"deb [signed-by={keyring}] {_mirror()} sid main\n")
            own = {
                "Dir::Etc::SourceList": sources,
                "Dir::Etc::SourceParts": "-",
                "Dir::State::Lists": f"{name}/lists",
                "Dir::Cache": name,
                "APT::Sandbox::User": "root",
            }
            apt = ("apt-get", "-qq", *(f"-o{key}={value}" for key, value in own.items()))
            Path(name, "lists/partial").mkdir(parents=True)
            _do(*apt, "update")
            _do("sh", "-c", 'cd "$0" && "$@"', name, *apt, "download", package)
            (file,) = Path(name).glob("*.deb")
            _do("dpkg-deb", "--extract", str(file), str(part))

    return _kept(f"package-{package}", package, make, DAYS)


def _mirror() -> str:
    asked = ("apt-get", "indextargets", "--format", "$(REPO_URI)")
    told = _do(*asked, "Origin: Debian", "Component: main").split()
    assert told, "apt knows no mirror of Debian"
    return told[0]


def _kept(name: str, what: str, make: Callable[[Path], None], days: int) -> Path:
    """The directory of that name made of ``what``: from the cache, or made now, or not at all.

    Others of that name, and not used for ``days``, are removed.
    """
    cache = Path(paths.cache())
    paths.private_directory(str(cache))
    made = cache / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        oldest = time.time() - days * DAY
        for old in cache.glob(f"{name}-*"):
            if old.stat().st_mtime < oldest or old.suffix == ".part":
                shutil.rmtree(old)
        if not made.exists():
            part = Path(f"{made}.part")
            part.mkdir(mode=0o755)
            make(part)
            os.utime(part)
            part.rename(made)
    return made


def _do(*command: str) -> str:
    # LC_ALL: what is made does not depend on who makes it
    environment = {**os.environ, "PATH": os.environ["PATH"] + SBIN, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    said = (done.stderr + done.stdout).strip().splitlines()[-8:]
    assert done.returncode == 0, "\n".join([" ".join(command)[:200], *said])
    return done.stdout
