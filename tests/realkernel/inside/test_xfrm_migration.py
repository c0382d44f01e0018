"""SAs of a real kernel that move to other addresses and ports, their replay state, and the kernel's word of a NAT's new port."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from realkernel.kernel_ends import FAR, HERE, KEY, NEAR, PEER, REQID, SPI, TRAP, Ends, Sink, outbound, send, two_ends, until, within

from kernel_shim.channel.netlink import NetlinkSocket
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import (
    AcquireSequence,
    Direction,
    Endpoint,
    KernelError,
    KernelEvent,
    Lifetime,
    Mark,
    Mode,
    NewMapping,
    SaId,
    SecurityAssociation,
    Template,
    UdpEncapsulation,
)
from kernel_shim.xfrm.constants import OURS
from kernel_shim.xfrm.migrate import Move, migrate_message
from kernel_shim.xfrm.replay import ReplayState

pytestmark = pytest.mark.realkernel

ELSEWHERE = IPv4Address("192.0.2.77")


@pytest.fixture
def ends() -> Iterator[Ends]:
    with two_ends() as both:
        both.here.ip(f"addr add {ELSEWHERE}/24 dev wire")
        yield both


def test_an_outbound_sa_moves_and_its_numbers_go_on(ends: Ends) -> None:
    """Also with packets on their way: what was held meanwhile leaves in order once the policy knows the new address."""
    sink = Sink(ends.there)

    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        await channel.add_policy(TRAP)
        old = outbound(soft=Lifetime(packets=1000), acquire=AcquireSequence(3))
        await channel.add_sa(old)
        before = await channel.get_sa(old.id)
        assert send(5) == (5, 0)
        await until(lambda: sink.look() == 5)
        new = replace(old, source=ELSEWHERE)
        await channel.migrate_sa(old, new)
        assert send(2) == (2, 0)  # its policy still wants the old address: held
        assert (await channel.replay_state(new.id)).sent == 5
        await channel.update_policy(replace(TRAP, templates=(Template(Mode.TUNNEL, REQID, ELSEWHERE, PEER),)))
        await until(lambda: sink.look() == 7)
        assert sink.numbers == [*range(5), *range(2)]
        moved = await channel.get_sa(new.id)
        assert (moved.sequence, moved.packets, moved.added) == (7, 7, before.added)
        assert replace(moved.sa, acquire=old.acquire) == new
        await channel.migrate_sa(old, new)  # a repetition whose first answer was lost
        assert (await channel.replay_state(new.id)).sent == 7
        await channel.delete_sa(new.id)
        with pytest.raises(KernelError) as refused:
            await channel.migrate_sa(old, new)
        assert refused.value.errno == errno.ESRCH
        assert (await channel.statistics())["moved"] == 1

    try:
        within(ends.here, body)
    finally:
        sink.close()


@pytest.mark.parametrize("esn", [False, True])
def test_an_inbound_sa_moves_with_its_window(ends: Ends, esn: bool) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        old = outbound(source=PEER, destination=HERE, direction=Direction.IN, esn=esn, replay_window=64 if esn else 32)
        await channel.add_sa(old)
        seen = ReplayState(0, (3 << 32) + 77, 64, (0xF0F0F0F0, 0x55), wide=True) if esn else ReplayState(0, 77, bitmap=(0xF0F0F0F0,))
        await channel.set_replay_state(old.id, seen)
        assert await channel.replay_state(old.id) == seen
        new = replace(old, destination=ELSEWHERE, encapsulation=UdpEncapsulation(61000, 4500))
        await channel.migrate_sa(old, new)
        assert await channel.replay_state(new.id) == seen
        told = await channel.get_sa(new.id)
        assert (told.sa, told.sequence) == (new, seen.received)
        with pytest.raises(KernelError):
            await channel.get_sa(old.id)
        # a NAT's new port
        after = replace(new, encapsulation=UdpEncapsulation(61001, 4500))
        await channel.migrate_sa(new, after)
        told = await channel.get_sa(new.id)
        assert (told.sa, told.sequence) == (after, seen.received)

    within(ends.here, body)


def test_a_marked_sa_moves_and_goes(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        old = outbound(mark=Mark(7, 0xFF), set_mark=Mark(3, 0xF), if_id=42)
        await channel.add_sa(old)
        new = replace(old, source=ELSEWHERE)
        await channel.migrate_sa(old, new)
        assert (await channel.get_sa(new.id)).sa == new
        await channel.delete_sa(new.id)
        assert await channel.sas() == []

    within(ends.here, body)


def test_a_migration_by_somebody_else_is_heard_of(ends: Ends) -> None:
    async def body(channel: XfrmChannel, _: list[KernelEvent]) -> None:
        overruns = []
        channel.on_overrun(lambda: overruns.append(1))
        await channel.add_policy(TRAP)
        await channel.add_sa(outbound())
        other = NetlinkSocket()
        other.open()
        await other.request(migrate_message(Direction.OUT, TRAP.selector, [Move(HERE, PEER, ELSEWHERE, PEER, Mode.TUNNEL, OURS | REQID)]))
        other.close()
        await until(lambda: bool(overruns))
        (status,) = await channel.sas()
        assert status.sa.source == ELSEWHERE
        (policy,) = await channel.policies()
        assert policy.templates[0].source == ELSEWHERE
        assert (await channel.statistics())["migrations"] == 1

    within(ends.here, body)


def test_a_nat_that_takes_another_port_is_reported(ends: Ends) -> None:
    encap = ends.here.socket(socket.AF_INET, socket.SOCK_DGRAM)
    encap.setsockopt(socket.IPPROTO_UDP, 100, 2)  # UDP_ENCAP, UDP_ENCAP_ESPINUDP
    encap.bind((str(HERE), 4500))
    there = f"src {PEER} dst {HERE} proto esp"
    ends.there.run(["ip", "xfrm", *f"policy add src {FAR} dst {NEAR} dir out tmpl {there} mode tunnel".split()])
    state = f"state add {there} spi {SPI:#x} mode tunnel encap espinudp 61000 4500 0.0.0.0".split()
    ends.there.run(["ip", "xfrm", *state, "aead", "rfc4106(gcm(aes))", "0x" + KEY.hex(), "128"])

    async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
        sa: SecurityAssociation = outbound(source=PEER, destination=HERE, direction=Direction.IN, encapsulation=UdpEncapsulation(4500, 4500))
        await channel.add_sa(sa)
        await channel.add_policy(
            replace(TRAP, selector=TRAP.selector.reversed(), direction=Direction.IN, templates=(Template(Mode.TUNNEL, REQID, PEER, HERE),))
        )
        sender = ends.there.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.bind((str(FAR[1]), 0))
        sender.sendto(b"x", (str(NEAR[1]), 9))
        sender.close()
        await until(lambda: bool(events))
        assert events[0] == NewMapping(SaId(HERE, SPI), REQID, Endpoint(PEER, 4500), Endpoint(PEER, 61000))

    try:
        within(ends.here, body)
    finally:
        encap.close()
