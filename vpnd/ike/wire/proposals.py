"""The Security Association payload (RFC 7296 section 3.3): proposals, transforms, attributes."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from vpnd.ike.iana import TransformAttribute
from vpnd.ike.transform import Proposal, Transform
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.payloads import SaPayload
from vpnd.ike.wire.reader import Reader, Writer

# Of the specification.
LAST: Final = 0
MORE_PROPOSALS: Final = 2
MORE_TRANSFORMS: Final = 3
FIXED_FORMAT: Final = 0x8000  # the attribute's value is the two octets that follow

# Of this implementation: no known peer comes near, and each costs memory before the peer is known.
MAX_PROPOSALS: Final = 64
MAX_TRANSFORMS: Final = 255  # of one proposal; the count's own range
MAX_ATTRIBUTES: Final = 8  # of one transform
MAX_REMEMBERED_TRANSFORMS: Final = 256  # decoded ones kept, as peers offer the same few; each of at most _COMMON_LENGTH octets

_SHORTEST_TRANSFORM: Final = 4  # octets after the length field, without attributes
_COMMON_LENGTH: Final = 8  # with a key length


def decode_sa(reader: Reader) -> SaPayload:
    """An empty payload is an offer of nothing (OpenIKED sends one): NO_PROPOSAL_CHOSEN answers it better than INVALID_SYNTAX."""
    proposals: list[Proposal] = []
    more = MORE_PROPOSALS if reader.remaining else LAST
    while more != LAST:
        if len(proposals) == MAX_PROPOSALS:
            raise reader.fail(f"more than {MAX_PROPOSALS} proposals")
        more = reader.u8()
        if more not in (LAST, MORE_PROPOSALS):
            raise reader.fail(f"proposal begins with {more}")
        reader.skip(1)
        with reader.restrict_to(reader.u16() - 4, "SA.proposal"):
            proposals.append(_decode_proposal(reader))
    return SaPayload(tuple(proposals))


def encode_sa(payload: SaPayload, writer: Writer) -> None:
    for left, proposal in enumerate(payload.proposals, 1 - len(payload.proposals)):
        start = len(writer)
        writer.u8(MORE_PROPOSALS if left else LAST)
        writer.put(bytes(3))
        _encode_proposal(proposal, writer)
        writer.length_at(start + 2, start)


def _decode_proposal(reader: Reader) -> Proposal:
    number, protocol, spi_size, count = reader.u8(), reader.u8(), reader.u8(), reader.u8()
    spi = reader.take(spi_size)
    if not 1 <= count <= MAX_TRANSFORMS:
        raise reader.fail(f"{count} transforms")
    transforms: list[Transform] = []
    for left in range(count - 1, -1, -1):
        more = reader.u8()
        if more != (MORE_TRANSFORMS if left else LAST):
            raise reader.fail(f"transform begins with {more}, and {left} are to follow")
        reader.skip(1)
        length = reader.u16() - 4
        if length < _SHORTEST_TRANSFORM:
            raise MalformedMessage("SA.transform", f"length of {length} octets")
        octets = reader.take(length)
        transforms.append(_short_transform(octets) if length <= _COMMON_LENGTH else _decode_transform(Reader(octets, "SA.transform")))
    return Proposal(protocol, tuple(transforms), number, spi)


def _encode_proposal(proposal: Proposal, writer: Writer) -> None:
    writer.put(bytes((proposal.number, proposal.protocol, len(proposal.spi), len(proposal.transforms))))
    writer.put(proposal.spi)
    for left, transform in enumerate(proposal.transforms, 1 - len(proposal.transforms)):
        start = len(writer)
        writer.u8(MORE_TRANSFORMS if left else LAST)
        writer.put(bytes(3))
        _encode_transform(transform, writer)
        writer.length_at(start + 2, start)


@lru_cache(maxsize=MAX_REMEMBERED_TRANSFORMS)
def _short_transform(octets: bytes) -> Transform:
    return _decode_transform(Reader(octets, "SA.transform"))


def _decode_transform(reader: Reader) -> Transform:
    transform_type = reader.u8()
    reader.skip(1)
    number = reader.u16()
    key_length = 0
    others: list[tuple[int, bytes]] = []
    while reader.remaining:
        attribute = reader.u16()
        if attribute == FIXED_FORMAT | TransformAttribute.KEY_LENGTH and not key_length:
            key_length = reader.u16()
            if not key_length:
                raise reader.fail("key length of 0")
        else:
            if len(others) == MAX_ATTRIBUTES:
                raise reader.fail(f"more than {MAX_ATTRIBUTES} attributes")
            others.append((attribute, reader.take(2 if attribute & FIXED_FORMAT else reader.u16())))
    return Transform(transform_type, number, key_length, tuple(others))


def _encode_transform(transform: Transform, writer: Writer) -> None:
    writer.put(bytes((transform.type, 0)))
    writer.u16(transform.id)
    if transform.key_length:
        writer.u16(FIXED_FORMAT | TransformAttribute.KEY_LENGTH)
        writer.u16(transform.key_length)
    for attribute, value in transform.attributes:
        writer.u16(attribute)
        if not attribute & FIXED_FORMAT:
            writer.u16(len(value))
        writer.put(value)
