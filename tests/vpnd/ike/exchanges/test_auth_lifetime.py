"""How long an authentication lasts (RFC 7296 section 2.8.3, RFC 4478): who begins the next one, and when the IKE SA ends without."""

from __future__ import annotations

import pytest
from lab.ike_pair import Pair, child, connection, mirrored, psk

from vpnd.ike.effects import Reason, ReauthenticationDue
from vpnd.ike.reauthentication import SHORTEST

NET = child()


def make_pair(a: float = 0.0, b: float = 0.0, **options: object) -> Pair:
    options = {"rekey_time": 0.0, "over_time": 100.0, "rand_time": 0.0, **options}
    first = connection("to-b", psk("a"), psk("b"), [NET], reauth_time=a, **options)
    return Pair(first, connection("to-a", psk("b"), psk("a"), [mirrored(NET)], reauth_time=b, **options))


def due(pair: Pair) -> tuple[int, int]:
    return len(pair.a.happened(ReauthenticationDue)), len(pair.b.happened(ReauthenticationDue))


def test_the_initiator_begins_and_the_responder_only_when_it_did_not() -> None:
    pair = make_pair(1000.0, 1000.0)
    pair.connect()
    pair.wait(899.0)
    assert due(pair) == (0, 0)
    pair.wait(102.0)
    assert due(pair) == (1, 0)
    pair.wait(48.0)
    assert due(pair) == (1, 0)
    pair.wait(2.0)
    assert due(pair) == (1, 1)
    assert pair.a.closed is None
    pair.wait(60.0)
    # nobody did
    assert {pair.a.closed, pair.b.closed} == {Reason.EXPIRED, Reason.PEER_DELETED}


def test_the_responder_says_how_long_and_the_initiator_is_early() -> None:
    pair = make_pair(0.0, 1000.0)
    # IKE_AUTH { IDr, AUTH, N(AUTH_LIFETIME, 1100), SAr2, TSi, TSr } <--
    pair.connect()
    pair.wait(980.0)
    assert due(pair) == (0, 0)
    pair.wait(66.0)
    assert due(pair) == (1, 0)


@pytest.mark.parametrize("seconds", [1.0, 30.0])
def test_a_peer_that_gives_absurdly_little_time_does_not_make_us_authenticate_without_end(seconds: float) -> None:
    pair = make_pair(0.0, seconds, over_time=1.0)
    pair.connect()
    assert pair.a.sa.reauth_at is not None
    assert pair.a.sa.reauth_at - pair.now >= SHORTEST * 0.9
    pair.wait(SHORTEST)
    # the peer ends what it gave no time
    assert due(pair)[0] == 0
    assert pair.a.closed is Reason.PEER_DELETED


def test_a_rekeying_does_not_prolong_an_authentication() -> None:
    pair = make_pair(1000.0)
    pair.connect()
    pair.wait(500.0)
    pair.b.run(pair.b.sa, pair.b.sa.rekey(pair.now), pair.now)
    pair.wait(490.0)
    assert len(pair.a.standing) == 1
    assert not pair.a.sa.initiator
    assert due(pair) == (0, 0)
    pair.wait(20.0)
    assert due(pair) == (1, 0)
    pair.wait(100.0)
    assert pair.a.closed is Reason.EXPIRED


def test_what_came_to_nothing_is_tried_again() -> None:
    pair = make_pair(1000.0)
    pair.connect()
    pair.wait(1001.0)
    pair.a.run(pair.a.sa, pair.a.sa.reauthenticate_later(pair.now), pair.now)
    pair.wait(61.0)
    assert due(pair) == (2, 0)
