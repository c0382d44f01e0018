"""The protection of SK payloads: RFC 7296 section 3.14 (AES-CBC and HMAC), RFC 5930 (AES-CTR) and RFC 5282, RFC 7634 (AEADs)."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, CTR, GCM

from kernel_shim.algorithms import AEAD_ICV, AEAD_SALT, INTEGRITY_ICV, INTEGRITY_KEY, EncryptionId, IntegrityId
from kernel_shim.secret import Secret
from vpnd.ike import iana
from vpnd.ike.crypto import Entropy
from vpnd.ike.transform import Transform
from vpnd.ike.wire.errors import IntegrityFailure, MalformedMessage
from vpnd.ike.wire.header import GENERIC_LENGTH, HEADER_LENGTH, Header, encode_header, generic_header
from vpnd.ike.wire.payloads import SkfPayload, SkPayload

AEAD_IV: Final = 8  # octets, RFC 5282 section 3.1
AES_BLOCK: Final = 16  # octets
CTR_IV: Final = 8  # octets, RFC 5930 section 2.1
CTR_NONCE: Final = 4  # octets that follow the key in the keying material, RFC 5930 section 2.2
CTR_FIRST_BLOCK: Final = (1).to_bytes(4, "big")  # RFC 3686 section 4


class SkCipher(Protocol):
    """One direction of one IKE SA. Padding is the cipher's own business: plaintext is the payload chain."""

    def sealed_length(self, length: int) -> int:
        """Octets of IV, ciphertext, padding and ICV for that many octets of plaintext."""

    def seal(self, associated: bytes, plaintext: bytes, entropy: Entropy) -> bytes:
        """IV, ciphertext and ICV. `associated` is the message up to and with the SK payload's generic header, lengths final.

        Two calls never use the same IV; a message is sealed once and its octets kept for retransmission.
        """

    def open(self, associated: bytes, body: bytes) -> bytes:
        """The payload chain. Raises IntegrityFailure, or MalformedMessage for padding that lies."""


class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


class _ShortTagGcm:
    """AES-GCM with an ICV shorter than the library's own AEAD class offers (RFC 5282 section 3.2)."""

    __slots__ = ("_key", "_tag")

    def __init__(self, key: bytes, tag: int) -> None:
        self._key = AES(key)
        self._tag = tag

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        context = Cipher(self._key, GCM(nonce)).encryptor()
        context.authenticate_additional_data(associated_data or b"")
        return context.update(data) + context.finalize() + context.tag[: self._tag]

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        context = Cipher(self._key, GCM(nonce, data[-self._tag :], min_tag_length=self._tag)).decryptor()
        context.authenticate_additional_data(associated_data or b"")
        return context.update(data[: -self._tag]) + context.finalize()


class AeadSkCipher:
    """RFC 5282: nonce is salt and IV; the IV counts up, so it never repeats under its key."""

    __slots__ = ("_aead", "_icv", "_next", "_salt")

    def __init__(self, aead: _Aead, salt: bytes, icv: int) -> None:
        self._aead = aead
        self._salt = salt
        self._icv = icv
        self._next = 0

    def sealed_length(self, length: int) -> int:
        return AEAD_IV + length + 1 + self._icv

    def seal(self, associated: bytes, plaintext: bytes, entropy: Entropy) -> bytes:
        iv = self._next.to_bytes(AEAD_IV, "big")
        self._next += 1
        # RFC 5282 section 3: no padding is needed, but its length octet is always there.
        return iv + self._aead.encrypt(self._salt + iv, plaintext + b"\0", associated)

    def open(self, associated: bytes, body: bytes) -> bytes:
        if len(body) < AEAD_IV + 1 + self._icv:
            raise IntegrityFailure(f"encrypted payload of {len(body)} octets")
        try:
            padded = self._aead.decrypt(self._salt + body[:AEAD_IV], body[AEAD_IV:], associated)
        except InvalidTag:
            raise IntegrityFailure("integrity check failed") from None
        return _unpad(padded)


class CbcHmacSkCipher:
    """RFC 7296 section 3.14: encrypt, then authenticate everything from the header on."""

    __slots__ = ("_digest", "_icv", "_integrity_key", "_key")

    def __init__(self, key: bytes, integrity_key: bytes, digest: str, icv: int) -> None:
        self._key = AES(key)
        self._integrity_key = integrity_key
        self._digest = digest
        self._icv = icv

    def sealed_length(self, length: int) -> int:
        return AES_BLOCK + length + 1 + -(length + 1) % AES_BLOCK + self._icv

    def seal(self, associated: bytes, plaintext: bytes, entropy: Entropy) -> bytes:
        padding = -(len(plaintext) + 1) % AES_BLOCK
        iv = entropy(AES_BLOCK)  # CBC needs one that nobody can predict
        context = Cipher(self._key, CBC(iv)).encryptor()
        sealed = iv + context.update(plaintext + bytes(padding) + bytes((padding,))) + context.finalize()
        return sealed + self._checksum(associated + sealed)

    def open(self, associated: bytes, body: bytes) -> bytes:
        sealed, icv = body[: -self._icv], body[-self._icv :]
        if len(sealed) < 2 * AES_BLOCK or len(sealed) % AES_BLOCK:
            raise IntegrityFailure(f"encrypted payload of {len(body)} octets")
        if not hmac.compare_digest(icv, self._checksum(associated + sealed)):
            raise IntegrityFailure("integrity check failed")
        context = Cipher(self._key, CBC(sealed[:AES_BLOCK])).decryptor()
        return _unpad(context.update(sealed[AES_BLOCK:]) + context.finalize())

    def _checksum(self, data: bytes) -> bytes:
        return hmac.digest(self._integrity_key, data, self._digest)[: self._icv]


class CtrHmacSkCipher:
    """RFC 5930: AES-CTR and HMAC. Counter block: nonce of the keying material, IV, block number from 1; the IV counts up and never repeats."""

    __slots__ = ("_digest", "_icv", "_integrity_key", "_key", "_next", "_nonce")

    def __init__(self, key: bytes, nonce: bytes, integrity_key: bytes, digest: str, icv: int) -> None:
        self._key = AES(key)
        self._nonce = nonce
        self._integrity_key = integrity_key
        self._digest = digest
        self._icv = icv
        self._next = 0

    def sealed_length(self, length: int) -> int:
        return CTR_IV + length + 1 + self._icv

    def seal(self, associated: bytes, plaintext: bytes, entropy: Entropy) -> bytes:
        iv = self._next.to_bytes(CTR_IV, "big")
        self._next += 1
        sealed = iv + self._crypt(iv, plaintext + b"\0")
        return sealed + self._checksum(associated + sealed)

    def open(self, associated: bytes, body: bytes) -> bytes:
        sealed, icv = body[: -self._icv], body[-self._icv :]
        if len(sealed) < CTR_IV + 1:
            raise IntegrityFailure(f"encrypted payload of {len(body)} octets")
        if not hmac.compare_digest(icv, self._checksum(associated + sealed)):
            raise IntegrityFailure("integrity check failed")
        return _unpad(self._crypt(sealed[:CTR_IV], sealed[CTR_IV:]))

    def _crypt(self, iv: bytes, data: bytes) -> bytes:
        context = Cipher(self._key, CTR(self._nonce + iv + CTR_FIRST_BLOCK)).encryptor()
        return context.update(data) + context.finalize()

    def _checksum(self, data: bytes) -> bytes:
        return hmac.digest(self._integrity_key, data, self._digest)[: self._icv]


def _unpad(padded: bytes) -> bytes:
    # RFC 7296 section 3.14: the pad length is the last octet, the padding before it may be anything.
    padding = padded[-1]
    if padding >= len(padded):
        raise MalformedMessage("SK.padding", f"{padding} octets in {len(padded)}")
    return padded[: len(padded) - 1 - padding]


_DIGESTS: Final = {
    IntegrityId.HMAC_SHA1_96: "sha1",
    IntegrityId.HMAC_SHA2_256_128: "sha256",
    IntegrityId.HMAC_SHA2_384_192: "sha384",
    IntegrityId.HMAC_SHA2_512_256: "sha512",
}
_WITH_HMAC: Final = frozenset({EncryptionId.AES_CBC, EncryptionId.AES_CTR})
_AES_BITS: Final = frozenset({128, 192, 256})
_AEADS: Final[dict[int, Callable[[bytes], _Aead]]] = {
    EncryptionId.AES_GCM_8: lambda key: _ShortTagGcm(key, 8),
    EncryptionId.AES_GCM_12: lambda key: _ShortTagGcm(key, 12),
    EncryptionId.AES_GCM_16: AESGCM,
    EncryptionId.AES_CCM_8: lambda key: AESCCM(key, 8),
    EncryptionId.AES_CCM_12: lambda key: AESCCM(key, 12),
    EncryptionId.AES_CCM_16: AESCCM,
    EncryptionId.CHACHA20_POLY1305: ChaCha20Poly1305,
}


def encryption_key_length(encryption: Transform) -> int:
    """Octets of SK_e: key and, for an AEAD, salt, and for AES-CTR the nonce. Raises KeyError when it is not implemented for IKE."""
    allowed = {256} if encryption.id == EncryptionId.CHACHA20_POLY1305 else _AES_BITS
    if (encryption.id not in _AEADS and encryption.id not in _WITH_HMAC) or encryption.key_bits not in allowed:
        raise KeyError(str(encryption))
    if encryption.id == EncryptionId.AES_CTR:
        return encryption.key_bits // 8 + CTR_NONCE
    return encryption.key_bits // 8 + AEAD_SALT.get(EncryptionId(encryption.id), 0)


def integrity_key_length(integrity: Transform | None) -> int:
    """Octets of SK_a; 0 for None, beside an AEAD. Raises KeyError when it is not implemented."""
    if integrity is None:
        return 0
    return INTEGRITY_KEY[_integrity_id(integrity)]


def _integrity_id(integrity: Transform) -> IntegrityId:
    number = next((known for known in _DIGESTS if known == integrity.id), None)
    if number is None:
        raise KeyError(iana.transform_name(iana.TransformType.INTEG, integrity.id))
    return number


def sk_cipher(encryption: Transform, integrity: Transform | None, encryption_key: Secret, integrity_key: Secret) -> SkCipher:
    """The cipher of one direction: SK_ei and SK_ai, or SK_er and SK_ar.

    Raises KeyError when it is not implemented, ValueError for keys of a wrong length or a cipher without integrity.
    """
    if len(encryption_key) != encryption_key_length(encryption):
        raise ValueError(f"encryption key of {len(encryption_key)} octets for {encryption}")
    if encryption.id in _AEADS:
        number = EncryptionId(encryption.id)
        key, salt = encryption_key.reveal()[: -AEAD_SALT[number]], encryption_key.reveal()[-AEAD_SALT[number] :]
        return AeadSkCipher(_AEADS[number](key), salt, AEAD_ICV[number])
    if integrity is None or len(integrity_key) != integrity_key_length(integrity):
        raise ValueError(f"integrity key of {len(integrity_key)} octets for {encryption} with {integrity}")
    kind = _integrity_id(integrity)
    key = encryption_key.reveal()
    if encryption.id == EncryptionId.AES_CTR:
        return CtrHmacSkCipher(key[:-CTR_NONCE], key[-CTR_NONCE:], integrity_key.reveal(), _DIGESTS[kind], INTEGRITY_ICV[kind])
    return CbcHmacSkCipher(key, integrity_key.reveal(), _DIGESTS[kind], INTEGRITY_ICV[kind])


def seal_chain(header: Header, first: int, chain: bytes, cipher: SkCipher, entropy: Entropy) -> bytes:
    """A whole message around an encoded payload chain, whose first payload is of type `first`. Raises ValueError when it does not fit one."""
    length = GENERIC_LENGTH + cipher.sealed_length(len(chain))
    associated = encode_header(header, iana.Payload.SK, HEADER_LENGTH + length) + generic_header(first, length)
    return associated + cipher.seal(associated, chain, entropy)


def open_chain(data: bytes, sealed: SkPayload | SkfPayload, cipher: SkCipher) -> bytes:
    """The payload chain, or the piece of it, inside the last payload of a message. Raises as `SkCipher.open` does."""
    return cipher.open(data[: len(data) - len(sealed.body)], sealed.body)
