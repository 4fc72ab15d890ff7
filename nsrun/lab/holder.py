"""The process that is a lab: it holds the namespaces and is the parent of every program in them.

Its death, by whatever signal, ends the lab: the programs by their parent-death signal, then the
namespaces, links and private mounts, which nothing refers to any more. On disk it leaves a
directory with its lock, log and description, which the next command removes.

Protocol: one JSON object on stdin (`Order`), then JSON lines on stdout: any number of
{"progress": percent, "summary": text}, then {"ready": description} or
{"error": {"doing", "cause", "hint"}}. When the reader goes away before that, the lab ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from nsrun import client
from nsrun.errors import GatewayError, NsrunError
from nsrun.lab import bake, namespaces, relays, topology, torrcs, web
from nsrun.lab.description import Description, Order
from nsrun.lab.programs import LOGS, RUN, Programs, bound, last_words, wait_for
from nsrun.lab.topology import EXITS, NODES
from nsrun.netns import Namespace

if TYPE_CHECKING:
    from types import FrameType

GATEWAY, SUPERVISOR = "gateway", "supervisor"
DNS, RESOLVER = "dns", "resolver"
GATEWAY_SECONDS = 60.0  # for its Tor to bootstrap; about 2 are usual


def main() -> None:
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may end up among the JSON lines
    order = Order(**json.load(sys.stdin))
    signal.signal(signal.SIGTERM, _end)
    programs = Programs()
    try:
        try:
            description = boot(order, programs, report)
            text = json.dumps(dataclasses.asdict(description))
            Path(order.directory, "lab.json").write_text(text)
            _tell(report, ready=True)
            report.close()
        except NsrunError as error:
            _tell(report, error={"doing": error.doing, "cause": error.cause, "hint": error.hint})
            sys.exit(1)
        while True:
            signal.pause()
    finally:
        programs.stop()


def boot(order: Order, programs: Programs, report: IO[str]) -> Description:
    """Bring up everything, and return when the network has carried a request."""

    def progress(percent: int, summary: str) -> None:
        _tell(report, progress=percent, summary=summary)

    progress(0, "making namespaces")
    namespaces.unshare(order.runtime)
    LOGS.mkdir()
    namespaces.connect()
    cache = Path(order.cache)
    with ThreadPoolExecutor() as pool:
        certificates = pool.submit(web.make_certificates, RUN)
        baked = bake.restore_or_make(cache, programs, progress)
        certificates.result()
    bundle = Path(order.directory, "ca-bundle.pem")
    _write_bundle(bundle, order.ca_bundle)
    _start_dns(programs)
    web.serve_internet(RUN / "web.pem", RUN / "web.key", LOGS / "web.log")
    web.serve_lan(Namespace(namespaces.path("lan")), LOGS / "lan.log")

    def network(seconds: float) -> tuple[str, Future[None] | None]:
        torrc = _start_tor(programs, progress)
        gateway = _start_gateway(order, programs, torrc, bundle) if order.gateway else None
        _await_traffic(programs, seconds, progress)
        return torrc, gateway

    try:
        torrc, gateway = network(15 if baked else 30)
    except NsrunError:
        if not baked:
            raise
        progress(1, "the bake is of no use, making a new one")
        programs.stop(*set(programs.pids) - {DNS, RESOLVER})
        bake.path(cache).unlink(missing_ok=True)
        baked = bake.restore_or_make(cache, programs, progress)
        torrc, gateway = network(30)
    if order.onion:
        progress(90, "waiting for the onion service")
        relays.await_onion(programs, 30)
    if gateway is not None:
        progress(95, "waiting for the gateway")
        _await_gateway(order, gateway)
    return Description(
        name=order.name,
        pid=os.getpid(),
        since=order.started,
        boot_seconds=round(time.time() - order.started, 2),
        baked=baked,
        gateway=gateway is not None,
        tor=relays.tor_version(),
        onion=relays.onion_address(),
        ca_bundle=str(bundle),
        exits={n.name: (n.outbound, n.outbound6) for n in EXITS},
        relays={n.name: (n.address, n.address6) for n in NODES},
        or_port=topology.OR_PORT,
        client_torrc=torrc,
        wires=topology.wires(order.name),
        programs={"holder": os.getpid(), **programs.pids},
    )


def _start_tor(programs: Programs, progress: bake.Progress) -> str:
    """Start relays and onion service; return what a client's torrc needs."""
    progress(70, "starting relays")
    authorities = relays.read_authorities()
    relays.start(programs, NODES, authorities, None)
    relays.start_service(programs, authorities)
    return torrcs.client_torrc(authorities)


def _await_traffic(programs: Programs, seconds: float, progress: bake.Progress) -> None:
    progress(80, "waiting for the first request through three relays")
    relays.await_log(programs, relays.SERVICE, "Bootstrapped 100%", seconds)
    wait_for(_carries_traffic, seconds, "a request through the network")


def _start_dns(programs: Programs) -> None:
    for name, text, netns in (
        (DNS, topology.inet_dns(), ""),
        (RESOLVER, topology.lan_dns(), "lan"),
    ):
        configuration = RUN / f"{name}.conf"
        configuration.write_text(text)
        # as root it would change its groups, which a user namespace does not let it
        nobody = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--")
        programs.start(name, *nobody, "dnsmasq", f"--conf-file={configuration}", netns=netns)


def _write_bundle(bundle: Path, system: str) -> None:
    """The certificates that programs in the lab trust: the system's and the lab's."""
    known = Path(system).read_bytes() if system else b""
    bundle.write_bytes(known + (RUN / "ca.pem").read_bytes())
    bundle.chmod(0o644)


def _start_gateway(order: Order, programs: Programs, torrc: str, bundle: Path) -> Future[None]:
    """Start the supervisor of the lab's gateway, as a machine on the LAN would.

    The result is there when it answers requests; its Tor may still be bootstrapping.
    """
    state = RUN / "gateway"
    request = {
        "name": order.name,
        "runtime": order.gateway,
        "state": str(state),
        "uplinks": [
            {
                "netns": namespaces.path("router"),
                "bridge": "lan0",
                "address": f"{topology.GATEWAY}/24",
                "router": topology.ROUTER,
                "address6": f"{topology.GATEWAY6}/64",
                "router6": topology.ROUTER6,
            }
        ],
        "torrc": torrc,
        "idle": 0,
        "ca_bundle": str(bundle),
    }
    (LOGS / f"{GATEWAY}.log").unlink(missing_ok=True)
    (LOGS / f"{GATEWAY}.log").symlink_to(f"../{state.name}/log")
    with (LOGS / f"{SUPERVISOR}.log").open("ab") as log:
        process = subprocess.Popen(
            bound((sys.executable, "-P", "-m", "nsrun.gateway"), "host"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    programs.adopt(SUPERVISOR, process)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(request).encode())
    ready: Future[None] = Future()
    threading.Thread(target=_follow, args=(process, ready), daemon=True).start()
    return ready


def _follow(gateway: subprocess.Popen[bytes], ready: Future[None]) -> None:
    """Read what the supervisor says for as long as it lives, lest it blocks on a full pipe."""
    assert gateway.stdout is not None
    for line in gateway.stdout:
        message = json.loads(line)
        if "ready" in message:
            ready.set_result(None)
        elif "error" in message:
            error = message["error"]
            ready.set_exception(GatewayError(error["doing"], error["cause"], error["hint"]))
    if not ready.done():
        hint = "ttp lab up --no-gateway starts the network alone"
        ready.set_exception(GatewayError("start the lab's gateway", last_words(SUPERVISOR), hint))


def _await_gateway(order: Order, ready: Future[None]) -> None:
    """Wait until the gateway's Tor has bootstrapped. Raises GatewayError."""
    try:
        ready.result(GATEWAY_SECONDS)
        request = {"do": "wait", "timeout": GATEWAY_SECONDS}
        _, descriptors = client.ask(client.connect(f"{order.gateway}/api"), request)
        os.close(descriptors["supervisor"])
    except TimeoutError:
        cause = f"no answer after {GATEWAY_SECONDS:g} s"
        raise GatewayError("start the lab's gateway", cause) from None
    except client.NotHereError:
        raise GatewayError("start the lab's gateway", last_words(SUPERVISOR)) from None
    except client.RefusedError as error:
        raise GatewayError(error.doing, error.cause, error.hint) from None


def _carries_traffic() -> bool:
    """Whether the oracle sees every exit: one without a descriptor yet resolves no name."""
    return all(_seen_from(node) for node in EXITS)


def _seen_from(node: topology.Node) -> bool:
    request = b"GET /ip HTTP/1.0\r\n\r\n"
    try:
        with _socks(torrcs.by_exit(node), 80) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
    except OSError:
        return False
    return answer.decode().endswith((f"\n{node.outbound}", f"\n{node.outbound6}"))


def _socks(host: str, port: int) -> socket.socket:
    """A connection through the onion service's Tor (RFC 1928, by name). Raises OSError."""
    connection = socket.create_connection(("127.0.0.1", topology.SOCKS_PORT), timeout=5)
    try:
        name = host.encode()
        connection.sendall(
            b"\x05\x01\x00\x05\x01\x00\x03" + bytes((len(name),)) + name + port.to_bytes(2)
        )
        reply = connection.makefile("rb", buffering=0)
        method, answer = reply.read(2), reply.read(10)
        if method != b"\x05\x00" or not answer or answer[1] != 0:
            raise ConnectionRefusedError(f"SOCKS answered {answer!r}")
    except BaseException:
        connection.close()
        raise
    return connection


def _tell(report: IO[str], **message: object) -> None:
    report.write(f"{json.dumps(message)}\n")


def _end(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
