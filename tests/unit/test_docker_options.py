"""What a ``docker run`` line may not ask for behind Tor, and the image that holds a network."""

from __future__ import annotations

import os
import socket
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from lab_helpers import TTP
from nsrun import paths
from nsrun.containers import doors, pause
from nsrun.containers.options import check_made, misplaced, parse
from nsrun.errors import UsageError


def test_a_line_is_told_apart_as_docker_does() -> None:
    """Flags in clusters, values joined and apart, what is the network's, image and command."""
    found = parse(
        [
            *("-dit", "-e", "A=1", "-v/data:/d", "-vnamed:/n", "--name=one", "--rm", "-h", "box"),
            *(
                "--add-host",
                "a:1.2.3.4",
                "--restart",
                "always",
                "--mount",
                "type=BIND,src=/s,dst=/x",
            ),
            *("--cap-add", "sys_nice", "--privileged=false", "-itu", "root", "--pull", "missing"),
            *("image:tag", "-v", "--net", "host"),
        ]
    )
    assert found.image == "image:tag"
    assert found.command == ("-v", "--net", "host")
    assert (found.name, found.hostname, found.pull) == ("one", "box", "missing")
    assert found.hosts == ("a:1.2.3.4",)
    assert found.binds == ("/data", "/s")
    assert found.volumes == ("named",)
    kept = " ".join(found.kept)
    assert kept.startswith(
        "-d -i -t -e A=1 -v /data:/d -v named:/n --name=one --rm --restart always"
    )
    assert "--privileged=false -i -t -u root" in kept
    assert "box" not in kept
    assert parse(["--", "-odd"]).image == "-odd"


@pytest.mark.parametrize(
    ("option", "why"),
    [
        *(("-i", "docker's"), ("--volume", "docker's"), ("--privileged", "docker's")),
        *(("--strict", "Docker confines it"), ("--timeout", "docker's to end"), ("--stirct", "")),
    ],
)
def test_who_forgets_the_dashes_is_told_so(option: str, why: str) -> None:
    """Options of docker's, and of ttp run, stand out from mistakes; ttp's own are not asked for."""
    line = [TTP, "docker", "run", option, "image"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert done.returncode == 125
    told = (
        f"ttp: cannot run a container with {option}: " if why else "ttp: no such option: --stirct"
    )
    assert done.stderr.startswith(told)
    assert why in done.stderr
    assert misplaced("--socks") == ("", "")


@pytest.mark.promise("P3", "P6", "P10")
@pytest.mark.parametrize(
    "line",
    [
        *("--network bridge", "--net=host", "--net container:x", "-p 80:80", "-P", "--publish-all"),
        *("--expose 80", "--link x", "--ip 10.0.0.1", "--mac-address 02::1", "--dns 9.9.9.9"),
        *("--dns-search x", "--dns-opt ndots:1", "--privileged", "--privileged=true", "-itP"),
        *("--cap-add NET_ADMIN", "--cap-add=ALL", "--cap-add CAP_NET_RAW", "--cap-add sys_admin"),
        *("--pid host", "--pid=container:x", "--ipc=host", "--ipc container:x", "--userns host"),
        *("--log-driver syslog", "--log-driver=gelf", "--runtime kata", "--volumes-from x"),
        *("--mount type=npipe,src=/a,dst=/b", "--device /dev/dri/../net/tun"),
        *("--device /dev/net/tun", "--device=/dev/mem:/dev/x", "--device-cgroup-rule c"),
        *("--sysctl net.ipv4.ip_forward=1", "--security-opt seccomp=unconfined"),
        *("--security-opt apparmor:unconfined", "--use-api-socket", "--volume-driver nfs"),
        "--mount type=volume,dst=/x,volume-driver=nfs",
        '--mount type=volume,dst=/x,"volume-opt=o=addr=192.0.2.1,rw"',
        *("--pull sometimes", "--nosuchoption", "--nosuchoption=1", "-z", "-itz"),
    ],
)
def test_what_would_break_a_promise_is_refused_by_name(line: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse([*line.split(" "), "image"])
    option = line.split(" ")[0].split("=")[0].lstrip("-")
    assert option[:3] in str(refused.value) or len(option) < 4, refused.value
    assert parse(["image", *line.split(" ")]).command == tuple(line.split(" "))  # control: its own


def test_what_is_missing_is_said() -> None:
    """An image; a value."""
    for words, cause in (
        *((["--rm"], "no image"), ([""], "no image"), (["-v"], "needs a value")),
        (["--mount", "\ntype=bind", "image"], "--mount"),
    ):
        with pytest.raises(UsageError, match=cause):
            parse(words)


@pytest.mark.promise("P10")
def test_one_that_is_there_is_judged_likewise() -> None:
    """By what docker inspect tells of it."""
    plain = dict.fromkeys(("CapAdd", "SecurityOpt", "Devices"))
    plain |= {"PidMode": "", "IpcMode": "private", "Privileged": False}
    plain |= {"LogConfig": {"Type": "json-file"}}
    check_made(plain, "runc")
    check_made({**plain, "Runtime": "runc", "UsernsMode": "", "Sysctls": None}, "runc")
    for key, value in (
        ("Privileged", True),
        ("CapAdd", ["NET_ADMIN"]),
        ("PidMode", "host"),
        ("Devices", [{"PathOnHost": "/dev/net/tun"}]),
        ("LogConfig", {"Type": "gelf"}),
        ("DeviceCgroupRules", ["a *:* rwm"]),
        ("UsernsMode", "host"),
        ("Runtime", "kata"),
        ("VolumesFrom", ["other"]),
        ("VolumeDriver", "nfs"),
    ):
        with pytest.raises(UsageError):
            check_made({**plain, key: value}, "runc")


@pytest.mark.promise("P6")
def test_no_door_is_mounted(tmp_path: Path) -> None:
    """A socket, what is in /run, /proc, /sys or /dev, what has that below it; by any name."""
    (tmp_path / "link").symlink_to("/run")
    (tmp_path / "plain").write_text("")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    shut = ["/", "/run", "/var/run/docker.sock", "/proc/1", "/sys", "/dev/shm", "/run/../run"]
    shut += [str(tmp_path / name) for name in ("link", "link/x", "socket", "root/x")]
    shut += [str(Path(paths.state()).parent)]
    for path in shut:
        with pytest.raises(UsageError):
            doors.check([path], [str(tmp_path / "root")])
    doors.check([str(tmp_path / "plain"), str(tmp_path / "new"), "/etc"], [str(tmp_path / "root")])


@pytest.mark.promise("P6")
def test_no_volume_is_a_door_by_another_name() -> None:
    """A path of the host's, another machine's files, another driver's; plain ones may be."""
    bind = {"type": "none", "o": "bind,ro", "device": "/run"}
    for driver, options in (("nfs", {}), ("local", bind), ("local", {"type": "nfs", "o": "rw"})):
        with pytest.raises(UsageError):
            doors.check_volume({"Name": "v", "Driver": driver, "Options": options}, [])
    for plain in (None, {}, {"type": "tmpfs", "device": "tmpfs"}, {**bind, "device": "/srv"}):
        doors.check_volume({"Name": "v", "Driver": "local", "Options": plain}, [])


def test_the_image_is_always_the_same() -> None:
    """So that its tag says what is in it; other archives can be read by anybody."""
    made = pause.image("x86_64")
    assert made == pause.image("x86_64") != pause.image("aarch64")
    with tarfile.open(fileobj=BytesIO(made.archive)) as archive:
        assert archive.getnames()[0] == "manifest.json"
        layer = archive.extractfile("layer.tar")
        assert layer is not None
        with tarfile.open(fileobj=layer) as inner:
            [program] = inner.getmembers()
    assert (program.name, program.mode, program.uid) == ("pause", 0o755, 0)


def test_its_program_waits(tmp_path: Path) -> None:
    """It does nothing until it is killed, and is a program as others see it."""
    program = tmp_path / "pause"
    program.write_bytes(pause.program(os.uname().machine))
    program.chmod(0o755)
    with subprocess.Popen([program]) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "State:\tS (sleeping)" in status
        process.terminate()
        assert process.wait(5) == -15
