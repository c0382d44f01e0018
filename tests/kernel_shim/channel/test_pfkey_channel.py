"""PfKeyChannel over a real SOCK_SEQPACKET socket, against the server session."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest
from lab.process import open_files
from pfkey_support import CBC_SHA1, CHACHA, A, B, NaiveKernel, SocketEdge, make_sa, selectors, without_keys

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Direction,
    Expire,
    Flow,
    KernelError,
    Mode,
    Policy,
    PortRange,
    SaId,
    SaState,
    SaStatus,
    Selector,
    SpiRequest,
    Template,
    UdpEncapsulation,
    Unresolved,
)
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MAX_MESSAGE, MessageType, SaType
from kernel_shim.pfkey.messages import Message
from kernel_shim.pfkey.outbox import MAX_PENDING_EXPIRES, MAX_QUEUED_REPLIES

CODEC = Codec()

SELECTOR = Selector(AddressRange(A, A), AddressRange(B, B), 6, PortRange(), PortRange(80, 90), if_id=3)
POLICY = Policy(SELECTOR, Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, 7, A, B),), Unresolved.BLOCK)


@pytest.fixture
def kernel():
    return NaiveKernel()


@pytest.fixture
async def edge(tmp_path, kernel):
    serving = SocketEdge(tmp_path / "kernel", kernel)
    yield serving
    serving.close()


@asynccontextmanager
async def opened(path, **options):
    channel = PfKeyChannel(path, **options)
    await channel.open()
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture
async def channel(edge, tmp_path):
    async with opened(tmp_path / "kernel") as it:
        yield it


def satisfies(channel: PfKeyChannel) -> KernelChannel:
    return channel


async def test_open_learns_the_capabilities(channel, kernel):
    assert satisfies(channel).capabilities() == kernel.capabilities()
    assert kernel.listening == [True]


async def test_a_tool_does_not_listen(edge, tmp_path, kernel):
    async with opened(tmp_path / "kernel", listens=False) as tool:
        assert (await tool.statistics())["packets"] == 3
    assert kernel.listening == []


async def test_sas(channel, kernel):
    spi = await channel.get_spi(SpiRequest(B, A, Mode.TUNNEL, 7, 0x1000, 0x1FFF, acquire=3))
    assert 0x1000 <= spi <= 0x1FFF
    assert kernel.table[SaId(A, spi)].sa.acquire == 3
    assert (await channel.get_sa(SaId(A, spi))).state is SaState.LARVAL
    inbound = make_sa(
        spi,
        source=B,
        destination=A,
        direction=Direction.IN,
        algorithm=CHACHA,
        esn=True,
        replay_window=4096,
        encapsulation=UdpEncapsulation(4500, 1),
        source_selectors=selectors("10.0.0.0/8", "2001:db8::/32"),
    )
    await channel.update_sa(inbound)
    outbound = make_sa(0x2000)
    await channel.add_sa(outbound)
    assert [status.sa for status in kernel.table.values()] == [inbound, outbound]
    kernel.table[outbound.id] = used = SaStatus(outbound, SaState.DYING, 1 << 40, 1 << 33, 1_700_000_000.25, 1_700_000_009.5, 1 << 34)
    assert await channel.get_sa(outbound.id) == replace(used, sa=without_keys(outbound))
    assert [status.sa for status in await channel.sas()] == [without_keys(inbound), without_keys(outbound)]
    await channel.delete_sa(outbound.id)
    with pytest.raises(KernelError) as error:
        await channel.delete_sa(outbound.id)
    assert (error.value.errno, error.value.detail) == (errno.ESRCH, "no SA 0x2000")
    await channel.flush_sas()
    assert await channel.sas() == []


async def test_policies(channel, kernel):
    added = await channel.add_policy(POLICY)
    assert added.index
    assert replace(added, index=0) == POLICY
    assert await channel.update_policy(replace(POLICY, priority=5)) == replace(added, priority=5)
    assert list(await channel.policies()) == kernel.spd
    await channel.delete_policy(Direction.OUT, SELECTOR)
    with pytest.raises(KernelError):
        await channel.delete_policy(Direction.OUT, SELECTOR)
    await channel.add_policy(POLICY)
    await channel.flush_policies()
    assert await channel.policies() == []


async def test_many_requests_at_once(channel, kernel):
    await asyncio.gather(*(channel.add_sa(make_sa(spi)) for spi in range(500)))
    assert len(await channel.sas()) == 500


async def test_events(channel, edge, kernel):
    heard: asyncio.Queue[object] = asyncio.Queue()
    channel.on_event(heard.put_nowait)
    acquire = Acquire(9, 17, 7, Mode.TUNNEL, None, B, SELECTOR, Flow(A, B, 6, 1, 80))
    expire = Expire(SaId(B, 5), 7, hard=False)
    kernel.emit(acquire)
    kernel.emit(expire)
    edge.send_ready()
    assert [await heard.get(), await heard.get()] == [acquire, expire]
    await channel.acquire_failed(9, errno.ETIMEDOUT)
    await channel.get_spi(SpiRequest(A, B, Mode.TUNNEL, 7))
    assert kernel.failed == [(9, errno.ETIMEDOUT)]


async def test_events_before_the_first_listener_are_kept_for_it(edge, tmp_path, kernel):
    kernel.outstanding = [Expire(SaId(B, spi), 7, hard=False) for spi in (5, 6)]
    heard: asyncio.Queue[object] = asyncio.Queue()
    async with opened(tmp_path / "kernel") as channel:
        await channel.sas()
        channel.on_event(heard.put_nowait)
        assert [await heard.get(), await heard.get()] == kernel.outstanding


async def test_overrun(channel, edge, kernel):
    overrun = asyncio.Event()
    channel.on_overrun(overrun.set)
    for spi in range(MAX_PENDING_EXPIRES + 1):
        kernel.emit(Expire(SaId(B, spi), 7, hard=False))
    edge.send_ready()
    await overrun.wait()


async def test_descriptors_are_handed_over(channel, edge):
    for _ in range(2):  # it may be asked again
        ours = await channel.bind(A)
        theirs = edge.sockets.bound[A]
        assert set(ours).isdisjoint(theirs)
        assert not any(os.get_inheritable(descriptor) for descriptor in ours)
        os.write(ours[1], b"500")
        assert os.read(theirs[0], 9) == b"500"
        for descriptor in ours:
            os.close(descriptor)
    await channel.unbind(A)
    assert not edge.sockets.bound
    with pytest.raises(KernelError) as error:
        await channel.bind(ip_address("224.0.0.1"))
    assert error.value.errno == errno.EADDRNOTAVAIL


async def test_descriptors_that_nobody_waits_for_are_closed(channel, edge):
    before = open_files()
    edge.pause(True)
    waiting = asyncio.create_task(channel.bind(A))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    edge.pause(False)
    await channel.unbind(B)  # what was sent before has been answered when this is
    await channel.unbind(A)
    assert open_files() <= before


async def test_a_dump_through_a_small_buffer_while_sas_change(tmp_path, kernel):
    edge = SocketEdge(tmp_path / "kernel", kernel, send_buffer=4096)
    stays = range(0x10000, 0x10000 + 5000)
    for spi in stays:
        kernel.add_sa(make_sa(spi), 0.0)
    others = iter(range(0x20000, 0x40000))

    def churn() -> None:
        spi = next(others)
        kernel.add_sa(make_sa(spi), 0.0)
        if spi % 2:
            kernel.delete_sa(SaId(B, spi - 1))

    try:
        async with opened(tmp_path / "kernel") as channel:
            edge.before_send = churn
            dump, extra, got = await asyncio.gather(channel.sas(), channel.get_sa(SaId(B, 0x10001)), channel.sas())
            for snapshot in (dump, got):
                spis = [status.sa.spi for status in snapshot]
                assert len(spis) == len(set(spis))
                assert set(stays) <= set(spis)
            assert extra.sa.spi == 0x10001
    finally:
        edge.close()


async def test_who_does_not_read_loses_no_reply(tmp_path, kernel):
    """The client's side of the socket is filled before it reads anything."""
    edge = SocketEdge(tmp_path / "kernel", kernel, send_buffer=4096)
    try:
        async with opened(tmp_path / "kernel") as channel, opened(tmp_path / "kernel") as other:
            await other.flush_sas()
            await asyncio.gather(*(channel.add_sa(make_sa(spi)) for spi in range(300)))
            assert len(kernel.table) == 300
            assert len(await other.sas()) == 300
    finally:
        edge.close()


async def test_a_client_that_only_writes_is_held_up_and_loses_nothing(edge, tmp_path):
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as raw:
        raw.connect(str(tmp_path / "kernel"))
        sent, idle = 0, 0
        while idle < 50:
            try:
                raw.send(CODEC.encode(Message(MessageType.REGISTER, SaType.UNSPEC, sequence=sent + 1, pid=1)))
                sent, idle = sent + 1, 0
            except BlockingIOError:
                idle += 1
                await asyncio.sleep(0)
        assert sent > MAX_QUEUED_REPLIES
        replies = [CODEC.decode(await loop.sock_recv(raw, 1 << 16)).sequence for _ in range(sent)]
        assert replies == list(range(1, sent + 1))


async def test_the_kernel_side_dies(channel, edge):
    closed = asyncio.Event()
    channel.on_closed(closed.set)
    edge.pause(True)
    waiting = asyncio.create_task(channel.sas())
    await asyncio.sleep(0)
    edge.close()
    with pytest.raises(ChannelClosed):
        await waiting
    await closed.wait()
    late = asyncio.Event()
    channel.on_closed(late.set)
    await late.wait()
    with pytest.raises(ChannelClosed):
        await channel.get_sa(SaId(B, 5))
    with pytest.raises(ChannelClosed):
        await channel.acquire_failed(5, errno.ETIMEDOUT)


async def test_close_ends_what_is_under_way_and_is_not_a_loss(channel, edge):
    lost: list[bool] = []
    channel.on_closed(lambda: lost.append(True))
    edge.pause(True)
    waiting = asyncio.create_task(channel.sas())
    await asyncio.sleep(0)
    await channel.close()
    with pytest.raises(ChannelClosed):
        await waiting
    await channel.close()
    assert not lost


async def test_a_client_that_dies_takes_its_registration_along(channel, edge, tmp_path, kernel):
    dying = PfKeyChannel(tmp_path / "kernel")
    await dying.open()
    await dying.add_sa(make_sa(5))
    await channel.close()
    assert edge.session.statistics()["pfkey.registered"] == 2
    await dying.close()
    for _ in range(10):
        if False in kernel.listening:
            break
        await asyncio.sleep(0)
    assert kernel.listening[-1] is False
    assert SaId(B, 5) in kernel.table


async def test_nobody_listens(tmp_path):
    with pytest.raises(FileNotFoundError):
        await PfKeyChannel(tmp_path / "kernel").open()


async def test_requests_before_open_are_refused(tmp_path):
    channel = PfKeyChannel(tmp_path / "kernel")
    with pytest.raises(ChannelClosed):
        await channel.sas()
    with pytest.raises(ChannelClosed):
        channel.capabilities()
    await channel.close()


async def test_an_oversized_datagram_is_refused_and_the_channel_goes_on(channel, edge):
    for client in edge.clients.values():
        client.send(b"x" * 100_000)
    assert MAX_MESSAGE > 100_000
    assert (await channel.statistics())["packets"] == 3


# Without our extensions


async def test_plain_pf_key_does_what_it_can_say_and_refuses_the_rest(edge, tmp_path, kernel):
    async with opened(tmp_path / "kernel", extensions=False) as channel:
        capabilities = channel.capabilities()
        assert capabilities.algorithms == {replace(CBC_SHA1, key_bits=bits) for bits in (128, 192, 256)}
        assert (capabilities.esn, capabilities.port_ranges, capabilities.binds_ike_sockets) == (False, False, False)
        spi = await channel.get_spi(SpiRequest(B, A, Mode.TUNNEL, 7, acquire=5))
        inbound = make_sa(spi, source=B, destination=A, direction=Direction.IN, algorithm=CBC_SHA1, acquire=5)
        await channel.update_sa(inbound)
        outbound = make_sa(0x2000, algorithm=CBC_SHA1, replay_window=32)
        await channel.add_sa(outbound)
        assert [replace(status.sa, acquire=0) for status in kernel.table.values()] == [replace(inbound, acquire=0), outbound]
        assert kernel.table[inbound.id].sa.acquire == 5
        for beyond in (make_sa(1, esn=True), make_sa(1, replay_window=33), make_sa(1, source_selectors=selectors("10.0.0.0/8"))):
            with pytest.raises(KernelError) as error:
                await channel.add_sa(beyond)
            assert error.value.errno == errno.EOPNOTSUPP
        plain_selector = Selector(AddressRange(A, A), AddressRange(B, B), 6)
        for policy in (POLICY, replace(POLICY, selector=replace(SELECTOR, if_id=0)), replace(POLICY, selector=plain_selector)):
            with pytest.raises(KernelError):
                await channel.add_policy(policy)
        plain = Policy(plain_selector, Direction.OUT, Action.PROTECT, 5, POLICY.templates)
        assert replace(await channel.add_policy(plain), index=0) == plain
        assert len(await channel.policies()) == 1
        await channel.delete_policy(Direction.OUT, plain.selector)
        assert len(await channel.sas()) == 2
        assert await channel.statistics() == {}
        with pytest.raises(KernelError):
            await channel.bind(A)
