from __future__ import annotations

import asyncio
import errno
from ipaddress import ip_address, ip_network

import pytest
from vpnd_fakes import ALGORITHM, FakeChannel, FakeKernel

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import (
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    KernelError,
    Mode,
    Policy,
    ReqId,
    SaId,
    SecurityAssociation,
    Spi,
    TrafficSelector,
)
from vpnd.daemon import installed_sas, kernel_side, repair
from vpnd.daemon.kernel_side import KernelSide
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

pytestmark = pytest.mark.virtual_time

A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def ts(network: str) -> TrafficSelector:
    return TrafficSelector(AddressRange.of(ip_network(network)))


def policies(network: str, reqid: int = 1) -> list[Policy]:
    return list(policies_for(PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(reqid), A, B), [ts("10.1.0.0/16")], [ts(network)]))


def association(spi: int, direction: Direction, network: str = "10.2.0.0/16") -> SecurityAssociation:
    ours, theirs = (ts("10.1.0.0/16"),), (ts(network),)
    out = direction is Direction.OUT
    return SecurityAssociation(
        Spi(spi),
        A if out else B,
        B if out else A,
        direction,
        Mode.TUNNEL,
        ReqId(1),
        ALGORITHM,
        source_selectors=ours if out else theirs,
        destination_selectors=theirs if out else ours,
    )


class Lab:
    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.channels: list[FakeChannel] = []
        self.attached = asyncio.Event()
        self.lost: list[SaId] = []

    async def connect(self) -> KernelChannel:
        channel = FakeChannel(self.kernel)
        self.channels.append(channel)
        self.attached.set()
        return channel

    def side(self) -> KernelSide:
        side = KernelSide(self.connect, Counters())
        side.lost = self.lost.extend
        return side

    def selectors(self) -> set[str]:
        return {str(selector) for direction, selector in self.kernel.policies if direction is Direction.OUT}


async def test_policies_come_and_go_with_their_owners() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    await side.claim("child", policies("10.2.0.0/16"))
    await side.claim("child", policies("10.3.0.0/16"))
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16", "10.1.0.0/16 => 10.3.0.0/16"}
    await side.release("child")
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16"}
    await side.release("trap")
    assert not lab.kernel.policies


async def test_a_refused_policy_leaves_nothing_half_applied() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    wanted = policies("10.2.0.0/16")
    lab.kernel.refuse.add(wanted[1].selector)
    with pytest.raises(KernelError):
        await side.claim("trap", wanted)
    assert not lab.kernel.policies
    assert not side.has_claims("trap")


async def test_a_refusal_is_heard_by_who_asked_for_the_policy_not_by_who_carried_it_over() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    good, bad = policies("10.2.0.0/16"), policies("10.3.0.0/16", reqid=2)
    lab.kernel.refuse.add(bad[0].selector)
    outcome = await asyncio.gather(side.claim("good", good), side.claim("bad", bad), return_exceptions=True)
    assert outcome[0] is None
    assert isinstance(outcome[1], KernelError)
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16"}
    await side.close()


async def test_policies_that_the_kernel_does_not_answer_for_are_not_claimed_and_leave_nothing() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    lab.kernel.faults["update_policy"] = TimeoutError("no answer")
    with pytest.raises(TimeoutError):
        await side.claim("trap", policies("10.2.0.0/16"))
    assert not side.has_claims("trap")
    assert not lab.kernel.policies
    await side.claim("trap", policies("10.2.0.0/16"))
    assert len(lab.kernel.policies) == 3
    await side.close()


@pytest.mark.parametrize("fault", [TimeoutError("no answer"), KernelError(errno.ENOMEM, "no memory")], ids=["silent", "refused"])
async def test_a_deletion_that_failed_is_made_again(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    await side.install(association(2, Direction.OUT))
    lab.kernel.faults |= {"delete_sa": fault, "delete_policy": fault}
    await side.remove(association(2, Direction.OUT).id)
    await side.release("trap")
    async with asyncio.timeout(60):
        while lab.kernel.sas or lab.kernel.policies:
            await asyncio.sleep(0)
    await side.close()


async def test_a_kernel_that_dies_while_it_is_examined_is_attached_once() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    lab.kernel = FakeKernel(faults={"sas": KernelError(errno.EIO, "half alive")})
    lab.channels[-1].die()
    async with asyncio.timeout(60):
        while not lab.kernel.policies:
            await asyncio.sleep(0.001)
    assert [channel.closed for channel in lab.channels] == [True, True, False]
    await side.close()


async def test_one_policy_that_a_new_kernel_refuses_does_not_keep_the_others_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("one", policies("10.2.0.0/16"))
    await side.claim("two", policies("10.3.0.0/16", reqid=2))
    lab.kernel = FakeKernel(refuse={policies("10.2.0.0/16")[0].selector})
    lab.channels[-1].die()
    async with asyncio.timeout(60):
        while "10.1.0.0/16 => 10.3.0.0/16" not in lab.selectors():
            await asyncio.sleep(0)
        assert side.connected
        lab.kernel.refuse.clear()
        while "10.1.0.0/16 => 10.2.0.0/16" not in lab.selectors():
            await asyncio.sleep(0)
    await side.close()


async def test_a_restarted_kernel_gets_its_policies_back_and_lost_sas_are_told() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    await side.install(association(1, Direction.IN))
    await side.install(association(2, Direction.OUT))
    lab.kernel = FakeKernel()  # the new one knows nothing
    lab.attached.clear()
    lab.channels[-1].die()
    await lab.attached.wait()
    while len(lab.lost) < 2:
        await asyncio.sleep(0)
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16"}
    assert {sa.spi for sa in lab.lost} == {1, 2}
    assert not lab.kernel.sas, "an outbound key is never installed twice"
    await side.close()


async def test_a_claim_made_while_the_kernel_is_away_is_carried_over_later() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    lab.attached.clear()
    lab.channels[-1].die()
    await side.claim("trap", policies("10.2.0.0/16"))
    await lab.attached.wait()
    while not lab.kernel.policies:
        await asyncio.sleep(0)
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16"}
    await side.close()


async def test_what_an_earlier_run_left_serves_until_its_successor_stands() -> None:
    lab = Lab()
    first = lab.side()
    await first.open()
    await first.claim("trap", policies("10.2.0.0/16", reqid=9))
    await first.install(association(1, Direction.IN))
    await first.install(association(2, Direction.OUT))
    await first.close(leave=True)  # as if killed

    second = lab.side()
    await second.open()
    assert second.reqid_for(policies("10.2.0.0/16")[0].selector) == 9, "the old SAs still serve the policy"
    assert second.reqid_for(None) != 9
    await second.claim("trap", policies("10.2.0.0/16", reqid=9))
    assert {sa.spi for sa in lab.kernel.sas} == {1, 2}
    await second.install(association(3, Direction.IN))
    assert {sa.spi for sa in lab.kernel.sas} == {1, 2, 3}
    await second.install(association(4, Direction.OUT))
    assert {sa.spi for sa in lab.kernel.sas} == {3, 4}
    await second.close()


async def test_what_nobody_claims_again_is_removed_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_side, "ORPHAN_GRACE", 0.0)
    lab = Lab()
    first = lab.side()
    await first.open()
    await first.claim("trap", policies("10.2.0.0/16"))
    await first.install(association(2, Direction.OUT))
    await first.close(leave=True)
    second = lab.side()
    await second.open()
    while lab.kernel.sas or lab.kernel.policies:
        await asyncio.sleep(0)
    await second.close()


async def test_after_an_overrun_the_tables_tell_what_the_lost_events_told() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    await side.install(association(1, Direction.IN))
    await side.install(association(2, Direction.OUT))
    out = association(2, Direction.OUT).id
    del lab.kernel.sas[out]
    lab.kernel.policies.clear()
    lab.channels[-1].overrun()
    while not lab.lost:
        await asyncio.sleep(0)
    assert lab.lost == [out]
    assert lab.selectors() == {"10.1.0.0/16 => 10.2.0.0/16"}


async def test_an_orderly_end_leaves_an_empty_kernel() -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    await side.install(association(2, Direction.OUT))
    await side.close()
    assert not lab.kernel.sas
    assert not lab.kernel.policies


async def test_a_claim_outlives_a_kernel_that_dies_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    lab = Lab()
    side = lab.side()
    await side.open()
    lab.kernel.faults["update_policy"] = ChannelClosed("gone")
    claiming = asyncio.ensure_future(side.claim("trap", policies("10.2.0.0/16")))
    await asyncio.sleep(0)
    lab.channels[-1].die()
    await claiming
    async with asyncio.timeout(60):
        while len(lab.kernel.policies) < 3:
            await asyncio.sleep(0.001)
    await side.close()


async def test_a_request_without_answer_holds_up_only_its_own_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    channel, real, answer = lab.channels[-1], lab.channels[-1].update_policy, asyncio.Event()

    async def slow(policy: Policy) -> Policy:
        if policy.selector == policies("10.2.0.0/16")[0].selector:
            await answer.wait()
        return await real(policy)

    monkeypatch.setattr(channel, "update_policy", slow)
    held = asyncio.create_task(side.claim("held", policies("10.2.0.0/16")))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        for number in range(3, 200):
            await side.claim(number, policies(f"10.{number}.0.0/16", reqid=number))
        await side.release(3)
    assert not held.done()
    assert len(lab.selectors()) == 196
    answer.set()
    await held
    await side.close()


async def test_between_two_address_ranges_what_is_wanted_stands_before_what_is_not_goes() -> None:
    """To a kernel with fewer words the two may be one policy."""
    lab = Lab()
    side = lab.side()
    await side.open()
    (old, *_), tcp = policies("10.2.0.0/16"), TrafficSelector(AddressRange.of(ip_network("10.2.0.0/16")), 6)
    new = next(policies_for(PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(2), A, B), [ts("10.1.0.0/16")], [tcp]))
    await side.claim("old", [old])
    lab.kernel.requests.clear()
    await asyncio.gather(side.release("old"), side.claim("new", [new]))
    assert lab.kernel.requests == ["update_policy", "delete_policy"]
    await side.close()


async def test_a_kernel_that_dies_once_its_tables_were_read_is_attached_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    lab.kernel = FakeKernel(faults={"update_policy": ChannelClosed("gone")})
    lab.channels[-1].die()
    async with asyncio.timeout(60):
        while len(lab.channels) < 2:
            await asyncio.sleep(0)
        lab.channels[-1].die()
        while len(lab.kernel.policies) < 3 or not side.connected:
            await asyncio.sleep(0.001)
    await side.close()


async def test_a_refused_acquire_is_refused_until_the_kernel_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    lab = Lab()
    side = lab.side()
    await side.open()
    lab.kernel.faults["acquire_failed"] = TimeoutError("no answer")
    await side.acquire_failed(AcquireSequence(7), errno.EHOSTUNREACH)
    async with asyncio.timeout(60):
        while lab.kernel.requests.count("acquire_failed") < 2:
            await asyncio.sleep(0)
    await side.close()


async def test_an_overrun_is_looked_after_until_the_tables_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    lab = Lab()
    side = lab.side()
    await side.open()
    await side.claim("trap", policies("10.2.0.0/16"))
    lab.kernel.policies.clear()
    lab.kernel.faults["sas"] = TimeoutError("no answer")
    for _ in range(3):
        lab.channels[-1].overrun()
    async with asyncio.timeout(60):
        while len(lab.kernel.policies) < 3:
            await asyncio.sleep(0)
    assert lab.kernel.requests.count("policies") == 2, "once at attaching, once for all overruns"
    await side.close()


async def test_sas_that_linger_go_in_time_and_are_bounded_per_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed_sas, "MAX_LINGERING", 2)
    lab = Lab()
    side = lab.side()
    await side.open()
    for spi in (1, 2, 3):
        await side.install(association(spi, Direction.IN))
        side.remove_later(association(spi, Direction.IN).id, 0.01)
    while len(lab.kernel.sas) > 2:
        await asyncio.sleep(0)
    assert {sa.spi for sa in lab.kernel.sas} == {1, 2}
    while lab.kernel.sas:
        await asyncio.sleep(0.001)
    # those that went make room
    for spi in (4, 5):
        await side.install(association(spi, Direction.IN))
        side.remove_later(association(spi, Direction.IN).id, 60.0)
    await asyncio.sleep(0.01)
    assert {sa.spi for sa in lab.kernel.sas} == {4, 5}
    await side.close()
    assert not lab.kernel.sas
