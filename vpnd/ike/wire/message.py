"""A whole IKE message: header and payload chain (RFC 7296 section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from vpnd.ike import iana
from vpnd.ike.iana import NotifyType
from vpnd.ike.wire.codec import BY_KIND, BY_TYPE
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import CRITICAL, GENERIC_LENGTH, HEADER_LENGTH, Header, decode_header_and_type, encode_header, generic_header
from vpnd.ike.wire.payloads import NotifyPayload, Payload, SkfPayload, SkPayload, UnknownPayload
from vpnd.ike.wire.reader import Reader, Writer

MAX_PAYLOADS: Final = 128  # of one message; room for a long certificate chain and every notification that exists

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Message:
    """Payloads in their order on the wire. An encrypted message ends with `SkPayload` or `SkfPayload`, unopened.

    `plain` is the `plain_form` of an IKE_INTERMEDIATE message that was opened.
    """

    header: Header
    payloads: tuple[Payload, ...]
    plain: bytes = field(default=b"", repr=False, compare=False)

    def first(self, kind: type[P]) -> P | None:
        return next((payload for payload in self.payloads if isinstance(payload, kind)), None)

    def all(self, kind: type[P]) -> tuple[P, ...]:
        return tuple(payload for payload in self.payloads if isinstance(payload, kind))

    def notify(self, notify_type: int) -> NotifyPayload | None:
        """The first notification of that type."""
        return next((payload for payload in self.payloads if isinstance(payload, NotifyPayload) and payload.type == notify_type), None)

    def notifies(self, notify_type: int) -> tuple[NotifyPayload, ...]:
        return tuple(payload for payload in self.payloads if isinstance(payload, NotifyPayload) and payload.type == notify_type)

    @property
    def error(self) -> NotifyPayload | None:
        """The first notification of an error."""
        return next((payload for payload in self.payloads if isinstance(payload, NotifyPayload) and iana.is_error(payload.type)), None)

    @property
    def encrypted(self) -> SkPayload | SkfPayload | None:
        last = self.payloads[-1] if self.payloads else None
        return last if isinstance(last, SkPayload | SkfPayload) else None


def decode_message(data: bytes) -> Message:
    """A datagram (without non-ESP marker) as a message. Raises MalformedMessage.

    Nothing here is authenticated: where the message ends with SK, an error in what precedes it may be a forger's.
    """
    header, first = decode_header_and_type(data)
    return Message(header, _decode_chain(first, data[HEADER_LENGTH:], clear=True))


def decode_payloads(first: int, data: bytes) -> tuple[Payload, ...]:
    """The payload chain inside an opened SK payload; `first` is the type of its first payload. Raises MalformedMessage."""
    return _decode_chain(first, data, clear=False)


def _decode_chain(payload_type: int, data: bytes, *, clear: bool) -> tuple[Payload, ...]:
    reader = Reader(data, "message")
    payloads: list[Payload] = []
    while payload_type != iana.Payload.NONE:
        if len(payloads) == MAX_PAYLOADS:
            raise reader.fail(f"more than {MAX_PAYLOADS} payloads")
        following, flags = reader.u8(), reader.u8()
        with reader.restrict_to(reader.u16() - GENERIC_LENGTH, iana.name_of(iana.Payload, payload_type)):
            payloads.append(_decode_payload(reader, payload_type, bool(flags & CRITICAL), following, clear))
        # RFC 7296 section 3.14: SK is the last payload, and its next-payload field names the first one inside.
        if isinstance(payloads[-1], SkPayload | SkfPayload):
            break
        payload_type = following
    if reader.remaining:
        raise reader.fail(f"{reader.remaining} octets after the last payload")
    return tuple(payloads)


def _decode_payload(reader: Reader, payload_type: int, critical: bool, following: int, clear: bool) -> Payload:
    codec = BY_TYPE.get(payload_type)
    if codec is not None:
        return codec.decode(reader)
    if payload_type in (iana.Payload.SK, iana.Payload.SKF):
        if not clear:
            raise reader.fail("inside an encrypted payload")
        return _decode_encrypted(reader, payload_type, following)
    # RFC 7296 section 2.5: the message is rejected for a critical payload that we do not know, others are skipped.
    if critical:
        raise MalformedMessage(
            iana.name_of(iana.Payload, payload_type), "unknown and critical", NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes((payload_type,))
        )
    return UnknownPayload(payload_type, reader.rest())


def _decode_encrypted(reader: Reader, payload_type: int, first: int) -> SkPayload | SkfPayload:
    if payload_type == iana.Payload.SK:
        return SkPayload(first, reader.rest())
    number, total = reader.u16(), reader.u16()
    # RFC 7383 section 2.5: fragments are numbered from 1.
    if not 1 <= number <= total:
        raise reader.fail(f"fragment {number} of {total}")
    return SkfPayload(first, number, total, reader.rest())


def encode_message(message: Message) -> bytes:
    """Raises ValueError for a payload too long for its length field."""
    first, chain = encode_payloads(message.payloads)
    return encode_header(message.header, first, HEADER_LENGTH + len(chain)) + chain


def plain_form(datagram: bytes, first: int, chain: bytes) -> bytes:
    """What RFC 9242 section 3.3.2 authenticates of an encrypted message: as if it were neither encrypted nor in fragments.

    `datagram` is the message, or its first fragment, as it came; `chain` the payloads inside, the first of type `first`. Both lengths are those without
    IV, padding and ICV. The datagram must have been decoded without an error.
    """
    name_at, start = 16, HEADER_LENGTH  # of the payload's type, and of the payload
    while datagram[name_at] not in (iana.Payload.SK, iana.Payload.SKF):
        name_at, start = start, start + int.from_bytes(datagram[start + 2 : start + 4], "big")
    head = bytearray(datagram[: start + GENERIC_LENGTH])
    head[name_at], head[start] = iana.Payload.SK, first
    head[start + 2 :] = (GENERIC_LENGTH + len(chain)).to_bytes(2, "big")
    head[HEADER_LENGTH - 4 : HEADER_LENGTH] = (len(head) + len(chain)).to_bytes(4, "big")
    return bytes(head) + chain


def plain_message(header: Header, payloads: Sequence[Payload]) -> bytes:
    """The `plain_form` of a message of ours with all its payloads inside SK."""
    first, chain = encode_payloads(payloads)
    length = GENERIC_LENGTH + len(chain)
    return encode_header(header, iana.Payload.SK, HEADER_LENGTH + length) + generic_header(first, length) + chain


def encode_payloads(payloads: Sequence[Payload]) -> tuple[int, bytes]:
    """The type of the first payload (0 for none) and the chain. Raises ValueError for a payload too long for its length field."""
    types = [payload_type(payload) for payload in payloads]
    parts: list[bytes] = []
    for index, payload in enumerate(payloads):
        body = _encode_body(payload)
        last = payload.first if isinstance(payload, SkPayload | SkfPayload) else iana.Payload.NONE
        following = types[index + 1] if index + 1 < len(types) else last
        critical = isinstance(payload, UnknownPayload) and payload.critical
        parts.append(generic_header(following, GENERIC_LENGTH + len(body), critical))
        parts.append(body)
    return (types[0] if types else iana.Payload.NONE), b"".join(parts)


def payload_type(payload: Payload) -> int:
    """Its number in the next-payload field before it."""
    match payload:
        case UnknownPayload():
            return payload.type
        case SkPayload():
            return iana.Payload.SK
        case SkfPayload():
            return iana.Payload.SKF
        case _:
            return BY_KIND[type(payload)].payload_type


def _encode_body(payload: Payload) -> bytes:
    match payload:
        case UnknownPayload():
            return payload.data
        case SkPayload():
            return payload.body
        case SkfPayload():
            return payload.number.to_bytes(2, "big") + payload.total.to_bytes(2, "big") + payload.body
        case _:
            writer = Writer()
            BY_KIND[type(payload)].encode(payload, writer)
            return writer.bytes()
