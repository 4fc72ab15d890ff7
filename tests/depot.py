"""What everyday programs fetch from: package indexes and a repository on the lab's web, and ssh.

As a program, in the lab's `inet`: fills /run/lab/www, starts an ssh server, prints one JSON line
(``{"key": …, "known_host": …}``: a private key that may log in, the server's line for
known_hosts), and ends, with all of it gone, at the end of its standard input.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nsrun import linux
from nsrun.lab.programs import RUN, wait_for

SITE = "https://www.test"
WWW = RUN / "www"
SSH = RUN / "ssh"
SSH_PORT = 2222
NOBODY = 65534
HELLO = "hello from the lab"


def main() -> None:
    shutil.rmtree(WWW, ignore_errors=True)  # of one that was killed
    shutil.rmtree(SSH, ignore_errors=True)
    WWW.mkdir()
    try:
        make_wheel(WWW / "pip")
        make_npm_package(WWW / "npm")
        make_debian_package(WWW / "apt")
        make_repository(WWW / "git" / "hello.git")
        answer = make_keys()
        server = start_ssh()
        try:
            print(json.dumps(answer), flush=True)
            sys.stdin.read()
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(WWW)
        shutil.rmtree(SSH, ignore_errors=True)


def make_wheel(directory: Path) -> None:
    """A package index with one wheel (PEP 427, PEP 503)."""
    index = directory / "simple" / "lab-hello"
    index.mkdir(parents=True)
    wheel = "lab_hello-1.0-py3-none-any.whl"
    (index / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>\n')
    info = "lab_hello-1.0.dist-info"
    files = {
        "lab_hello.py": f"print({HELLO!r})\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: lab-hello\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(index / wheel, "w") as archive:
        for name, text in (*files.items(), (f"{info}/RECORD", record)):
            archive.writestr(name, text)


def make_npm_package(directory: Path) -> None:
    """A registry with one package: its document and its tarball."""
    directory.mkdir()
    package = {"name": "lab-hello", "version": "1.0.0", "main": "index.js"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (
            ("package/package.json", json.dumps(package)),
            ("package/index.js", f"console.log({HELLO!r})\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (directory / "lab-hello-1.0.0.tgz").write_bytes(buffer.getvalue())
    checksum = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    where = {
        "tarball": f"{SITE}/npm/lab-hello-1.0.0.tgz",
        "integrity": f"sha512-{checksum}",
    }
    document = {
        "name": "lab-hello",
        "dist-tags": {"latest": "1.0.0"},
        "versions": {"1.0.0": {**package, "dist": where}},
    }
    (directory / "lab-hello").write_text(json.dumps(document))


def make_debian_package(directory: Path) -> None:
    """A flat repository (sources.list(5)) with one package."""
    tree = directory / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = (
        "Package: lab-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: Lab <lab@www.test>\n"
        "Description: hello\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    hello = tree / "usr" / "share" / "lab-hello"
    hello.parent.mkdir(parents=True)
    hello.write_text(f"{HELLO}\n")
    package = directory / "lab-hello_1.0_all.deb"
    run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(package))
    content = package.read_bytes()
    entry = {
        "Filename": f"./{package.name}",
        "Size": len(content),
        "SHA256": hashlib.sha256(content).hexdigest(),
    }
    index = control + "".join(f"{key}: {value}\n" for key, value in entry.items())
    (directory / "Packages").write_text(index)


def make_repository(bare: Path) -> None:
    """A repository of one commit, ready for ``git clone`` over plain HTTP (dumb) and over ssh."""
    commit = (
        "commit refs/heads/main\ncommitter Lab <lab@www.test> 0 +0000\ndata 5\nfirst\n"
        f"M 100644 inline hello\ndata {len(HELLO) + 1}\n{HELLO}\n\n"
    )
    run("git", "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    run("git", "-C", str(bare), "fast-import", "--quiet", text=commit)
    run("git", "-C", str(bare), "update-server-info")


def make_keys() -> dict[str, str]:
    home = SSH / "home"
    (home / ".ssh").mkdir(parents=True)
    home.chmod(0o700)
    run("dropbearkey", "-t", "ed25519", "-f", str(SSH / "host"))
    public = run("dropbearkey", "-y", "-f", str(SSH / "host"))
    host_key = next(line for line in public.splitlines() if line.startswith("ssh-ed25519"))
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(SSH / "client"))
    authorized = home / ".ssh" / "authorized_keys"
    authorized.write_text((SSH / "client.pub").read_text())
    authorized.chmod(0o600)
    return {
        "key": (SSH / "client").read_text(),
        "known_host": f"[www.test]:{SSH_PORT} {host_key}\n",
    }


def start_ssh() -> subprocess.Popen[bytes]:
    """A server for one user, who is himself: as root of a user namespace it could become nobody."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    for name, text in (
        ("passwd", f"lab:x:{NOBODY}:{NOBODY}::{SSH / 'home'}:/bin/bash\n"),
        ("group", f"lab:x:{NOBODY}:\n"),  # without tty: a terminal could not be given to that
    ):
        (SSH / name).write_text(text)
        linux.mount(str(SSH / name), f"/etc/{name}", flags=linux.MS_BIND)
    server = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--"),
            *("dropbear", "-F", "-E", "-s", "-r", str(SSH / "host")),
            *("-p", str(SSH_PORT), "-P", str(SSH / "pid")),
        ],
        stdin=subprocess.DEVNULL,
    )
    wait_for((SSH / "pid").exists, 5, "the ssh server")
    return server


def run(*command: str, text: str = "") -> str:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
