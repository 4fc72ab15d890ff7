"""The machine itself: what the other tests here stand on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from lab_helpers import PLAIN_ORACLE
from machine import Machine
from nsrun.lab import topology

CURL = ("curl", "-sS4", "--max-time", "20")


def test_it_is_a_host_of_the_lan_with_resolved(machine: Machine) -> None:
    """Names by the LAN's resolver, over resolved's stub; the lab's internet, in clear."""
    assert machine.path("/etc/resolv.conf").readlink().name == "stub-resolv.conf"
    asked = machine.run("getent", "ahostsv4", "nas.lan", check=True)
    assert asked.stdout.split()[0] == topology.LAN_WEB
    told = json.loads(machine.run(*CURL, PLAIN_ORACLE, check=True).stdout)
    assert told == {"IsTor": False, "IP": topology.WAN}
    by_tls = machine.run(*CURL, "https://check.torproject.org/api/ip", user="alice", check=True)
    assert json.loads(by_tls.stdout) == told


def test_ttp_is_on_its_path(machine: Machine) -> None:
    """Of this checkout, with its unit, its man pages and its completion."""
    assert machine.run("ttp", "--version", user="alice", check=True).stdout.startswith("ttp ")
    assert machine.run("systemctl", "cat", "ttp-gateway@default", check=True).returncode == 0
    share = "/usr/local/share"
    assert machine.path(f"{share}/man/man1/ttp-run.1").read_text().startswith(".TH TTP-RUN 1 ")
    loads = f". {share}/bash-completion/completions/ttp && complete -p ttp"
    assert machine.run("bash", "-c", loads, check=True).stdout.endswith(" ttp\n")
    assert machine.path(f"{share}/zsh/site-functions/_ttp").read_text().startswith("#compdef ttp")


def test_its_sshd_answers_the_lan(machine: Machine, tmp_path: Path) -> None:
    """A login by key, from another machine: a session of systemd's, of its user alone."""
    key = tmp_path / "key"
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key), check=True)
    install = "umask 77; mkdir ~/.ssh; cat >~/.ssh/authorized_keys"
    machine.run("sh", "-c", install, user="bob", text=Path(f"{key}.pub").read_text(), check=True)
    options = (
        "-F",
        "none",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        f"UserKnownHostsFile={key}.known",
    )
    login = ("ssh", "-q", *options, "-i", str(key), f"bob@{topology.HOST}", "id", "-un")
    asked = machine.lab.do(*machine.lab.inside_argv("lan", *login))
    machine.run("rm", "-r", "/home/bob/.ssh", check=True)
    assert asked.stdout == "bob\n", asked.stderr


def test_its_state_tells_what_was_changed(machine: Machine) -> None:
    """A table, an address, a mount, units, a file; and nothing when they are gone."""
    before = machine.state()
    assert machine.changes(before) == ""
    for change, undo, told in (
        ("nft add table inet mine", "nft delete table inet mine", "table inet mine"),
        ("ip address add 192.0.2.1/32 dev lo", "ip address del 192.0.2.1/32 dev lo", "192.0.2.1"),
        ("mount -t tmpfs none /mnt", "umount /mnt", "/mnt none tmpfs"),
        ("systemctl stop ssh", "systemctl start ssh", "-ssh.service active"),
        (
            "systemctl -q mask ufw",
            "systemctl -q unmask ufw",
            "ufw.service lrwxrwxrwx root /dev/null",
        ),
        ("echo >>/etc/hosts", "sed -i $d /etc/hosts", "/etc/hosts"),
    ):
        machine.run(*change.split() if ">" not in change else ("sh", "-c", change), check=True)
        assert told in machine.changes(before, 0), change
        machine.run(*undo.split(), check=True)
        assert machine.changes(before) == "", undo


def test_a_reboot_and_a_crash_leave_the_disk_and_nothing_else(machine: Machine) -> None:
    """Rules, settings, /run and processes are gone; files and enabled units are there."""
    for end in (machine.reboot, machine.crash):
        boot = machine.run("cat", "/proc/sys/kernel/random/boot_id").stdout
        machine.run("sh", "-c", "echo kept >/root/kept; echo lost >/run/lost", check=True)
        machine.run("nft", "add", "table", "inet", "mine", check=True)
        machine.run("sysctl", "-qw", "net.ipv4.ip_forward=1", check=True)
        end()
        assert machine.run("cat", "/proc/sys/kernel/random/boot_id").stdout != boot
        assert machine.run("cat", "/root/kept", check=True).stdout == "kept\n"
        assert not machine.path("/run/lost").exists()
        assert machine.run("nft", "list", "ruleset").stdout == ""
        assert machine.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "0\n"
        machine.run(*CURL, PLAIN_ORACLE, check=True)
    machine.run("rm", "/root/kept", check=True)
