"""What exits are asked, and what their answers may do: by the log of the internet's DNS server."""

from __future__ import annotations

import uuid

import pytest

from lab_helpers import Lab
from nsrun.lab import topology

pytestmark = pytest.mark.lab

PYTHON = "/usr/bin/python3"
ASK = """
import socket, struct, sys
for question in sys.argv[1:]:
    kind, _, name = question.partition(":")
    labels = b"".join(bytes((len(l),)) + l.encode() for l in name.split(".")) + b"\\0"
    query = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">2H", int(kind), 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(20)
        udp.sendto(query, ("9.9.9.9", 53))
        udp.recv(512)
"""
A, PTR = 1, 12


def asked(lab: Lab) -> str:
    """Every question that the lab's internet has heard."""
    done = lab.ttp("lab", "logs", "dns", "--lab", lab.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.promise("P2", "P5")
def test_what_is_tors_own_or_private_is_asked_of_no_exit(lab: Lab) -> None:
    """Names in .exit and .onion, whose the LAN's addresses are; others are asked, as they must."""
    mark = uuid.uuid4().hex
    own = (f"{A}:{mark}-a.exit", f"{A}:{mark}-b.onion")
    lan = [f"{n}.77.168.192.in-addr.arpa" for n in (1, 80)] + ["5.0.192.10.in-addr.arpa"]
    control = f"{mark}-c.test"
    before = asked(lab)
    questions = (*own, *(f"{PTR}:{name}" for name in lan), f"{A}:{control}")
    done = lab.run(PYTHON, "-c", ASK, *questions)
    assert done.returncode == 0, done.stderr
    heard = asked(lab)[len(before) :]
    assert control in heard.lower()
    for word in (f"{mark}-a", f"{mark}-b", "168.192.in-addr", "192.168.", "10.192."):
        assert word not in heard.lower(), heard


@pytest.mark.promise("P5")
def test_an_exits_answer_with_a_private_address_is_refused(lab: Lab) -> None:
    """DNS rebinding: a name whose owner says that it is a machine of our LAN."""
    name = topology.REBIND
    lookup = ("getent", "ahostsv4", name)
    without = lab.do(*lab.inside_argv("host", *lookup))
    assert topology.LAN_WEB in without.stdout, "control: that is what it says"
    found = lab.run(*lookup)
    assert found.returncode == 2, found.stdout
    fetched = lab.run("curl", "-sS", "--max-time", "20", f"http://{name}/")
    assert fetched.returncode != 0
    assert "LAN web server" not in fetched.stdout
