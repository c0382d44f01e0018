"""Quick crash detection (RFC 6290) between two peers: who gives which token, and who believes what."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.ike_pair import Datagram, Pair, agree, psk_pair

from vpnd.ike.effects import Reason
from vpnd.ike.exchanges.crash_detection import SHORTEST_REQUEST, TokenMaker
from vpnd.ike.iana import NotifyType
from vpnd.ike.wire.header import Header
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload

SECRET = b"of this daemon, whatever happens"


def made(**options: object) -> Pair:
    pair = psk_pair(**options)  # type: ignore[arg-type]
    for peer in pair.peers:
        peer.tokens = TokenMaker(SECRET + peer.name.encode())
    pair.connect()
    return pair


def probe(pair: Pair) -> Datagram:
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    return pair.take()


def answer(pair: Pair, request: Datagram, maker: TokenMaker) -> Datagram | None:
    data = maker.answer(request.data)
    return None if data is None else Datagram("b", request.remote, request.local, data)


def maker_of_b() -> TokenMaker:
    """As it is after a restart: nothing but the secret is left."""
    return TokenMaker(SECRET + b"b")


def test_a_restarted_peer_is_recognised_at_once() -> None:
    pair = made()
    # HDR, SK {} -->   <-- HDR, N(INVALID_IKE_SPI), N(QCD_TOKEN)
    lost = answer(pair, probe(pair), maker_of_b())
    assert lost is not None
    pair.deliver(lost)
    assert pair.a.closed is Reason.PEER_RESTARTED
    assert not pair.a.sad


@pytest.mark.parametrize("side", ["a", "b"])
def test_tokens_follow_a_rekeying(side: str) -> None:
    pair = made()
    peer = pair.a if side == "a" else pair.b
    peer.run(peer.sa, peer.sa.rekey(pair.now), pair.now)
    pair.settle()
    assert pair.a.sa.crash_token == pair.b.tokens.make(pair.b.sa.wire_spi_i, pair.b.sa.wire_spi_r)  # type: ignore[union-attr]
    assert pair.b.sa.crash_token == pair.a.tokens.make(pair.a.sa.wire_spi_i, pair.a.sa.wire_spi_r)  # type: ignore[union-attr]
    agree(pair, 1)


@pytest.mark.parametrize("fault", ["secret", "none", "short", "request", "only_the_error", "other_ike_sa"])
def test_what_proves_nothing(fault: str) -> None:
    pair = made()
    request = probe(pair)
    lost = answer(pair, request, TokenMaker(b"guessed") if fault == "secret" else maker_of_b())
    assert lost is not None
    message = decode_message(lost.data)
    header: Header = message.header
    payloads = message.payloads
    if fault in ("none", "only_the_error"):
        payloads = payloads[:1]
    elif fault == "short":
        payloads = (payloads[0], NotifyPayload(NotifyType.QUICK_CRASH_DETECTION, b""))
    elif fault == "request":
        header = replace(header, response=False)
    elif fault == "other_ike_sa":
        other = made()
        other.b.random = random.Random(99)
        payloads = (payloads[0], NotifyPayload(NotifyType.QUICK_CRASH_DETECTION, maker_of_b().make(bytes(8), bytes(8))))
    pair.deliver(replace(lost, data=encode_message(Message(header, payloads))))
    assert pair.a.closed is None
    pair.deliver(request)
    pair.settle()
    agree(pair, 1)


def test_nobody_answers_what_is_not_a_protected_request() -> None:
    pair = made()
    maker = maker_of_b()
    request = probe(pair)
    assert maker.answer(request.data) is not None
    pair.deliver(request)
    response = pair.take()
    assert maker.answer(response.data) is None
    assert maker.answer(request.data[: SHORTEST_REQUEST - 1]) is None
    header = decode_message(request.data).header
    assert maker.answer(encode_message(Message(header, (NotifyPayload(NotifyType.INITIAL_CONTACT, bytes(64)),)))) is None


def test_without_a_maker_there_are_no_tokens() -> None:
    pair = psk_pair()
    pair.connect()
    assert pair.a.sa.crash_token == pair.b.sa.crash_token == b""
    agree(pair, 1)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_datagram_upsets_a_maker(data: bytes) -> None:
    TokenMaker(SECRET).answer(data)
