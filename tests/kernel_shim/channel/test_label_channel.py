"""Entries of the label node over the channel: put, replaced, dumped, deleted, refused."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from dataplane_pair import Gateway
from pfkey_support import SocketEdge

from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.model import KernelError
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToPeer, ToVrf
from kernel_shim.mpls.node import Classes, LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

TUNNEL = Tunnel("pe2", ip_address("192.0.2.1"), ip_address("192.0.2.2"), Encapsulation.GRE)
ENTRIES: list[NodeEntry] = [
    Vrf("red", "vpn-red", 101, ("eth1",)),
    TUNNEL,
    Peer("pe2", LabelSet([LabelRange(Label(100), Label(199))])),
    Classes(ClassMap.class_selectors().but({10: 7}, {7: 11})),
    *[LabelBinding(Label(label), (Nhlfe(ToVrf("red")),)) for label in range(100, 400)],
    *[VrfRoute("red", ip_network((10 << 24 | host << 8, 24)), (Nhlfe(ToPeer("pe2"), (Label(200),)),)) for host in range(300)],
]


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[PfKeyChannel]:
    edge = SocketEdge(tmp_path / "kernel", Gateway(1).engine)
    channel = PfKeyChannel(tmp_path / "kernel")
    await channel.open()
    yield channel
    await channel.close()
    edge.close()


def by_key(entries: object) -> dict[object, object]:
    return {entry.key: entry for entry in entries}  # type: ignore[attr-defined]


async def test_what_was_put_is_there(channel: PfKeyChannel) -> None:
    await channel.put_labels(ENTRIES)
    assert by_key(await channel.labels()) == by_key(ENTRIES)
    assert len(await channel.labels()) == len(ENTRIES)
    await channel.put_labels(ENTRIES)
    assert len(await channel.labels()) == len(ENTRIES)


async def test_an_entry_of_the_same_key_is_replaced(channel: PfKeyChannel) -> None:
    await channel.put_labels(ENTRIES)
    other = Tunnel("pe2", TUNNEL.local, ip_address("192.0.2.77"), Encapsulation.UDP)
    await channel.put_labels([other])
    assert by_key(await channel.labels())[TUNNEL.key] == other


async def test_what_was_deleted_is_gone_and_may_be_deleted_again(channel: PfKeyChannel) -> None:
    await channel.put_labels(ENTRIES)
    for _ in range(2):
        await channel.delete_labels(ENTRIES[2:])
        assert by_key(await channel.labels()) == by_key(ENTRIES[:2])
    await channel.delete_labels(ENTRIES)
    assert list(await channel.labels()) == []


async def test_what_means_nothing_is_refused_and_changes_nothing(channel: PfKeyChannel) -> None:
    await channel.put_labels([TUNNEL])
    with pytest.raises(KernelError, match="leads to pe2 already") as caught:
        await channel.put_labels([Tunnel("pe3", TUNNEL.local, TUNNEL.remote)])
    assert caught.value.errno == errno.EINVAL
    assert list(await channel.labels()) == [TUNNEL]


async def test_a_kernel_without_our_extensions_forwards_no_labels(tmp_path: Path) -> None:
    edge = SocketEdge(tmp_path / "kernel", Gateway(1).engine)
    plain = PfKeyChannel(tmp_path / "kernel", extensions=False)
    await plain.open()
    for request in (plain.labels(), plain.put_labels([TUNNEL]), plain.delete_labels([TUNNEL])):
        with pytest.raises(KernelError) as caught:
            await request
        assert caught.value.errno == errno.EOPNOTSUPP
    await plain.close()
    edge.close()
