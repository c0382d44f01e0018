"""The IKE header (RFC 7296 section 3.1) and the generic payload header (section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType

from vpnd.ike.iana import NotifyType
from vpnd.ike.wire.errors import MalformedMessage

IkeSpi = NewType("IkeSpi", bytes)  # 8 octets
MessageId = NewType("MessageId", int)

# Of the specification.
NO_SPI: Final = IkeSpi(bytes(8))
HEADER_LENGTH: Final = 28
GENERIC_LENGTH: Final = 4
MAJOR_VERSION: Final = 2
FLAG_INITIATOR: Final = 0x08
FLAG_VERSION: Final = 0x10
FLAG_RESPONSE: Final = 0x20
CRITICAL: Final = 0x80

# Of this implementation.
MAX_MESSAGE: Final = 65507  # octets; the largest UDP payload over IPv4, as no longer datagram can arrive


@dataclass(frozen=True, slots=True)
class Header:
    """`initiator`: the sender is the original initiator of the IKE SA. `response`: this answers a request."""

    initiator_spi: IkeSpi
    responder_spi: IkeSpi
    exchange: int
    message_id: MessageId
    initiator: bool
    response: bool
    minor_version: int = 0
    higher_version: bool = False


def decode_header(data: bytes) -> Header:
    """The header of a whole datagram, whose length it must state. Raises MalformedMessage."""
    return decode_header_and_type(data)[0]


def decode_header_and_type(data: bytes) -> tuple[Header, int]:
    """The header and the type of the first payload. Raises MalformedMessage."""
    if len(data) < HEADER_LENGTH:
        raise MalformedMessage("header", f"{HEADER_LENGTH} octets expected, {len(data)} left")
    if len(data) > MAX_MESSAGE:
        raise MalformedMessage("header", f"message of {len(data)} octets, at most {MAX_MESSAGE} are allowed")
    version, flags = data[17], data[19]
    # RFC 7296 section 2.5: only a higher major version is answered with INVALID_MAJOR_VERSION.
    if version >> 4 > MAJOR_VERSION:
        raise MalformedMessage("header.version", f"major version {version >> 4}", NotifyType.INVALID_MAJOR_VERSION)
    if version >> 4 < MAJOR_VERSION:
        raise MalformedMessage("header.version", f"major version {version >> 4}")
    length = int.from_bytes(data[24:28], "big")
    if length != len(data):
        raise MalformedMessage("header.length", f"{length} stated, {len(data)} received")
    # RFC 7296 section 3.1: the initiator's SPI must not be zero.
    if data[:8] == NO_SPI:
        raise MalformedMessage("header.initiator_spi", "zero")
    header = Header(
        IkeSpi(data[:8]),
        IkeSpi(data[8:16]),
        data[18],
        MessageId(int.from_bytes(data[20:24], "big")),
        bool(flags & FLAG_INITIATOR),
        bool(flags & FLAG_RESPONSE),
        version & 0x0F,
        bool(flags & FLAG_VERSION),
    )
    return header, data[16]


def encode_header(header: Header, first: int, length: int) -> bytes:
    """`first` is the type of the first payload, `length` that of the whole message in octets."""
    flags = FLAG_INITIATOR * header.initiator | FLAG_RESPONSE * header.response | FLAG_VERSION * header.higher_version
    fixed = bytes((first, MAJOR_VERSION << 4 | header.minor_version, header.exchange, flags))
    return header.initiator_spi + header.responder_spi + fixed + header.message_id.to_bytes(4, "big") + length.to_bytes(4, "big")


def generic_header(following: int, length: int, critical: bool = False) -> bytes:
    """RFC 7296 section 3.2. `length` includes these four octets. Raises ValueError when it does not fit."""
    if length > 0xFFFF:
        raise ValueError(f"payload of {length} octets does not fit its length field")
    return bytes((following, CRITICAL * critical, length >> 8, length & 0xFF))
