"""A peer that is authenticated and does not wait for our answers, while the kernel takes its time."""

from __future__ import annotations

import asyncio

import pytest
from vpnd_nodes import A, B, mirrored, pair, until

from kernel_shim.model import Endpoint, SecurityAssociation
from vpnd.daemon import manager
from vpnd.ike.iana import Exchange
from vpnd.ike.transport import Transport

pytestmark = pytest.mark.virtual_time

LOCAL, REMOTE = Endpoint(B, 4500), Endpoint(A, 4500)


async def test_what_waits_for_the_kernel_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "MAX_STEPS", 20)
    a, b, network = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    asked, answered = asyncio.Event(), asyncio.Event()
    add = b.channels[-1].add_sa

    async def slow(sa: SecurityAssociation) -> None:
        asked.set()
        await answered.wait()
        await add(sa)

    monkeypatch.setattr(b.channels[-1], "add_sa", slow)
    monkeypatch.setattr(b.channels[-1], "update_sa", slow)
    entry, hasty = next(b.manager.entries()), next(a.manager.entries()).sa
    assert isinstance(hasty, Transport)
    network.cut = True
    before = len(network.sent)
    # CREATE_CHILD_SA { N(REKEY_SA), ... } -->  and the kernel does not answer
    a.manager.run(next(a.manager.entries()), hasty.rekey_child(next(iter(hasty.children)), asyncio.get_running_loop().time()))
    await until(lambda: len(network.sent) > before)
    first = hasty._next_id
    b.manager.datagram(LOCAL, REMOTE, network.sent[before])
    await asked.wait()
    # INFORMATIONAL { } --> again and again, each under a message id of its own
    for number in range(first, first + 100):
        for data in hasty._seal(Exchange.INFORMATIONAL, number, (), response=False).datagrams:
            b.manager.datagram(LOCAL, REMOTE, data)
    assert len(entry.steps) <= 20
    assert b.manager.counters.snapshot()["ike_overloaded"] >= 80
    sent = len(network.sent)
    answered.set()
    await until(lambda: not entry.steps)
    assert 1 < len(network.sent) - sent <= 21
