"""One of two CHILD_SAs for the same packets is deleted, alone or with its IKE SA: what is sent meanwhile arrives, whichever message is lost."""

from __future__ import annotations

import pytest
from lab.ike_pair import Datagram, Pair, Peer, agree, child, psk_pair

from kernel_shim.model import Direction
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import IkeClosed, Reason
from vpnd.ike.exchanges.crash_detection import TokenMaker

NET = child("net", "10.1.0.0/16", "10.2.0.0/16")
DELAY = IkeSettings().rekeyed_delay


def doubled_pair() -> Pair:
    """One IKE SA, twice the same CHILD_SA."""
    pair = psk_pair(NET)
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
    pair.settle()
    agree(pair, 2)
    return pair


def crossed_pair() -> Pair:
    """Both sides initiated: two IKE SAs with a CHILD_SA each."""
    pair = psk_pair(NET)
    for peer in pair.peers:
        peer.tokens = TokenMaker(peer.name.encode() * 32)
    pair.a.start(pair.b.endpoint, pair.now, pair.a.connections[0].children["net"])
    pair.b.start(pair.a.endpoint, pair.now, pair.b.connections[0].children["net"])
    pair.settle()
    agree(pair, 2)
    return pair


def passes(peer: Peer, other: Peer) -> None:
    """Whichever of its SAs out the kernel takes, the other side takes what comes of it."""
    outbound = {sa.spi for sa in peer.sad.values() if sa.direction is Direction.OUT}
    assert outbound
    assert outbound <= {sa.spi for sa in other.sad.values() if sa.direction is Direction.IN}


def both_pass(pair: Pair) -> None:
    passes(pair.a, pair.b)
    passes(pair.b, pair.a)


@pytest.mark.parametrize("lost", ["none", "request", "answer"])
@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("deletes", ["a", "b"])
def test_a_doubled_child_is_deleted(deletes: str, newest: bool, lost: str) -> None:
    pair = doubled_pair()
    peer = pair.a if deletes == "a" else pair.b
    target = max(peer.sa.children) if newest else min(peer.sa.children)
    inbound = peer.sa.children[target].sa.inbound.id
    # INFORMATIONAL { D } -->: the SA out is gone when it leaves, the SA in takes what the peer sends until it hears of it
    peer.run(peer.sa, peer.sa.delete_child(target, pair.now, Reason.REPLACED), pair.now)
    assert [len([sa for sa in peer.sad.values() if sa.direction is direction]) for direction in (Direction.IN, Direction.OUT)] == [2, 1]
    both_pass(pair)
    gone = lost == "request"
    pair.take() if gone else pair.step()
    both_pass(pair)
    # <-- INFORMATIONAL { D }
    if lost == "answer":
        pair.take()
        both_pass(pair)
    pair.settle()
    both_pass(pair)
    # at its sender a packet may have left just before the answer did
    pair.wait(DELAY / 2)
    assert inbound in peer.sad
    pair.wait(3 * DELAY)
    agree(pair, 1)


@pytest.mark.parametrize("lost", ["none", "request", "answer"])
@pytest.mark.parametrize("deletes", ["a", "b"])
def test_an_ike_sa_goes_while_its_children_have_twins(deletes: str, lost: str) -> None:
    pair = crossed_pair()
    peer, other = (pair.a, pair.b) if deletes == "a" else (pair.b, pair.a)
    doomed = peer.standing[0]
    peer.run(doomed, doomed.delete(pair.now, Reason.REPLACED), pair.now)
    both_pass(pair)
    pair.take() if lost == "request" else pair.step()
    both_pass(pair)
    if lost == "answer":
        pair.take()
        # the peer has forgotten the IKE SA: the second copy gets a crash token, which is as good an answer
        pair.now = doomed.next_deadline() or 0.0
        pair.tick()
        token = other.tokens.answer(pair.take().data) if other.tokens else None
        assert token is not None
        pair.deliver(Datagram(other.name, other.endpoint, peer.endpoint, token))
    pair.settle()
    both_pass(pair)
    pair.wait(4 * DELAY)
    agree(pair, 1)
    assert [event.reason for event in peer.events if isinstance(event, IkeClosed)] == [Reason.REPLACED]


def test_a_child_without_a_twin_is_gone_at_once() -> None:
    pair = psk_pair(NET)
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.delete_child(1, pair.now), pair.now)
    # what the peer can still take is still sent
    both_pass(pair)
    pair.settle()
    assert not pair.a.sad
    assert not pair.b.sad


def test_an_unheard_deletion_is_repeated_as_long_as_a_twin_would_suffer() -> None:
    pair = crossed_pair()
    doomed = pair.a.standing[0]
    pair.a.run(doomed, doomed.delete(pair.now, Reason.REPLACED), pair.now)
    deaf = pair.now + 60.0
    pair.wait(100.0, lambda datagram: pair.now < deaf)
    agree(pair, 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1


def test_an_unheard_deletion_of_what_was_replaced_is_repeated_without_children_as_well() -> None:
    pair = psk_pair(NET)
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.delete_child(1, pair.now), pair.now)
    pair.settle()
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now, Reason.REPLACED), pair.now)
    deaf = pair.now + 60.0
    pair.wait(100.0, lambda datagram: pair.now < deaf)
    assert pair.a.standing == pair.b.standing == []
