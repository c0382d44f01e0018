"""Two peers and everything that a network can do to what they begin at once, up to a bound: all orders, with datagrams lost, doubled or held back.

After each step of each path: no kernel has an SA that its key manager does not know; and where both only rekey, each side sends, and by what the other
one can receive. At each path's end: one CHILD_SA on both sides (or none, where one was deleted), the SADs alike, nothing left to do.

COLLISIONS_DEEPER=1 in the environment goes on for the better part of an hour.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
from lab.collisions import OTHER, create_child, delete_ike, invariants, rekey_ike
from lab.exploration import Act, Bounds, Original, explore
from lab.ike_pair import Datagram, Pair, Peer, agree, child, connection, mirrored, psk

from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.sa import ChildSaState, IkeSaState

NET = child("net", "10.1.0.0/16", "10.2.0.0/16", "aes128gcm16")
QUIET = 400.0  # s; longer than anything is waited for
RESPONSE = 0x20


def newest(peer: Peer, *states: ChildSaState) -> int:
    return max((one.sa.id for one in peer.sa.children.values() if not states or one.state in states), default=0)


def rekey_newest(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey_child(newest(peer, ChildSaState.INSTALLED), pair.now), pair.now)


def delete_newest(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.delete_child(newest(peer), pair.now), pair.now)


def expire_newest(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.child_expired(newest(peer), pair.now), pair.now)


ACTS: dict[str, Act] = {"r": rekey_newest, "i": rekey_ike, "d": delete_newest, "x": expire_newest, "c": create_child, "D": delete_ike}


@functools.cache
def original() -> Original:
    pair = Pair(connection("to-b", psk("a"), psk("b"), [NET, OTHER]), connection("to-a", psk("b"), psk("a"), [mirrored(NET), mirrored(OTHER)]))
    pair.connect()
    pair.log.clear()
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.0, tries=60))
    return Original(pair)


def make(lower: str) -> Pair:
    """`lower` is who draws the lower nonces of its own requests, and so makes the SA that goes."""
    pair = original().copy()
    for peer in pair.peers:
        answering = [False]

        def entropy(
            octets: int,
            drawn: Callable[[int], bytes] = peer.entropy,
            answering: list[bool] = answering,
            first: bytes = b"\x00" if peer.name == lower else b"\x7f",
        ) -> bytes:
            return (b"\x80" if answering[0] else first) + drawn(octets - 1)

        def arrive(datagram: Datagram, now: float, arrived: Callable[[Datagram, float], None] = peer.arrive, answering: list[bool] = answering) -> None:
            answering[0] = not datagram.data[19] & RESPONSE
            arrived(datagram, now)
            answering[0] = False

        peer.entropy, peer.arrive = entropy, arrive  # type: ignore[method-assign]
    return pair


def lossless(pair: Pair) -> None:
    invariants(pair)


def known(pair: Pair) -> None:
    invariants(pair, lossless=False)


def end(pair: Pair, wanted: set[int]) -> None:
    pair.wait(QUIET)
    standing = [len(peer.standing) for peer in pair.peers]
    assert standing in ([1, 1], [0, 0])
    children = len(pair.a.sa.children) if pair.a.standing else 0
    assert children in wanted, f"{children} CHILD_SAs"
    agree(pair, children)
    for peer in pair.peers:
        for ike in peer.standing:
            assert ike.state is IkeSaState.ESTABLISHED
            assert {one.state for one in ike.children.values()} <= {ChildSaState.INSTALLED}
            assert ike.tasks_active == ike.tasks_queued == ()
            assert not ike.postponed
            assert not ike.held
        assert not peer.lingering
    assert sorted(pair.a.up) == sorted(pair.b.up)


def prove(one: str, other: str, bounds: Bounds, lower: str) -> None:
    both = one + other
    rekeyings = set(both) <= set("ri")
    wanted = {1} if rekeyings else {1 + both.count("c")} if set(both) <= set("ric") else {0} if "D" in both else {0, 1}
    explored = explore(
        lambda: make(lower),
        ([ACTS[act] for act in one], [ACTS[act] for act in other]),
        bounds,
        lossless if rekeyings else known,
        lambda pair: end(pair, wanted),
    )
    assert not explored.failures, explored.failures[0]
    assert explored.ends > 0


# What a begins, one after another at any time, and what b begins
ALL_ORDERS = [
    ("r", "r"),
    ("i", "i"),
    ("i", "r"),
    ("r", "d"),
    ("r", "x"),
    ("r", "c"),
    ("i", "d"),
    ("i", "x"),
    ("i", "c"),
    ("i", "D"),
    ("r", "D"),
    ("d", "d"),
    ("d", "rr"),
]
ONE_LOST = [("r", "r"), ("i", "r")]
DEEPER = [
    *((one, other, Bounds(lost=1)) for one, other in [("rr", "r"), ("i", "i"), ("r", "d"), ("r", "x"), ("i", "d"), ("i", "D"), ("ir", "r"), ("ir", "ri")]),
    *((one, other, Bounds(held=1)) for one, other in [("r", "r"), ("i", "i"), ("i", "r")]),
    *((one, other, Bounds(doubled=1)) for one, other in [("r", "r"), ("i", "i"), ("i", "r"), ("r", "d"), ("r", "x")]),
    ("rr", "rr", Bounds()),
    ("r", "r", Bounds(lost=2, doubled=1)),
]


def names(cases: list[tuple[str, str]]) -> list[str]:
    return [f"{one}+{other}" for one, other in cases]


@pytest.mark.parametrize("lower", ["a", "b"])
@pytest.mark.parametrize(("one", "other"), ALL_ORDERS, ids=names(ALL_ORDERS))
def test_all_orders(one: str, other: str, lower: str) -> None:
    prove(one, other, Bounds(), lower)


@pytest.mark.parametrize("lower", ["a", "b"])
@pytest.mark.parametrize(("one", "other"), ONE_LOST, ids=names(ONE_LOST))
def test_all_orders_with_any_one_datagram_lost(one: str, other: str, lower: str) -> None:
    prove(one, other, Bounds(lost=1), lower)


def test_one_that_is_rekeyed_again_before_the_collision_is_over() -> None:
    # the loser's deletion waits for a sign that our answer arrived, and what the peer made in between is not to be sent by yet
    prove("rr", "r", Bounds(), "b")


if "COLLISIONS_DEEPER" in os.environ:

    @pytest.mark.timeout(0)
    @pytest.mark.parametrize("lower", ["a", "b"])
    @pytest.mark.parametrize(("one", "other", "bounds"), DEEPER)
    def test_deeper(one: str, other: str, bounds: Bounds, lower: str) -> None:
        """The better part of an hour."""
        prove(one, other, bounds, lower)
