"""The daemon's side of Linux's own kernel, which it shares with other key managers: theirs stays whatever happens to ours."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Network

import pytest
from lab.drift import HERE, OUR_NETWORK, network_of, peer_of
from lab.drift_beds import prepare
from lab.namespaces import Lab, Namespace

from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import Action, AddressRange, KernelError, Mode, Policy, ReqId, TrafficSelector
from kernel_shim.xfrm.constants import OURS
from vpnd.daemon import kernel_side
from vpnd.daemon.kernel_side import KernelSide
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

pytestmark = pytest.mark.root

FOREIGN_REQID = 7
# One beside ours and one that covers them all, each with the templates of another key manager.
FOREIGN = ("src 10.1.0.0/16 dst 10.9.0.0/24", "src 10.1.0.0/16 dst 10.128.0.0/9", "src 10.1.0.9/32 dst 10.128.0.0/24")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("shared")
        prepare(namespace)
        for selector in FOREIGN:
            template = f"tmpl src {HERE} dst {peer_of(0)} proto esp reqid {FOREIGN_REQID} mode tunnel"
            namespace.run(["ip", "xfrm", *f"policy add {selector} dir out priority 99 {template}".split()])
        yield namespace


def within(namespace: Namespace, body: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await body()

    namespace.call(lambda: asyncio.run(run()))


def policies(number: int) -> list[Policy]:
    theirs = (TrafficSelector(AddressRange.of(network_of(number))),)
    spec = PolicySpec(Action.PROTECT, Mode.TUNNEL, ReqId(FOREIGN_REQID), HERE, peer_of(number))
    return list(policies_for(spec, (TrafficSelector(AddressRange.of(IPv4Network(OUR_NETWORK))),), theirs))


async def connect() -> KernelChannel:
    channel = XfrmChannel(require_esp=False)
    await channel.open()
    return channel


def table(namespace: Namespace) -> list[str]:
    """A policy a line, as `ip xfrm policy` shows it."""
    return [" ".join(line.split()) for line in namespace.run(["ip", "-o", "xfrm", "policy"]).stdout.splitlines()]


def ours(namespace: Namespace) -> list[str]:
    return [line for line in table(namespace) if f"reqid {OURS | FOREIGN_REQID} " in line]


def foreign(namespace: Namespace) -> list[str]:
    return [line for line in table(namespace) if f"reqid {FOREIGN_REQID} " in line]


def test_a_key_manager_that_comes_goes_and_dies_leaves_others_policies_alone(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_side, "ORPHAN_GRACE", 0.0)
    before = table(host)
    assert len(before) == len(FOREIGN)

    async def body() -> None:
        first = KernelSide(connect, Counters())
        await first.open()
        for number in range(3):
            await first.claim(number, policies(number))
        await first.audit()
        assert sorted(foreign(host)) == sorted(before)
        assert len(table(host)) == len(before) + 9
        await first.close(leave=True)  # as if it had been killed

        counters = Counters()
        second = KernelSide(connect, counters)
        await second.open()
        await second.claim(1, policies(1))
        while len(table(host)) > len(before) + 3:
            await asyncio.sleep(0.01)
        assert sorted(foreign(host)) == sorted(before)
        assert counters.snapshot().get("kernel_orphan_policies_removed") == 6
        await second.audit()
        await second.release(1)
        await second.audit()
        assert table(host) == before
        await second.close()
        assert table(host) == before

    within(host, body)


def test_a_policy_of_others_under_the_very_selector_of_ours_is_not_replaced(host: Namespace) -> None:
    """The kernel has one policy a selector: ours is refused while theirs stands."""
    same = "src 10.1.0.0/16 dst 10.128.0.0/24 dir out"
    host.run(["ip", "xfrm", *f"policy add {same} priority 99 action block".split()])
    before = table(host)

    async def body() -> None:
        side = KernelSide(connect, Counters())
        await side.open()
        with pytest.raises(KernelError) as refused:
            await side.claim(0, policies(0))
        assert refused.value.errno == errno.EEXIST
        await side.audit()
        assert [line for line in table(host) if line in before] == before
        await side.release(0)
        assert table(host) == before

        host.run(["ip", "xfrm", *f"policy delete {same}".split()])
        await side.claim(0, policies(0))
        assert len(ours(host)) == 3
        await side.close()
        assert ours(host) == []

    within(host, body)
