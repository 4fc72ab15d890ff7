"""A link for a namespace that is not ours: a container's, or the one its engine works in.

    box ─eth0══w4─┐                 engine ─ttp7══w4─ gateway    …moved and renamed by the engine:
    app ─eth0══w2─┼─ gateway        box    ─eth0══w4─ gateway
    bob ─eth0══w3─┘

Actors are in town.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsrun.errors import NsrunError, UsageError
from nsrun.netns import Namespace
from nsrun.plan import LINK_MAC
from nsrun.spec import Plug, RunSpec
from nsrun.steps import SetSysctl
from town import GATEWAY4, SITE4, SITE6, Actor, Town, eventually

pytestmark = pytest.mark.root

GIVEN, ROUTER = "172.18.0.2", "172.18.0.1"
SPEC = RunSpec(("docker", "run", "image"), name="box")
IPV6_IN_ALL = "net.ipv6.conf.all.disable_ipv6"


@pytest.fixture
def box(town: Town) -> Iterator[Actor]:
    """An empty network namespace as Docker makes it: without IPv6."""
    with place(town, "box") as found:
        town.machine.do(SetSysctl("box", IPV6_IN_ALL, "1"))
        yield found


@pytest.fixture
def engine(town: Town) -> Iterator[Actor]:
    """The namespace that an engine works in, with links of its own."""
    with place(town, "engine") as found:
        found.run("ip", "link", "add", "docker0", "type", "bridge")
        yield found


@contextmanager
def place(town: Town, name: str) -> Iterator[Actor]:
    """A namespace of that name, in the town's books."""
    space = town.machine.namespaces[name] = Namespace()
    yield Actor(name, space)
    del town.machine.namespaces[name]
    space.close()


def plug(town: Town, there: Actor, how: Plug | None = None, spec: RunSpec = SPEC) -> str:
    """Plug a link in; the number of it in the gateway."""
    live = asyncio.run(town.workloads.plug(spec, how or Plug(), there.space.fd, 0))
    there.live = live
    return live.workload.link


def move(town: Town, engine: Actor, box: Actor, link: str) -> None:
    """What an engine does with a link that a network driver gave it: libnetwork's osl."""
    engine.run("ip", "link", "set", link, "netns", box.space.path)
    box.run("ip", "link", "set", link, "name", "eth0")
    box.run("ip", "address", "add", f"{GIVEN}/16", "dev", "eth0")
    box.run("ip", "link", "set", "eth0", "up")
    box.run("ip", "route", "add", "default", "via", ROUTER)


def rules(town: Town) -> str:
    return town.gateway.run("nft", "list", "table", "inet", "ttp")


def links(actor: Actor) -> list[str]:
    return [name for _, name in actor.space.call(socket.if_nameindex)]


@pytest.mark.promise("P1", "P2", "P7")
@pytest.mark.parametrize("site", [SITE4, SITE6])
def test_a_container_is_served_as_any_workload(town: Town, box: Actor, site: str) -> None:
    """TCP and DNS go to Tor, under an identity of its own; IPv6 too, though the engine had none."""
    plug(town, box)
    assert box.live is not None
    with town.world_hears() as frames:
        with box.connect(site, 443) as connection:
            assert b"stand-in" in connection.recv(100)
        box.ask(GATEWAY4, "example.test")
    workload = box.live.workload
    own = workload.address6 if site == SITE6 else workload.address4
    assert town.heard == [(own, site, 443), (workload.address4, "dns", 53)]
    assert not frames


@pytest.mark.promise("P3")
def test_a_container_without_ipv6_has_none(town: Town, box: Actor) -> None:
    """As with `ttp run --no-ipv6`."""
    plug(town, box, spec=RunSpec(("docker",), name="box", ipv6=False))
    with pytest.raises(OSError):
        box.connect(SITE6, 443)
    box.connect(SITE4, 443).close()


@pytest.mark.promise("P8")
def test_it_ends_with_its_namespace(town: Town, box: Actor) -> None:
    """Its elements go, and the name is free again."""
    link = plug(town, box)
    assert f'"{link}"' in rules(town)
    box.run("ip", "link", "del", "eth0")  # as the kernel does when the namespace goes
    eventually(lambda: link in town.workloads.missing(), "the link to go")
    town.workloads.ended(link)
    assert f'"{link}"' not in rules(town)
    plug(town, box)


@pytest.mark.promise("P5", "P8")
def test_only_an_empty_network_is_plugged_in(town: Town, box: Actor, engine: Actor) -> None:
    """Not one with a link to elsewhere, none twice, no other kind of descriptor; nothing stays."""
    before = rules(town)
    with pytest.raises(NsrunError, match="has links already: lo docker0"):
        plug(town, engine)
    for path in ("/proc/self/ns/mnt", "/dev/null"):
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(NsrunError, match="not of one"):
            asyncio.run(town.workloads.plug(SPEC, Plug(), fd, 0))
        os.close(fd)
    assert rules(town) == before
    plug(town, box)  # control: what the others lack
    with pytest.raises(NsrunError, match="has links already: lo eth0"):
        plug(town, box, spec=RunSpec(("docker",), name="twice"))
    with pytest.raises(NsrunError, match="has that name"):
        plug(town, engine, Plug("ttp7", GIVEN))
    assert links(engine) == ["lo", "docker0"]


@pytest.mark.promise("P1", "P2", "P7")
def test_a_link_that_an_engine_moves_is_served(town: Town, engine: Actor, box: Actor) -> None:
    """Whatever address and route it gives it; Tor sees another, which nobody has had before."""
    plug(town, engine, Plug("ttp7", GIVEN))
    assert links(engine) == ["lo", "docker0", "ttp7"]
    with town.world_hears() as frames:
        move(town, engine, box, "ttp7")
        assert LINK_MAC in box.run("ip", "link", "show", "eth0")
        with box.connect(SITE4, 443) as connection:
            assert b"stand-in" in connection.recv(100)
        box.ask(GATEWAY4, "example.test")
        with pytest.raises(OSError):
            box.connect("172.18.0.3", 80)  # another one of that network
        box.send(SITE4, 443, b"stray").close()
    assert not frames
    (first, *_), (second, *_) = town.heard
    assert first == second != GIVEN
    assert first.startswith("10.128.")


@pytest.mark.promise("P7", "P8")
@pytest.mark.parametrize("moved", [False, True])
def test_it_is_unplugged_wherever_it_is(town: Town, engine: Actor, box: Actor, moved: bool) -> None:
    """The same address, given out once more, is another identity."""
    heard = []
    for _ in range(2):
        link = plug(town, engine, Plug("ttp7", GIVEN))
        if moved:
            move(town, engine, box, "ttp7")
            with box.connect(SITE4, 443) as connection:
                connection.recv(100)
            heard.append(town.heard[-1][0])
        assert GIVEN in rules(town)
        town.workloads.unplug("box")
        assert "eth0" not in links(box)
        assert links(engine) == ["lo", "docker0"]
        assert link not in links(town.gateway)
        assert GIVEN not in rules(town)
    assert len(set(heard)) == len(heard)


@pytest.mark.promise("P5", "P8")
def test_an_address_that_is_not_free_is_refused(town: Town, engine: Actor) -> None:
    """One that a relay or a site could have, the gateway's own, and one of another container."""
    for address in ("11.1.0.1", "127.0.0.1", "169.254.1.1", "224.0.0.1", "::1", "no"):
        with pytest.raises(UsageError):
            Plug("ttp7", address)
    for address in (GATEWAY4, "10.64.0.2", "10.128.0.9", "10.192.0.9"):
        with pytest.raises(NsrunError, match="gateway's own"):
            plug(town, engine, Plug("ttp7", address))
    plug(town, engine, Plug("ttp7", GIVEN))
    before = rules(town)
    other = RunSpec(("docker",), name="other")
    with pytest.raises(NsrunError, match="another one of this gateway has it"):
        plug(town, engine, Plug("ttp8", GIVEN), other)
    with pytest.raises(NsrunError, match="File exists"):
        plug(town, engine, Plug("ttp7", "172.18.0.9"), other)
    assert rules(town) == before
    assert links(engine) == ["lo", "docker0", "ttp7"]


def test_a_commands_link_is_not_unplugged(town: Town) -> None:
    """For that, its processes are ended: ttp kill."""
    with pytest.raises(NsrunError, match="not a container's"):
        town.workloads.unplug("app")
    town.app.connect(SITE4, 443).close()


@pytest.mark.promise("P4", "P8")
def test_no_process_of_the_engine_counts_as_the_workloads(town: Town, engine: Actor) -> None:
    """Else `ttp kill` of a container would end whatever runs beside its engine."""
    plug(town, engine, Plug("ttp7", GIVEN))
    assert engine.live is not None
    assert engine.live.network == 0
    assert engine.live.as_json()["network"] == 0


@pytest.mark.promise("P4")
def test_a_gateway_that_goes_takes_the_links_along(town: Town, box: Actor, engine: Actor) -> None:
    """At once, and not when the kernel gets to it."""
    plug(town, box)
    plug(town, engine, Plug("ttp7", GIVEN), RunSpec(("docker",), name="other"))
    town.workloads.close()
    assert links(box) == ["lo"]
    assert links(engine) == ["lo", "docker0"]


def test_a_step_that_fails_leaves_nothing_in_a_container(town: Town, box: Actor) -> None:
    """It was there before us: what we made in it goes, when the last step is refused."""
    town.gateway.run("nft", "flush", "ruleset")
    with pytest.raises(NsrunError):
        plug(town, box)
    assert links(box) == ["lo"]
    assert Path(box.space.path).exists()
