"""A peer that makes a second IKE SA beside the first and then deletes the first, and everything that a network can do to that, up to a bound.

After each step of each path: no kernel has an SA that its key manager does not know, and, unless IKE messages were lost or late, each side sends, and
the other one can receive whatever it sends by. At each path's end: what was not deleted stands on both sides, alike, and sends, and nothing is left to do.
"""

from __future__ import annotations

import functools

import pytest
from lab.collisions import invariants, rekey_ike
from lab.exploration import Act, Bounds, Original, explore
from lab.ike_pair import Pair, Peer, agree, child, psk_pair

from kernel_shim.model import Direction
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.sa import ChildSaState, IkeSaState

QUIET = 400.0  # s; longer than anything is waited for


@functools.cache
def original() -> Original:
    pair = psk_pair(child("net", "10.1.0.0/16", "10.2.0.0/16"))
    pair.connect()
    pair.log.clear()
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.0, tries=60))
    return Original(pair)


def make_anew(pair: Pair, peer: Peer) -> None:
    other = pair.b if peer is pair.a else pair.a
    peer.start(other.endpoint, pair.now, next(iter(peer.connections[0].children.values())))


def delete_old(pair: Pair, peer: Peer) -> None:
    """Not before another one stands."""
    ready = [sa for sa in peer.standing if sa.children and sa.state is IkeSaState.ESTABLISHED]
    if len(ready) > 1:
        peer.run(ready[0], ready[0].delete(pair.now, Reason.REPLACED), pair.now)


def rekey_child(pair: Pair, peer: Peer) -> None:
    """That of the youngest IKE SA."""
    sa = next(sa for sa in reversed(peer.standing) if sa.children)
    newest = max((one.sa.id for one in sa.children.values() if one.state is ChildSaState.INSTALLED), default=0)
    peer.run(sa, sa.rekey_child(newest, pair.now), pair.now)


ACTS: dict[str, Act] = {"n": make_anew, "o": delete_old, "r": rekey_child, "i": rekey_ike}


def known(pair: Pair) -> None:
    invariants(pair, lossless=False)


def lossless(pair: Pair) -> None:
    known(pair)
    for peer, other in (pair.peers, pair.peers[::-1]):
        sent = {sa.spi for sa in peer.sad.values() if sa.direction is Direction.OUT}
        assert sent, f"{peer.name} cannot send"
        assert sent <= {sa.spi for sa in other.sad.values() if sa.direction is Direction.IN}, f"{peer.name} sends what {other.name} cannot open"


def end(pair: Pair) -> None:
    pair.wait(QUIET)
    count = len(pair.a.standing)
    assert len(pair.b.standing) == count > 0
    agree(pair, count)
    for peer in pair.peers:
        assert len(peer.twins) == count
        for ike in peer.standing:
            assert ike.state is IkeSaState.ESTABLISHED
            assert [one.state for one in ike.children.values()] == [ChildSaState.INSTALLED]
            assert ike.tasks_active == ike.tasks_queued == ()
            assert not ike.postponed
            assert not ike.held
        assert not peer.lingering
    assert sorted(pair.a.up) == sorted(pair.b.up)


def prove(one: str, other: str, bounds: Bounds) -> None:
    # who deletes what the peer made anew cannot know whether the peer has our answer yet
    careful = not bounds.lost and not bounds.held and "o" not in other
    explored = explore(
        lambda: original().copy(),
        ([ACTS[act] for act in one], [ACTS[act] for act in other]),
        bounds,
        lossless if careful else known,
        end,
    )
    assert not explored.failures, explored.failures[0]
    assert explored.ends > 0


# What a begins, one after another at any time, and what b begins
@pytest.mark.parametrize(("one", "other"), [("no", ""), ("n", "n"), ("no", "r"), ("nr", ""), ("n", "i"), ("nio", ""), ("no", "o"), ("non", "")])
def test_all_orders(one: str, other: str) -> None:
    prove(one, other, Bounds())


@pytest.mark.parametrize("bounds", [Bounds(lost=1), Bounds(doubled=1), Bounds(held=1)], ids=["lost", "doubled", "late"])
@pytest.mark.parametrize(("one", "other"), [("no", "")])
def test_any_one_datagram(one: str, other: str, bounds: Bounds) -> None:
    prove(one, other, bounds)
