"""`unique`, INITIAL_CONTACT and doubled CHILD_SAs, between key managers."""

from __future__ import annotations

import asyncio

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.model import Direction, IPAddress
from vpnd.control.backend import ControlError
from vpnd.daemon import duplicates, uniqueness

pytestmark = pytest.mark.virtual_time

ROAMED = type(A)("127.0.0.13")


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniqueness, "REAUTHENTICATION_GRACE", 0.05)
    monkeypatch.setattr(duplicates, "SETTLE", 0.02)


async def gateway(unique: str) -> tuple[Network, Node]:
    network = Network()
    node = Node(network, config("b", connection=f"unique = {unique}").replace(f"remote_addrs = {A}", "remote_addrs = %any"), B)
    await node.start()
    return network, node


async def client(network: Network, address: IPAddress, *, contact: bool, identity: str = "a.example") -> Node:
    """One that says INITIAL_CONTACT only with `contact`."""
    text = config("a", connection="" if contact else "unique = never").replace(f"local_addrs = {A}", f"local_addrs = {address}")
    node = Node(network, text.replace("id = a.example", f"id = {identity}"), address)
    await node.start()
    return node


def standing(node: Node) -> list[object]:
    return [entry.sa.remote.address for entry in node.manager.entries() if entry.usable]


@pytest.mark.parametrize(
    ("unique", "contact", "left"),
    [
        ("never", True, [A, ROAMED]),
        ("never", False, [A, ROAMED]),
        ("no", True, [ROAMED]),
        ("no", False, [A, ROAMED]),
        ("replace", True, [ROAMED]),
        ("replace", False, [ROAMED]),
    ],
)
async def test_a_peer_that_comes_from_elsewhere(unique: str, contact: bool, left: list[object]) -> None:
    network, b = await gateway(unique)
    old = await client(network, A, contact=False)
    await old.up()
    new = await client(network, ROAMED, contact=contact)
    await new.up()
    await until(lambda: standing(b) == left)
    if unique == "replace" and not contact:
        await until(lambda: not list(old.manager.entries()))  # it was told
    if left == [ROAMED]:
        await until(lambda: mirrored(new, b))
    else:
        assert len(b.spis(Direction.IN)) == 2


@pytest.mark.parametrize("contact", [False, True])
async def test_keep_refuses_another_one_from_elsewhere(contact: bool) -> None:
    network, b = await gateway("keep")
    old = await client(network, A, contact=False)
    await old.up()
    await until(lambda: mirrored(old, b))
    new = await client(network, ROAMED, contact=contact)
    with pytest.raises(ControlError, match="refused our authentication"):
        await new.up()
    assert standing(b) == [A]
    assert mirrored(old, b)
    assert any("unique = keep" in line for line in b.lines)


@pytest.mark.parametrize("unique", ["keep", "replace"])
async def test_one_from_the_same_address_is_perhaps_reauthenticating(unique: str) -> None:
    network, b = await gateway(unique)
    old = await client(network, A, contact=False)
    await old.up()
    old.operations.rekey(ike="site", reauth=True)
    await until(lambda: len(standing(b)) == 2)
    await until(lambda: len(standing(b)) == 1 and mirrored(old, b))


@pytest.mark.parametrize("unique", ["no", "keep", "replace"])
async def test_other_identities_are_others(unique: str) -> None:
    network, b = await gateway(unique)
    old = await client(network, A, contact=False)
    await old.up()
    stranger = await client(network, ROAMED, contact=True, identity="mallory.example")
    with pytest.raises(ControlError):
        await stranger.up()
    assert standing(b) == [A]
    assert mirrored(old, b)


async def test_what_stands_is_not_brought_up_twice() -> None:
    network, b = await gateway("no")
    a = await client(network, A, contact=True)
    await a.up()
    await a.up()
    assert mirrored(a, b)
    assert any("stands already" in line for line in a.lines)


async def test_of_two_that_the_peer_narrowed_alike_the_newer_one_stays() -> None:
    network = Network()
    b = Node(network, config("b").replace("10.2.0.0/16", "10.2.3.0/24"), B)
    a = Node(network, config("a"), A)
    await b.start()
    await a.start()
    await a.up()
    first = a.spis(Direction.OUT)
    await a.up()
    await until(lambda: mirrored(a, b) and not a.spis(Direction.OUT) & first)


async def up_without_child(node: Node) -> None:
    async for _line in node.operations.initiate(child=None, ike="site", timeout=5.0):
        pass


@pytest.mark.parametrize("childless", ["a", "b", "ab"])
async def test_of_two_ike_sas_that_crossed_one_without_child_goes(childless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "AGAIN", 0.05)
    network = Network()
    a, b = (Node(network, config(side, connection="childless = allow"), address) for side, address in (("a", A), ("b", B)))
    await a.start()
    await b.start()
    children = 2 - len(childless)
    await asyncio.gather(*(up_without_child(node) if name in childless else node.up() for name, node in (("a", a), ("b", b))))
    await until(lambda: len(a.manager) == len(b.manager) == 1 and mirrored(a, b, children))
    (entry,) = a.manager.entries()
    assert len(entry.sa.children) == children
