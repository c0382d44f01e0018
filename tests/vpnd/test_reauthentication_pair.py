"""Reauthentication between two key managers: make before break, break before make, and what follows when it fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from vpnd_nodes import DEFAULTS, Node, mirrored, pair, until

from kernel_shim.model import Action, Direction, Endpoint
from vpnd.daemon import reauthentication
from vpnd.ike.context import Retransmission
from vpnd.ike.iana import Exchange

pytestmark = pytest.mark.virtual_time

BREAK_BEFORE_MAKE = replace(DEFAULTS, make_before_break=False)


@pytest.fixture(autouse=True)
def short_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reauthentication, "OVERLAP", 0.02)


def ikes(node: Node) -> set[tuple[int, int]]:
    return {(entry.sa.spi_initiator, entry.sa.spi_responder) for entry in node.manager.entries()}


class Watch:
    """What a kernel had of SAs out and of policies, at every request to it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.least_out = self.least_policies = 99

        class Requests(list[str]):
            def append(me, request: str) -> None:
                super().append(request)
                self.look()

        node.kernel.requests = Requests(node.kernel.requests)

    def look(self) -> None:
        self.least_out = min(self.least_out, len(self.node.spis(Direction.OUT)))
        protecting = [policy for policy in self.node.kernel.policies.values() if policy.action is Action.PROTECT]
        self.least_policies = min(self.least_policies, len(protecting))


async def stands_anew(a: Node, b: Node, before: set[tuple[int, int]]) -> None:
    await until(lambda: mirrored(a, b) and len(ikes(a)) == 1 and ikes(a) == ikes(b) and not ikes(a) & before)


@pytest.mark.parametrize("who", ["initiator", "responder"])
async def test_make_before_break(who: str) -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    before, watches = ikes(a), [Watch(a), Watch(b)]
    node = a if who == "initiator" else b
    assert node.operations.rekey(ike="site", reauth=True) == 1
    assert node.operations.rekey(ike="site", reauth=True) == 1  # is under way
    await stands_anew(a, b, before)
    for watch in watches:
        watch.look()
        assert (watch.least_out, watch.least_policies) == (1, 3), "an SA out and its policies stood all the while"
    assert {child.reqid for node in (a, b) for ike in await node.operations.list_sas() for child in ike.children} == {1}
    assert a.manager.counters.snapshot().get("ike_reauthentications", 0) + b.manager.counters.snapshot().get("ike_reauthentications", 0) == 1


async def test_break_before_make_keeps_the_policies() -> None:
    a, b, _ = await pair(settings=BREAK_BEFORE_MAKE)
    await a.up()
    await until(lambda: mirrored(a, b))
    before, watch = ikes(a), Watch(a)
    a.operations.rekey(ike="site", reauth=True)
    await stands_anew(a, b, before)
    assert watch.least_policies == 3


async def test_it_is_done_when_it_is_due() -> None:
    a, b, _ = await pair(connection="reauth_time = 1s\n rand_time = 1s\n over_time = 60s")
    await a.up()
    before = ikes(a)
    await stands_anew(a, b, before)


async def test_both_sides_at_once_end_with_one() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    before = ikes(a)
    a.operations.rekey(ike="site", reauth=True)
    b.operations.rekey(ike="site", reauth=True)
    await stands_anew(a, b, before)


async def test_what_a_silent_peer_does_not_answer_is_tried_again() -> None:
    a, b, network = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    before = ikes(a)
    network.cut = True
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: any("failed; it is tried again" in line for line in a.lines))
    (entry,) = a.manager.entries()
    assert ikes(a) == before
    assert entry.sa.reauth_at is not None
    assert mirrored(a, b)


async def test_the_new_ike_sa_may_be_rekeyed_before_the_old_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reauthentication, "OVERLAP", 0.3)
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    before = ikes(a)
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: mirrored(a, b, 2))
    new = next(entry for entry in a.manager.entries() if (entry.sa.spi_initiator, entry.sa.spi_responder) not in before)
    a.manager.run(new, new.sa.rekey(asyncio.get_running_loop().time()))
    await stands_anew(a, b, before)


async def test_several_children_come_along_with_their_selectors() -> None:
    a, b, _ = await pair(
        child="}\n other {\n local_ts = 10.8.0.0/16, 10.1.0.0/16, 10.2.0.0/16\n remote_ts = 10.8.0.0/16, 10.1.0.0/16, 10.2.0.0/16\n esp_proposals = aes128gcm16"
    )
    await a.up()
    async for _line in a.operations.initiate(child="other", ike=None, timeout=5.0):
        pass
    await until(lambda: mirrored(a, b, 2))

    async def selectors(node: Node) -> set[object]:
        return {(child.name, tuple(child.local_ts), tuple(child.remote_ts)) for ike in await node.operations.list_sas() for child in ike.children}

    before, wanted = ikes(a), await selectors(a)
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: mirrored(a, b, 2) and not ikes(a) & before)
    assert await selectors(a) == wanted


async def test_what_comes_up_on_the_old_ike_sa_meanwhile_comes_along() -> None:
    a, b, _ = await pair(
        child="}\n other {\n local_ts = 10.8.0.0/16\n remote_ts = 10.8.0.0/16\n esp_proposals = aes128gcm16", retransmission=Retransmission(30.0)
    )
    await a.up()
    await until(lambda: mirrored(a, b))
    before, held, send = ikes(a), list[tuple[Endpoint, Endpoint, bytes]](), a.send

    def hold(local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if data[18] == Exchange.IKE_SA_INIT:
            held.append((local, remote, data))
        else:
            send(local, remote, data)

    a.send = hold  # type: ignore[method-assign]
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: held)
    async for _line in b.operations.initiate(child="other", ike=None, timeout=5.0):
        pass
    await until(lambda: mirrored(a, b, 2))
    send(*held[0])
    await until(lambda: mirrored(a, b, 2) and len(ikes(a)) == 1 and ikes(a) == ikes(b) and not ikes(a) & before)
    assert {child.sa.name for entry in a.manager.entries() for child in entry.sa.children.values()} == {"net", "other"}


async def test_an_ike_sa_without_children_takes_the_place_of_one_without() -> None:
    a, b, _ = await pair(connection="childless = allow")
    site = a.manager.connections["site"]
    a.manager.connections["site"] = replace(site, children={})
    async for _line in a.operations.initiate(child=None, ike="site", timeout=5.0):
        pass
    await until(lambda: len(ikes(b)) == 1)
    before = ikes(a)
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: len(ikes(a)) == 1 and ikes(a) == ikes(b) and not ikes(a) & before)
    assert not a.kernel.sas
