"""A guest who speaks to root's gateway by hand, and not as the client does.

guest.py GATEWAY MODE     prints one line, "plugged in" or why not; ends with its standard input

Modes: ``new`` namespaces as they should be; those of the ``host``; ``linked`` to a third one;
``twice`` by two requests; ``mute`` when it is told to make them, and then it dies.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from nsrun import client, enter

ADD_LINK = "ip link add one type veth peer name two"


def ask(name: str, **changes: object) -> socket.socket:
    """A request to run something; what comes back is one line at a time, by ``hear``."""
    server = socket.socket(fileno=client.reach(name).detach())
    request = client.wish("run", ["-g", name, "--", "guest"], name, client.defaults())
    server.sendall(json.dumps({**request, **changes}).encode() + b"\n")
    return server


def hear(server: socket.socket) -> dict[str, object]:
    line = b""
    while not line.endswith(b"\n"):
        byte, *_ = server.recvmsg(1, 1024)
        if not byte:
            return {}
        line += byte
    return dict(json.loads(line))


def main(gateway: str, mode: str) -> None:
    requests = [ask(gateway) for _ in range(2 if mode == "twice" else 1)]
    for server in requests:
        assert "perform" in hear(server)
    if mode == "mute":
        os.kill(os.getpid(), 9)
    if mode != "host":
        enter.own_network()
    if mode == "linked":
        subprocess.run(ADD_LINK.split(), check=True)
    for server in requests:
        server.sendall(b"\n")
        answer = hear(server)
        error = answer.get("error", {"cause": "plugged in"})
        assert isinstance(error, dict)
        print(error["cause"], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
