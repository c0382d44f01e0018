"""An initiator gives up before the IKE SA stands: it stands nowhere afterwards, whatever was on the wire then, and whatever of it is lost."""

from __future__ import annotations

import pytest
from lab.ike_pair import Datagram, Pair, agree, psk_pair

from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import IkeClosed, Reason

HALF_OPEN = IkeSettings().half_open_timeout
EXCHANGES = 4  # datagrams of IKE_SA_INIT and IKE_AUTH
UNHEARD_DELETE = 30.0  # s, at most, until nobody answers a delete: two copies (strongSwan's schedule: 4.0, 7.2 and 13.0 s)


def started() -> Pair:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now, *pair.a.connections[0].children.values())
    return pair


def give_up(pair: Pair) -> None:
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)


def stands_nowhere(pair: Pair) -> None:
    agree(pair, 0)
    assert pair.a.standing == pair.b.standing == []
    assert [event.reason for event in pair.a.happened(IkeClosed) if isinstance(event, IkeClosed)] == [Reason.DELETED]
    assert pair.a.failed == [Reason.DELETED]
    assert not pair.a.established()


@pytest.mark.parametrize("lost", [None, 0, 1, 2])
@pytest.mark.parametrize("delivered", range(EXCHANGES))
def test_it_stands_nowhere_afterwards(delivered: int, lost: int | None) -> None:
    pair = started()
    for _ in range(delivered):
        pair.step()
    give_up(pair)
    sent = 0

    def drop(_: Datagram) -> bool:
        nonlocal sent
        sent += 1
        return sent - 1 == lost

    pair.wait(HALF_OPEN + 1.0, drop)
    stands_nowhere(pair)


def test_the_peer_hears_of_it_as_soon_as_it_has_answered() -> None:
    pair = started()
    for _ in range(2):
        pair.step()
    pair.log.clear()
    give_up(pair)
    give_up(pair)
    pair.settle()
    assert pair.log == ["a: IKE_AUTH request 1", "b: IKE_AUTH response 1", "a: INFORMATIONAL request 2", "b: INFORMATIONAL response 2"]
    assert pair.b.closed is Reason.PEER_DELETED
    stands_nowhere(pair)


def test_a_peer_that_never_answers_is_not_waited_for_long() -> None:
    pair = started()
    for _ in range(2):
        pair.step()
    give_up(pair)
    pair.wait(UNHEARD_DELETE, drop=lambda datagram: True)
    assert pair.a.standing == []
    pair.wait(HALF_OPEN)
    stands_nowhere(pair)


def test_a_peer_that_refuses_us_is_not_told() -> None:
    pair = started()
    pair.b.admitting = False
    for _ in range(2):
        pair.step()
    give_up(pair)
    pair.settle()
    assert pair.log[-1] == "b: IKE_AUTH response 1"
    stands_nowhere(pair)
