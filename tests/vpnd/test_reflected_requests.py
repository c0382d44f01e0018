"""Somebody on the way sends our own messages back to us: we would be a peer that shares every secret with us."""

from __future__ import annotations

import asyncio

import pytest
from vpnd_nodes import A, Network, Node, config

from kernel_shim.model import Endpoint
from vpnd.control.backend import ControlError

pytestmark = pytest.mark.virtual_time


class Mirror(Network):
    """Whatever is sent comes back from where it was sent to."""

    def carry(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.sent.append(data)
        asyncio.get_running_loop().call_soon(self.nodes[A].manager.datagram, local, remote, data)


async def test_we_do_not_become_our_own_peer() -> None:
    network = Mirror()
    # a secret for everybody and a peer of any name; the selectors of both sides overlap, as those of a client and its gateway do
    anybody = config("a").replace("id = b.example", "id = %any").replace("id-1 = a.example", "").replace("id-2 = b.example", "")
    a = Node(network, anybody.replace("10.1.0.0/16", "0.0.0.0/0").replace("10.2.0.0/16", "0.0.0.0/0"), A)
    await a.start()
    with pytest.raises(ControlError):
        await a.up()
    # IKE_SA_INIT { SAi1, KEi, Ni } -->  <-- the same, and again with each retransmission: no answer to any
    assert a.manager.counters.snapshot()["ike_reflected"] == len(network.sent) > 1
    assert set(network.sent) == {network.sent[0]}
    assert "ike_established" not in a.manager.counters.snapshot()
    assert not a.kernel.sas
