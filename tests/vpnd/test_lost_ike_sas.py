"""What the daemon says to messages of IKE SAs that it does not have (RFC 6290)."""

from __future__ import annotations

import asyncio

import pytest
from vpnd_nodes import A, B, pair, until

from kernel_shim.model import Endpoint
from vpnd.daemon.manager import LOST_AT_ONCE
from vpnd.ike.effects import Reason
from vpnd.ike.wire.header import FLAG_INITIATOR

pytestmark = pytest.mark.virtual_time


async def test_the_token_of_an_ike_sa_that_stands_stays_secret() -> None:
    """With the Initiator flag turned round, the peer's SPI stands where ours is looked for."""
    a, b, network = await pair()
    await a.up()
    entry = next(b.manager.entries())
    a_entry = next(a.manager.entries())
    network.cut = True
    now = asyncio.get_running_loop().time()
    a.manager.run(a_entry, a_entry.sa.probe(now))
    request = bytearray(network.sent[-1])
    before = len(network.sent)
    request[19] ^= FLAG_INITIATOR
    b.manager.datagram(Endpoint(B, 4500), Endpoint(A, 4500), bytes(request))
    assert len(network.sent) == before
    request[19] ^= FLAG_INITIATOR
    # once it is gone, the same request is answered
    b.manager.run(entry, entry.sa.abort(now, Reason.DELETED))
    await until(lambda: len(b.manager) == 0)
    b.manager.datagram(Endpoint(B, 4500), Endpoint(A, 4500), bytes(request))
    assert len(network.sent) == before + 1


async def test_a_peer_that_lost_the_ike_sa_gets_a_new_one_at_once() -> None:
    a, b, _ = await pair()
    await a.up()
    entry = next(b.manager.entries())
    now = asyncio.get_running_loop().time()
    b.manager.run(entry, entry.sa.abort(now, Reason.SHUTDOWN))
    await until(lambda: len(b.manager) == 0)
    a_entry = next(a.manager.entries())
    a.manager.run(a_entry, a_entry.sa.probe(now))
    await until(lambda: len(b.manager) == 1 and next(b.manager.entries()).sa.established_at is not None)
    assert next(a.manager.entries()) is not a_entry


async def test_answers_are_rationed() -> None:
    a, b, network = await pair()
    await a.up()
    network.cut = True
    entry = next(a.manager.entries())
    a.manager.run(entry, entry.sa.probe(asyncio.get_running_loop().time()))
    request = network.sent[-1]
    entry = next(b.manager.entries())
    b.manager.run(entry, entry.sa.abort(asyncio.get_running_loop().time(), Reason.DELETED))
    await until(lambda: len(b.manager) == 0)
    before = len(network.sent)
    for _ in range(2 * LOST_AT_ONCE):
        b.manager.datagram(Endpoint(B, 4500), Endpoint(A, 4500), request)
    assert LOST_AT_ONCE <= len(network.sent) - before < 2 * LOST_AT_ONCE
    assert b.manager.counters.snapshot()["ike_lost_not_answered"] > 0


async def test_an_ike_sa_that_is_about_to_stand_is_not_lost() -> None:
    """Who answered our rekeying may use the new IKE SA before we have the answer; a token would end it as soon as it stands."""
    a, b, network = await pair()
    await a.up()
    old = next(a.manager.entries())
    network.cut = True
    now = asyncio.get_running_loop().time()
    a.manager.run(old, old.sa.rekey(now))
    b.manager.datagram(Endpoint(B, 4500), Endpoint(A, 4500), network.sent[-1])
    answer = network.sent[-1]
    heir = next(entry for entry in b.manager.entries() if entry.sa.predecessor is not None)
    b.manager.run(heir, heir.sa.probe(now))
    request, before = network.sent[-1], len(network.sent)
    a.manager.datagram(Endpoint(A, 4500), Endpoint(B, 4500), request)
    assert len(network.sent) == before
    a.manager.datagram(Endpoint(A, 4500), Endpoint(B, 4500), answer)
    new = next(entry for entry in a.manager.entries() if entry is not old)
    assert new.sa.spi_local == heir.sa.spi_remote
    # now it is answered
    before = len(network.sent)
    a.manager.datagram(Endpoint(A, 4500), Endpoint(B, 4500), request)
    assert len(network.sent) > before
