"""The shape of an ESP packet (RFC 4303 section 2): header, trailer, lengths."""

from __future__ import annotations

import struct
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm

HEADER: Final = 8  # SPI and sequence number
TRAILER: Final = 2  # pad length and next header
HEADER_FORMAT: Final = struct.Struct("!II")
SEQUENCE_LIMIT: Final = 0xFFFFFFFF
EXTENDED_SEQUENCE_LIMIT: Final = 0xFFFFFFFFFFFFFFFF

_PADDING: Final = tuple(bytes(range(1, length + 1)) + bytes([length]) for length in range(255))


def trailer(length: int, alignment: int, next_header: int) -> bytes:
    """Padding, pad length and next header for a payload of `length` bytes (RFC 4303 section 2.4)."""
    return _PADDING[-(length + TRAILER) % alignment] + bytes((next_header,))


def padded(length: int, alignment: int) -> int:
    """Bytes of plaintext, trailer included, for a payload of `length`."""
    return length + TRAILER + -(length + TRAILER) % alignment


def strip(plaintext: memoryview | bytes | bytearray) -> tuple[int, int] | None:
    """(payload length, next header); None when the pad length does not fit.

    The padding's own bytes are not looked at: the ICV has covered them.
    """
    length = len(plaintext) - TRAILER - plaintext[-2]
    return None if length < 0 else (length, plaintext[-1])


class Shape:
    """The lengths of one algorithm's packets. `overhead` is header, IV and ICV: what a packet has beyond its plaintext."""

    __slots__ = ("alignment", "icv", "iv", "overhead")

    def __init__(self, algorithm: EspAlgorithm) -> None:
        self.iv: Final = algorithm.iv_length
        self.icv: Final = algorithm.icv_length
        self.alignment: Final = 16 if algorithm.encryption is EncryptionId.AES_CBC else 4
        self.overhead: Final = HEADER + self.iv + self.icv

    def sealed(self, payload: int) -> int:
        """Bytes of the ESP packet around `payload` bytes."""
        return self.overhead + padded(payload, self.alignment)

    def largest_payload(self, room: int) -> int:
        """The longest payload whose ESP packet fits `room` bytes; may be negative."""
        plaintext = room - self.overhead
        return plaintext - plaintext % self.alignment - TRAILER

    def plausible(self, length: int) -> bool:
        """Whether an ESP packet can be `length` bytes long."""
        plaintext = length - self.overhead
        return plaintext >= self.alignment and plaintext % self.alignment == 0
