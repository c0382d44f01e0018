"""Both peers act at once (RFC 7296 sections 2.8.1, 2.8.2 and 2.25): what crosses on the wire, and what stands on both sides after each message.

An order names the senders of the messages in the order in which they arrive. After each of them: what is sent can be received.
After the last one: each SA of a side has its twin on the other, and nothing is left over.
"""

from __future__ import annotations

import pytest
from lab.collisions import (
    Act,
    collide,
    create_child,
    delete_child,
    delete_ike,
    deliver,
    expire_child,
    finish,
    invariants,
    make_pair,
    reasons,
    rekey_child,
    rekey_ike,
)
from lab.ike_pair import Datagram, Pair, Peer, agree

from kernel_shim.model import Direction
from vpnd.daemon.crossings import superfluous_child
from vpnd.ike import succession
from vpnd.ike.effects import ChildClosed, IkeClosed, Reason
from vpnd.ike.state import ChildSaState

# Simultaneous CHILD rekeying, RFC 7296 section 2.8.1


def one_child_of(pair: Pair, loser: str) -> None:
    finish(pair, 1, lossless=True)
    (a,), (b,) = pair.a.sa.children.values(), pair.b.sa.children.values()
    assert a.initiator is (loser == "b")
    assert b.initiator is (loser == "a")
    assert set(reasons(pair.a)) | set(reasons(pair.b)) == {Reason.REKEYED}


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("order", ["abab", "abba", "baab", "baba"])
def test_both_rekey_the_child(order: str, loser: str) -> None:
    pair = make_pair(loser)
    # CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni1, KEi1, TSi, TSr } -->
    # <-- CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni2, KEi2, TSi, TSr }
    collide(pair, rekey_child, rekey_child)
    # CREATE_CHILD_SA { SA, Nr2, KEr2, TSi, TSr } -->  <-- CREATE_CHILD_SA { SA, Nr1, KEr1, TSi, TSr }
    for sender in order:
        deliver(pair, sender)
        invariants(pair)
    # the winner: INFORMATIONAL { D(old) }; the loser: INFORMATIONAL { D(its new one) }
    one_child_of(pair, loser)


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_one_side_has_rekeyed_the_child_before_it_sees_the_other_request(first: str, loser: str) -> None:
    pair = make_pair(loser)
    collide(pair, rekey_child, rekey_child)
    late = next(datagram for datagram in pair.flight if datagram.sender != first)
    pair.flight.remove(late)
    deliver(pair, first)  # CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni1, ... } -->
    invariants(pair)
    deliver(pair, late.sender)  # <-- CREATE_CHILD_SA { SA, Nr1, ... }
    invariants(pair)
    pair.tick()  # INFORMATIONAL { D(old) } --> is on the wire
    pair.deliver(late)  # <-- CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni2, ... }
    invariants(pair)
    # CREATE_CHILD_SA { SA, Nr2, ... } -->, and then as if both had noticed at once
    one_child_of(pair, loser)


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("slow", ["a", "b"])
def test_the_delete_follows_the_answer_that_waits_for_the_kernel(slow: str, loser: str) -> None:
    """strongSwan 5.9 drops what it made when it hears of the old one's end first, whatever the nonces say: then that must be what is redundant."""
    pair = make_pair(loser)
    collide(pair, rekey_child, rekey_child)
    peer, other = (pair.a, pair.b) if slow == "a" else (pair.b, pair.a)
    peer.hold_spis = True
    deliver(pair, other.name)  # <-- CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni2, ... }, for which there is no SPI yet
    deliver(pair, slow)  # CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni1, ... } -->
    deliver(pair, other.name)  # <-- CREATE_CHILD_SA { SA, Nr1, ... }
    invariants(pair)
    while pair.tick():
        pass
    assert pair.flight == []
    peer.hold_spis = False
    peer.give_spis(pair.now)
    while pair.tick():
        pass
    # CREATE_CHILD_SA { SA, Nr2, ... } -->, and by the winner INFORMATIONAL { D(old) } -->
    sent = [f"{slow}: CREATE_CHILD_SA response", f"{slow}: INFORMATIONAL request"]
    assert [str(datagram).rpartition(" ")[0] for datagram in pair.flight] == sent[: 1 if slow == loser else 2]
    one_child_of(pair, loser)


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("lost", range(8))
@pytest.mark.parametrize("repeated", [False, True], ids=["lost", "repeated"])
@pytest.mark.parametrize("acts", [rekey_child, rekey_ike], ids=["child", "ike"])
def test_any_message_of_a_collision_is_lost_or_repeated(acts: Act, repeated: bool, lost: int, loser: str) -> None:
    pair, seen = make_pair(loser), [-1]
    collide(pair, acts, acts)

    def disturb(datagram: Datagram) -> bool:
        invariants(pair)
        seen[0] += 1
        if seen[0] == lost and repeated:
            pair.deliver(datagram)
        return seen[0] == lost and not repeated

    pair.settle(disturb)
    pair.wait(200.0, disturb)
    finish(pair, 1, lossless=True)


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("deaf", ["a", "b"])
@pytest.mark.parametrize("acts", [rekey_child, rekey_ike], ids=["child", "ike"])
def test_all_that_one_side_sends_is_lost_for_a_while(acts: Act, deaf: str, loser: str) -> None:
    pair = make_pair(loser)
    collide(pair, acts, acts)
    pair.wait(10.0, lambda datagram: datagram.sender == deaf)

    def watch(_datagram: Datagram) -> bool:
        invariants(pair)
        return False

    pair.wait(200.0, watch)
    finish(pair, 1, lossless=True)


# CHILD rekeying and deletion, RFC 7296 section 2.25.1


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_rekeying_meets_deletion(order: str) -> None:
    pair = make_pair()
    # CREATE_CHILD_SA { N(REKEY_SA(old)), ... } -->  <-- INFORMATIONAL { D(old) }
    collide(pair, rekey_child, delete_child)
    # <-- CREATE_CHILD_SA { N(TEMPORARY_FAILURE) }  INFORMATIONAL { D(old) } -->
    for sender in order + order[::-1]:
        deliver(pair, sender)
        invariants(pair, lossless=False)
    finish(pair, 0)
    assert reasons(pair.a) == [Reason.PEER_DELETED]
    assert reasons(pair.b) == [Reason.DELETED]


def test_rekeying_meets_the_deletion_of_what_is_gone_already() -> None:
    pair = make_pair()
    # the peer's kernel has dropped it: <-- INFORMATIONAL { D(old) } is late
    collide(pair, rekey_child, expire_child)
    late = pair.flight.pop(1)
    deliver(pair, "a")
    # <-- CREATE_CHILD_SA { N(CHILD_SA_NOT_FOUND) }: a makes one from scratch, unless it learns that this is meant
    deliver(pair, "b")
    pair.deliver(late)
    finish(pair, 0)


def lose_child(peer: Peer) -> None:
    """It has it no more, and did not say so yet."""
    old = peer.sa.children[1]
    succession.leave(peer.sa, old)
    for sa_id in (old.sa.inbound.id, old.sa.outbound.id):
        del peer.sad[sa_id]
    peer.events.append(ChildClosed(old.sa, Reason.EXPIRED))


def test_what_the_peer_has_lost_is_made_from_scratch() -> None:
    pair = make_pair()
    lose_child(pair.b)
    rekey_child(pair, pair.a)
    # { N(REKEY_SA(old)), ... } -->  <-- { N(CHILD_SA_NOT_FOUND) }  { SA, Ni, ... } -->  <-- { SA, Nr, ... }
    finish(pair, 1)
    assert reasons(pair.a) == [Reason.PEER_DELETED]


def test_what_is_made_from_scratch_crosses_with_what_the_peer_makes() -> None:
    pair = make_pair()
    lose_child(pair.a)
    rekey_child(pair, pair.b)
    pair.settle()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
    pair.settle()
    assert [len(peer.sa.children) for peer in pair.peers] == [2, 2]
    # both sides judge alike: of two that crossed that of the IKE SA's initiator, a, stays
    newest = [peer.sa.children[max(peer.sa.children)] for peer in pair.peers]
    assert [superfluous_child(peer.sa, new.sa) is not None for peer, new in zip(pair.peers, newest, strict=True)] == [False, True]


def test_a_child_that_is_deleted_while_it_is_rekeyed_does_not_come_back() -> None:
    pair = make_pair()
    rekey_child(pair, pair.a)
    delete_child(pair, pair.a)
    # { N(REKEY_SA(old)), ... } -->  <-- { SA, ... }  { D(new) } --> <-- { D }  { D(old) } --> <-- { D }
    finish(pair, 0)


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_a_child_that_expires_while_it_is_rekeyed_leaves_its_successor(sides: str) -> None:
    pair = make_pair()
    rekey_child(pair, pair.a)
    deliver(pair, "a")
    for side in sides:
        expire_child(pair, pair.a if side == "a" else pair.b)
    finish(pair, 1)


# Simultaneous IKE rekeying, RFC 7296 section 2.8.2


@pytest.mark.parametrize("loser", ["a", "b"])
@pytest.mark.parametrize("order", ["abab", "abba", "baab", "baba"])
def test_both_rekey_the_ike_sa(order: str, loser: str) -> None:
    pair = make_pair(loser)
    collide(pair, rekey_ike, rekey_ike)
    # CREATE_CHILD_SA { SA, Ni1, KEi1 } -->  <-- CREATE_CHILD_SA { SA, Ni2, KEi2 }
    # CREATE_CHILD_SA { SA, Nr2, KEr2 } -->  <-- CREATE_CHILD_SA { SA, Nr1, KEr1 }
    for sender in order:
        deliver(pair, sender)
        invariants(pair)
    # the winner: { D(IKE) } on the old one; the loser: { D(IKE) } on its own new one
    finish(pair, 1)
    assert pair.a.sa.initiator is (loser == "b")
    assert pair.a.sa.spi_local == pair.b.sa.spi_remote
    assert len(pair.a.sas) == len(pair.b.sas) == 3
    for peer in pair.peers:
        assert [event.reason for event in peer.events if isinstance(event, IkeClosed)] == [Reason.REKEYED] * 2


def test_one_side_has_rekeyed_the_ike_sa_before_it_sees_the_other_request() -> None:
    pair = make_pair()
    collide(pair, rekey_ike, rekey_ike)
    late = pair.flight.pop(0)
    # <-- CREATE_CHILD_SA { SA, Ni2, KEi2 }  CREATE_CHILD_SA { SA, Nr2, KEr2 } -->
    deliver(pair, "b")
    deliver(pair, "a")
    # CREATE_CHILD_SA { SA, Ni1, KEi1 } -->  <-- CREATE_CHILD_SA { N(TEMPORARY_FAILURE) }: it is being closed
    pair.deliver(late)
    finish(pair, 1)
    assert len(pair.a.sas) == len(pair.b.sas) == 2
    assert pair.b.sa.initiator


# IKE rekeying and everything else, RFC 7296 section 2.25.2


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize(("meets", "children"), [(rekey_child, 1), (create_child, 2), (delete_child, 0)], ids=["rekey", "create", "delete"])
def test_ike_rekeying_meets_a_child_exchange(meets: Act, children: int, order: str) -> None:
    pair = make_pair()
    # CREATE_CHILD_SA { SA, Ni, KEi } -->  <-- CREATE_CHILD_SA { ... } or INFORMATIONAL { D }
    collide(pair, rekey_ike, meets)
    for sender in order:
        deliver(pair, sender)
        invariants(pair, lossless=children > 0)
    # the IKE rekeying gets TEMPORARY_FAILURE, and so does the CHILD_SA exchange unless it deletes; both are tried again
    finish(pair, children)
    assert len(pair.a.sas) == 2
    assert pair.b.failed == []


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_ike_rekeying_meets_its_deletion(order: str) -> None:
    pair = make_pair()
    # CREATE_CHILD_SA { SA, Ni, KEi } -->  <-- INFORMATIONAL { D(IKE) }
    collide(pair, rekey_ike, delete_ike)
    for sender in order:
        deliver(pair, sender)
    # it is answered as usual, and the rekeying is forgotten
    pair.wait(10.0)
    agree(pair, 0)
    assert pair.a.standing == pair.b.standing == []
    assert pair.a.closed is Reason.PEER_DELETED


def test_a_deletion_is_not_forgotten_when_the_peer_is_done_with_its_own_rekeying_first() -> None:
    pair = make_pair()
    # CREATE_CHILD_SA { SA, Ni, KEi } is lost  <-- CREATE_CHILD_SA { SA, Ni, KEi }
    collide(pair, rekey_ike, rekey_ike)
    pair.take()
    deliver(pair, "b")
    # our own deletion waits for the answer to the rekeying; <-- INFORMATIONAL { D(IKE) } of what b has rekeyed comes first
    (old, _theirs) = pair.a.standing
    pair.a.run(old, old.delete(pair.now), pair.now)
    deliver(pair, "a")
    deliver(pair, "b")
    pair.wait(10.0)
    agree(pair, 0)
    assert pair.a.standing == pair.b.standing == []


@pytest.mark.parametrize("who", ["a", "b", "ab"])
@pytest.mark.parametrize("both", [False, True], ids=["one rekeys", "both rekey"])
def test_an_ike_sa_that_is_deleted_while_it_is_rekeyed_goes_with_its_successor(both: bool, who: str) -> None:
    pair = make_pair()
    rekey_ike(pair, pair.a)
    if both:
        rekey_ike(pair, pair.b)
    deliver(pair, "a")
    for name in who:
        peer = pair.a if name == "a" else pair.b
        for sa in list(peer.standing):
            peer.run(sa, sa.delete(pair.now), pair.now)
    pair.wait(400.0)
    agree(pair, 0)
    assert pair.a.standing == pair.b.standing == []
    assert pair.a.up == pair.b.up == []


def test_a_child_rekeying_that_waits_moves_to_the_new_ike_sa() -> None:
    pair = make_pair()
    rekey_ike(pair, pair.a)
    rekey_child(pair, pair.a)
    create_child(pair, pair.a)
    finish(pair, 2)
    # everything but the IKE rekeying was asked once, on the new IKE SA
    assert [line for line in pair.log if "a: CREATE_CHILD_SA request" in line] == [f"a: CREATE_CHILD_SA request {number}" for number in (2, 0, 1)]


# Answers that are lost or late. With `b` as the loser its SA is the one that goes.


def outbound(peer: Peer) -> int:
    """By which SPI it sends: kernels take the one that came last."""
    return [sa.spi for sa in peer.sad.values() if sa.direction is Direction.OUT][-1]


def inbound(peer: Peer) -> set[int]:
    return {sa.spi for sa in peer.sad.values() if sa.direction is Direction.IN}


def late_collision() -> tuple[Pair, Datagram]:
    """`b`'s rekeying is done before it sees `a`'s; its answer to that has not arrived, and `b`'s SA turns out to be the redundant one."""
    pair = make_pair("b")
    collide(pair, rekey_child, rekey_child)
    request = pair.flight.pop(0)
    deliver(pair, "b")  # <-- CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni2, ... }
    deliver(pair, "a")  # CREATE_CHILD_SA { SA, Nr2, ... } -->
    pair.tick()
    assert (len(pair.a.sad), len(pair.b.sad)) == (3, 3)  # a: old both ways, b's new one in; b: the old one in, its new one both ways
    pair.deliver(request)  # CREATE_CHILD_SA { N(REKEY_SA(old)), SA, Ni1, ... } -->
    assert (len(pair.a.sad), len(pair.b.sad)) == (3, 4)  # and a's new one in
    answer = next(datagram for datagram in pair.flight if "CREATE_CHILD_SA response" in str(datagram))
    pair.flight.remove(answer)
    invariants(pair)
    deliver(pair, "b")  # <-- INFORMATIONAL { D(old) }
    invariants(pair)
    deliver(pair, "a")  # INFORMATIONAL { D(old) } -->
    invariants(pair)
    return pair, answer


def test_the_redundant_one_is_not_deleted_before_the_peer_has_the_other() -> None:
    pair, answer = late_collision()
    pair.wait(30.0, lambda datagram: datagram.sender == "b")  # <-- CREATE_CHILD_SA { SA, Nr1, ... }: every copy is lost
    invariants(pair)
    redundant = outbound(pair.b)
    assert outbound(pair.a) in inbound(pair.b)
    assert redundant in inbound(pair.a)
    assert len(pair.b.sa.children) == 2
    pair.deliver(answer)
    # a: its own one in and out; that b may delete the other one now, it says by asking for anything: INFORMATIONAL { } -->
    assert outbound(pair.a) != redundant
    finish(pair, 1, lossless=True)
    assert redundant not in inbound(pair.a)
    assert pair.a.sa.children[max(pair.a.sa.children)].initiator


def test_the_redundant_one_is_neither_rekeyed_nor_sent_by() -> None:
    pair, answer = late_collision()
    pair.deliver(answer)
    states = {child.state: child for child in pair.a.sa.children.values()}
    assert set(states) == {ChildSaState.INSTALLED, ChildSaState.REKEYED}
    redundant = states[ChildSaState.REKEYED]
    pair.a.run(pair.a.sa, pair.a.sa.rekey_child(redundant.sa.id, pair.now), pair.now)
    assert pair.a.sa.tasks_queued == ("IKE_DPD",)
    finish(pair, 1, lossless=True)
    assert len([line for line in pair.log if "CREATE_CHILD_SA request" in line]) == 2


def test_what_was_rekeyed_already_is_not_sent_by_when_its_predecessor_goes_at_last() -> None:
    pair = make_pair()
    # CREATE_CHILD_SA { N(REKEY_SA(old)), ... } -->  <-- CREATE_CHILD_SA { ... }; INFORMATIONAL { D(old) } --> is late
    rekey_child(pair, pair.a)
    deliver(pair, "a")
    deliver(pair, "b")
    pair.tick()
    late = pair.flight.pop()
    invariants(pair)
    # b rekeys what a made: <-- CREATE_CHILD_SA { N(REKEY_SA(new)), ... }  CREATE_CHILD_SA { ... } -->
    second = max(pair.b.sa.children)
    pair.b.run(pair.b.sa, pair.b.sa.rekey_child(second, pair.now), pair.now)
    deliver(pair, "b")
    invariants(pair)
    deliver(pair, "a")
    invariants(pair)
    sent_by = outbound(pair.b)
    pair.deliver(late)
    assert outbound(pair.b) == sent_by
    finish(pair, 1, lossless=True)


def test_a_new_one_sends_when_what_it_replaces_has_ceased_to() -> None:
    """As in a tunnel that was doubled: the other one of it took over."""
    pair = make_pair()
    old = pair.b.sa.children[1]
    old.sends, old.ceased = False, True
    del pair.b.sad[old.sa.outbound.id]
    rekey_child(pair, pair.a)
    deliver(pair, "a")
    new = max(pair.b.sa.children)
    assert outbound(pair.b) == pair.b.sa.children[new].sa.outbound.spi
    finish(pair, 1)
