"""Docker's network driver as a server: its socket, its state on disk, its service."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import ROOT
from lab_helpers import TTP
from nsrun.containers import driver_client, driver_server, driver_service
from nsrun.containers.driver import Endpoint, Network, State
from nsrun.errors import NsrunError, UsageError
from town import eventually

SERVE = """
import signal, sys
import nsrun
nsrun.__version__ = sys.argv[2] or nsrun.__version__
from nsrun.containers import driver_server
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
driver_server.serve(sys.argv[1], 1)
"""


ENABLED = (
    "sockets.target.wants/ttp-docker-driver.socket",
    "docker.service.wants/ttp-docker-revive.service",
)
NETWORK = "a" * 64
CREATE = json.dumps(
    {
        "NetworkID": NETWORK,
        "Options": {"com.docker.network.internal": True},
        "IPv4Data": [{"Pool": "172.18.0.0/16", "Gateway": "172.18.0.1/16"}],
    }
).encode()
JOINED = State(
    {NETWORK: Network("default", "workload", "172.18.0.1")},
    {"b" * 64: Endpoint(NETWORK, "172.18.0.2/16", sandbox="/run/docker/netns/b")},
)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the driver of a test listens; its state is beside it."""
    monkeypatch.setenv("TTP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TTP_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(driver_client, "SOCKET", str(tmp_path / "ttp.sock"))
    return tmp_path / "ttp.sock"


@contextmanager
def serving(path: Path, *prefix: str, version: str = "") -> Iterator[subprocess.Popen[str]]:
    command = (*prefix, sys.executable, "-P", "-c", SERVE, str(path), version)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: answers(path) or process.poll() is not None, "the driver")
            yield process
        finally:
            process.terminate()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def said(path: Path, request: bytes) -> tuple[str, str]:
    """The status of an answer, and its text."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    return head.decode().split(" ")[1], body.decode()


def post(path: Path, method: str, body: bytes) -> tuple[str, str]:
    line = f"POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {len(body)}\r\n\r\n"
    return said(path, line.encode() + body)


def test_docker_is_answered_as_the_protocol_wants(path: Path) -> None:
    """A refusal is an answer; what is not there is 404, so that Docker does without."""
    with serving(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert post(path, "Plugin.Activate", b"") == ("200", '{"Implements": ["NetworkDriver"]}\n')
        assert post(path, "NetworkDriver.AllocateNetwork", b"{}")[0] == "404"
        code, text = post(path, "NetworkDriver.CreateNetwork", b'{"NetworkID": "/"}')
        assert (code, json.loads(text)["Err"]) == (
            "200",
            "cannot create the network: NetworkID is none",
        )
        for wrong in (b"{", b"\xff", b'"'):
            assert post(path, "NetworkDriver.Leave", wrong)[0] == "400"
        assert post(path, "NetworkDriver.Leave", b"[]")[1].count("no object") == 1
        for head in (b"Content-Length: 2000000", b"Transfer-Encoding: chunked"):
            line = b"POST /Plugin.Activate HTTP/1.1\r\n" + head + b"\r\n\r\n"
            assert said(path, line)[0] == "400"
        assert said(path, b"GET / HTTP/1.1\r\n\r\n")[0] == "501"
    assert not path.exists()


@pytest.mark.promise("P8")
def test_networks_survive_the_driver(path: Path) -> None:
    """Docker tells of a network once: after kill -9 of the driver it must still be known."""
    with serving(path) as process:
        assert post(path, "NetworkDriver.CreateNetwork", CREATE) == ("200", "{}\n")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
    with serving(path):  # in place of the dead one's socket
        assert list(driver_client.status()["networks"]) == [NETWORK]
        request = json.dumps({"NetworkID": NETWORK}).encode()
        assert post(path, "NetworkDriver.DeleteNetwork", request) == ("200", "{}\n")
        assert driver_client.status()["networks"] == {}


def test_there_is_one_driver(path: Path) -> None:
    """A second one would overwrite the state of the first, and take its socket."""
    with serving(path), serving(path) as second:
        assert second.wait(10) == 1
        assert second.stderr
        assert "cannot start the driver: it runs" in second.stderr.read()
        assert answers(path)


def test_what_is_not_the_driver_s_is_kept(path: Path) -> None:
    """A file in the way, and a socket on which another program listens."""
    path.write_text("mine")
    with pytest.raises(UsageError, match="something else, no socket"):
        driver_server.listen(str(path))
    assert path.read_text() == "mine"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(UsageError, match="another one listens there"):
            driver_server.listen(str(path))
        assert answers(path)


def test_a_service_manager_listens_for_the_driver(path: Path) -> None:
    """With its socket, which stays when the driver ends: Docker finds it at any time."""
    with serving(path, "systemd-socket-activate", f"--listen={path}") as process:
        assert post(path, "Plugin.Activate", b"")[0] == "200"
        process.terminate()
        process.wait()
        assert path.exists()


def test_damaged_state_is_not_overwritten(path: Path) -> None:
    """It is the only place where it says which gateway a network leads to."""
    file = driver_server.state_file()
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(NsrunError, match="read the driver's state") as caught:
        driver_server.read_state(file)
    assert str(file) in caught.value.hint
    driver_server.write_state(file, JOINED)
    assert driver_server.read_state(file) == JOINED
    assert sorted(entry.name for entry in file.parent.iterdir()) == [file.name]


def test_status_says_why_there_is_none(path: Path) -> None:
    """It does not run, it is of another version, it is no driver."""
    with pytest.raises(UsageError, match="it does not run"):
        driver_client.status()
    with serving(path, version="9"), pytest.raises(NsrunError, match="it is of version 9, this"):
        driver_client.status()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        connection = socket.socket(socket.AF_UNIX)
        with connection, pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver_client, "PATIENCE", 0.1)
            with pytest.raises(NsrunError, match="it does not answer"):
                driver_client.status()


def test_systemd_understands_every_line_of_the_units(tmp_path: Path) -> None:
    """A socket, and what is started by it; of a line that it does not know it complains."""
    for name in driver_service.UNITS:
        text = (ROOT / "nsrun" / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/ttp", TTP))
    units = [str(tmp_path / name) for name in driver_service.UNITS]
    command = ("systemd-analyze", "verify", *units)
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_the_service_is_installed_and_taken_back(tmp_path: Path, as_root: list[str]) -> None:
    """Into another system's files, which systemctl then finds enabled; uninstalled, all is gone."""

    def do(verb: str) -> subprocess.CompletedProcess[str]:
        command = [*as_root, TTP, "docker", "driver", verb, "--root", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    def files() -> list[str]:
        return sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if not f.is_dir())

    assert (done := do("uninstall")).returncode == 2
    assert "it is not installed" in done.stderr
    for _ in range(2):  # again: of another version, for instance
        assert (done := do("install")).returncode == 0, done.stderr
    enabled = [f"etc/systemd/system/{name}" for name in ENABLED]
    units = [f"etc/systemd/system/{name}" for name in driver_service.UNITS]
    assert files() == sorted([*enabled, *units])
    assert f"ExecStart={TTP} docker driver serve" in (tmp_path / units[1]).read_text()
    assert (done := do("uninstall")).returncode == 0, done.stderr
    assert files() == []


@pytest.mark.root
def test_without_systemd_there_is_no_service(as_root: list[str]) -> None:
    """And it is said what to do instead; nothing is written."""
    hidden = 'mount -t tmpfs none /run && exec "$@"'
    command = [*as_root, "unshare", "--mount", "sh", "-c", hidden, "sh", TTP, "docker", "driver"]
    done = subprocess.run([*command, "install"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "systemd does not run here\nhint: run `ttp docker driver serve`" in done.stderr
    assert not Path("/etc/systemd/system/ttp-docker-driver.socket").exists()


def test_a_user_is_told_that_only_root_can(as_user: list[str]) -> None:
    """To serve, to install, and to ask."""
    for verb in ("serve", "install", "uninstall"):
        command = [*as_user, TTP, "docker", "driver", verb]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert "only root can" in done.stderr
