"""The audit: whatever the kernel has and should not, or should have and has not, is repaired and counted."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network

import pytest
from vpnd_fakes import ALGORITHM, FakeChannel, FakeKernel

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import Action, AddressRange, Direction, KernelError, Mode, Policy, ReqId, SaId, SecurityAssociation, Spi, TrafficSelector
from vpnd.daemon import kernel_side, repair
from vpnd.daemon.kernel_side import KernelSide
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

pytestmark = pytest.mark.virtual_time

A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def policies(network: str, reqid: int = 1) -> list[Policy]:
    ours, theirs = (TrafficSelector(AddressRange.of(ip_network(it))) for it in ("10.1.0.0/16", network))
    return list(policies_for(PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(reqid), A, B), [ours], [theirs]))


def outbound(spi: int) -> SecurityAssociation:
    return SecurityAssociation(Spi(spi), A, B, Direction.OUT, Mode.TUNNEL, ReqId(1), ALGORITHM)


class Lab:
    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.channels: list[FakeChannel] = []
        self.lost: list[SaId] = []
        self.counters = Counters()
        self.side = KernelSide(self.connect, self.counters)
        self.side.lost = self.lost.extend

    async def connect(self) -> KernelChannel:
        self.channels.append(FakeChannel(self.kernel))
        return self.channels[-1]

    async def reconnected(self) -> None:
        async with asyncio.timeout(60):
            while not self.side.connected or self.channels[-1].closed:
                await asyncio.sleep(0)


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(repair, "REPAIR_FIRST", 0.0)
    monkeypatch.setattr(kernel_side, "STRANGER_GRACE", 0.0)
    lab = Lab()
    await lab.side.open()
    await lab.side.claim("trap", policies("10.2.0.0/16"))
    await lab.side.install(outbound(2))
    yield lab
    await lab.side.close()


async def test_nothing_is_touched_where_nothing_drifted(lab: Lab) -> None:
    lab.kernel.requests.clear()
    await lab.side.audit()
    assert lab.kernel.requests == ["sas", "policies"]
    assert lab.counters.snapshot() == {"kernel_audits": 1}


async def test_missing_policies_are_restored(lab: Lab) -> None:
    standing = dict(lab.kernel.policies)
    lab.kernel.policies.clear()
    await lab.side.audit()
    assert lab.kernel.policies.keys() == standing.keys()
    assert lab.counters.snapshot()["kernel_policies_restored"] == 3


async def test_a_policy_that_became_another_is_put_right(lab: Lab) -> None:
    wanted = policies("10.2.0.0/16")[0]
    bypass = Policy(wanted.selector, wanted.direction, Action.BYPASS)
    lab.kernel.policies[wanted.direction, wanted.selector] = bypass
    await lab.side.audit()
    assert lab.kernel.policies[wanted.direction, wanted.selector].action is Action.PROTECT
    assert lab.counters.snapshot()["kernel_policies_restored"] == 1


async def test_policies_that_nobody_wants_are_removed(lab: Lab) -> None:
    for policy in policies("10.9.0.0/16", reqid=7):
        lab.kernel.policies[policy.direction, policy.selector] = policy
    await lab.side.audit()
    assert len(lab.kernel.policies) == 3
    assert lab.counters.snapshot()["kernel_policies_removed"] == 3


async def test_sas_that_vanished_are_told(lab: Lab) -> None:
    lab.kernel.sas.clear()
    await lab.side.audit()
    assert lab.lost == [outbound(2).id]
    assert lab.counters.snapshot()["kernel_sas_lost"] == 1
    await lab.side.audit()
    assert len(lab.lost) == 1


async def test_sas_without_an_owner_are_removed_after_a_grace() -> None:
    lab = Lab()
    await lab.side.open()
    await lab.side.install(outbound(2))
    lab.kernel.sas[outbound(3).id] = outbound(3)
    await lab.side.audit()
    assert len(lab.kernel.sas) == 2, "its owner may be about to come"
    await lab.side.close()


async def test_the_grace_ends(lab: Lab) -> None:
    lab.side = KernelSide(lab.connect, lab.counters)  # with the grace of this test
    await lab.side.open()
    lab.kernel.sas[outbound(3).id] = outbound(3)
    await lab.side.audit()
    assert outbound(3).id not in lab.kernel.sas
    assert outbound(2).id in lab.kernel.sas, "an earlier run's have a grace of their own"
    assert lab.counters.snapshot()["kernel_sas_removed"] == 1


async def test_an_sa_that_is_being_installed_has_an_owner(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    channel, real = lab.channels[-1], lab.channels[-1].add_sa
    done = asyncio.Event()

    async def slow(sa: SecurityAssociation) -> None:
        await real(sa)
        await done.wait()

    monkeypatch.setattr(channel, "add_sa", slow)
    installing = asyncio.create_task(lab.side.install(outbound(5)))
    await asyncio.sleep(0)
    await lab.side.audit()
    done.set()
    await installing
    assert outbound(5).id in lab.kernel.sas
    await lab.side.audit()
    assert outbound(5).id in lab.kernel.sas
    assert not lab.lost


async def test_an_sa_installed_while_the_tables_are_read_is_not_lost(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    channel, real = lab.channels[-1], lab.channels[-1].policies

    async def meanwhile() -> object:
        await lab.side.install(outbound(6))
        return await real()

    monkeypatch.setattr(channel, "policies", meanwhile)
    await lab.side.audit()
    assert not lab.lost


async def test_a_kernel_that_does_not_answer_is_asked_again_next_time(lab: Lab) -> None:
    lab.kernel.policies.clear()
    lab.kernel.faults["sas"] = TimeoutError("no answer")
    await lab.side.audit()
    assert lab.counters.snapshot()["kernel_audits_failed"] == 1
    await lab.side.audit()
    assert len(lab.kernel.policies) == 3


async def test_audits_come_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_side, "AUDIT_INTERVAL", 0.0)
    lab = Lab()
    await lab.side.open()
    await lab.side.claim("trap", policies("10.2.0.0/16"))
    lab.kernel.policies.clear()
    async with asyncio.timeout(60):
        while len(lab.kernel.policies) < 3:
            await asyncio.sleep(0)
    await lab.side.close()


@pytest.mark.parametrize("fault", [TimeoutError("no answer"), ChannelClosed("gone")], ids=["silent", "gone"])
async def test_an_sa_of_which_the_kernel_did_not_say_whether_it_stands_goes(lab: Lab, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    channel, real = lab.channels[-1], lab.channels[-1].add_sa

    async def carried_out_but_not_answered(sa: SecurityAssociation) -> None:
        await real(sa)
        raise fault

    monkeypatch.setattr(channel, "add_sa", carried_out_but_not_answered)
    with pytest.raises(type(fault)):
        await lab.side.install(outbound(7))
    if isinstance(fault, ChannelClosed):
        channel.die()
        await lab.reconnected()
    async with asyncio.timeout(60):
        while outbound(7).id in lab.kernel.sas:
            await asyncio.sleep(0)
    assert outbound(2).id in lab.kernel.sas
    assert not lab.lost


async def test_a_refused_sa_does_not_stand_and_needs_no_deletion(lab: Lab) -> None:
    lab.kernel.faults["add_sa"] = KernelError(errno.EEXIST, "taken")
    lab.kernel.requests.clear()
    with pytest.raises(KernelError):
        await lab.side.install(outbound(8))
    await asyncio.sleep(0)
    assert lab.kernel.requests == ["add_sa"]


async def test_what_was_removed_while_the_kernel_was_away_goes_when_it_is_back(lab: Lab) -> None:
    lab.channels[-1].die()
    await lab.side.remove(outbound(2).id)
    await lab.side.release("trap")
    await lab.reconnected()
    async with asyncio.timeout(60):
        while lab.kernel.sas or lab.kernel.policies:
            await asyncio.sleep(0)
