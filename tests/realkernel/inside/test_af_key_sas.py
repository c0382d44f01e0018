"""AfKeyChannel and a kernel that has AF_KEY and ESP: what it claims, what it hears, what it finds again after losses, and the hold queue."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from lab.namespaces import Namespace
from lab.process import PATIENCE
from realkernel.kernel_ends import FAR, HELD, HERE, NEAR, PEER, REQID, SPI, TRAP, Ends, Sink, send, two_ends, until
from xfrm_support import is_gone

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.af_key import AfKeyChannel
from kernel_shim.channel.af_key_socket import AfKeyTransport
from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Direction,
    Expire,
    KernelError,
    KernelEvent,
    Lifetime,
    Mode,
    Policy,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    Template,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from kernel_shim.xfrm.constants import NETLINK_XFRM, Group

pytestmark = pytest.mark.realkernel

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
CBC = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA1_96)
PEER_STATE = ["auth", "hmac(sha1)", "0x" + bytes(range(20)).hex(), "enc", "cbc(aes)", "0x" + bytes(range(16)).hex()]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with two_ends(PEER_STATE) as both:
        yield both


def outbound(**changes: Any) -> SecurityAssociation:
    algorithm = changes.pop("algorithm", CBC)
    sa = SecurityAssociation(
        spi=SPI,
        source=HERE,
        destination=PEER,
        direction=Direction.OUT,
        mode=Mode.TUNNEL,
        reqid=REQID,
        algorithm=algorithm,
        encryption_key=Secret(bytes(range(algorithm.encryption_key_length))),
        integrity_key=Secret(bytes(range(algorithm.integrity_key_length))),
        replay_window=32,
    )
    return replace(sa, **changes)


def within(namespace: Namespace, body: Callable[[AfKeyChannel, list[KernelEvent]], Awaitable[None]], *, receive_buffer: int = 8 << 20) -> None:
    async def run() -> None:
        channel, events = AfKeyChannel(transport=AfKeyTransport(receive_buffer)), list[KernelEvent]()
        channel.on_event(events.append)
        await channel.open()
        try:
            async with asyncio.timeout(4 * PATIENCE):
                await body(channel, events)
        finally:
            await channel.flush_policies()
            await channel.flush_sas()
            await channel.close()

    namespace.call(lambda: asyncio.run(run()))


def test_every_algorithm_of_its_capabilities_is_taken_and_told_alike(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, _: list[KernelEvent]) -> None:
        assert channel.capabilities().algorithms
        for number, algorithm in enumerate(sorted(channel.capabilities().algorithms, key=repr)):
            lifetimes = {"soft": Lifetime(3600, 10**9, 10**6), "hard": Lifetime(4000, 10**10, 10**7)}
            sa = outbound(spi=Spi(0x2000 + number), algorithm=algorithm, encapsulation=UdpEncapsulation(4501, 4500), **lifetimes)
            await channel.add_sa(sa)
            told = await channel.get_sa(sa.id)
            assert (told.state, told.sa) == (SaState.MATURE, sa)
        assert len(await channel.sas()) == len(channel.capabilities().algorithms)

    within(ends.here, body)


def test_what_it_cannot_do_is_refused_by_name_and_others_are_left_alone(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, _: list[KernelEvent]) -> None:
        sha256 = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_256_128)
        gcm = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
        for sa, name in (
            (outbound(algorithm=sha256), "HMAC_SHA2_256_128"),
            (outbound(algorithm=gcm), "AES_GCM_16"),
            (outbound(esn=True), "extended sequence numbers"),
            (outbound(replay_window=64), "replay window of 64"),
            (outbound(reqid=ReqId(16384)), "reqids of 1 to 16383"),
        ):
            with pytest.raises(KernelError, match=name) as refused:
                await channel.add_sa(sa)
            assert refused.value.errno == errno.EOPNOTSUPP
        state = f"state add src {HERE} dst {PEER} proto esp spi 0x9999 reqid {REQID} mode tunnel".split()
        ends.here.run(["ip", "xfrm", *state, "aead", "rfc4106(gcm(aes))", "0x" + bytes(20).hex(), "128"])
        ends.here.run(["ip", "xfrm", *f"policy add src {FAR} dst {NEAR} dir in action allow".split()])
        await channel.add_sa(outbound())
        assert [status.sa.spi for status in await channel.sas()] == [SPI]
        assert await channel.policies() == []
        await channel.flush_sas()
        await channel.flush_policies()
        assert "0x00009999" in ends.here.run(["ip", "xfrm", "state"]).stdout
        assert "dir in" in ends.here.run(["ip", "xfrm", "policy"]).stdout

    within(ends.here, body)


def test_policies_are_told_as_they_were_asked_for(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, _: list[KernelEvent]) -> None:
        transport = replace(TRAP, direction=Direction.IN, templates=(Template(Mode.TRANSPORT, REQID, HERE, PEER),))
        shunt = Policy(Selector(AddressRange.host(HERE), AddressRange.host(PEER), 6), Direction.OUT, Action.BYPASS, 5)
        put = {(await channel.add_policy(policy)).direction: policy for policy in (TRAP, transport)}
        await channel.add_policy(shunt)
        assert {replace(policy, index=TRAP.index) for policy in await channel.policies()} == {*put.values(), shunt}
        with pytest.raises(KernelError) as refused:
            await channel.add_policy(TRAP)
        assert refused.value.errno == errno.EEXIST
        await channel.update_policy(replace(TRAP, priority=900))
        assert 900 in {policy.priority for policy in await channel.policies()}
        with pytest.raises(KernelError) as refused:
            await channel.delete_policy(Direction.FORWARD, TRAP.selector)
        assert refused.value.errno == errno.ENOENT

    within(ends.here, body)


def test_a_reserved_spi_gets_its_keys(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, _: list[KernelEvent]) -> None:
        spi = await channel.get_spi(SpiRequest(PEER, HERE, Mode.TUNNEL, REQID))
        assert [status.state for status in await channel.sas()] == [SaState.LARVAL]
        sa = outbound(spi=spi, source=PEER, destination=HERE, direction=Direction.IN, encapsulation=UdpEncapsulation())
        await channel.update_sa(sa)
        longer = replace(sa, hard=Lifetime(seconds=1000), encapsulation=UdpEncapsulation(4501, 4500))
        await channel.update_sa(longer)
        (status,) = await channel.sas()
        assert (status.state, status.sa) == (SaState.MATURE, longer)

    within(ends.here, body)


def test_lifetimes_in_packets_are_reported_soft_then_hard(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, events: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        await channel.add_sa(outbound(soft=Lifetime(packets=3), hard=Lifetime(packets=6)))
        with contextlib.suppress(OSError):  # the kernel refuses what is beyond the hard limit to its sender
            send(8)
        await until(lambda: Expire(SaId(PEER, SPI), REQID, True) in events)
        assert next(event for event in events if isinstance(event, Expire)) == Expire(SaId(PEER, SPI), REQID, False)

    within(ends.here, body)


def test_an_acquire_that_is_given_up_does_not_block_the_next(ends: Ends) -> None:
    async def body(channel: AfKeyChannel, events: list[KernelEvent]) -> None:
        policy = await channel.add_policy(TRAP)
        for _ in range(2):
            send(1)
            await until(lambda: bool(events))
            event = events.pop()
            assert isinstance(event, Acquire)
            assert (event.policy, event.reqid, event.source, event.destination, event.selector) == (policy.index, REQID, HERE, PEER, TRAP.selector)
            await channel.acquire_failed(event.sequence, errno.ETIMEDOUT)
            assert is_gone(event.sequence, await channel.sas())

    within(ends.here, body)


def test_what_a_full_buffer_dropped_is_found_again(ends: Ends) -> None:
    """64 KB hold less than 100 ACQUIREs: the loop stands still while 200 come, and a dump of 300 SAs passes through all the same.

    Somebody else hears each of them by netlink: so the kernel takes them for delivered, and does not repeat them with its polling.
    """
    somebody = ends.here.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
    somebody.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    somebody.bind((0, 1 << Group.ACQUIRE - 1))

    async def body(channel: AfKeyChannel, events: list[KernelEvent]) -> None:
        overruns: list[bool] = []
        channel.on_overrun(lambda: overruns.append(True))
        for number in range(200):
            far = AddressRange.host(FAR[256 + number])
            template = Template(Mode.TUNNEL, ReqId(100 + number), HERE, IPv4Address(int(PEER) + 1))
            await channel.add_policy(replace(TRAP, selector=Selector(AddressRange.of(NEAR), far), templates=(template,)))
        for number in range(200):
            send(1, FAR[256 + number])
        await until(lambda: len({event.reqid for event in events if isinstance(event, Acquire)}) == 200)
        assert overruns
        assert (await channel.statistics())["found"] > 0
        for number in range(300):
            await channel.add_sa(outbound(spi=Spi(0x3000 + number)))
        told = await channel.sas()
        assert sorted(status.sa.spi for status in told if status.sa.spi) == [0x3000 + number for number in range(300)]
        assert len(told) == 500

    with somebody:
        within(ends.here, body, receive_buffer=64 << 10)


@pytest.mark.parametrize("kick", [True, False], ids=["kicked", "polled"])
def test_packets_sent_before_the_sa_are_held_and_leave_in_order(ends: Ends, kick: bool, record_property: Callable[[str, object], None]) -> None:
    """150 packets, of which the kernel holds 101 and refuses the rest to their sender; the SA comes when the kernel's polling has slowed down."""
    sink = Sink(ends.there)

    async def body(channel: AfKeyChannel, events: list[KernelEvent]) -> None:
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
            state = f"state add src {HERE} dst {PEER} proto esp spi {SPI:#x} reqid {REQID} mode tunnel".split()
            ends.here.run(["ip", "xfrm", *state, *PEER_STATE])
        await until(lambda: sink.look() >= HELD)
        assert sink.first is not None
        how = "AF_KEY, policy replaced when the SA came" if kick else "AF_KEY, left to the kernel's polling"
        record_property("kernel-hold", f"{how}: {len(sink.numbers)} of 150 delivered, the first after {1000 * (sink.first - added):.0f} ms")
        assert sink.numbers == list(range(HELD))
        assert (await channel.statistics())["kicks"] == int(kick)

    try:
        within(ends.here, body)
    finally:
        sink.close()
