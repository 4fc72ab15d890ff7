"""Docker's network driver ``ttp``: what dockerd asks, and what it is answered. Pure.

Source: the remote driver protocol, moby/libnetwork, docs/remote.md and drivers/remote/api/api.go.
dockerd says that there will be a network, then an endpoint (a container's place in it), then
that a container joins: for that we make a link, of which one end is in the gateway and dockerd
moves the other into the container, with an address and a default route of its own choice.

Who asks for what cannot be kept closed is refused, with the reason, which ``docker`` prints.
Each request may come twice, and one to take back may come for what is not there: no error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from ipaddress import IPv4Interface, IPv4Network, ip_address
from typing import Any, get_args

from nsrun.address import BLOCKS
from nsrun.errors import NsrunError, UsageError
from nsrun.spec import OWN_NETWORKS, Isolation, check_name

NAME = "ttp"  # of the driver, as in `docker network create --driver ttp`
GENERIC = "com.docker.network.generic"  # the options of `docker network create --opt`
INTERNAL = "com.docker.network.internal"
IPV6 = "com.docker.network.enable_ipv6"
PORTS = "com.docker.network.portmap"
OURS = "ttp."  # what our options begin with
PINNED = ("ttp.dns", "pinned")  # of a container: it was given --dns

# Before, an internal network does not keep dockerd from asking a resolver from the host, in clear:
# one on loopback (CVE-2024-29018, moby/moby#47832), and from 26.0 on one by IPv6.
ASKS_NOT_FROM_HOST, ASKS_IPV6_FROM_HOST = (26, 1, 3), (26, 0, 0)

DNS = "192.0.2.53"  # for --dns: nobody's (RFC 5737), and as good as any, since Tor answers

_ID = re.compile(r"[0-9a-zA-Z]{12,64}")


class RefusedError(NsrunError):
    """dockerd asks for what we do not do. The user of docker reads it."""


@dataclass(frozen=True)
class Engine:
    """What was found of the dockerd that asks, and of the container that is to join.

    ``version`` is empty if it cannot be told. ``resolvers`` are the host's, as dockerd sees them.
    ``links`` are those that the container has already, if it has a network namespace yet.
    """

    version: tuple[int, ...] = ()
    resolvers: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """``router`` is the address that Docker's IPAM chose for the gateway: none of ours has it."""

    gateway: str
    isolate: Isolation
    router: str


@dataclass(frozen=True)
class Endpoint:
    """``sandbox`` is where dockerd keeps the container's network namespace, once it has joined."""

    network: str
    address: str  # with prefix length
    pinned: bool = False
    sandbox: str = ""


@dataclass(frozen=True)
class State:
    """All that must be known after a restart: dockerd tells of a network once, when it is made."""

    networks: Mapping[str, Network] = field(default_factory=dict)
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)


@dataclass(frozen=True)
class Connect:
    """A link from the gateway into dockerd's own network namespace, which moves it on."""

    gateway: str
    name: str  # of the workload
    link: str
    address: str  # without prefix length
    isolate: Isolation


@dataclass(frozen=True)
class Disconnect:
    """Remove the workload ``name``, and both ends of its link."""

    gateway: str
    name: str


Effect = Connect | Disconnect
Answer = tuple[State, tuple[Effect, ...], dict[str, Any]]


def as_json(state: State) -> dict[str, Any]:
    return {"format": 1, **asdict(state)}


def from_json(found: Any) -> State:
    """What as_json() made. Raises ValueError."""
    try:
        if found["format"] != 1:
            raise ValueError(f"format {found['format']} is not known")
        networks = {key: Network(**one) for key, one in found["networks"].items()}
        endpoints = {key: Endpoint(**one) for key, one in found["endpoints"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not the driver's: {error!r}") from error
    if lost := {one.network for one in endpoints.values()} - networks.keys():
        raise ValueError(f"it lacks the networks {' '.join(sorted(lost))}")
    return State(networks, endpoints)


def workload(endpoint: str) -> str:
    """The name that a container has in ``ttp ps``; its own is not known here."""
    return f"docker-{endpoint[:12]}"


def link(endpoint: str) -> str:
    """The link on the host, for the moment until dockerd moves it: at most 15 bytes."""
    return f"{NAME}{endpoint[:12]}"


def answer(state: State, method: str, request: Any, engine: Engine) -> Answer | None:
    """The state after a request, what to do, and what to say; None if there is no such method.

    The state is to be kept before an effect that connects, and after one that only takes back.
    Raises RefusedError; then nothing is to be done.
    """
    if method not in METHODS:
        return None
    if not isinstance(request, dict):
        raise RefusedError(f"answer {method}", "the request is no object")
    if not request and METHODS[method] not in (_activate, _capabilities):
        # Docker 20.10 sends a request again without its body
        hint = "the driver ended over the first one; do it again"
        raise RefusedError(f"answer {method}", "the request is empty", hint)
    return METHODS[method](state, request, engine)


def gone(state: State, exists: Callable[[str], bool]) -> tuple[State, tuple[Disconnect, ...]]:
    """Leave for all containers that ended while nobody listened, by looking for their sandboxes."""
    left = [key for key, one in state.endpoints.items() if one.sandbox and not exists(one.sandbox)]
    effects: tuple[Disconnect, ...] = ()
    for endpoint in left:
        state, undo = _taken_out(state, endpoint)
        effects += undo
    return state, effects


def _activate(state: State, _request: dict[str, Any], _engine: Engine) -> Answer:
    return state, (), {"Implements": ["NetworkDriver"]}


def _capabilities(state: State, _request: dict[str, Any], _engine: Engine) -> Answer:
    return state, (), {"Scope": "local", "ConnectivityScope": "local"}


def _create_network(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    doing = "create the network"
    network = _identifier(doing, request, "NetworkID")
    options = _object(doing, request, "Options")
    gateway, isolate = _network_options(doing, _object(doing, options, GENERIC))
    if options.get(INTERNAL) is not True:
        cause = "it is not internal, so Docker would ask for names, and route, beside Tor"
        raise RefusedError(doing, cause, "add --internal (compose: internal: true)")
    if options.get(IPV6) or request.get("IPv6Data"):
        hint = "leave out --ipv6; IPv6 sites are reached all the same, by name"
        raise RefusedError(doing, "it would have IPv6, which this driver keeps closed", hint)
    router = _pool(doing, request.get("IPv4Data"))
    made = Network(gateway, isolate, router)
    return replace(state, networks={**state.networks, network: made}), (), {}


def _network_options(doing: str, options: dict[str, Any]) -> tuple[str, Isolation]:
    known = ("ttp.gateway", "ttp.isolate")
    for key, value in options.items():
        if key not in known:
            raise RefusedError(doing, f"there is no option {key}", f"there are {', '.join(known)}")
        if not isinstance(value, str):
            raise RefusedError(doing, f"the option {key} is no text")
    kinds = get_args(Isolation)
    if (isolate := options.get("ttp.isolate", kinds[0])) not in kinds:
        raise RefusedError(doing, f"ttp.isolate is {isolate!r}", f"one of {', '.join(kinds)}")
    try:
        return check_name("gateway", options.get("ttp.gateway", "default")), isolate
    except UsageError as error:
        raise RefusedError(doing, error.cause, "ttp.gateway is the NAME of a gateway") from error


def _pool(doing: str, pools: Any) -> str:
    """The router's address in the one pool of a network. Raises RefusedError."""
    try:
        [data] = pools
        pool, router = IPv4Network(data["Pool"]), IPv4Interface(data["Gateway"]).ip
    except (KeyError, TypeError, ValueError) as error:
        hint = "leave out --ipam-driver, and give one --subnet or none"
        raise RefusedError(doing, "it has not one IPv4 subnet with a gateway", hint) from error
    ours = [
        mine
        for block in BLOCKS
        for mine in (block.links, block.identities, block.connections, block.automap)
    ]
    if not any(map(pool.subnet_of, OWN_NETWORKS)) or any(map(pool.overlaps, ours)):
        hint = "choose one of 172.16.0.0/12 or 192.168.0.0/16 by --subnet, or leave it out"
        raise RefusedError(doing, f"the subnet {pool} is not free for containers", hint)
    return str(router)


def _delete_network(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    network = _identifier("delete the network", request, "NetworkID")
    effects: tuple[Effect, ...] = ()
    for endpoint in [key for key, one in state.endpoints.items() if one.network == network]:
        state, undo = _taken_out(state, endpoint)
        effects += undo
    networks = {key: one for key, one in state.networks.items() if key != network}
    endpoints = {key: one for key, one in state.endpoints.items() if one.network != network}
    return State(networks, endpoints), effects, {}


def _create_endpoint(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    doing = "connect the container"
    network, endpoint = _both(doing, state, request)
    interface = _object(doing, request, "Interface")
    options = _object(doing, request, "Options")
    _closed_ports(doing, options)
    for key in options:
        if key.startswith(OURS) and (key, options[key]) != PINNED:
            raise RefusedError(doing, f"there is no option {key}={options[key]}", "=".join(PINNED))
    if interface.get("AddressIPv6"):
        raise RefusedError(doing, "it would have an IPv6 address", "leave out --ip6")
    if interface.get("MacAddress"):
        cause = "it would have a MAC address of its own, and every link has the same"
        raise RefusedError(doing, cause, "leave out --mac-address; nobody sees it")
    try:
        address = str(IPv4Interface(interface.get("Address") or ""))
    except ValueError as error:
        raise RefusedError(doing, "Docker gives it no IPv4 address") from error
    made = Endpoint(network, address, PINNED[0] in options)
    return replace(state, endpoints={**state.endpoints, endpoint: made}), (), {}


def _join(state: State, request: dict[str, Any], engine: Engine) -> Answer:
    doing = "connect the container"
    network, key = _both(doing, state, request)
    endpoint = state.endpoints.get(key)
    sandbox = request.get("SandboxKey")
    if endpoint is None or endpoint.network != network:
        raise RefusedError(doing, f"the driver was not told of its endpoint {key[:12]}")
    if not isinstance(sandbox, str) or not sandbox.startswith("/"):
        raise RefusedError(doing, "it has no sandbox")
    _closed_ports(doing, _object(doing, request, "Options"))
    if engine.links:
        cause = f"it has another network already ({' '.join(engine.links)}), by which it could leak"
        raise RefusedError(doing, cause, "one network for a container")
    asked = [text for text in engine.resolvers if _asked_from_host(text, engine.version)]
    if asked and not endpoint.pinned:
        cause = f"this Docker would ask the host's resolver {asked[0]} for it, in clear"
        hint = f"--dns {DNS} --network name=NETWORK,driver-opt={'='.join(PINNED)}, or Docker 26.1.3"
        raise RefusedError(doing, cause, hint)
    told = state.networks[network]
    joined = replace(endpoint, sandbox=sandbox)
    address = str(IPv4Interface(endpoint.address).ip)
    state, again = _taken_out(state, key)
    effect = Connect(told.gateway, workload(key), link(key), address, told.isolate)
    said = {
        "InterfaceName": {"SrcName": effect.link, "DstPrefix": "eth"},
        "Gateway": told.router,
        # without it, and without a gateway, Docker adds an interface on its docker_gwbridge
        "DisableGatewayService": True,
    }
    return replace(state, endpoints={**state.endpoints, key: joined}), (*again, effect), said


def _leave(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    return (*_taken_out(state, _identifier("disconnect", request, "EndpointID")), {})


def _delete_endpoint(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    endpoint = _identifier("disconnect", request, "EndpointID")
    state, effects = _taken_out(state, endpoint)
    left = {key: one for key, one in state.endpoints.items() if key != endpoint}
    return replace(state, endpoints=left), effects, {}


def _ports_of(state: State, request: dict[str, Any], _engine: Engine) -> Answer:
    _closed_ports("connect the container", _object("connect the container", request, "Options"))
    return state, (), {}


def _information(state: State, _request: dict[str, Any], _engine: Engine) -> Answer:
    return state, (), {"Value": {}}


def _nothing(state: State, _request: dict[str, Any], _engine: Engine) -> Answer:
    return state, (), {}


METHODS: Mapping[str, Callable[[State, dict[str, Any], Engine], Answer]] = {
    "Plugin.Activate": _activate,
    "NetworkDriver.GetCapabilities": _capabilities,
    "NetworkDriver.CreateNetwork": _create_network,
    "NetworkDriver.DeleteNetwork": _delete_network,
    "NetworkDriver.CreateEndpoint": _create_endpoint,
    "NetworkDriver.DeleteEndpoint": _delete_endpoint,
    "NetworkDriver.EndpointOperInfo": _information,
    "NetworkDriver.Join": _join,
    "NetworkDriver.Leave": _leave,
    "NetworkDriver.ProgramExternalConnectivity": _ports_of,
    "NetworkDriver.RevokeExternalConnectivity": _nothing,
    "NetworkDriver.DiscoverNew": _nothing,
    "NetworkDriver.DiscoverDelete": _nothing,
}


def _taken_out(state: State, endpoint: str) -> tuple[State, tuple[Disconnect, ...]]:
    """An endpoint whose container has left, or never was in."""
    found = state.endpoints.get(endpoint)
    if found is None or not found.sandbox:
        return state, ()
    network = state.networks[found.network]
    left = {**state.endpoints, endpoint: replace(found, sandbox="")}
    return replace(state, endpoints=left), (Disconnect(network.gateway, workload(endpoint)),)


def _both(doing: str, state: State, request: dict[str, Any]) -> tuple[str, str]:
    """The network, which must be known, and the endpoint of a request. Raises RefusedError."""
    network = _identifier(doing, request, "NetworkID")
    if network not in state.networks:
        cause = f"the driver was not told of its network {network[:12]}, or lost its state"
        raise RefusedError(doing, cause, "remove the network and create it again")
    return network, _identifier(doing, request, "EndpointID")


def _closed_ports(doing: str, options: dict[str, Any]) -> None:
    if options.get(PORTS):
        cause = "it would publish a port, and nobody reaches a container that is behind Tor"
        raise RefusedError(doing, cause, "leave out --publish")


def _identifier(doing: str, request: dict[str, Any], key: str) -> str:
    found = request.get(key)
    if not isinstance(found, str) or not _ID.fullmatch(found):
        raise RefusedError(doing, f"{key} is none")
    return found


def _object(doing: str, request: dict[str, Any], key: str) -> dict[str, Any]:
    """The object at ``key``, empty if it is not there: Go leaves out, or says null."""
    found = request.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RefusedError(doing, f"{key} is no object")
    return found


def _asked_from_host(resolver: str, version: tuple[int, ...]) -> bool:
    """Whether a Docker of ``version`` asks this nameserver of resolv.conf(5) from the host.

    Of what is no address, or no version, it is assumed.
    """
    if version >= ASKS_NOT_FROM_HOST:
        return False
    try:
        address = ip_address(resolver.partition("%")[0])
    except ValueError:
        return True
    by_ipv6 = address.version == 6 and (not version or version >= ASKS_IPV6_FROM_HOST)
    return address.is_loopback or by_ipv6
