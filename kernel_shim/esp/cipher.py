"""The ciphers of ESP, each a key that seals and opens packets.

A plaintext is payload and trailer; a packet is header, IV, ciphertext, ICV. Sequence numbers are 64-bit; without ESN the upper half is 0.
Where the IV is the sequence number, a nonce repeats only when a sequence number does, and `kernel_shim.sa` never lets one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kernel_shim.algorithms import USERSPACE, EspAlgorithm
from kernel_shim.esp.aead import AeadCipher
from kernel_shim.esp.encrypt_then_mac import MacCipher
from kernel_shim.esp.rows import Rows, Sequences
from kernel_shim.esp.wire import Shape
from kernel_shim.secret import Secret


class EspCipher(Protocol):
    """The key of one SA, of one direction."""

    @property
    def shape(self) -> Shape: ...

    def seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview) -> None:
        """Fill `packet`, which is exactly as long as the ESP packet. The two do not overlap."""

    def open(self, sequence: int, packet: memoryview, plaintext: memoryview) -> bool:
        """Fill `plaintext`, which is exactly `shape.overhead` shorter; False when the ICV does not match."""

    def seal_rows(self, rows: Rows, count: int, first: int) -> None:
        """Seal the first `count` rows with sequence numbers from `first`."""

    def open_rows(self, rows: Rows, count: int, sequences: Sequences) -> bool:
        """Open the first `count` rows; False when any ICV does not match, and then no row may be used."""


def make_cipher(algorithm: EspAlgorithm, encryption_key: Secret, integrity_key: Secret, spi: int, esn: bool, entropy: Callable[[int], bytes]) -> EspCipher:
    """The cipher of an SA. Raises ValueError for an algorithm that is not one of `USERSPACE` or a key of the wrong length."""
    if algorithm not in USERSPACE:
        raise ValueError(f"ESP algorithm {algorithm} is not supported")
    if len(encryption_key) != algorithm.encryption_key_length or len(integrity_key) != algorithm.integrity_key_length:
        raise ValueError("key of the wrong length")
    if algorithm.aead:
        return AeadCipher(algorithm, encryption_key, spi, esn)
    return MacCipher(algorithm, encryption_key, integrity_key, spi, esn, entropy)
