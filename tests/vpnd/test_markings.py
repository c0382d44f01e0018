"""Marks and interface ids that are given to CHILD_SAs: `%unique`, `%unique-dir`, `%same`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import IPv4Network

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.model import Action, AddressRange, Direction, Mark, Policy, Selector
from vpnd.config.children import selecting_mark, setting_mark
from vpnd.config.model import ALL_BITS, ChildConfig, ConnectionConfig, Unique, UniqueMark
from vpnd.control.backend import ChildUpDown, ControlError
from vpnd.control.vici.formats import child_sa
from vpnd.daemon.markings import Markings
from vpnd.ike.marking import Marking, NumbersExhausted, SharedIfIds

pytestmark = pytest.mark.virtual_time

POLICY = Policy(Selector(AddressRange.of(IPv4Network("10.1.0.0/16")), AddressRange.of(IPv4Network("10.2.0.0/16"))), Direction.OUT, Action.BYPASS, 1, ())
CONNECTION = ConnectionConfig("site", (), (), (), {})


def given(markings: Markings, **options: object) -> Marking:
    return markings.of(CONNECTION, ChildConfig("net", (), (), (), **options), SharedIfIds())  # type: ignore[arg-type]


def full(number: int) -> Mark:
    return Mark(number, ALL_BITS)


def test_one_number_for_both_directions_or_one_for_each() -> None:
    markings = Markings()
    unique, each_way = selecting_mark("%unique"), selecting_mark("%unique-dir")
    first = given(markings, mark_in=unique, mark_out=unique, set_mark_in=setting_mark("%same"), set_mark_out=setting_mark("%same/0xff"))
    assert (first.mark_in, first.mark_out, first.set_mark_in, first.set_mark_out) == (full(1), full(1), full(1), Mark(1, 0xFF))
    second = given(markings, mark_in=each_way, mark_out=unique, if_id_in=Unique(), if_id_out=Unique())
    assert (second.mark_in, second.mark_out, second.if_id_in, second.if_id_out) == (full(2), full(3), 1, 1)
    third = given(markings, mark_in=Mark(7, 0xF), mark_out=unique, if_id_in=Unique(each_way=True), if_id_out=Unique(each_way=True))
    assert (third.mark_in, third.mark_out, third.if_id_in, third.if_id_out) == (Mark(7, 0xF), full(4), 2, 3)


def test_a_number_is_given_again_once_nobody_has_it_and_never_one_that_is_reserved() -> None:
    markings = Markings()
    markings.standing([replace(POLICY, selector=replace(POLICY.selector, mark=full(2), if_id=5))])
    narrow = UniqueMark(mask=0x3)
    first, second = given(markings, mark_out=narrow), given(markings, mark_out=narrow)
    assert (first.mark_out.value, second.mark_out.value) == (1, 3)
    with pytest.raises(NumbersExhausted, match="all marks up to 3 are taken"):
        given(markings, mark_out=narrow)
    del first
    assert given(markings, mark_out=narrow).mark_out == Mark(1, 0x3)


def marking_node(network: Network, side: str, address: object, child: str, connection: str = "", start: str = "none") -> Node:
    node = Node(network, config(side, start=start, child=child, connection=connection), address)
    node.kernel.capabilities = replace(node.kernel.capabilities, marks=True, if_ids=True)
    return node


async def marked_pair(child_a: str, child_b: str = "", *, connection_a: str = "", start: str = "none") -> tuple[Node, Node]:
    network = Network()
    a, b = marking_node(network, "a", A, child_a, connection_a, start), marking_node(network, "b", B, child_b)
    for node in (a, b):
        await node.start()
    return a, b


def markings_of(node: Node) -> list[Marking]:
    return [child.sa.marking for entry in node.manager.entries() for child in entry.sa.children.values()]


BOTH = "mark_in = %unique\n mark_out = %unique\n set_mark_in = %same\n if_id_in = %unique-dir\n if_id_out = %unique-dir"


@pytest.mark.parametrize("rekeyer", ["a", "b"])
async def test_a_rekeyed_child_keeps_its_numbers(rekeyer: str) -> None:
    a, b = await marked_pair(BOTH)
    events: list[ChildUpDown] = []
    a.manager.news.subscribe(lambda event: events.append(event) if isinstance(event, ChildUpDown) else None)
    await a.up()
    await until(lambda: mirrored(a, b))
    (marking,) = markings_of(a)
    outbound = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    inbound = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.IN)
    assert (outbound.mark, outbound.if_id, inbound.mark, inbound.set_mark, inbound.if_id) == (full(1), 2, Mark(), full(1), 1)
    assert {(key[0], key[1].mark, key[1].if_id) for key in a.kernel.policies} == {
        (Direction.OUT, full(1), 2),
        (Direction.IN, full(1), 1),
        (Direction.FORWARD, full(1), 1),
    }
    (told,) = events[0].ike.children
    listed = {name: str(value) for name, value in child_sa(told).entries.items()}
    assert {"mark-in", "mark-out", "if-id-in", "if-id-out"} <= listed.keys()
    assert "mark-mask-in" not in listed
    old = a.spis(Direction.OUT)
    {"a": a, "b": b}[rekeyer].operations.rekey(child="net")
    await until(lambda: mirrored(a, b) and not old & a.spis(Direction.OUT) and len(markings_of(a)) == 1)
    assert markings_of(a) == [marking]
    assert len(a.kernel.policies) == 3
    await a.down(ike="site")
    await a.up()
    await until(lambda: mirrored(a, b))
    assert markings_of(a)[0].mark_out != marking.mark_out


async def test_a_trap_shares_its_numbers_with_what_it_asks_for() -> None:
    a, b = await marked_pair(BOTH, start="trap")
    policies = set(a.kernel.policies)
    await a.up()
    await until(lambda: mirrored(a, b))
    assert set(a.kernel.policies) == policies
    await a.down(ike="site")
    assert set(a.kernel.policies) == policies


async def test_an_ike_sa_gives_its_children_one_interface_id_and_passes_it_on() -> None:
    a, b = await marked_pair("", connection_a="    if_id_in = %unique\n    if_id_out = %unique")
    await a.up()
    await until(lambda: mirrored(a, b))
    (marking,) = markings_of(a)
    assert marking.if_id_in == marking.if_id_out == 1
    ikes = {entry.sa.spi_initiator for entry in a.manager.entries()}
    a.operations.rekey(ike="site")
    await until(lambda: mirrored(a, b) and len(a.manager) == 1 and not ikes & {entry.sa.spi_initiator for entry in a.manager.entries()})
    (entry,) = a.manager.entries()
    config = entry.sa.connection.children["net"]
    assert a.manager.marking(entry.sa.connection, config, entry.sa.if_ids).if_id_out == 1
    await a.down(ike="site")
    await asyncio.sleep(0)
    await a.up()
    await until(lambda: mirrored(a, b))
    assert markings_of(a)[0].if_id_out == 2
    with pytest.raises(ControlError, match="without an IKE SA"):
        await a.operations.install("net", None)
