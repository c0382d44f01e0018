"""Where the next IKE SA of a connection goes, and how often it may be sent on (RFC 5685 section 7)."""

from __future__ import annotations

from vpnd.daemon.redirects import LOOP_PERIOD, MAX_REDIRECTS, Redirection, Redirects
from vpnd.ike.gateway_id import GatewayId

ELSEWHERE = Redirection(GatewayId.parse("192.0.2.9"), GatewayId.parse("192.0.2.1"))


def sent_as_often_as_allowed() -> Redirects:
    redirects = Redirects()
    for at in range(MAX_REDIRECTS):
        assert redirects.admits("gw", float(at))
        redirects.sent("gw", ELSEWHERE, float(at))
    return redirects


def test_a_redirection_counts_for_one_attempt() -> None:
    redirects = Redirects()
    redirects.sent("gw", ELSEWHERE, 0.0)
    assert redirects.next("gw") == redirects.take("gw") == ELSEWHERE
    assert redirects.next("gw") is redirects.take("gw") is None


def test_round_and_round_has_an_end_and_begins_anew_after_the_period() -> None:
    redirects = sent_as_often_as_allowed()
    assert not redirects.admits("gw", LOOP_PERIOD - 0.1)
    assert redirects.admits("another", LOOP_PERIOD - 0.1)
    assert redirects.admits("gw", LOOP_PERIOD)


def test_a_connection_that_is_configured_no_more_is_forgotten() -> None:
    redirects = sent_as_often_as_allowed()
    redirects.forget("gw")
    assert redirects.next("gw") is None
    assert redirects.admits("gw", float(MAX_REDIRECTS))
