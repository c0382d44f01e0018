"""Session resumption (RFC 5723) between two key managers: through the gate, with what the managers keep."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from vpnd_nodes import Network, Node, mirrored, pair, until

from vpnd.ike.effects import Reason
from vpnd.ike.exchanges.ike_session_resume import basis_of
from vpnd.ike.iana import Exchange
from vpnd.ike.identity import Identity
from vpnd.ike.resumption import Ticket

pytestmark = pytest.mark.virtual_time


def exchanges(network: Network) -> list[int]:
    """Of the messages so far, in order, one after another of the same kind counted once."""
    kinds = [data[18] for data in network.sent]
    return [kind for number, kind in enumerate(kinds) if not number or kinds[number - 1] != kind]


async def lost(a: Node, b: Node, network: Network) -> None:
    """The path is gone for long: both sides give up."""
    network.cut = True
    for node in (a, b):
        for entry in node.manager.entries():
            node.manager.run(entry, entry.sa.abort(asyncio.get_running_loop().time(), Reason.PEER_SILENT))
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    network.cut = False
    network.sent.clear()


async def test_after_a_failure_of_the_path() -> None:
    a, b, network = await pair(connection="resumption = yes")
    await a.up()
    await until(lambda: mirrored(a, b))
    await lost(a, b, network)
    await a.up()
    await until(lambda: mirrored(a, b))
    assert exchanges(network) == [Exchange.IKE_SESSION_RESUME, Exchange.IKE_AUTH]


async def test_a_responder_that_was_started_anew_wants_it_all() -> None:
    a, b, network = await pair(connection="resumption = yes")
    await a.up()
    await until(lambda: mirrored(a, b))
    await lost(a, b, network)
    fresh = await pair(connection="resumption = yes")
    network.nodes.update({address: fresh[1] for address, node in network.nodes.items() if node is b})
    fresh[1].network = network
    await a.up()
    await until(lambda: mirrored(a, fresh[1]))
    assert exchanges(network)[:2] == [Exchange.IKE_SESSION_RESUME, Exchange.IKE_SA_INIT]


async def test_a_resumption_that_the_responder_does_not_believe_is_followed_by_a_full_exchange() -> None:
    a, b, network = await pair(connection="resumption = yes")
    await a.up()
    await until(lambda: mirrored(a, b))
    (entry,) = a.manager.entries()
    connection, wallet = entry.sa.connection, a.manager.resumption.wallet
    await lost(a, b, network)
    ticket = wallet.take(connection.name, asyncio.get_running_loop().time())
    assert ticket is not None
    state = replace(ticket.state, local_id=Identity.parse("another.example"))
    wallet.keep(Ticket(ticket.data, replace(state, basis=basis_of(a.manager, connection, state.local_id, state.remote_id, state.d))))
    await a.up()
    await until(lambda: mirrored(a, b))
    assert exchanges(network)[:4] == [Exchange.IKE_SESSION_RESUME, Exchange.IKE_AUTH, Exchange.IKE_SA_INIT, Exchange.IKE_AUTH]
