"""What Docker's network driver answers, what it refuses, and what it remembers."""

from __future__ import annotations

from typing import Any

import pytest

from nsrun.containers import driver
from nsrun.containers.driver import Connect, Disconnect, Endpoint, Engine, Network, State
from nsrun.containers.driver_client import state
from nsrun.errors import NsrunError

NETWORK, ENDPOINT = "a" * 64, "0123456789ab" + "c" * 52
SANDBOX = "/var/run/docker/netns/0123456789ab"
NEW, OLD = (26, 1, 3), (20, 10, 24)
SEEN_BY_DOCKER = Engine(NEW, ("192.168.77.53",))


def create(**changes: Any) -> dict[str, Any]:
    """What Docker 20.10 sends for `docker network create --driver ttp --internal`."""
    options = {"com.docker.network.enable_ipv6": False, "com.docker.network.generic": {}}
    options["com.docker.network.internal"] = True
    pools = [{"AddressSpace": "LocalDefault", "Pool": "172.18.0.0/16", "Gateway": "172.18.0.1/16"}]
    request = {"NetworkID": NETWORK, "Options": options, "IPv4Data": pools, "IPv6Data": []}
    for key, value in changes.items():
        where = request if key in request else options
        where[key if key in request else f"com.docker.network.{key}"] = value
    return request


def connect(**changes: Any) -> dict[str, Any]:
    interface = {"Address": "172.18.0.2/16", "AddressIPv6": "", "MacAddress": ""}
    request = {"NetworkID": NETWORK, "EndpointID": ENDPOINT, "Interface": interface, "Options": {}}
    for key, value in changes.items():
        (request if key in request else interface)[key] = value
    return request


def join(**changes: Any) -> dict[str, Any]:
    ids = {"NetworkID": NETWORK, "EndpointID": ENDPOINT, "SandboxKey": SANDBOX}
    return {**ids, "Options": {"com.docker.network.portmap": []}, **changes}


IDS = {"NetworkID": NETWORK, "EndpointID": ENDPOINT}


def asked(
    before: State, method: str, request: object, engine: Engine = SEEN_BY_DOCKER
) -> tuple[State, tuple[driver.Effect, ...], dict[str, Any]]:
    found = driver.answer(before, f"NetworkDriver.{method}", request, engine)
    assert found is not None
    return found


def refusal(before: State, method: str, request: object, engine: Engine = SEEN_BY_DOCKER) -> str:
    with pytest.raises(driver.RefusedError) as caught:
        asked(before, method, request, engine)
    return f"{caught.value}; {caught.value.hint}"


CREATED = asked(State(), "CreateNetwork", create())[0]
CONNECTED = asked(CREATED, "CreateEndpoint", connect())[0]
JOINED = asked(CONNECTED, "Join", join())[0]


def test_a_container_s_life() -> None:
    """From the network to its end; each answer is what the protocol wants."""
    assert driver.answer(State(), "Plugin.Activate", {}, Engine()) == (
        *(State(), ()),
        {"Implements": ["NetworkDriver"]},
    )
    assert asked(State(), "GetCapabilities", {})[2]["Scope"] == "local"
    assert CREATED.networks == {NETWORK: Network("default", "workload", "172.18.0.1")}
    found, effects, said = asked(CREATED, "CreateEndpoint", connect())
    assert (effects, said) == ((), {}), "an address that Docker gave must not be given back"
    _, effects, said = asked(found, "Join", join())
    name, link = "docker-0123456789ab", "ttp0123456789ab"
    assert effects == (Connect("default", name, link, "172.18.0.2", "workload"),)
    assert said == {
        "InterfaceName": {"SrcName": link, "DstPrefix": "eth"},
        "Gateway": "172.18.0.1",
        "DisableGatewayService": True,
    }
    left, effects, said = asked(JOINED, "Leave", IDS)
    assert (effects, said) == ((Disconnect("default", name),), {})
    ended, effects, _ = asked(left, "DeleteEndpoint", IDS)
    assert (ended, effects) == (CREATED, ())
    assert asked(ended, "DeleteNetwork", IDS)[0] == State()


def test_every_request_may_come_twice() -> None:
    """Docker sends one again when the driver died before it answered."""
    assert asked(CREATED, "CreateNetwork", create())[0] == CREATED
    assert asked(CONNECTED, "CreateEndpoint", connect())[0] == CONNECTED
    again, effects, _ = asked(JOINED, "Join", join())
    assert again == JOINED
    assert [type(effect) for effect in effects] == [Disconnect, Connect]
    for method in ("Leave", "DeleteEndpoint", "DeleteNetwork"):
        assert asked(State(), method, IDS) == (State(), (), {})
    assert asked(CREATED, "Leave", IDS) == (CREATED, (), {})


def test_what_goes_takes_its_links_along() -> None:
    """An endpoint, and a network, of a container that never left."""
    disconnect = (Disconnect("default", "docker-0123456789ab"),)
    assert asked(JOINED, "DeleteEndpoint", IDS) == (CREATED, disconnect, {})
    assert asked(JOINED, "DeleteNetwork", IDS) == (State(), disconnect, {})
    gone = driver.gone(JOINED, lambda sandbox: sandbox != SANDBOX)
    assert gone == (CONNECTED, disconnect)
    assert driver.gone(JOINED, lambda _: True) == (JOINED, ())


def test_options_of_a_network_say_which_gateway() -> None:
    """And how finely its containers are isolated."""
    options = {"ttp.gateway": "work", "ttp.isolate": "destination"}
    found = asked(State(), "CreateNetwork", create(generic=options))[0]
    assert found.networks[NETWORK] == Network("work", "destination", "172.18.0.1")
    both = asked(asked(found, "CreateEndpoint", connect())[0], "Join", join())[1]
    assert (both[0].gateway, both[0].isolate) == ("work", "destination")  # type: ignore[union-attr]


@pytest.mark.promise("P1", "P2", "P5")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"internal": False}, "add --internal"),
        ({"enable_ipv6": True}, "leave out --ipv6"),
        ({"IPv6Data": [{"Pool": "fd00::/64"}]}, "leave out --ipv6"),
        ({"IPv4Data": []}, "it has not one IPv4 subnet"),
        ({"IPv4Data": [{"Pool": "172.18.0.0/16"}]}, "it has not one IPv4 subnet"),
        ({"IPv4Data": [{"Pool": "8.8.8.0/24", "Gateway": "8.8.8.1/24"}]}, "8.8.8.0/24 is not free"),
        ({"IPv4Data": [{"Pool": "10.64.9.0/24", "Gateway": "10.64.9.1/24"}]}, "is not free"),
        ({"generic": {"ttp.gatevay": "work"}}, "there is no option ttp.gatevay"),
        ({"generic": {"com.docker.network.driver.mtu": "1500"}}, "there is no option com.docker"),
        ({"generic": {"ttp.gateway": "../work"}}, "ttp.gateway is the NAME"),
        ({"generic": {"ttp.gateway": 7}}, "ttp.gateway is no text"),
        ({"generic": {"ttp.isolate": "site"}}, "one of workload, destination, connection"),
        ({"generic": []}, "com.docker.network.generic is no object"),
        ({"NetworkID": "../x"}, "NetworkID is none"),
    ],
)
def test_a_network_that_could_leak_is_not_created(changes: dict[str, Any], why: str) -> None:
    """The reason, and what to do, are what the user of docker reads."""
    assert why in refusal(State(), "CreateNetwork", create(**changes))


@pytest.mark.promise("P3", "P5")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"AddressIPv6": "fd00::2/64"}, "leave out --ip6"),
        ({"MacAddress": "02:42:ac:12:00:02"}, "leave out --mac-address"),
        ({"Address": ""}, "Docker gives it no IPv4 address"),
        ({"Options": {"com.docker.network.portmap": [{"HostPort": 80}]}}, "leave out --publish"),
        ({"Options": {"ttp.dns": "open"}}, "there is no option ttp.dns=open"),
        ({"Options": {"ttp.gateway": "work"}}, "there is no option ttp.gateway=work"),
        ({"NetworkID": "b" * 64}, "remove the network and create it again"),
        ({"EndpointID": None}, "EndpointID is none"),
        ({"Interface": "eth0"}, "Interface is no object"),
    ],
)
def test_a_container_that_could_leak_is_not_connected(changes: dict[str, Any], why: str) -> None:
    """Nothing has been done for it by then."""
    assert why in refusal(CREATED, "CreateEndpoint", connect(**changes))


def test_a_container_joins_only_what_it_was_connected_to() -> None:
    """Of another order of requests nothing is known."""
    assert "was not told of its endpoint" in refusal(CREATED, "Join", join())
    assert "it has no sandbox" in refusal(CONNECTED, "Join", join(SandboxKey=""))
    ports = {"com.docker.network.portmap": [{"HostPort": 80}]}
    assert "leave out --publish" in refusal(CONNECTED, "Join", join(Options=ports))
    both = {**IDS, "Options": ports}
    assert "--publish" in refusal(JOINED, "ProgramExternalConnectivity", both)
    assert asked(JOINED, "RevokeExternalConnectivity", both)[0] == JOINED


def test_a_container_has_one_network() -> None:
    """By another one it would leave beside Tor."""
    engine = Engine(NEW, (), ("eth0",))
    assert "another network already (eth0)" in refusal(CONNECTED, "Join", join(), engine)


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize(
    ("version", "resolver", "beside"),
    [
        (OLD, "192.168.77.53", False),
        (OLD, "127.0.0.53", True),
        (OLD, "::1", True),
        (OLD, "fe80::1%eth0", False),
        (OLD, "what", True),
        (OLD, "2001:db8::53", False),
        ((26, 1, 2), "127.0.0.53", True),
        ((26, 0, 0), "2001:db8::53", True),
        (NEW, "2001:db8::53", False),
        ((), "127.0.0.53", True),
        ((), "2001:db8::53", True),
        ((), "192.0.2.1", False),
        (NEW, "127.0.0.53", False),
        ((28, 5, 1), "127.0.0.1", False),
    ],
)
def test_the_host_s_resolver_is_not_asked(
    version: tuple[int, ...], resolver: str, beside: bool
) -> None:
    """Docker before 26.1.3 asks one on loopback from the host, unless the container has another."""
    engine = Engine(version, ("192.168.77.53", resolver))
    pinned = asked(CREATED, "CreateEndpoint", connect(Options={"ttp.dns": "pinned"}))[0]
    assert asked(pinned, "Join", join(), engine)[1]
    if beside:
        why = refusal(CONNECTED, "Join", join(), engine)
        assert resolver in why
        assert "--dns 192.0.2.53" in why
        assert "driver-opt=ttp.dns=pinned" in why
    else:
        assert asked(CONNECTED, "Join", join(), engine)[1]


def test_what_is_no_request_is_refused() -> None:
    """No method, and no object; or an empty one, as Docker sends when the driver has died."""
    assert driver.answer(State(), "NetworkDriver.AllocateNetwork", {}, Engine()) is None
    assert "the request is no object" in refusal(State(), "Join", [])
    for method in ("Join", "CreateNetwork", "DeleteEndpoint"):
        assert "do it again" in refusal(JOINED, method, {})


def test_the_state_survives() -> None:
    """Written and read again it is the same; what is not the driver's is not taken for it."""
    assert driver.from_json(driver.as_json(JOINED)) == JOINED
    whole = driver.as_json(JOINED)
    changes: tuple[dict[str, Any], ...] = (
        {"format": 2},
        {"networks": {}},
        {"endpoints": {ENDPOINT: {"network": NETWORK}}},
    )
    for wrong in ([], {}, *({**whole, **change} for change in changes)):
        with pytest.raises(ValueError, match=r"."):
            driver.from_json(wrong)


def test_an_endpoint_of_no_network_is_none() -> None:
    """Each that is kept can be taken out."""
    lost = State({}, {ENDPOINT: Endpoint(NETWORK, "172.18.0.2/16")})
    with pytest.raises(ValueError, match="lacks the networks"):
        driver.from_json(driver.as_json(lost))


@pytest.mark.parametrize(
    ("links", "plugged", "found"),
    [
        (None, False, "ended"),
        ([], False, "cut off"),
        (["eth0"], True, "connected"),
        (["eth0"], False, "LEAKS: it has another network (eth0)"),
        (["eth0", "eth1"], True, "LEAKS: it has another network (eth0 eth1)"),
    ],
)
def test_status_says_who_is_behind_tor_alone(
    links: list[str] | None, plugged: bool, found: str
) -> None:
    """By what the kernel lists in the container, and what the gateway knows."""
    assert state(links, plugged) == found


def test_errors_are_ours() -> None:
    """So that the server shows them as it shows those of gateways."""
    assert issubclass(driver.RefusedError, NsrunError)
