"""Separate encryption and integrity: AES-CBC (RFC 3602), AES-CTR (RFC 3686) and NULL (RFC 2410) under HMAC (RFC 2404, RFC 4868).

The IV of CBC is random, that of CTR the 64-bit sequence number. The MAC is checked before anything is decrypted.
"""

from __future__ import annotations

import hmac as constant_time
from collections.abc import Callable
from typing import Final, Protocol

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.esp.rows import Rows, Sequences
from kernel_shim.esp.wire import HEADER, HEADER_FORMAT, Shape
from kernel_shim.secret import Secret

_LOW: Final = 0xFFFFFFFF
_FIRST_BLOCK: Final = (1).to_bytes(4, "big")  # RFC 3686 section 4
_HASHES: Final[dict[IntegrityId, Callable[[], hashes.HashAlgorithm]]] = {
    IntegrityId.HMAC_SHA1_96: hashes.SHA1,
    IntegrityId.HMAC_SHA2_256_128: hashes.SHA256,
    IntegrityId.HMAC_SHA2_384_192: hashes.SHA384,
    IntegrityId.HMAC_SHA2_512_256: hashes.SHA512,
}


class Encryption(Protocol):
    """The part that keeps secret. Lengths do not change."""

    def ivs(self, first: int, count: int) -> bytes:
        """The IVs of `count` packets with sequence numbers from `first`, one after the other."""

    def encrypt(self, iv: bytes, plaintext: memoryview | bytes) -> bytes | memoryview: ...
    def decrypt(self, iv: bytes, ciphertext: memoryview) -> bytes | memoryview: ...


class NullEncryption:
    """Everybody reads along."""

    def ivs(self, first: int, count: int) -> bytes:
        return b""

    def encrypt(self, iv: bytes, plaintext: memoryview | bytes) -> bytes | memoryview:
        return plaintext

    def decrypt(self, iv: bytes, ciphertext: memoryview) -> bytes | memoryview:
        return ciphertext


class CbcEncryption:
    def __init__(self, key: bytes, entropy: Callable[[int], bytes]) -> None:
        self._aes, self._entropy = algorithms.AES(key), entropy

    def ivs(self, first: int, count: int) -> bytes:
        return self._entropy(16 * count)

    def encrypt(self, iv: bytes, plaintext: memoryview | bytes) -> bytes | memoryview:
        return Cipher(self._aes, modes.CBC(iv)).encryptor().update(plaintext)

    def decrypt(self, iv: bytes, ciphertext: memoryview) -> bytes | memoryview:
        return Cipher(self._aes, modes.CBC(iv)).decryptor().update(ciphertext)


class CtrEncryption:
    def __init__(self, material: bytes) -> None:
        self._aes, self._nonce = algorithms.AES(material[:-4]), material[-4:]

    def ivs(self, first: int, count: int) -> bytes:
        return b"".join(sequence.to_bytes(8, "big") for sequence in range(first, first + count))

    def encrypt(self, iv: bytes, plaintext: memoryview | bytes) -> bytes | memoryview:
        return Cipher(self._aes, modes.CTR(self._nonce + iv + _FIRST_BLOCK)).encryptor().update(plaintext)

    def decrypt(self, iv: bytes, ciphertext: memoryview) -> bytes | memoryview:
        return self.encrypt(iv, ciphertext)


def _encryption(algorithm: EspAlgorithm, key: bytes, entropy: Callable[[int], bytes]) -> Encryption:
    if algorithm.encryption is EncryptionId.AES_CBC:
        return CbcEncryption(key, entropy)
    return CtrEncryption(key) if algorithm.encryption is EncryptionId.AES_CTR else NullEncryption()


class MacCipher:
    def __init__(self, algorithm: EspAlgorithm, encryption_key: Secret, integrity_key: Secret, spi: int, esn: bool, entropy: Callable[[int], bytes]) -> None:
        self.shape: Final = Shape(algorithm)
        self._encryption: Final = _encryption(algorithm, encryption_key.reveal(), entropy)
        self._mac: Final = hmac.HMAC(integrity_key.reveal(), _HASHES[algorithm.integrity]())
        self._payload: Final = HEADER + self.shape.iv
        self._spi, self._esn = spi, esn

    def seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview) -> None:
        self._seal(sequence, plaintext, packet, self._encryption.ivs(sequence, 1))

    def open(self, sequence: int, packet: memoryview, plaintext: memoryview) -> bool:
        end = len(packet) - self.shape.icv
        if not constant_time.compare_digest(self._icv(sequence, packet[:end]), bytes(packet[end:])):
            return False
        plaintext[:] = self._encryption.decrypt(bytes(packet[HEADER : self._payload]), packet[self._payload : end])
        return True

    def seal_rows(self, rows: Rows, count: int, first: int) -> None:
        size = self.shape.iv
        ivs = self._encryption.ivs(first, count)
        for row in range(count):
            self._seal(first + row, rows.plaintext_views[row], rows.packets[row], ivs[size * row : size * row + size])

    def open_rows(self, rows: Rows, count: int, sequences: Sequences) -> bool:
        return all(map(self.open, sequences.tolist(), rows.packets, rows.plaintext_views[:count]))

    def _seal(self, sequence: int, plaintext: memoryview | bytes, packet: memoryview, iv: bytes) -> None:
        HEADER_FORMAT.pack_into(packet, 0, self._spi, sequence & _LOW)
        packet[HEADER : self._payload] = iv
        end = len(packet) - self.shape.icv
        packet[self._payload : end] = self._encryption.encrypt(iv, plaintext)
        packet[end:] = self._icv(sequence, packet[:end])

    def _icv(self, sequence: int, covered: memoryview) -> bytes:
        mac = self._mac.copy()
        mac.update(covered)
        if self._esn:  # RFC 4303 section 2.2.1: the high-order half is covered, not sent
            mac.update((sequence >> 32).to_bytes(4, "big"))
        return mac.finalize()[: self.shape.icv]
