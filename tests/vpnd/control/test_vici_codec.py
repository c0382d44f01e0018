"""VICI's codec: the example of strongSwan's README.md, round trips, limits, and whatever bytes come."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.config.tree import Section
from vpnd.control.vici.codec import (
    HEADER_LENGTH,
    MAX_DEPTH,
    MAX_NAME,
    MAX_SEGMENT,
    MAX_VALUE,
    MalformedVici,
    Packet,
    PacketType,
    Segmenter,
    TooLong,
    decode_message,
    decode_packet,
    encode_message,
    encode_segment,
)

README_TREE = {"key1": "value1", "section1": {"sub-section": {"key2": "value2"}, "list1": ["item1", "item2"]}}
README_BYTES = (
    b"\x03\x04key1\x00\x06value1\x01\x08section1\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02\x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06\x02"
)

names = st.text(min_size=1, max_size=20)
values = st.binary(max_size=40)
trees = st.recursive(
    st.dictionaries(names, values | st.lists(values, max_size=4), max_size=4),
    lambda below: st.dictionaries(names, values | st.lists(values, max_size=4) | below, max_size=4),
    max_leaves=20,
)


def test_the_readmes_example() -> None:
    assert encode_message(Section.of(README_TREE)) == README_BYTES
    assert decode_message(README_BYTES).plain() == README_TREE


@given(trees)
def test_a_message_survives_the_wire(tree: dict[str, object]) -> None:
    section = Section.of(tree)  # type: ignore[arg-type]
    decoded = decode_message(encode_message(section))
    assert decoded == section
    assert list(decoded.entries) == list(section.entries)


@pytest.mark.parametrize("kind", PacketType)
def test_a_packet_survives_the_wire(kind: PacketType) -> None:
    named = kind in (PacketType.CMD_REQUEST, PacketType.EVENT_REGISTER, PacketType.EVENT_UNREGISTER, PacketType.EVENT)
    packet = Packet(kind, "list-sa" if named else "", README_BYTES)
    segment = encode_segment(packet)
    assert int.from_bytes(segment[:HEADER_LENGTH], "big") == len(segment) - HEADER_LENGTH
    assert decode_packet(segment[HEADER_LENGTH:]) == packet


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x02", "was not begun"),
        (b"\x01\x01a", "without its end"),
        (b"\x03\x01a", "cut off"),
        (b"\x03\x01a\x00\x05abc", "cut off"),
        (b"\x03\x05a", "cut off"),
        (b"\x05\x00\x01a", "not expected"),
        (b"\x06", "not expected"),
        (b"\x00", "not expected"),
        (b"\x09", "not expected"),
        (b"\x04\x01a\x05\x00\x01b", "cut off"),
        (b"\x04\x01a\x04\x01b\x06\x06", "in a list"),
        (b"\x03\x01a\x00\x00\x03\x01a\x00\x00", "a name twice"),
        (b"\x03\x01\xff\x00\x00", "UTF-8"),
        (b"\x01\x01a" * (MAX_DEPTH + 1) + b"\x02" * (MAX_DEPTH + 1), "deep"),
    ],
)
def test_malformed_messages(data: bytes, why: str) -> None:
    with pytest.raises(MalformedVici, match=why):
        decode_message(data)


@pytest.mark.parametrize("data", [b"", b"\x08", b"\xff", b"\x00", b"\x00\x05abc", b"\x03\x01\xff"])
def test_malformed_packets(data: bytes) -> None:
    with pytest.raises(MalformedVici):
        decode_packet(data)


def test_lengths_that_the_protocol_does_not_have() -> None:
    encode_message(Section.of({"n" * MAX_NAME: b"v" * MAX_VALUE}))
    with pytest.raises(TooLong):
        encode_message(Section.of({"n" * (MAX_NAME + 1): "v"}))
    with pytest.raises(TooLong):
        encode_message(Section.of({"n": b"v" * (MAX_VALUE + 1)}))
    assert decode_message(encode_message(Section.of({"": {"a": "b"}}))).plain() == {"": {"a": "b"}}  # as strongSwan names the counters of all
    encode_segment(Packet(PacketType.CMD_RESPONSE, message=b"x" * (MAX_SEGMENT - 1)))
    with pytest.raises(TooLong):
        encode_segment(Packet(PacketType.CMD_RESPONSE, message=b"x" * MAX_SEGMENT))


@pytest.mark.property
@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_segments_come_whole_however_the_stream_is_cut(segments: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(segment).to_bytes(4, "big") + segment for segment in segments)
    segmenter, found, at = Segmenter(), [], 0
    for cut in cuts:
        found += segmenter.feed(stream[at : at + cut])
        at += cut
    assert found + segmenter.feed(stream[at:]) == segments


def test_a_segment_that_is_too_long_is_refused_by_its_length() -> None:
    with pytest.raises(MalformedVici):
        Segmenter().feed((MAX_SEGMENT + 1).to_bytes(4, "big"))


@pytest.mark.property
@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for decode in (decode_message, decode_packet, Segmenter().feed):
        with contextlib.suppress(MalformedVici):
            decode(data)


@pytest.mark.property
@settings(max_examples=200)
@given(trees, st.data())
def test_no_damage_to_a_message_raises_anything_else(tree: dict[str, object], data: st.DataObject) -> None:
    encoded = bytearray(encode_message(Section.of(tree)))  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(0, 4))):
        if encoded:
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedVici):
        decode_message(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))
