"""ESP algorithms by their IKEv2 transform numbers (IANA "IKEv2 Parameters", RFC 7296 section 3.3.2).

Both packages use these numbers as the name of an algorithm: the key manager negotiates them, PF_KEY's private
extension carries them, the data plane looks its cipher up by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class EncryptionId(IntEnum):
    """Transform type 1."""

    NULL = 11  # RFC 2410
    AES_CBC = 12  # RFC 3602
    AES_CTR = 13  # RFC 3686
    AES_CCM_8 = 14  # RFC 4309
    AES_CCM_12 = 15
    AES_CCM_16 = 16
    AES_GCM_8 = 18  # RFC 4106
    AES_GCM_12 = 19
    AES_GCM_16 = 20
    CHACHA20_POLY1305 = 28  # RFC 7634


class IntegrityId(IntEnum):
    """Transform type 3."""

    NONE = 0
    HMAC_SHA1_96 = 2  # RFC 2404
    HMAC_SHA2_256_128 = 12  # RFC 4868
    HMAC_SHA2_384_192 = 13
    HMAC_SHA2_512_256 = 14


AEAD_SALT: Final = {  # bytes of salt that follow the key in the keying material
    EncryptionId.AES_GCM_8: 4,
    EncryptionId.AES_GCM_12: 4,
    EncryptionId.AES_GCM_16: 4,
    EncryptionId.CHACHA20_POLY1305: 4,
    EncryptionId.AES_CCM_8: 3,
    EncryptionId.AES_CCM_12: 3,
    EncryptionId.AES_CCM_16: 3,
}
AEAD_ICV: Final = {  # bytes
    EncryptionId.AES_GCM_8: 8,
    EncryptionId.AES_GCM_12: 12,
    EncryptionId.AES_GCM_16: 16,
    EncryptionId.CHACHA20_POLY1305: 16,
    EncryptionId.AES_CCM_8: 8,
    EncryptionId.AES_CCM_12: 12,
    EncryptionId.AES_CCM_16: 16,
}
INTEGRITY_KEY: Final = {  # bytes
    IntegrityId.NONE: 0,
    IntegrityId.HMAC_SHA1_96: 20,
    IntegrityId.HMAC_SHA2_256_128: 32,
    IntegrityId.HMAC_SHA2_384_192: 48,
    IntegrityId.HMAC_SHA2_512_256: 64,
}
INTEGRITY_ICV: Final = {  # bytes
    IntegrityId.NONE: 0,
    IntegrityId.HMAC_SHA1_96: 12,
    IntegrityId.HMAC_SHA2_256_128: 16,
    IntegrityId.HMAC_SHA2_384_192: 24,
    IntegrityId.HMAC_SHA2_512_256: 32,
}


@dataclass(frozen=True, slots=True)
class EspAlgorithm:
    """What an SA is sealed with. `key_bits` is the cipher's own key, without salt; `integrity` is NONE for an AEAD."""

    encryption: EncryptionId
    key_bits: int
    integrity: IntegrityId = IntegrityId.NONE

    @property
    def aead(self) -> bool:
        return self.encryption in AEAD_ICV

    @property
    def counts_its_ivs(self) -> bool:
        """Whether two packets under one key and IV betray both plaintexts: AEADs and counter mode, whose IV is the sequence number."""
        return self.aead or self.encryption is EncryptionId.AES_CTR

    @property
    def iv_length(self) -> int:
        """Bytes of the IV in each packet."""
        return 8 if self.counts_its_ivs else 16 if self.encryption is EncryptionId.AES_CBC else 0

    @property
    def encryption_key_length(self) -> int:
        """Bytes of encryption keying material, salt included (RFC 3686, 4106, 4309 and 7634)."""
        return self.key_bits // 8 + self.salt_length

    @property
    def salt_length(self) -> int:
        """Bytes at the end of the encryption keying material that are not the cipher's key."""
        if self.encryption is EncryptionId.AES_CTR:
            return 4  # the nonce of RFC 3686 section 5.1
        return AEAD_SALT.get(self.encryption, 0)

    @property
    def integrity_key_length(self) -> int:
        """Bytes of integrity keying material; 0 for an AEAD."""
        return INTEGRITY_KEY[self.integrity]

    @property
    def icv_length(self) -> int:
        """Bytes of the integrity check value at the packet's end."""
        return AEAD_ICV.get(self.encryption) or INTEGRITY_ICV[self.integrity]


_AES_BITS: Final = (128, 192, 256)
_MACS: Final = tuple(integrity for integrity in IntegrityId if integrity is not IntegrityId.NONE)

USERSPACE: Final = frozenset(
    {
        *(EspAlgorithm(encryption, bits) for encryption in AEAD_ICV if encryption is not EncryptionId.CHACHA20_POLY1305 for bits in _AES_BITS),
        EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256),
        *(EspAlgorithm(encryption, bits, mac) for encryption in (EncryptionId.AES_CBC, EncryptionId.AES_CTR) for bits in _AES_BITS for mac in _MACS),
        *(EspAlgorithm(EncryptionId.NULL, 0, mac) for mac in _MACS),
    }
)
"""What our own data plane seals and opens with. Never without integrity: such an SA could be made to say anything."""
