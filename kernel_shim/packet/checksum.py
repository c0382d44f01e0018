"""The Internet checksum (RFC 1071), for one buffer and for a matrix of rows.

Sums are taken over little-endian words: the one's complement sum is the same in both byte orders once it is stored
back the same way (RFC 1071 section 2 B), and an odd last byte needs no padding. So every checksum here is a `<H` of the packet.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Column = npt.NDArray[np.uint64]

_MODULUS: Final = 0xFFFF
_MODULUS_U64: Final = np.uint64(_MODULUS)


def partial_sum(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum, 0 to 0xFFFE (0 stands for 0xFFFF too)."""
    return int.from_bytes(data, "little") % _MODULUS


def checksum(total: int) -> int:
    """What to store as `<H` for the sum `total`. Never 0 only by chance of representation: 0xFFFF and 0 sum to checksum 0."""
    return -total % _MODULUS


def udp_checksum(total: int) -> int:
    """As `checksum`, with 0, which would mean "none" (RFC 768), sent as 0xFFFF."""
    return _MODULUS - total % _MODULUS


def pseudo_header_sum(addresses: bytes | bytearray | memoryview, protocol: int, length: int) -> int:
    """The sum over the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) of source plus destination `addresses`."""
    return (int.from_bytes(addresses, "little") + (protocol << 8) + swap(length & 0xFFFF) + swap(length >> 16)) % _MODULUS


def swap(word: int) -> int:
    """A 16-bit number as the little-endian reading of its network order."""
    return (word & 0xFF) << 8 | word >> 8


def row_sums(words: Words) -> Column:
    """The sum of each row of little-endian 32-bit words, not reduced."""
    sums: Column = np.add.reduce(words, 1, np.uint64)
    return sums


def row_checksums(sums: Column, constant: int) -> Column:
    """The checksum of each row, whose sum is `sums` plus `constant`."""
    checksums: Column = (_MODULUS_U64 - (sums + np.uint64(constant)) % _MODULUS_U64) % _MODULUS_U64
    return checksums


def rows_verify(sums: Column, constant: int) -> npt.NDArray[np.bool_]:
    """Which rows, checksum field included, sum to zero."""
    verified: npt.NDArray[np.bool_] = (sums + np.uint64(constant)) % _MODULUS_U64 == 0
    return verified
