"""Routes of the label table and of VRFs over netlink: as written and read, and as a kernel keeps them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.namespaces import Lab
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from kernel_shim.channel.linux_mpls.known import Known
from kernel_shim.channel.linux_mpls.messages import (
    AF_INET,
    AF_INET6,
    AF_MPLS,
    RT_TABLE_MAIN,
    Route,
    Way,
    answers,
    delete_message,
    dump_message,
    label_destination,
    put_message,
)
from kernel_shim.channel.linux_mpls.tables import BATCH, RouteTables
from kernel_shim.model import ROUTE_PROTOCOL
from kernel_shim.mpls.labels import LABEL_BITS, LAST_LABEL, Label, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToVrf
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute
from kernel_shim.xfrm.structs import MalformedMessage

labels = st.integers(0, LAST_LABEL).map(Label)
ttls = st.integers(0, 255)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    family = draw(st.sampled_from((AF_INET, AF_INET6, AF_MPLS)))
    stacks = st.lists(labels, max_size=5).map(tuple)
    ways = []
    for _ in range(draw(st.integers(1, 4))):
        stack = draw(stacks)
        ways.append(Way(draw(st.integers(1, 1 << 30)), stack, draw(ttls) if stack and family != AF_MPLS else 0))
    if family == AF_MPLS:
        return Route(family, label_destination(draw(labels)), LABEL_BITS, RT_TABLE_MAIN, tuple(ways), draw(st.booleans()), ROUTE_PROTOCOL)
    size = 4 if family == AF_INET else 16
    return Route(
        family, draw(st.binary(min_size=size, max_size=size)), draw(st.integers(0, 8 * size)), draw(st.integers(1, 1 << 31)), tuple(ways), protocol=178
    )


@settings(max_examples=100)
@given(st.lists(routes(), min_size=1, max_size=3))
def test_what_is_written_reads_back(wanted: list[Route]) -> None:
    datagram = b"".join(put_message(route, number + 1, replace=False) for number, route in enumerate(wanted))
    found = list(answers(datagram))
    assert [answer.route for answer in found] == wanted
    assert [answer.sequence for answer in found] == list(range(1, len(wanted) + 1))


def test_pyroute2_reads_the_same() -> None:
    way = Way(7, (Label(300), Label(400)), 255)
    route = Route(AF_INET, ip_address("10.9.0.0").packed, 24, 1001, (way,), protocol=ROUTE_PROTOCOL)
    told = rtmsg(put_message(route, 5, replace=True))
    told.decode()
    assert (told["family"], told["dst_len"], told["proto"], told["type"]) == (AF_INET, 24, ROUTE_PROTOCOL, 1)
    assert (told.get("RTA_DST"), told.get("RTA_TABLE"), told.get("RTA_OIF")) == ("10.9.0.0", 1001, 7)
    encapsulation = told.get("RTA_ENCAP")
    assert [each["label"] for each in encapsulation.get("MPLS_IPTUNNEL_DST")] == [300, 400]
    assert encapsulation.get("MPLS_IPTUNNEL_TTL") == 255
    swap = Route(AF_MPLS, label_destination(Label(100)), LABEL_BITS, RT_TABLE_MAIN, (Way(7, (Label(200),)), Way(8)), protocol=ROUTE_PROTOCOL)
    told = rtmsg(put_message(swap, 5, replace=True))
    told.decode()
    assert told.get("RTA_DST")[0]["label"] == 100
    assert [hop["oif"] for hop in told.get("RTA_MULTIPATH")] == [7, 8]


@settings(max_examples=100)
@given(st.binary(max_size=200), routes(), st.data())
def test_any_octets_are_answers_or_malformed(garbage: bytes, route: Route, data: st.DataObject) -> None:
    whole = bytearray(put_message(route, 1, replace=False))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for octets in (garbage, bytes(whole), bytes(whole)[: data.draw(st.integers(0, len(whole)))]):
        with suppress(MalformedMessage):
            list(answers(octets))


PATH = (Nhlfe(ToPeer("pe"), (Label(300),)),)
ENTRIES: list[NodeEntry] = [
    Vrf("red", "vpn-red", 101),
    Vrf("blue", "vpn-blue", 102),
    Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2")),
    Peer("pe", LabelSet()),
    LabelBinding(Label(100), PATH),
    LabelBinding(Label(101), (Nhlfe(ToVrf("red")),)),
    VrfRoute("red", ip_network("10.1.0.0/24"), PATH),
    VrfRoute("red", ip_network("10.2.0.0/24"), (Nhlfe(ToInterface("red")),)),
    VrfRoute("red", ip_network("10.3.0.0/24"), (Nhlfe(ToVrf("blue")), *PATH)),
]
OTHERS: list[NodeEntry] = [
    LabelBinding(Label(100), (Nhlfe(ToVrf("blue")),)),
    VrfRoute("red", ip_network("10.1.0.0/24"), (Nhlfe(ToInterface("red")),)),
    VrfRoute("red", ip_network("10.2.0.0/24"), PATH),
]


def _rests(entry: NodeEntry, device: NodeEntry) -> bool:
    """What an entry rests upon, said by looking at all of it."""
    hops = {path.next_hop for path in entry.paths} if isinstance(entry, LabelBinding | VrfRoute) else set()
    if isinstance(device, Tunnel):
        return (isinstance(entry, Peer) and entry.name == device.peer) or ToPeer(device.peer) in hops
    assert isinstance(device, Vrf)
    return (isinstance(entry, VrfRoute) and entry.vrf == device.name) or bool({ToVrf(device.name), ToInterface(device.name)} & hops)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([*ENTRIES, *OTHERS])), max_size=30))
def test_what_rests_upon_a_device_is_known(steps: list[tuple[bool, NodeEntry]]) -> None:
    known, model = Known(), dict[object, NodeEntry]()
    for put, entry in steps:
        if put:
            known.put(entry)
            model.pop(entry.key, None)
            model[entry.key] = entry
        else:
            known.drop(entry.key)
            model.pop(entry.key, None)
    assert list(known.entries()) == list(model.values())
    for device in ENTRIES[:3]:
        assert {entry.key: entry for entry in known.upon(device.key)} == {key: entry for key, entry in model.items() if _rests(entry, device)}
    assert set(known.vrfs) == {entry.name for entry in model.values() if isinstance(entry, Vrf)}
    assert list(known.own_routes.values()) == [
        entry for entry in model.values() if isinstance(entry, VrfRoute) and entry.paths[0].next_hop == ToInterface("red")
    ]


# ---------------------------------------------------------------- a kernel's


def in_namespace(body: Coroutine[Any, Any, None], *commands: str) -> None:
    with Lab() as lab:
        host = lab.namespace("host")
        host.ip("link set lo up", *commands)
        host.call(lambda: asyncio.run(body))


def plain(address: str, device: int, table: int = 101) -> Route:
    packed = ip_address(address).packed
    return Route(AF_INET if len(packed) == 4 else AF_INET6, packed, 8 * len(packed), table, (Way(device),), protocol=ROUTE_PROTOCOL)


@pytest.mark.root
def test_a_kernel_keeps_and_tells_them() -> None:
    async def body() -> None:
        lo = socket.if_nametoindex("lo")
        async with RouteTables() as tables:
            four, six = [plain("10.0.0.1", lo), plain("10.0.0.2", lo)], [plain("fd00::1", lo)]
            assert await tables.put(four, replace=False) == [0, 0]
            assert await tables.put([four[0], plain("10.0.0.3", 9999)], replace=False) == [errno.EEXIST, errno.ENODEV]
            assert await tables.put(four, replace=True) == [0, 0]
            assert await tables.put(six, replace=True) == [0]
            assert await tables.dump(AF_INET) == four
            assert await tables.dump(AF_INET, 101) == four
            assert await tables.dump(AF_INET6) == six
            assert await tables.dump(AF_INET, 4711) == []
            # Of what another program has put nothing goes.
            assert await tables.delete([plain("10.0.0.9", lo), plain("fd00::9", lo), four[0]]) == [errno.ESRCH, errno.ESRCH, 0]
            assert await tables.delete([plain("10.0.0.8", lo, 4711)]) == [errno.ESRCH]
            assert await tables.dump(AF_INET) == four[1:]

    in_namespace(body(), "route add 10.0.0.9 dev lo table 101", "route add fd00::9 dev lo table 101")


@pytest.mark.root
def test_an_end_of_a_table_is_no_default_route() -> None:
    async def body() -> None:
        lo = socket.if_nametoindex("lo")
        async with RouteTables() as tables:
            for family, size in ((AF_INET, 4), (AF_INET6, 16)):
                default = Route(family, bytes(size), 0, 101, (Way(lo),), protocol=ROUTE_PROTOCOL)
                assert await tables.put([default], replace=False) == [0]
                (found,) = await tables.dump(family)
                assert (found.length, found.ways) == (0, (Way(lo),))
                assert await tables.delete([found]) == [0]
                assert await tables.delete([default]) == [errno.ESRCH]

    ends = [f"{family} route add blackhole default table 101 metric 4294967294 proto {ROUTE_PROTOCOL}" for family in ("-4", "-6")]
    with Lab() as lab:
        host = lab.namespace("host")
        host.ip("link set lo up")
        for words in ends:
            host.run(["ip", *words.split()])
        host.call(lambda: asyncio.run(body()))
        for family in ("-4", "-6"):
            assert "blackhole default" in host.run(["ip", family, "route", "show", "table", "101"]).stdout


@pytest.mark.root
def test_others_have_their_turns_while_thousands_are_put_and_read() -> None:
    async def body() -> None:
        lo, turns = socket.if_nametoindex("lo"), 0
        many = [plain(str(ip_address(0x0A000000 + number)), lo) for number in range(5000)]

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.create_task(others())
        async with RouteTables() as tables:
            assert not any(await tables.put(many, replace=False))
            assert turns >= len(many) // BATCH
            turns = 0
            assert await tables.dump(AF_INET) == many
            assert turns >= len(many) * len(put_message(many[0], 0, replace=False)) // (32 << 10)  # datagrams
            assert not any(await tables.delete(many))
        task.cancel()

    in_namespace(body())


def test_a_dump_and_a_deletion_name_the_protocol() -> None:
    """Else another program's routes would be read, or go."""
    for message in (dump_message(AF_INET, ROUTE_PROTOCOL, 1), delete_message(plain("10.0.0.1", 1), 1)):
        assert message[16 + 5] == ROUTE_PROTOCOL
