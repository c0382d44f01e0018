"""The key manager's channel, the server session and the real data plane together: from the first packet to the SA's counters."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from dataplane_pair import Gateway, addresses
from pfkey_support import SocketEdge, without_keys
from scapy.layers.inet import IP, UDP

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.model import (
    Acquire,
    Action,
    Direction,
    KernelError,
    Lifetime,
    Mode,
    Policy,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    Selector,
    SpiRequest,
    Template,
    TrafficSelector,
    UdpEncapsulation,
    Unresolved,
)
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.secret import Secret

LEFT, RIGHT = ip_address("192.0.2.1"), ip_address("192.0.2.2")
MINE, THEIRS = addresses("10.1.0.0/16"), addresses("10.2.0.0/16")
POLICY = Policy(Selector(MINE, THEIRS), Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, ReqId(7), LEFT, RIGHT),), Unresolved.QUEUE)


def frame(source: str = "10.1.0.1", destination: str = "10.2.0.1") -> bytes:
    return VnetHeader().pack() + bytes(IP(src=source, dst=destination) / UDP(sport=1000, dport=2000) / b"hello")


def outbound_sa(spi: int, sequence: int) -> SecurityAssociation:
    return SecurityAssociation(
        spi=spi,
        source=LEFT,
        destination=RIGHT,
        direction=Direction.OUT,
        mode=Mode.TUNNEL,
        reqid=ReqId(7),
        algorithm=EspAlgorithm(EncryptionId.AES_GCM_16, 256),
        encryption_key=Secret(bytes(36)),
        encapsulation=UdpEncapsulation(),
        soft=Lifetime(100),
        hard=Lifetime(200),
        source_selectors=(TrafficSelector(MINE),),
        destination_selectors=(TrafficSelector(THEIRS),),
        acquire=sequence,
    )


@pytest.fixture
async def standing(tmp_path):
    """Gateway, edge, channel, and the queue of the channel's events."""
    gateway = Gateway(1)
    edge = SocketEdge(tmp_path / "kernel", gateway.engine)
    channel = PfKeyChannel(tmp_path / "kernel")
    heard: asyncio.Queue[object] = asyncio.Queue()
    await channel.open()
    channel.on_event(heard.put_nowait)
    yield gateway, edge, channel, heard
    await channel.close()
    edge.close()


async def test_from_the_first_packet_to_the_counters(standing):
    gateway, edge, channel, heard = standing
    now = asyncio.get_running_loop().time
    policy = await channel.add_policy(POLICY)
    gateway.engine.send(frame(), now())
    gateway.engine.flush(now())
    edge.send_ready()
    acquire = await heard.get()
    assert isinstance(acquire, Acquire)
    assert (acquire.policy, acquire.reqid, acquire.source, acquire.destination) == (policy.index, 7, LEFT, RIGHT)
    assert (str(acquire.flow.source), acquire.flow.destination_port) == ("10.1.0.1", 2000)
    assert acquire.selector == POLICY.selector

    request = SpiRequest(RIGHT, LEFT, Mode.TUNNEL, ReqId(7), acquire=acquire.sequence)
    spi = await channel.get_spi(request)
    assert (await channel.get_sa(SaId(LEFT, spi))).state is SaState.LARVAL
    sa = outbound_sa(0x1234, acquire.sequence)
    await channel.add_sa(sa)
    gateway.engine.tick(now())
    gateway.engine.flush(now())
    (sent,) = gateway.sent()
    assert sent.data[:4] == (0x1234).to_bytes(4, "big")
    status = await channel.get_sa(sa.id)
    assert status.sa == without_keys(sa)
    assert (status.packets, status.sequence, status.used is not None) == (1, 1, True)
    assert {entry.sa.spi for entry in await channel.sas()} == {spi, 0x1234}
    assert (await channel.statistics())["sas"] == 2


async def test_giving_up_discards_the_queue(standing):
    gateway, edge, channel, heard = standing
    now = asyncio.get_running_loop().time
    await channel.add_policy(POLICY)
    gateway.engine.send(frame(), now())
    gateway.engine.flush(now())
    edge.send_ready()
    acquire = await heard.get()
    await channel.acquire_failed(acquire.sequence, errno.ETIMEDOUT)
    assert (await channel.statistics())["drop_acquire_failed"] == 1


async def test_a_key_manager_that_comes_later_hears_what_waits(tmp_path):
    gateway = Gateway(1)
    edge = SocketEdge(tmp_path / "kernel", gateway.engine)
    first = PfKeyChannel(tmp_path / "kernel")
    await first.open()
    await first.add_policy(POLICY)
    await first.close()
    now = asyncio.get_running_loop().time()
    gateway.engine.send(frame(), now)
    gateway.engine.flush(now)
    second = PfKeyChannel(tmp_path / "kernel")
    await second.open()
    heard: asyncio.Queue[object] = asyncio.Queue()
    second.on_event(heard.put_nowait)
    assert isinstance(await heard.get(), Acquire)
    await second.close()
    edge.close()


async def test_refusals_of_the_kernel(standing):
    _, _, channel, _ = standing
    sa = outbound_sa(0x1234, 0)
    await channel.add_sa(sa)
    for request, number in (
        (channel.add_sa(sa), errno.EEXIST),
        (channel.update_sa(outbound_sa(0x9999, 0)), errno.ESRCH),
        (channel.delete_sa(SaId(LEFT, 0x1234)), errno.ESRCH),
    ):
        with pytest.raises(KernelError) as error:
            await request
        assert error.value.errno == number


async def test_an_sa_moves_to_other_addresses(standing):
    _, _, channel, _ = standing
    old = outbound_sa(0x1234, 0)
    new = replace(old, source=ip_address("198.51.100.1"), encapsulation=UdpEncapsulation(4500, 31337))
    with pytest.raises(KernelError) as error:
        await channel.migrate_sa(old, new)
    assert error.value.errno == errno.ESRCH
    await channel.add_sa(old)
    for _ in range(2):  # again is harmless
        await channel.migrate_sa(old, new)
        assert [status.sa for status in await channel.sas()] == [without_keys(new)]
    with pytest.raises(KernelError) as error:
        await channel.migrate_sa(new, replace(new, reqid=ReqId(99)))
    assert error.value.errno == errno.EINVAL
