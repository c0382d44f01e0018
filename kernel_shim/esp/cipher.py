"""The ciphers of ESP, each a key that seals and opens packets.

AEADs (RFC 4106 AES-GCM, RFC 7634 ChaCha20-Poly1305): the IV is the 64-bit sequence number, so a nonce repeats only when a sequence
number does, and `kernel_shim.sa` never lets one. AES-CBC (RFC 3602) with HMAC-SHA2 (RFC 4868): the IV is random, the MAC is
checked before anything is decrypted.

A plaintext is payload and trailer; a packet is header, IV, ciphertext, ICV. Sequence numbers are 64-bit; without ESN the
upper half is 0.
"""

from __future__ import annotations

import hmac as constant_time
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.esp.rows import Rows
from kernel_shim.esp.wire import HEADER, HEADER_FORMAT, Shape
from kernel_shim.secret import Secret

Sequences = npt.NDArray[np.uint64]

_LOW: Final = 0xFFFFFFFF
_HEADER_AND_IV: Final = struct.Struct("!IIQ")
_AAD_ESN: Final = struct.Struct("!IQ")
_HASHES: Final[dict[IntegrityId, Callable[[], hashes.HashAlgorithm]]] = {
    IntegrityId.HMAC_SHA2_256_128: hashes.SHA256,
    IntegrityId.HMAC_SHA2_384_192: hashes.SHA384,
    IntegrityId.HMAC_SHA2_512_256: hashes.SHA512,
}

SUPPORTED: Final = frozenset(
    [EspAlgorithm(EncryptionId.AES_GCM_16, bits) for bits in (128, 192, 256)]
    + [EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256)]
    + [EspAlgorithm(EncryptionId.AES_CBC, bits, integrity) for bits in (128, 192, 256) for integrity in _HASHES]
)


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
    """The cipher of an SA. Raises ValueError for an algorithm that is not SUPPORTED or a key of the wrong length."""
    if algorithm not in SUPPORTED:
        raise ValueError(f"ESP algorithm {algorithm} is not supported")
    if len(encryption_key) != algorithm.encryption_key_length or len(integrity_key) != algorithm.integrity_key_length:
        raise ValueError("key of the wrong length")
    if algorithm.aead:
        return AeadCipher(algorithm, encryption_key, spi, esn)
    return CbcCipher(algorithm, encryption_key, integrity_key, spi, esn, entropy)


class AeadCipher:
    def __init__(self, algorithm: EspAlgorithm, key: Secret, spi: int, esn: bool) -> None:
        material = key.reveal()
        self.shape: Final = Shape(algorithm)
        self._salt: Final = material[-4:]
        self._salt_row: Final = np.frombuffer(self._salt, np.uint8)
        self._spi, self._esn = spi, esn
        aead = AESGCM(material[:-4]) if algorithm.encryption is EncryptionId.AES_GCM_16 else ChaCha20Poly1305(material[:-4])
        self._encrypt: Final = aead.encrypt_into
        self._decrypt: Final = aead.decrypt_into

    def seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview) -> None:
        _HEADER_AND_IV.pack_into(packet, 0, self._spi, sequence & _LOW, sequence)
        associated = _AAD_ESN.pack(self._spi, sequence) if self._esn else packet[:HEADER]
        self._encrypt(self._salt + packet[8:16], plaintext, associated, packet[16:])

    def open(self, sequence: int, packet: memoryview, plaintext: memoryview) -> bool:
        associated = _AAD_ESN.pack(self._spi, sequence) if self._esn else packet[:HEADER]
        try:
            self._decrypt(self._salt + packet[8:16], packet[16:], associated, plaintext)
        except InvalidTag:
            return False
        return True

    def seal_rows(self, rows: Rows, count: int, first: int) -> None:
        tables = rows.tables
        self._take(rows)
        sequences = tables.counting[:count] + np.uint64(first)
        tables.ivs[:count] = sequences
        tables.header_ivs[:count] = sequences
        tables.header_sequences[:count] = sequences
        rows.wire[:count, :16] = tables.header_rows[:count]
        associated = rows.headers
        if self._esn:
            self._fill_associated(rows, count, sequences)
            associated = tables.associated
        deque(map(self._encrypt, tables.nonces[:count], rows.plaintext_views, associated, rows.sealed), 0)

    def open_rows(self, rows: Rows, count: int, sequences: Sequences) -> bool:
        tables = rows.tables
        self._take(rows)
        tables.raw_ivs[:count] = rows.wire_ivs[:count]
        associated = rows.headers
        if self._esn:
            self._fill_associated(rows, count, sequences)
            associated = tables.associated
        try:
            deque(map(self._decrypt, tables.nonces[:count], rows.sealed, associated, rows.plaintext_views), 0)
        except InvalidTag:
            return False
        return True

    def _take(self, rows: Rows) -> None:
        tables = rows.tables
        if tables.owner is not self:
            tables.owner = self
            tables.salts[:] = self._salt_row
            tables.header_spis[:] = self._spi
            tables.associated_spis[:] = self._spi

    def _fill_associated(self, rows: Rows, count: int, sequences: Sequences) -> None:
        rows.tables.associated_high[:count] = sequences >> np.uint64(32)
        rows.tables.associated_low[:count] = sequences & np.uint64(_LOW)


class CbcCipher:
    def __init__(self, algorithm: EspAlgorithm, encryption_key: Secret, integrity_key: Secret, spi: int, esn: bool, entropy: Callable[[int], bytes]) -> None:
        self.shape: Final = Shape(algorithm)
        self._aes: Final = algorithms.AES(encryption_key.reveal())
        self._mac: Final = hmac.HMAC(integrity_key.reveal(), _HASHES[algorithm.integrity]())
        self._spi, self._esn, self._entropy = spi, esn, entropy

    def seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview) -> None:
        self._seal(sequence, plaintext, packet, self._entropy(16))

    def open(self, sequence: int, packet: memoryview, plaintext: memoryview) -> bool:
        end = len(packet) - self.shape.icv
        if not constant_time.compare_digest(self._icv(sequence, packet[:end]), bytes(packet[end:])):
            return False
        decryptor = Cipher(self._aes, modes.CBC(bytes(packet[8:24]))).decryptor()
        plaintext[:] = decryptor.update(packet[24:end])
        return True

    def seal_rows(self, rows: Rows, count: int, first: int) -> None:
        ivs = self._entropy(16 * count)
        for row in range(count):
            self._seal(first + row, rows.plaintext_views[row], rows.packets[row], ivs[16 * row : 16 * row + 16])

    def open_rows(self, rows: Rows, count: int, sequences: Sequences) -> bool:
        return all(map(self.open, sequences.tolist(), rows.packets, rows.plaintext_views[:count]))

    def _seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview, iv: bytes) -> None:
        HEADER_FORMAT.pack_into(packet, 0, self._spi, sequence & _LOW)
        packet[8:24] = iv
        end = len(packet) - self.shape.icv
        # The encryptor wants a block's worth of room beyond its output; the ICV's place is that and is filled next.
        Cipher(self._aes, modes.CBC(iv)).encryptor().update_into(plaintext, packet[24:])
        packet[end:] = self._icv(sequence, packet[:end])

    def _icv(self, sequence: int, covered: memoryview) -> bytes:
        mac = self._mac.copy()
        mac.update(covered)
        if self._esn:  # RFC 4303 section 2.2.1: the high-order half is covered, not sent
            mac.update((sequence >> 32).to_bytes(4, "big"))
        return mac.finalize()[: self.shape.icv]
