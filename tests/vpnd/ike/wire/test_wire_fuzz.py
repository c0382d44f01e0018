"""Every decoder of the registry, fed with anything: a payload that encodes stably, or MalformedMessage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.ike import iana
from vpnd.ike.iana import ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import default_proposals
from vpnd.ike.wire.codec import CODECS, PayloadCodec
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import Header, IkeSpi, MessageId
from vpnd.ike.wire.message import Message, decode_message, decode_payloads, encode_message, encode_payloads
from vpnd.ike.wire.payloads import IdrPayload, KePayload, NoncePayload, NotifyPayload, SaPayload, SkPayload
from vpnd.ike.wire.reader import Reader, Writer

pytestmark = pytest.mark.property

SEED = encode_message(
    Message(
        Header(IkeSpi(b"initiato"), IkeSpi(b"responde"), 34, MessageId(0), initiator=True, response=False),
        (
            SaPayload(default_proposals(ProtocolId.IKE)),
            KePayload(31, b"k" * 32),
            NoncePayload(b"n" * 32),
            IdrPayload(Identity.parse("CN=moon")),
            NotifyPayload(16388, b"h" * 20),
            SkPayload(35, b"sealed" * 9),
        ),
    )
)
SMALL = st.integers(0, 4) | st.sampled_from([8, 12, 16, 40, 44, 127, 128, 255])
BODIES = st.binary(max_size=120) | st.lists(SMALL, max_size=60).map(bytes)


@st.composite
def lengths_made_right(draw: st.DrawFn) -> bytes:
    """Nested structures whose lengths fit, so that the fuzz gets past the first check."""
    parts = draw(st.lists(st.tuples(SMALL, SMALL, st.lists(SMALL, max_size=24).map(bytes)), max_size=5))
    return bytes(draw(st.lists(SMALL, max_size=8))) + b"".join(bytes((a, b)) + (len(body) + 4).to_bytes(2, "big") + body for a, b, body in parts)


def encoded(codec: PayloadCodec, payload: object) -> bytes:
    writer = Writer()
    codec.encode(payload, writer)
    return writer.bytes()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@settings(max_examples=150, deadline=None)
@given(data=BODIES | lengths_made_right())
def test_a_payload_decodes_stably_or_is_malformed(codec, data):
    reader = Reader(data, codec.name)
    try:
        payload = codec.decode(reader)
    except MalformedMessage:
        return
    if reader.remaining:
        return  # the frame around it refuses what is left over
    assert isinstance(payload, codec.kind)
    again = encoded(codec, payload)
    assert codec.decode(Reader(again, codec.name)) == payload
    assert encoded(codec, codec.decode(Reader(again, codec.name))) == again


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_datagram_is_a_message_or_malformed(data):
    try:
        message = decode_message(data)
    except MalformedMessage:
        return
    assert decode_message(encode_message(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(SEED)))
def test_a_damaged_message_decodes_stably_or_is_malformed(damage, length):
    data = bytearray(SEED)
    for position, value in damage:
        data[position] = value
    for candidate in (bytes(data), bytes(data[:length]), bytes(data[:24]) + length.to_bytes(4, "big") + bytes(data[28:length])):
        try:
            message = decode_message(candidate)
        except MalformedMessage:
            continue
        assert decode_message(encode_message(message)) == message


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([codec.payload_type for codec in CODECS] + [iana.Payload.SK, iana.Payload.SKF, 0, 200]), lengths_made_right() | BODIES)
def test_any_opened_chain_is_payloads_or_malformed(first, data):
    try:
        payloads = decode_payloads(first, data)
    except MalformedMessage:
        return
    assert decode_payloads(*encode_payloads(payloads)) == payloads


def test_every_payload_of_the_specification_has_a_codec():
    special = {iana.Payload.NONE, iana.Payload.SK, iana.Payload.SKF}
    later = {iana.Payload.GSPM, iana.Payload.IDG, iana.Payload.GSA, iana.Payload.KD, iana.Payload.PS}
    assert {codec.payload_type for codec in CODECS} == set(iana.Payload) - special - later
