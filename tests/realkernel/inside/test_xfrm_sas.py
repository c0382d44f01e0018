"""XfrmChannel and a kernel that has ESP: every algorithm and window it claims, events of lifetimes, and the hold queue."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network

import pytest
from realkernel.kernel_ends import HELD, HERE, IN_KERNEL, KEY, NEAR, PEER, REQID, SPI, TRAP, Ends, Sink, outbound, send, two_ends, until, within

from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import (
    Acquire,
    AddressRange,
    Direction,
    Expire,
    KernelError,
    KernelEvent,
    Lifetime,
    Mode,
    ReqId,
    SaId,
    SaState,
    Selector,
    Spi,
    SpiRequest,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret

pytestmark = pytest.mark.realkernel


@pytest.fixture
def ends() -> Iterator[Ends]:
    with two_ends() as both:
        yield both


def test_every_algorithm_of_its_capabilities_is_taken_and_told_alike(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        for number, algorithm in enumerate(sorted(channel.capabilities().algorithms, key=repr)):
            keys = {"encryption_key": Secret(bytes(algorithm.encryption_key_length)), "integrity_key": Secret(bytes(algorithm.integrity_key_length))}
            sa = outbound(spi=Spi(0x2000 + number), algorithm=algorithm, **keys)
            await channel.add_sa(sa)
            told = await channel.get_sa(sa.id)
            assert (told.state, told.sa) == (SaState.MATURE, sa)
        dump = await channel.sas()
        assert len({status.sa.id for status in dump}) == len(channel.capabilities().algorithms)

    within(ends.here, body)


@pytest.mark.parametrize("window", [0, 1, 32, 33, 64, 1024, 4096])
def test_every_window_with_and_without_extended_numbers(ends: Ends, window: int) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        for esn in (False, True):
            sa = outbound(replay_window=window, esn=esn)
            await channel.add_sa(sa)
            told = (await channel.get_sa(sa.id)).sa
            assert told.esn is esn
            assert told.replay_window == window or (esn and not window)
            await channel.delete_sa(sa.id)

    within(ends.here, body)


def test_a_reserved_spi_gets_its_keys(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        spi = await channel.get_spi(SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(0)))
        sa = outbound(spi=spi, source=PEER, destination=HERE, direction=Direction.IN, encapsulation=UdpEncapsulation())
        await channel.update_sa(sa)
        (status,) = await channel.sas()
        assert (status.state, status.sa) == (SaState.MATURE, sa)
        longer = replace(sa, hard=Lifetime(seconds=1000), encapsulation=UdpEncapsulation(4501, 4500))
        await channel.update_sa(longer)
        assert (await channel.get_sa(sa.id)).sa == longer
        with pytest.raises(KernelError) as refused:
            await channel.update_sa(replace(sa, spi=Spi(0x9999)))
        assert refused.value.errno == errno.ESRCH
        with pytest.raises(KernelError) as refused:
            await channel.add_sa(sa)
        assert refused.value.errno == errno.EEXIST

    within(ends.here, body)


def test_lifetimes_in_packets_are_reported_soft_then_hard(ends: Ends) -> None:
    async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        sa = outbound(soft=Lifetime(packets=3), hard=Lifetime(packets=6))
        await channel.add_sa(sa)
        with contextlib.suppress(OSError):  # the kernel refuses what is beyond the hard limit to its sender
            send(8)
        await until(lambda: Expire(SaId(PEER, SPI), REQID, True) in events)
        expiries = [event for event in events if isinstance(event, Expire)]
        assert expiries[0] == Expire(SaId(PEER, SPI), REQID, False)
        with pytest.raises(KernelError) as refused:
            await channel.get_sa(sa.id)
        assert refused.value.errno == errno.ESRCH

    within(ends.here, body)


def test_what_was_used_is_counted(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        await channel.add_sa(outbound(esn=True, replay_window=64))
        send(5)
        status = await channel.get_sa(SaId(PEER, SPI))
        assert (status.packets, status.sequence) == (5, 5)
        assert status.octets > 5 * 28
        assert status.used is not None
        assert status.added <= status.used

    within(ends.here, body)


def test_a_narrow_sa_carries_only_its_own(ends: Ends) -> None:
    """A flow that the policy protects and the SA does not cover asks for another SA."""

    async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        elsewhere = Selector(AddressRange.of(NEAR), AddressRange.of(IPv4Network("10.2.9.0/24")))
        sides = TrafficSelector(elsewhere.source), TrafficSelector(elsewhere.destination)
        await channel.add_sa(outbound(source_selectors=sides[:1], destination_selectors=sides[1:]))
        send(1)
        await until(lambda: any(isinstance(event, Acquire) for event in events))
        assert (await channel.get_sa(SaId(PEER, SPI))).packets == 0

    within(ends.here, body)


def test_a_policy_that_is_deleted_while_its_sa_comes_stays_deleted(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        for number in range(20):
            await channel.update_policy(TRAP)
            sa = outbound(spi=Spi(0x2000 + number))
            first, second = channel.add_sa(sa), channel.delete_policy(Direction.OUT, TRAP.selector)
            await asyncio.gather(*((first, second) if number % 2 else (second, first)))
            assert await channel.policies() == []
            await channel.delete_sa(sa.id)

    within(ends.here, body)


@pytest.mark.parametrize("kick", [True, False], ids=["kicked", "polled"])
def test_packets_sent_before_the_sa_are_held_and_leave_in_order(ends: Ends, kick: bool, record_property: Callable[[str, object], None]) -> None:
    """150 packets, of which the kernel holds 101 and refuses the rest to their sender; the SA comes when the kernel's polling has slowed down."""
    sink = Sink(ends.there)

    async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        assert send(150) == (HELD, 150 - HELD)
        await until(lambda: bool(events))
        (event,) = events
        assert isinstance(event, Acquire)
        await asyncio.sleep(1.0)  # a negotiation; the kernel looks 0.1 s, 0.3 s, 0.7 s and 1.5 s after the first packet
        added = time.monotonic()
        if kick:
            await channel.add_sa(outbound(acquire=event.sequence))
        else:
            # as a key manager does that does not know of the queue
            state = f"state add src {HERE} dst {PEER} proto esp spi {SPI:#x} reqid {IN_KERNEL} mode tunnel".split()
            ends.here.run(["ip", "xfrm", *state, "aead", "rfc4106(gcm(aes))", "0x" + KEY.hex(), "128"])
        await until(lambda: sink.look() >= HELD)
        assert sink.first is not None
        waited = 1000 * (sink.first - added)
        how = "policy replaced when the SA came" if kick else "left to the kernel's polling"
        record_property("kernel-hold", f"{how}: {len(sink.numbers)} of 150 delivered, the first after {waited:.0f} ms")
        assert sink.numbers == list(range(HELD))
        statuses = await channel.sas()
        assert [status.state for status in statuses] == [SaState.MATURE]  # the larval one is gone
        assert send(1) == (1, 0)
        await until(lambda: sink.look() == HELD + 1)

    try:
        within(ends.here, body)
    finally:
        sink.close()
