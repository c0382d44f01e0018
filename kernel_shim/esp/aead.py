"""AEADs: AES-GCM (RFC 4106), AES-CCM (RFC 4309), ChaCha20-Poly1305 (RFC 7634). The IV is the 64-bit sequence number."""

from __future__ import annotations

import struct
from collections import deque
from typing import Final, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.esp.rows import Rows, Sequences
from kernel_shim.esp.wire import HEADER, Shape
from kernel_shim.secret import Secret

_LOW: Final = 0xFFFFFFFF
_FULL_TAG: Final = 16
_HEADER_AND_IV: Final = struct.Struct("!IIQ")
_AAD_ESN: Final = struct.Struct("!IQ")
_GCM: Final = frozenset({EncryptionId.AES_GCM_8, EncryptionId.AES_GCM_12, EncryptionId.AES_GCM_16})

Buffer = bytes | memoryview


class Primitive(Protocol):
    """As the classes of `cryptography` have it: both fill a buffer of exactly the right length; InvalidTag when the tag is another."""

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: memoryview) -> int: ...
    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: memoryview) -> int: ...


class ShortTagGcm:
    """AES-GCM whose tag is cut to 8 or 12 bytes."""

    def __init__(self, key: bytes, tag: int) -> None:
        self._aes, self._whole, self._tag = algorithms.AES(key), AESGCM(key), tag

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: memoryview) -> int:
        buf[:] = self._whole.encrypt(nonce, data, associated_data)[: self._tag - _FULL_TAG]
        return len(buf)

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: memoryview) -> int:
        mode = modes.GCM(bytes(nonce), bytes(data[-self._tag :]), min_tag_length=self._tag)
        decryptor = Cipher(self._aes, mode).decryptor()
        decryptor.authenticate_additional_data(bytes(associated_data or b""))
        plaintext = decryptor.update(data[: -self._tag])
        decryptor.finalize()
        buf[:] = plaintext
        return len(buf)


def _primitive(algorithm: EspAlgorithm, key: bytes) -> Primitive:
    if algorithm.encryption is EncryptionId.CHACHA20_POLY1305:
        return ChaCha20Poly1305(key)
    if algorithm.encryption is EncryptionId.AES_GCM_16:
        return AESGCM(key)
    if algorithm.encryption in _GCM:
        return ShortTagGcm(key, algorithm.icv_length)
    return AESCCM(key, algorithm.icv_length)


class AeadCipher:
    def __init__(self, algorithm: EspAlgorithm, key: Secret, spi: int, esn: bool) -> None:
        material, salt = key.reveal(), algorithm.salt_length
        self.shape: Final = Shape(algorithm)
        self._salt: Final = material[-salt:]
        self._salt_row: Final = np.frombuffer(self._salt.rjust(4, b"\0"), np.uint8)
        self._short_nonce: Final = salt == 3
        self._spi, self._esn = spi, esn
        primitive = _primitive(algorithm, material[:-salt])
        self._encrypt: Final = primitive.encrypt_into
        self._decrypt: Final = primitive.decrypt_into

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
        nonces = self._take(rows)
        sequences = tables.counting[:count] + np.uint64(first)
        tables.ivs[:count] = sequences
        tables.header_ivs[:count] = sequences
        tables.header_sequences[:count] = sequences
        rows.wire[:count, :16] = tables.header_rows[:count]
        associated = rows.headers
        if self._esn:
            self._fill_associated(rows, count, sequences)
            associated = tables.associated
        deque(map(self._encrypt, nonces[:count], rows.plaintext_views, associated, rows.sealed), 0)

    def open_rows(self, rows: Rows, count: int, sequences: Sequences) -> bool:
        tables = rows.tables
        nonces = self._take(rows)
        tables.raw_ivs[:count] = rows.wire_ivs[:count]
        associated = rows.headers
        if self._esn:
            self._fill_associated(rows, count, sequences)
            associated = tables.associated
        try:
            deque(map(self._decrypt, nonces[:count], rows.sealed, associated, rows.plaintext_views), 0)
        except InvalidTag:
            return False
        return True

    def _take(self, rows: Rows) -> list[memoryview]:
        """Make the tables this SA's; the nonces in them."""
        tables = rows.tables
        if tables.owner is not self:
            tables.owner = self
            tables.salts[:] = self._salt_row
            tables.header_spis[:] = self._spi
            tables.associated_spis[:] = self._spi
        return tables.short_nonces if self._short_nonce else tables.nonces

    def _fill_associated(self, rows: Rows, count: int, sequences: Sequences) -> None:
        rows.tables.associated_high[:count] = sequences >> np.uint64(32)
        rows.tables.associated_low[:count] = sequences & np.uint64(_LOW)
