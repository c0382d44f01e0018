"""A CHILD_SA that waits for the peer's word beside its twin, in a key manager whose kernel refuses or is slow."""

from __future__ import annotations

import asyncio
import errno

import pytest
from vpnd_nodes import Network, Node, mirrored, pair, until

from kernel_shim.model import Direction, Endpoint, KernelError, SecurityAssociation
from vpnd.daemon import crossings
from vpnd.daemon.duplicates import SETTLE
from vpnd.daemon.entry import Entry
from vpnd.ike.context import Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.iana import Exchange
from vpnd.ike.state import Child, IkeSaState

pytestmark = pytest.mark.virtual_time


def deaf_to(network: Network, monkeypatch: pytest.MonkeyPatch, address: object) -> None:
    """That node hears no more from the first IKE_AUTH answer on."""
    carry, deaf = network.carry, [False]

    def filtered(local: Endpoint, remote: Endpoint, data: bytes) -> None:
        deaf[0] |= remote.address == address and data[18] == Exchange.IKE_AUTH
        if not (deaf[0] and remote.address == address):
            carry(local, remote, data)

    monkeypatch.setattr(network, "carry", filtered)


async def old_and_new(a: Node, b: Node) -> tuple[Entry, Entry]:
    """At `b`, whose new CHILD_SA waits."""
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: len(list(b.manager.entries())) == 2 and all(entry.sa.children for entry in b.manager.entries()))
    old, new = b.manager.entries()
    return old, new


def child_of(entry: Entry) -> Child:
    (child,) = entry.sa.children.values()
    return child


async def test_what_follows_from_the_kernels_answer_stirs_the_other_ike_sa(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, network = await pair(retransmission=Retransmission())
    await a.up()
    await until(lambda: mirrored(a, b))
    deaf_to(network, monkeypatch, next(address for address, node in network.nodes.items() if node is a))
    old, new = await old_and_new(a, b)
    before, waits = child_of(old), child_of(new)
    await until(lambda: not new.steps)
    assert b.spis(Direction.OUT) == {before.sa.outbound.spi}
    b.kernel.faults["get_spi"] = KernelError(errno.ENOMEM, "no SPI")
    now = asyncio.get_running_loop().time()
    b.manager.run(old, old.sa.create_child(before.config, now))
    b.manager.run(old, old.sa.delete_child(before.sa.id, now))
    await asyncio.sleep(0.5)
    assert b.spis(Direction.OUT) == {waits.sa.outbound.spi}


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "takes it"])
async def test_the_old_one_ends_while_the_kernel_thinks_of_the_new_sa_in(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = await pair(retransmission=Retransmission())
    await a.up()
    await until(lambda: mirrored(a, b))
    (old,) = b.manager.entries()
    update = b.channels[-1].update_sa

    async def slow(sa: SecurityAssociation) -> None:
        now = asyncio.get_running_loop().time()
        b.manager.run(old, old.sa.abort(now, Reason.PEER_SILENT))
        await asyncio.sleep(0.01)
        monkeypatch.undo()
        if refuses:
            raise KernelError(errno.ENOMEM, "no memory")
        await update(sa)

    monkeypatch.setattr(b.channels[-1], "update_sa", slow)
    a.operations.rekey(ike="site", reauth=True)
    await asyncio.sleep(5.0)
    known = {child.sa.outbound.spi for entry in b.manager.entries() for child in entry.sa.children.values()}
    assert b.spis(Direction.OUT) == known
    if not refuses:
        assert len(known) == 1


async def test_what_the_peer_may_not_have_yet_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """We made the old IKE SA; the peer, which makes another one, misses our answer."""
    a, b, network = await pair(retransmission=Retransmission())
    await b.up()
    await until(lambda: mirrored(a, b))
    monkeypatch.setattr(crossings, "_lower", lambda one, other, *, ours: one.at < other.at)  # the old one is to go
    with monkeypatch.context() as loss:
        deaf_to(network, loss, next(address for address, node in network.nodes.items() if node is a))
        old, _ = await old_and_new(a, b)
        await asyncio.sleep(5 * SETTLE)
        assert old.sa.state is IkeSaState.ESTABLISHED
        assert b.spis(Direction.OUT) == {child_of(old).sa.outbound.spi}
    await until(lambda: len(list(b.manager.entries())) == len(list(a.manager.entries())) == 1 and mirrored(a, b))
