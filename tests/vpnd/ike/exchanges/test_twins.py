"""The peer makes a CHILD_SA beside one for the same packets, as in reauthentication: what we send arrives, though it has the SA in only with our answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from lab.ike_pair import Datagram, Pair, Peer, agree, child, psk_pair

from kernel_shim.model import Direction
from vpnd.config.model import ChildConfig
from vpnd.ike.effects import ChildClosed, Reason
from vpnd.ike.sa import IkeSa
from vpnd.ike.state import Child
from vpnd.ike.twins import LOOKED_AT

NET = child("net", "10.1.0.0/16", "10.2.0.0/16")


def outbound(peer: Peer) -> set[int]:
    return {sa.spi for sa in peer.sad.values() if sa.direction is Direction.OUT}


def what_is_sent_arrives(pair: Pair) -> None:
    """Whichever of its SAs out a kernel takes."""
    for peer, other in ((pair.a, pair.b), (pair.b, pair.a)):
        assert outbound(peer)
        assert outbound(peer) <= {sa.spi for sa in other.sad.values() if sa.direction is Direction.IN}


def connected() -> Pair:
    pair = psk_pair(NET)
    pair.connect()
    return pair


def answer_is_on_its_way(pair: Pair, look: Callable[[Pair], None] = what_is_sent_arrives) -> IkeSa:
    """`a` made a second IKE SA; with `b` it stands."""
    new = pair.a.start(pair.b.endpoint, pair.now, pair.a.connections[0].children["net"])
    # IKE_SA_INIT -->  <-- IKE_SA_INIT  IKE_AUTH -->  <-- IKE_AUTH, on its way
    for _ in range(3):
        pair.step()
        look(pair)
    assert len(pair.b.standing) == 2
    return new


def new_child(peer: Peer) -> Child:
    (found,) = peer.standing[-1].children.values()
    return found


def until_quiet(pair: Pair) -> None:
    for _ in range(100):
        if pair.flight:
            pair.step()
        elif not pair.tick():
            return
        what_is_sent_arrives(pair)
    raise AssertionError("they do not come to rest")


def test_the_old_one_sends_until_the_peer_has_our_answer() -> None:
    pair = connected()
    (before,) = outbound(pair.b)
    answer_is_on_its_way(pair)
    assert outbound(pair.b) == {before}
    until_quiet(pair)
    agree(pair, 2)


@pytest.mark.parametrize("lost", range(5))
def test_whichever_message_is_lost(lost: int) -> None:
    pair = connected()
    pair.a.start(pair.b.endpoint, pair.now, pair.a.connections[0].children["net"])
    count = -1

    def weather(datagram: Datagram) -> bool:
        nonlocal count
        what_is_sent_arrives(pair)
        count += 1
        return count == lost

    pair.wait(30.0, weather)
    what_is_sent_arrives(pair)
    agree(pair, 2)


def test_the_peer_deletes_the_old_one_before_it_says_anything_else() -> None:
    pair = connected()
    old = pair.a.standing[0]
    answer_is_on_its_way(pair)
    # <-- IKE_AUTH; on the old one INFORMATIONAL { D } -->, before what `b` asks on the new one
    pair.deliver(pair.take())
    pair.a.run(old, old.delete(pair.now, Reason.REPLACED), pair.now)
    what_is_sent_arrives(pair)
    pair.deliver(pair.flight.pop())
    what_is_sent_arrives(pair)
    assert outbound(pair.b) == {new_child(pair.b).sa.outbound.spi}
    pair.wait(10.0)
    agree(pair, 1)


def test_our_answer_to_the_delete_leaves_after_the_last_packet_by_the_old_one() -> None:
    pair = connected()
    old = pair.a.standing[0]
    (before,) = outbound(pair.b)
    answer_is_on_its_way(pair)
    pair.deliver(pair.take())
    pair.a.run(old, old.delete(pair.now, Reason.REPLACED), pair.now)
    sends = []

    class Network(list[Datagram]):
        def append(self, datagram: Datagram) -> None:
            sends.append(outbound(pair.b))

    pair.b.network = Network()
    pair.deliver(pair.flight.pop())
    assert sends == [{new_child(pair.b).sa.outbound.spi}]
    assert before not in outbound(pair.b)


@pytest.mark.parametrize("end", ["aborted", "deleted"])
def test_the_old_one_goes_at_our_side(end: str) -> None:
    pair = connected()
    old = pair.b.standing[0]
    answer_is_on_its_way(pair)
    pair.b.run(old, old.abort(pair.now, Reason.PEER_SILENT) if end == "aborted" else old.delete(pair.now), pair.now)
    assert outbound(pair.b) == {new_child(pair.b).sa.outbound.spi}
    pair.wait(1.0)
    what_is_sent_arrives(pair)


@pytest.mark.parametrize("deletes", ["a", "b"])
def test_the_old_ike_sa_goes_in_the_midst_of_a_rekeying(deletes: str) -> None:
    """The peer has not our answer, but will; what replaces the old CHILD_SA goes with it, and is not let send."""
    pair = connected()
    at_a, at_b = pair.a.standing[0], pair.b.standing[0]
    answer_is_on_its_way(pair)
    late = pair.take()
    pair.a.run(at_a, at_a.rekey_child(min(at_a.children), pair.now), pair.now)
    # CREATE_CHILD_SA { N(REKEY_SA), ... } -->  <-- CREATE_CHILD_SA { ... }
    pair.step()
    assert len(at_b.children) == 2
    if deletes == "b":
        pair.b.run(at_b, at_b.delete(pair.now, Reason.REPLACED), pair.now)
    else:
        pair.step()
        pair.a.run(at_a, at_a.delete(pair.now, Reason.REPLACED), pair.now)
        pair.deliver(late)
        while at_b in pair.b.standing:
            pair.step() if pair.flight else pair.tick()
    assert outbound(pair.b) == {new_child(pair.b).sa.outbound.spi}


def test_the_new_one_goes_before_it_ever_sent() -> None:
    pair = connected()
    (before,) = outbound(pair.b)
    answer_is_on_its_way(pair)
    new = pair.b.standing[-1]
    pair.b.run(new, new.abort(pair.now, Reason.PEER_SILENT), pair.now)
    assert outbound(pair.b) == {before}


def test_a_second_one_of_the_same_ike_sa_waits_as_well() -> None:
    pair = connected()
    (before,) = outbound(pair.b)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
    # CREATE_CHILD_SA -->  <-- CREATE_CHILD_SA, on its way
    pair.step()
    assert len(pair.b.sa.children) == 2
    assert outbound(pair.b) == {before}
    until_quiet(pair)
    agree(pair, 2)


def test_the_ike_sa_is_rekeyed_while_we_wait_for_the_peers_word() -> None:
    pair = connected()
    new = answer_is_on_its_way(pair)
    pair.deliver(pair.take())
    pair.a.run(new, new.rekey(pair.now), pair.now)
    assert pair.tick()  # `b` asks
    for datagram in sorted([pair.take() for _ in range(len(pair.flight))], key=lambda datagram: datagram.sender):
        pair.deliver(datagram)
        what_is_sent_arrives(pair)
    until_quiet(pair)
    pair.wait(10.0)
    agree(pair, 2)


def test_the_kernel_refuses_the_late_sa() -> None:
    pair = connected()
    pair.b.refuse_install = lambda sa: sa.direction is Direction.OUT
    answer_is_on_its_way(pair)
    late = new_child(pair.b)
    pair.wait(10.0)
    assert [(event.child.id, event.reason) for event in pair.b.events if isinstance(event, ChildClosed)] == [(late.sa.id, Reason.KERNEL_REFUSED)]
    agree(pair, 1)


@pytest.mark.parametrize(
    ("at_a", "at_b"),
    [
        pytest.param(child("net", "10.3.0.0/16", "10.4.0.0/16"), child("net", "10.4.0.0/16", "10.3.0.0/16"), id="other-addresses"),
        pytest.param(NET, child("net", "10.2.0.0/16", "10.1.0.0/16", if_id_in=7, if_id_out=7), id="another-interface"),
    ],
)
def test_other_packets_wait_for_nothing(at_a: ChildConfig, at_b: ChildConfig) -> None:
    pair = connected()
    for peer, config in ((pair.a, at_a), (pair.b, at_b)):
        peer.connections[0] = replace(peer.connections[0], children={"net": config})
    answer_is_on_its_way(pair, look=lambda pair: None)
    assert len(outbound(pair.b)) == 2


def test_an_ike_sa_ends_whatever_the_kernel_says_to_what_ends_with_it() -> None:
    pair = connected()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
    # CREATE_CHILD_SA -->  <-- CREATE_CHILD_SA; INFORMATIONAL { D } -->, before what `b` asks
    pair.step()
    pair.step()
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.b.refuse_install = lambda sa: True
    pair.deliver(pair.flight.pop())
    assert pair.b.closed is Reason.PEER_DELETED
    assert not pair.b.sad
    assert not pair.b.larval


def test_from_another_address_there_is_nothing_to_wait_for() -> None:
    # policies lead to the addresses of the youngest, and there the older one does not send
    pair = connected()
    pair.a.address = "192.0.2.7"
    new = answer_is_on_its_way(pair, look=lambda pair: None)
    assert new_child(pair.b).sa.outbound.spi in outbound(pair.b)
    assert str(new.local.address) == "192.0.2.7"


def test_of_a_peer_that_makes_ever_more_of_the_same_some_are_looked_at() -> None:
    pair = connected()
    many = LOOKED_AT + 4
    for _ in range(many - 1):
        pair.a.run(pair.a.sa, pair.a.sa.create_child(pair.a.connections[0].children["net"], pair.now), pair.now)
    pair.settle()
    agree(pair, many)
    for peer in pair.peers:
        assert len(peer.twins) == many
        one = next(iter(peer.sa.children.values()))
        assert len(list(peer.twins.of(peer.sa.local_id, peer.sa.remote_id, one.sa))) == LOOKED_AT
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.settle()
    for peer in pair.peers:
        assert peer.closed in (Reason.DELETED, Reason.PEER_DELETED)
        assert len(peer.twins) == 0
