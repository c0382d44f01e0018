"""XfrmChannel against this machine's own kernel, in a namespace: policies, ACQUIREs, larval SAs, overruns. ESP itself is for the real-kernel tier."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from lab.lossy_sockets import Losses, lossy_netlink
from lab.namespaces import Lab, Namespace
from xfrm_support import is_gone

from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import (
    ANY_PORT,
    Acquire,
    Action,
    AddressRange,
    Direction,
    KernelError,
    KernelEvent,
    Mode,
    Policy,
    PortRange,
    ReqId,
    SaId,
    SaState,
    Selector,
    SpiRequest,
    Template,
    Unresolved,
)

pytestmark = pytest.mark.root

HERE, PEER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
CORE = Path("/proc/sys/net/core")


def network(text: str) -> AddressRange:
    return AddressRange.of(IPv4Network(text))


def policy(reqid: int = 7, remote: str = "10.2.0.0/24", **changes: Any) -> Policy:
    template = Template(Mode.TUNNEL, ReqId(reqid), HERE, PEER)
    values: dict[str, Any] = {
        "selector": Selector(network("10.1.0.0/24"), network(remote)),
        "direction": Direction.OUT,
        "action": Action.PROTECT,
        "priority": 1000,
        "templates": (template,),
    }
    return Policy(**{**values, **changes})


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A host of 10.1.0.1, with a way to everywhere."""
    with Lab() as lab:
        namespace = lab.namespace("xfrm")
        namespace.ip(
            "link add out type veth peer name nowhere",
            "link set out up",
            "link set nowhere up",
            "addr add 10.1.0.1/24 dev out",
            f"addr add {HERE}/24 dev out",
            f"neigh add {PEER} lladdr 02:00:00:00:00:01 dev out nud permanent",
            f"route add default via {PEER}",
        )
        yield namespace


def within(namespace: Namespace, body: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on a loop in the namespace: a netlink socket belongs to where it was made."""

    async def run() -> None:
        async with asyncio.timeout(60):
            await body()

    namespace.call(lambda: asyncio.run(run()))


class Heard:
    """What a channel reports."""

    def __init__(self, channel: XfrmChannel) -> None:
        self.events: list[KernelEvent] = []
        self.overruns = 0
        self._changed = asyncio.Event()
        channel.on_event(self._event)
        channel.on_overrun(self._overrun)

    def _event(self, event: KernelEvent) -> None:
        self.events.append(event)
        self._changed.set()

    def _overrun(self) -> None:
        self.overruns += 1
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
            self._changed.clear()


@asynccontextmanager
async def opened(**settings: Any):  # type: ignore[no-untyped-def]
    channel = XfrmChannel(require_esp=False, **settings)
    heard = Heard(channel)
    await channel.open()
    try:
        yield channel, heard
    finally:
        await channel.close()


def send(target: str = "10.2.0.5", port: int = 9) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("10.1.0.1", 0))
        sender.sendto(b"x", (target, port))


def test_policies_are_added_replaced_dumped_and_deleted(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, _):
            added = await channel.add_policy(policy())
            assert added == policy(index=added.index)
            assert added.index
            assert await channel.policies() == [added]
            with pytest.raises(KernelError) as refused:
                await channel.add_policy(policy())
            assert refused.value.errno == errno.EEXIST
            replaced = await channel.update_policy(policy(reqid=8))
            assert (replaced.index, replaced.templates[0].reqid) == (added.index, 8)
            assert await channel.policies() == [replaced]
            await channel.delete_policy(Direction.OUT, replaced.selector)
            assert await channel.policies() == []
            with pytest.raises(KernelError) as refused:
                await channel.delete_policy(Direction.OUT, replaced.selector)
            assert refused.value.errno == errno.ENOENT

    within(host, body)


def test_iproute2_reads_the_same(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, _):
            ports = {"protocol": 6, "destination_ports": PortRange(443, 443)}
            await channel.add_policy(policy(selector=Selector(network("10.1.0.0/24"), network("10.2.0.0/16"), **ports)))
            echo = PortRange(0x0800, 0x08FF)
            discard = Selector(network("10.1.0.0/24"), network("10.3.0.0/16"), 1, echo, echo)
            await channel.add_policy(policy(selector=discard, direction=Direction.FORWARD, action=Action.DISCARD, templates=(), priority=5))
            told = host.run(["ip", "xfrm", "policy"]).stdout
            shown = " ".join(told.split())
            assert "src 10.1.0.0/24 dst 10.2.0.0/16 proto tcp dport 443 dir out priority 1000" in shown
            assert f"tmpl src {HERE} dst {PEER} proto esp reqid {0x80000007} mode tunnel" in shown
            assert "src 10.1.0.0/24 dst 10.3.0.0/16 proto icmp type 8 dir fwd action block priority 5" in shown
            found = {policy.direction: policy for policy in await channel.policies()}
            assert found[Direction.FORWARD].selector == discard
            assert found[Direction.OUT].selector.destination_ports == PortRange(443, 443)

    within(host, body)


def test_what_others_have_put_into_the_kernel_is_left_alone(host: Namespace) -> None:
    async def body() -> None:
        theirs = "src 10.1.0.0/24 dst 10.9.0.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 7 mode tunnel"
        host.run(["ip", "xfrm", "policy", "add", *theirs.split()])
        async with opened() as (channel, heard):
            mine = await channel.add_policy(policy())
            bypass = await channel.add_policy(policy(remote="10.4.0.0/24", action=Action.BYPASS, templates=()))
            assert sorted(await channel.policies(), key=str) == sorted((mine, bypass), key=str)
            send("10.9.0.5")
            send("10.2.0.5")
            await heard.until(lambda: bool(heard.events))
            (event,) = heard.events
            assert isinstance(event, Acquire)
            assert event.policy == mine.index
            assert [status.sa.destination for status in await channel.sas()] == [PEER]
            await channel.flush_policies()
            await channel.flush_sas()
            assert await channel.policies() == []
            assert await channel.sas() == []
        assert "10.9.0.0/24" in host.run(["ip", "xfrm", "policy"]).stdout
        assert "192.0.2.9" in host.run(["ip", "xfrm", "state"]).stdout

    within(host, body)


def test_a_later_run_finds_what_an_earlier_one_left(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, _):
            left = await channel.add_policy(policy())
        async with opened() as (channel, _):
            assert await channel.policies() == [left]
            await channel.flush_policies()
            assert await channel.policies() == []

    within(host, body)


def test_a_packet_without_sa_is_an_acquire_that_names_its_flow(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, heard):
            trap = await channel.add_policy(policy())
            send(port=53)
            await heard.until(lambda: bool(heard.events))
            (event,) = heard.events
            assert isinstance(event, Acquire)
            assert (event.reqid, event.policy, event.mode, event.source, event.destination) == (7, trap.index, Mode.TUNNEL, HERE, PEER)
            assert event.selector == trap.selector
            assert event.flow is not None
            assert (event.flow.destination, event.flow.protocol, event.flow.destination_port) == (IPv4Address("10.2.0.5"), 17, 53)
            (larval,) = await channel.sas()
            assert (larval.state, larval.sa.direction, larval.sa.reqid, larval.sa.spi) == (SaState.LARVAL, Direction.OUT, 7, 0)
            assert larval.sa.acquire == event.sequence

    within(host, body)


def test_the_kernel_asks_once_for_all_flows_of_a_policy_and_holds_101_packets(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, heard):
            await channel.add_policy(policy())
            for number in range(101):
                send(f"10.2.0.{1 + number}")
            with pytest.raises(BlockingIOError):
                send("10.2.0.200")
            await heard.until(lambda: bool(heard.events))
            assert len(await channel.sas()) == 1
            assert len(heard.events) == 1

    within(host, body)


def test_an_acquire_that_an_earlier_run_left_unanswered_is_reported_again(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, heard):
            await channel.add_policy(policy())
            send(port=53)
            await heard.until(lambda: bool(heard.events))
        async with opened() as (channel, later):
            await channel.policies()
            again = Heard(channel)
            await again.until(lambda: bool(again.events))
            assert again.events == heard.events
            (event,) = again.events
            assert isinstance(event, Acquire)
            await channel.acquire_failed(event.sequence, errno.EHOSTUNREACH)
            assert is_gone(event.sequence, await channel.sas())
            await later.until(lambda: bool(later.events))

    within(host, body)


def test_a_failed_acquire_blocks_nobody(host: Namespace) -> None:
    """The larval SA goes at once, so the next packet asks again."""

    async def body() -> None:
        async with opened() as (channel, heard):
            await channel.add_policy(policy())
            send()
            await heard.until(lambda: len(heard.events) == 1)
            (event,) = heard.events
            assert isinstance(event, Acquire)
            await channel.acquire_failed(event.sequence, errno.EHOSTUNREACH)
            assert is_gone(event.sequence, await channel.sas())
            send()
            await heard.until(lambda: len(heard.events) >= 2)

    within(host, body)


class Deaf(Losses):
    """While `deaf`, all is lost."""

    deaf = False

    def loses(self, dump: int | None = None) -> bool:
        return self.deaf


def test_an_acquire_is_found_though_the_tables_cannot_be_read_at_first_and_goes_though_no_answer_comes(host: Namespace) -> None:
    losses = Deaf(0.0, 1)

    async def body() -> None:
        with lossy_netlink(losses):
            async with opened() as (channel, heard):
                await channel.add_policy(policy())
                losses.deaf = True
                send()
                await heard.until(lambda: heard.overruns > 0)
                with pytest.raises(TimeoutError):
                    await channel.sas()
                assert heard.events == []
                losses.deaf = False
                await heard.until(lambda: len(heard.events) == 1)
                (event,) = heard.events
                assert isinstance(event, Acquire)
                losses.deaf = True
                with pytest.raises(TimeoutError):
                    await channel.acquire_failed(event.sequence, errno.EHOSTUNREACH)
                losses.deaf = False
                await channel.acquire_failed(event.sequence, errno.EHOSTUNREACH)
                assert is_gone(event.sequence, await channel.sas())
                send()
                await heard.until(lambda: len(heard.events) >= 2)  # the packet that waits may have asked anew, more than once

    within(host, body)


def test_what_only_the_tables_told_can_be_refused(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, heard):
            await channel.add_policy(policy())
            send()
            (status,) = await channel.sas()
            await channel.acquire_failed(status.sa.acquire, errno.EHOSTUNREACH)
            assert is_gone(status.sa.acquire, await channel.sas())
            await heard.until(lambda: bool(heard.events))

    within(host, body)


def test_spis_are_reserved_for_as_long_as_a_negotiation_may_take(host: Namespace) -> None:
    async def body() -> None:
        async with opened(acquire_seconds=77) as (channel, _):
            request = SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(0), 0x1000, 0x1FFF)
            spis = {await channel.get_spi(request) for _ in range(5)}
            assert len(spis) == 5
            assert all(0x1000 <= spi <= 0x1FFF for spi in spis)
            status = await channel.get_sa(SaId(HERE, min(spis)))
            assert (status.state, status.sa.direction, status.sa.source, status.sa.hard.seconds) == (SaState.LARVAL, Direction.IN, PEER, 77)
            await channel.delete_sa(status.sa.id)
            with pytest.raises(KernelError) as refused:
                await channel.get_sa(status.sa.id)
            assert refused.value.errno == errno.ESRCH
            await channel.flush_sas()
            assert await channel.sas() == []

    within(host, body)


def test_settings_are_put_back_unless_somebody_else_changed_them(host: Namespace) -> None:
    async def body() -> None:
        before = {name: (CORE / name).read_text() for name in ("xfrm_larval_drop", "xfrm_acq_expires")}
        assert before["xfrm_larval_drop"] == "1\n"
        async with opened() as (channel, _):
            assert (CORE / "xfrm_larval_drop").read_text() == "0\n"
            assert channel.capabilities().unresolved_modes == {Unresolved.QUEUE}
        assert {name: (CORE / name).read_text() for name in before} == before
        async with opened():
            (CORE / "xfrm_acq_expires").write_text("99")
        assert (CORE / "xfrm_acq_expires").read_text() == "99\n"

    within(host, body)


@pytest.mark.parametrize("mode", [Unresolved.EAGAIN, Unresolved.BLOCK, Unresolved.DROP])
def test_modes_that_linux_does_not_have_are_refused_by_name(host: Namespace, mode: Unresolved) -> None:
    async def body() -> None:
        async with opened() as (channel, _):
            with pytest.raises(KernelError, match=f"unresolved: .* '{mode.value}'"):
                await channel.add_policy(policy(unresolved=mode))
            assert await channel.policies() == []

    within(host, body)


def test_two_selectors_that_are_one_to_the_kernel(host: Namespace) -> None:
    """ICMP type and code stand once in the kernel and on both sides in ours: the older name of a standing policy deletes nothing."""

    async def body() -> None:
        echo = PortRange(0x0800, 0x08FF)
        ends = network("10.1.0.0/24"), network("10.2.0.0/24")
        one, both = Selector(*ends, 1, ANY_PORT, echo), Selector(*ends, 1, echo, echo)
        async with opened() as (channel, _):
            await channel.update_policy(policy(selector=one))
            await channel.update_policy(policy(selector=both))
            await channel.delete_policy(Direction.OUT, one)
            assert [standing.selector for standing in await channel.policies()] == [both]

    within(host, body)


def test_a_dump_of_many_is_complete(host: Namespace) -> None:
    async def body() -> None:
        async with opened() as (channel, _):
            wanted = [policy(reqid=1 + number, remote=f"10.{64 + number // 250}.{number % 250}.0/24") for number in range(600)]
            added = await asyncio.gather(*(channel.add_policy(one) for one in wanted))
            assert len({one.index for one in added}) == 600
            dumps = await asyncio.gather(channel.policies(), channel.policies())
            for dump in dumps:
                assert sorted(one.index for one in dump) == sorted(one.index for one in added)
            await channel.flush_policies()
            assert await channel.policies() == []

    within(host, body)


def test_an_overrun_is_heard_and_what_was_lost_is_found_by_looking(host: Namespace) -> None:
    async def body() -> None:
        # Somebody else listens too, so to the kernel each ACQUIRE was delivered, and its larval SA stands in the way of the next.
        async with opened() as (_, other), opened(event_buffer=1) as (channel, heard):
            for number in range(200):
                await channel.add_policy(policy(reqid=1 + number, remote=f"10.2.{number}.0/24"))
            # Nobody reads meanwhile: the loop runs this very function.
            for number in range(200):
                send(f"10.2.{number}.1")
            await heard.until(lambda: heard.overruns > 0)
            await other.until(lambda: len(other.events) == 200)
            await heard.until(lambda: len(heard.events) == 200)
            assert sorted(map(str, heard.events)) == sorted(map(str, other.events))
            assert len(await channel.sas()) == 200
            assert (await channel.statistics())["found"] > 0
            assert (await channel.statistics())["overruns"] > 0
            await channel.flush_policies()  # else the packets that wait ask again
            await channel.flush_sas()
            assert await channel.sas() == []

    within(host, body)


def test_a_kernel_without_esp_is_said_so(host: Namespace) -> None:
    async def body() -> None:
        channel = XfrmChannel()
        refusal = None
        try:
            await channel.open()
        except KernelError as error:
            refusal = error
        await channel.close()
        if refusal is not None:  # else this machine's kernel has it
            assert refusal.errno == errno.EPROTONOSUPPORT
            assert "no ESP" in refusal.detail
        assert (CORE / "xfrm_larval_drop").read_text() == "1\n"

    within(host, body)
