"""AfKeyChannel on a kernel that drops messages and tells nobody."""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from af_key_fake import FakeAfKey, mark_of

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.af_key import AfKeyChannel
from kernel_shim.model import (
    Acquire,
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    KernelError,
    KernelEvent,
    Mode,
    Policy,
    PolicyIndex,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    Template,
)
from kernel_shim.pfkey.client import ATTEMPTS
from kernel_shim.pfkey.constants import MessageType
from kernel_shim.pfkey.messages import Message, Sa2
from kernel_shim.secret import Secret

HERE, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
CBC = EspAlgorithm(EncryptionId.AES_CBC, 256, IntegrityId.HMAC_SHA2_512_256)
DUMPS = (MessageType.DUMP, MessageType.X_SPDDUMP)
LARVAL = Sa2(Mode.TUNNEL, 0, 7)


def an_sa(spi: int = 0x1000, **changes: object) -> SecurityAssociation:
    encryption, integrity = Secret(spi.to_bytes(32, "big")), Secret(spi.to_bytes(64, "big"))
    sa = SecurityAssociation(Spi(spi), HERE, PEER, Direction.OUT, Mode.TUNNEL, ReqId(7), CBC, encryption, integrity, replay_window=32)
    return replace(sa, **changes)  # type: ignore[arg-type]


@pytest.fixture
async def kernel() -> AsyncIterator[FakeAfKey]:
    fake = FakeAfKey()
    yield fake
    fake.close()


@pytest.fixture
async def channel(kernel: FakeAfKey) -> AsyncIterator[AfKeyChannel]:
    opened = AfKeyChannel(listens=False, require_esp=False, transport=kernel)
    await opened.open()
    yield opened
    await opened.close()


def a_policy(channel: AfKeyChannel, number: int = 1) -> Policy:
    selector = Selector(AddressRange.of(ip_network("10.1.0.0/16")), AddressRange.of(ip_network(f"10.2.{number}.0/24")))
    (mode,) = channel.capabilities().unresolved_modes
    return Policy(selector, Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, ReqId(7), HERE, PEER),), mode)


class LosesFirst:
    """The first message of a type."""

    def __init__(self, kind: MessageType) -> None:
        self.kind: MessageType | None = kind

    def __call__(self, message: Message) -> bool:
        lost, self.kind = message.type == self.kind, None if message.type == self.kind else self.kind
        return lost


class LosesATenth:
    """By chance, but never all the answers to a request. Of a dump the whole: one of many entries that each are lost by chance never comes through."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.lost: Counter[tuple[int, int]] = Counter()

    def __call__(self, message: Message) -> bool:
        request = message.type, message.sequence
        if (message.type in DUMPS and message.sequence) or self.lost[request] == ATTEMPTS - 1 or self.draw.random() >= 0.1:
            return False
        self.lost[request] += 1
        return True


@pytest.mark.parametrize(
    "kind",
    [
        *(MessageType.GETSPI, MessageType.ADD, MessageType.GET, MessageType.DUMP, MessageType.DELETE),
        *(MessageType.X_SPDADD, MessageType.X_SPDUPDATE, MessageType.X_SPDDUMP, MessageType.X_SPDDELETE),
    ],
)
async def test_a_request_whose_answer_was_dropped_succeeds_all_the_same(kernel: FakeAfKey, channel: AfKeyChannel, kind: MessageType) -> None:
    kernel.loses = LosesFirst(kind)
    sa, policy = an_sa(), a_policy(channel)
    await channel.get_spi(SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(7)))
    await channel.add_sa(sa)
    assert (await channel.get_sa(sa.id)).sa == sa
    assert sa in [status.sa for status in await channel.sas()]
    await channel.delete_sa(sa.id)
    put = await channel.add_policy(policy)
    await channel.update_policy(replace(policy, priority=5))
    assert await channel.policies() == [replace(policy, priority=5, index=put.index)]
    await channel.delete_policy(policy.direction, policy.selector)
    assert kernel.policies == {}
    assert (await channel.statistics())["repeated"] >= 1


@pytest.mark.parametrize("seed", range(4))
async def test_a_kernel_that_drops_a_tenth_agrees_in_the_end(kernel: FakeAfKey, channel: AfKeyChannel, seed: int) -> None:
    kernel.loses = LosesATenth(random.Random(seed))
    wanted = [an_sa(0x1000 + number, direction=Direction.IN) for number in range(40)]
    policies = [a_policy(channel, number) for number in range(20)]
    await asyncio.gather(*(channel.add_sa(sa) for sa in wanted), *(channel.add_policy(policy) for policy in policies))
    await asyncio.gather(*(channel.delete_sa(sa.id) for sa in wanted[::2]), *(channel.delete_policy(it.direction, it.selector) for it in policies[::2]))
    kernel.loses = lambda _message: False
    assert {status.sa for status in await channel.sas()} == set(wanted[1::2])
    assert {replace(policy, index=PolicyIndex(0)) for policy in await channel.policies()} == set(policies[1::2])


async def test_an_add_is_not_taken_for_done_when_another_sa_stands(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    await channel.add_sa(an_sa())
    kernel.loses = LosesFirst(MessageType.ADD)
    with pytest.raises(KernelError) as refused:
        await channel.add_sa(an_sa(encryption_key=Secret(bytes(32))))
    assert refused.value.errno == errno.EEXIST


async def test_a_dropped_acquire_is_found_and_can_be_given_up(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    kernel.loses = LosesFirst(MessageType.ACQUIRE)
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    await channel.get_spi(SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(7)))
    event = await asyncio.wait_for(events.get(), 60)
    assert isinstance(event, Acquire)
    assert (event.policy, event.reqid, event.mode, event.source, event.destination) == (policy.index, 7, Mode.TUNNEL, HERE, PEER)
    await channel.acquire_failed(event.sequence, errno.ETIMEDOUT)
    assert kernel.larval == {}
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    heard = await asyncio.wait_for(events.get(), 60)
    assert isinstance(heard, Acquire)
    assert (heard.sequence, heard.selector) == (AcquireSequence(2), policy.selector)


async def test_reading_the_sas_finds_a_dropped_acquire_under_a_number_that_can_be_given_up(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    kernel.loses = lambda message: message.type == MessageType.ACQUIRE
    for _ in range(2):
        kernel.acquire(policy.index, HERE, PEER, LARVAL)
        kernel.dropped = False
        (status,) = await channel.sas()
        event = await asyncio.wait_for(events.get(), 60)
        assert isinstance(event, Acquire)
        assert (status.state, status.sa.acquire) == (SaState.LARVAL, event.sequence)
        await channel.sas()
        assert events.empty(), "told once"
        await channel.acquire_failed(event.sequence, errno.ETIMEDOUT)
        assert kernel.larval == {}


@pytest.mark.parametrize("known", ["told", "found"])
@pytest.mark.parametrize("seen_gone", [True, False])
async def test_an_acquire_of_the_same_ends_is_another_when_the_first_expired_and_nobody_heard(
    kernel: FakeAfKey, channel: AfKeyChannel, known: str, seen_gone: bool
) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    kernel.loses = lambda message: message.type == MessageType.ACQUIRE and (kernel.acquires > 1 or known == "found")
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    kernel.dropped = False
    await channel.sas()
    first = await asyncio.wait_for(events.get(), 60)
    kernel.larval.clear()
    kernel.seconds += 165
    if seen_gone:
        await channel.sas()
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    kernel.dropped = False
    await channel.sas()
    second = await asyncio.wait_for(events.get(), 60)
    assert isinstance(first, Acquire)
    assert isinstance(second, Acquire)
    assert first.sequence != second.sequence
    await channel.acquire_failed(second.sequence, errno.ETIMEDOUT)
    assert kernel.larval == {}


async def test_a_packet_that_asks_anew_before_its_refusal_is_heard_of_can_be_refused_again(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    """As the kernel's hold queue does by itself, as soon as the larval SA is gone."""
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    again = [MessageType.DELETE]

    def answered(kind: MessageType) -> None:
        if kind in again:
            again.remove(kind)
            kernel.acquire(policy.index, HERE, PEER, LARVAL)

    kernel.answered = answered
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    for number in (1, 2):
        event = await asyncio.wait_for(events.get(), 60)
        assert isinstance(event, Acquire)
        assert event.sequence == number
        await channel.acquire_failed(event.sequence, errno.ETIMEDOUT)
    assert kernel.larval == {}


async def test_a_larval_sa_beside_one_that_serves_its_ends_asks_for_nothing(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    await channel.add_sa(an_sa())
    kernel.loses = lambda message: message.type == MessageType.ACQUIRE
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    kernel.dropped = False
    assert len(await channel.sas()) == 2
    assert events.empty()


async def test_a_larval_sa_goes_also_when_the_answer_about_it_is_lost(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    event = await asyncio.wait_for(events.get(), 60)
    assert isinstance(event, Acquire)
    kernel.loses = LosesFirst(MessageType.GETSPI)
    await channel.acquire_failed(event.sequence, errno.ETIMEDOUT)
    assert (kernel.larval, kernel.sas) == ({}, {})


async def test_an_acquire_is_found_though_the_tables_cannot_be_read_at_first(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    events: asyncio.Queue[KernelEvent] = asyncio.Queue()
    channel.on_event(events.put_nowait)
    policy = await channel.add_policy(a_policy(channel))
    kernel.loses = lambda message: message.type in (MessageType.ACQUIRE, *DUMPS)
    kernel.acquire(policy.index, HERE, PEER, LARVAL)
    with pytest.raises(TimeoutError):
        await channel.sas()
    kernel.loses = lambda _message: False
    assert isinstance(await asyncio.wait_for(events.get(), 60), Acquire)


async def test_a_new_sa_kicks_the_policies_of_its_reqid(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    await channel.add_policy(a_policy(channel))
    before = kernel.asked.count(MessageType.X_SPDUPDATE)
    await channel.add_sa(an_sa(0x2000, direction=Direction.IN))
    await channel.add_sa(an_sa(0x2001, reqid=ReqId(8)))
    assert kernel.asked.count(MessageType.X_SPDUPDATE) == before
    await channel.add_sa(an_sa())
    assert kernel.asked.count(MessageType.X_SPDUPDATE) == before + 1


async def test_what_is_left_of_an_abandoned_dump_is_not_taken_for_the_next(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    wanted = [an_sa(0x1000 + number) for number in range(30)]
    for sa in wanted:
        await channel.add_sa(sa)
    abandoned = asyncio.ensure_future(channel.sas())
    await asyncio.sleep(0)
    abandoned.cancel()
    assert [status.sa for status in await channel.sas()] == wanted


async def test_what_others_put_there_is_neither_shown_nor_flushed(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    await channel.add_sa(an_sa())
    await channel.add_policy(a_policy(channel))
    (ours,) = kernel.sas.values()
    assert mark_of(ours)
    foreign = tuple(it for it in ours if not mark_of((it,)))
    kernel.sas[PEER, 0x9999] = foreign
    await channel.flush_sas()
    await channel.flush_policies()
    assert list(kernel.sas) == [(PEER, 0x9999)]
    assert kernel.policies == {}
    with pytest.raises(KernelError) as refused:
        await channel.get_sa(SaId(PEER, Spi(0x9999)))
    assert refused.value.errno == errno.ESRCH


async def test_a_policy_of_others_under_the_very_selector_of_ours_is_not_replaced(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    await channel.update_policy(a_policy(channel))
    ((selector, ours),) = kernel.policies.items()
    await channel.delete_policy(a_policy(channel).direction, a_policy(channel).selector)
    kernel.policies[selector] = foreign = tuple(it for it in ours if not mark_of((it,)))
    with pytest.raises(KernelError) as refused:
        await channel.update_policy(a_policy(channel))
    assert refused.value.errno == errno.EEXIST
    assert kernel.policies == {selector: foreign}


async def test_an_earlier_runs_policy_is_replaced(kernel: FakeAfKey, channel: AfKeyChannel) -> None:
    policy = await channel.add_policy(a_policy(channel))
    later = AfKeyChannel(listens=False, require_esp=False, transport=kernel)
    await later.open()
    put = await later.update_policy(replace(policy, priority=5))
    assert put.priority == 5
    assert await later.policies() == [put]
    await later.close()


async def test_a_reserved_spi_is_ours_and_larval(channel: AfKeyChannel) -> None:
    spi = await channel.get_spi(SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(7)))
    (status,) = await channel.sas()
    assert (status.sa.spi, status.state, status.sa.direction) == (spi, SaState.LARVAL, Direction.IN)


async def test_what_af_key_cannot_say_is_refused_by_name(channel: AfKeyChannel) -> None:
    for sa, name in (
        (an_sa(esn=True), "extended sequence numbers"),
        (an_sa(replay_window=33), "replay window of 33"),
        (an_sa(reqid=ReqId(16384)), "reqids of 1 to 16383"),
        (an_sa(algorithm=EspAlgorithm(EncryptionId.AES_GCM_16, 256)), "AES_GCM_16"),
        (an_sa(algorithm=replace(CBC, integrity=IntegrityId.HMAC_SHA2_256_128)), "HMAC_SHA2_256_128"),
        (an_sa(algorithm=replace(CBC, integrity=IntegrityId.HMAC_SHA2_384_192)), "HMAC_SHA2_384_192"),  # REGISTER's reply does not list it
    ):
        with pytest.raises(KernelError, match=name) as refused:
            await channel.add_sa(sa)
        assert refused.value.errno == errno.EOPNOTSUPP
