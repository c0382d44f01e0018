"""Redirection (RFC 5685) between a client `a` and a gateway `b`: in IKE_SA_INIT, in IKE_AUTH, during a session; forged and endless ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.ike_pair import Pair, agree, psk_pair

from vpnd.config.model import RedirectIn
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import IkeClosed, Reason, Redirected
from vpnd.ike.exchanges.redirect import DEPARTURE
from vpnd.ike.gateway_id import GatewayId, decode_gateway
from vpnd.ike.iana import NotifyType
from vpnd.ike.sa import IkeSa
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload

OTHER = GatewayId.parse("203.0.113.9")


def sending_away(when: RedirectIn, gateway: GatewayId = OTHER) -> Pair:
    pair = psk_pair()
    pair.b.connections = [replace(pair.b.connections[0], redirect=gateway, redirect_in=when)]
    return pair


def sent_to(pair: Pair) -> list[str]:
    return [str(event.gateway) for event in pair.a.happened(Redirected)]  # type: ignore[union-attr]


@pytest.mark.parametrize("gateway", ["203.0.113.9", "2001:db8::9", "gateway.example"])
def test_in_ike_sa_init(gateway: str) -> None:
    pair = sending_away(RedirectIn.INIT, GatewayId.parse(gateway))
    # HDR(A,0), SAi1, KEi, Ni, N(REDIRECT_SUPPORTED) -->   <-- HDR(A,0), N(REDIRECT, gateway, Ni)
    pair.connect()
    assert sent_to(pair) == [gateway]
    assert pair.a.closed is Reason.REDIRECTED
    assert not pair.b.sas
    assert pair.a.failed == [Reason.REDIRECTED]


def test_in_ike_auth() -> None:
    pair = sending_away(RedirectIn.AUTH)
    # IKE_AUTH { IDi, AUTH, SA, TSi, TSr } -->   <-- { IDr, AUTH, N(REDIRECT) }   INFORMATIONAL { D } -->
    pair.connect()
    assert sent_to(pair) == ["203.0.113.9"]
    assert pair.a.closed is Reason.REDIRECTED
    assert pair.b.closed is Reason.PEER_DELETED
    agree(pair, 0)


def test_during_a_session() -> None:
    pair = psk_pair()
    pair.connect()
    # <-- { N(REDIRECT) }   {} -->   { D } -->   <-- {}
    pair.b.run(pair.b.sa, pair.b.sa.redirect(OTHER, pair.now), pair.now)
    pair.settle()
    assert sent_to(pair) == ["203.0.113.9"]
    assert pair.a.closed is Reason.REDIRECTED
    assert pair.b.closed is Reason.PEER_DELETED
    agree(pair, 0)


@pytest.mark.parametrize("rekeyed", [False, True])
def test_a_client_that_stays_is_deleted(rekeyed: bool) -> None:
    pair = psk_pair()
    pair.connect()
    pair.a.follows = False
    pair.b.run(pair.b.sa, pair.b.sa.redirect(OTHER, pair.now), pair.now)
    pair.settle()
    agree(pair, 1)
    if rekeyed:
        pair.a.run(pair.a.sa, pair.a.sa.rekey(pair.now), pair.now)
        pair.settle()
    pair.wait(DEPARTURE + 1)
    assert pair.b.closed is Reason.REDIRECTED
    agree(pair, 0)


def test_who_was_sent_says_by_whom() -> None:
    pair = psk_pair()
    sa = pair.a.start(pair.b.endpoint, pair.now)
    pair.flight.clear()
    assert decode_message(sa.init_request).notify(NotifyType.REDIRECT_SUPPORTED) is not None
    again = IkeSa.initiator_of(pair.a, pair.a.connections[0], pair.a.endpoint, pair.b.endpoint, pair.now)
    again.redirected_from = OTHER
    pair.a.sas[again.spi_local] = again
    pair.a.run(again, again.initiate(pair.now), pair.now)
    told = decode_message(again.init_request).notify(NotifyType.REDIRECTED_FROM)
    assert told is not None
    assert decode_gateway(told.data) == (OTHER, b"")
    assert decode_message(again.init_request).notify(NotifyType.REDIRECT_SUPPORTED) is None
    pair.settle()
    assert pair.b.sa.redirectable


@pytest.mark.parametrize("when", list(RedirectIn))
def test_who_does_not_follow_is_served(when: RedirectIn) -> None:
    pair = sending_away(when)
    pair.a.settings = IkeSettings(follow_redirects=False)
    pair.connect()
    agree(pair, 1)
    assert not pair.b.sa.may_be_redirected
    assert pair.b.sa.redirect(OTHER, pair.now) == []


@pytest.mark.parametrize("data", [OTHER.encode(), OTHER.encode() + bytes(32), b"", b"\x01\x04\xe0\x00\x00\x01" + bytes(32), b"\x09\x01x", b"\x03\xffx"])
def test_a_forged_redirection_does_not_hold_the_truth_up(data: bytes) -> None:
    """RFC 5685 section 3: without our nonce it is from somebody who did not see our request."""
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now, *pair.a.connections[0].children.values())
    request = pair.flight[0]
    header = replace(decode_message(request.data).header, initiator=False, response=True)
    forged = encode_message(Message(header, (NotifyPayload(NotifyType.REDIRECT, data),)))
    pair.a.arrive(replace(request, sender="b", local=request.local, remote=request.remote, data=forged), pair.now)
    pair.settle()
    assert sent_to(pair) == []
    agree(pair, 1)


def test_round_and_round() -> None:
    """RFC 5685 section 7: it gives up."""
    pair = sending_away(RedirectIn.INIT)
    pair.a.follows = False
    pair.connect()
    pair.wait(10)
    assert sent_to(pair) == []
    assert [event.reason for event in pair.a.happened(IkeClosed)] == [Reason.PEER_ERROR]  # type: ignore[union-attr]


def test_an_authenticated_gateway_that_only_sends_on_is_left_at_once() -> None:
    pair = sending_away(RedirectIn.AUTH)
    pair.a.follows = False
    # IKE_AUTH { ... } -->   <-- { IDr, AUTH, N(REDIRECT) }   INFORMATIONAL { D } -->
    pair.connect()
    assert sent_to(pair) == []
    assert pair.a.closed is Reason.REDIRECTION_REFUSED
    assert pair.a.failed == [Reason.REDIRECTION_REFUSED]
    assert pair.b.closed is Reason.PEER_DELETED
    agree(pair, 0)


def test_a_client_sends_nobody_away() -> None:
    pair = psk_pair()
    pair.connect()
    assert pair.a.sa.redirect(OTHER, pair.now) == []
    pair.a.sa.redirectable, pair.a.sa.original_initiator = True, False
    pair.a.run(pair.a.sa, pair.a.sa.redirect(OTHER, pair.now), pair.now)
    pair.settle()
    assert pair.b.happened(Redirected) == []
    agree(pair, 1)


@pytest.mark.parametrize("text", ["", "127.0.0.1", "255.255.255.255", "::ffff:192.0.2.1", "224.0.0.1", "0.0.0.0", "a b", "-", "x" * 300, "1.2.3"])
def test_what_is_no_gateway(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        GatewayId.parse(text)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_decoding_raises_only_its_own_error(data: bytes) -> None:
    try:
        gateway, rest = decode_gateway(data)
    except MalformedMessage:
        return
    assert gateway.encode() + rest == data
