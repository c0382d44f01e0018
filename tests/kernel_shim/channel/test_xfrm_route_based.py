"""Marks, interface ids and the SPD's own figures against this machine's kernel."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from lab.namespaces import Lab, Namespace
from xfrm_support import is_gone

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import (
    NO_MARK,
    Acquire,
    Action,
    AddressRange,
    Direction,
    KernelError,
    KernelEvent,
    Mark,
    Mode,
    Policy,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
)
from kernel_shim.xfrm.information import HashThreshold

pytestmark = pytest.mark.root

HERE, PEER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
NEAR, FAR = AddressRange.of(IPv4Network("10.1.0.0/24")), AddressRange.of(IPv4Network("10.2.0.0/24"))


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("xfrm")
        namespace.ip(
            "link add out type veth peer name nowhere",
            "link set out up",
            "link set nowhere up",
            f"addr add {HERE}/24 dev out",
            "addr add 10.1.0.1/24 dev out",
            f"neigh add {PEER} lladdr 02:00:00:00:00:01 dev out nud permanent",
            f"route add default via {PEER}",
        )
        yield namespace


def within(namespace: Namespace, body: Callable[[XfrmChannel, asyncio.Queue[KernelEvent]], Awaitable[None]]) -> None:
    async def run() -> None:
        channel, events = XfrmChannel(require_esp=False), asyncio.Queue[KernelEvent]()
        channel.on_event(events.put_nowait)
        await channel.open()
        try:
            async with asyncio.timeout(60):
                await body(channel, events)
        finally:
            await channel.close()

    namespace.call(lambda: asyncio.run(run()))


def policy(reqid: int, *, if_id: int = 0, mark: Mark = NO_MARK) -> Policy:
    selector = Selector(NEAR, FAR, if_id=if_id, mark=mark)
    return Policy(selector, Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, ReqId(reqid), HERE, PEER),))


def test_policies_of_one_selector_differ_by_mark_and_interface(host: Namespace) -> None:
    async def body(channel: XfrmChannel, _: asyncio.Queue[KernelEvent]) -> None:
        wanted = [policy(1), policy(2, if_id=42), policy(3, if_id=43), policy(4, mark=Mark(7, 0xFF))]
        added = [await channel.add_policy(one) for one in wanted]
        assert sorted(await channel.policies(), key=str) == sorted(added, key=str)
        await channel.delete_policy(Direction.OUT, added[1].selector)
        assert {one.templates[0].reqid for one in await channel.policies()} == {1, 3, 4}
        await channel.flush_policies()
        assert await channel.policies() == []

    within(host, body)


def test_a_marked_packet_asks_for_its_own_sa_and_its_larval_one_goes(host: Namespace) -> None:
    async def body(channel: XfrmChannel, events: asyncio.Queue[KernelEvent]) -> None:
        await channel.add_policy(policy(4, mark=Mark(7, 0xFF)))
        for _ in range(2):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
                sender.bind(("10.1.0.1", 0))
                sender.sendto(b"x", ("10.2.0.5", 9))
            event = await events.get()
            assert isinstance(event, Acquire)
            assert event.selector is not None
            assert (event.reqid, event.selector.mark) == (4, Mark(7, 0xFF))
            (larval,) = await channel.sas()
            assert larval.sa.mark == Mark(7, 0xFF)
            await channel.acquire_failed(event.sequence, errno.EHOSTUNREACH)
            assert is_gone(event.sequence, await channel.sas())

    within(host, body)


def test_the_spd_tells_its_size_and_takes_thresholds(host: Namespace) -> None:
    async def body(channel: XfrmChannel, _: asyncio.Queue[KernelEvent]) -> None:
        before = await channel.spd_information()
        await channel.add_policy(policy(1))
        after = await channel.spd_information()
        assert after.policies[Direction.OUT] == before.policies[Direction.OUT] + 1
        assert after.most_buckets >= after.buckets > 0
        assert (after.threshold4, after.threshold6) == (HashThreshold(32, 32), HashThreshold(128, 128))
        await channel.set_hash_thresholds(HashThreshold(24, 16))
        assert (await channel.spd_information()).threshold4 == HashThreshold(24, 16)
        assert len(await channel.policies()) == 1
        assert (await channel.sad_information()).sas == 0

    within(host, body)


def test_an_sa_that_nobody_has_cannot_move(host: Namespace) -> None:
    async def body(channel: XfrmChannel, _: asyncio.Queue[KernelEvent]) -> None:
        old = SecurityAssociation(Spi(0x1234), HERE, PEER, Direction.OUT, Mode.TUNNEL, ReqId(1), EspAlgorithm(EncryptionId.AES_GCM_16, 128))
        for new in (replace(old, source=IPv4Address("192.0.2.9")), replace(old, destination=HERE)):
            with pytest.raises(KernelError) as refused:
                await channel.migrate_sa(old, new)
            assert refused.value.errno == errno.ESRCH
        with pytest.raises(KernelError) as refused:
            await channel.migrate_sa(old, replace(old, reqid=ReqId(2)))
        assert refused.value.errno == errno.EINVAL

    within(host, body)
