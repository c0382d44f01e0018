"""ML-KEM (FIPS 203) as a key exchange method (draft-ietf-ipsecme-ikev2-mlkem): the initiator sends an encapsulation key, the responder a ciphertext.

The key pair comes from the caller's entropy. What the responder encapsulates comes from OpenSSL's generator, for the library has no door to give it
another. ML-KEM-512 is not in the library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey, MLKEM1024PrivateKey, MLKEM1024PublicKey

from kernel_shim.secret import Secret
from vpnd.ike import iana
from vpnd.ike.crypto import Entropy
from vpnd.ike.crypto.exchange import Group, InvalidPublicValue, KeyExchange

SEED: Final = 64  # octets: d and z of FIPS 203 section 7.1

_PrivateKey = MLKEM768PrivateKey | MLKEM1024PrivateKey


@dataclass(frozen=True, slots=True)
class _Decapsulation:
    group: int
    public: bytes
    _ciphertext_length: int
    _private: _PrivateKey = field(repr=False)

    def complete(self, peer: bytes) -> Secret:
        # FIPS 203 section 7.3: the length is all that can be checked; a ciphertext that was changed gives another secret (implicit rejection)
        if len(peer) != self._ciphertext_length:
            raise InvalidPublicValue(f"ciphertext of {len(peer)} octets, {self._ciphertext_length} expected")
        return Secret(self._private.decapsulate(peer))


@dataclass(frozen=True, slots=True)
class MlKem:
    """A parameter set. `public_length` is that of the encapsulation key, in octets."""

    id: int
    public_length: int
    ciphertext_length: int
    _private: type[MLKEM768PrivateKey] | type[MLKEM1024PrivateKey] = field(repr=False)
    _public: type[MLKEM768PublicKey] | type[MLKEM1024PublicKey] = field(repr=False)

    def initiate(self, entropy: Entropy) -> KeyExchange:
        private = self._private.from_seed_bytes(entropy(SEED))
        return _Decapsulation(self.id, private.public_key().public_bytes_raw(), self.ciphertext_length, private)

    def respond(self, peer: bytes, entropy: Entropy) -> tuple[bytes, Secret]:
        if len(peer) != self.public_length:
            raise InvalidPublicValue(f"encapsulation key of {len(peer)} octets, {self.public_length} expected")
        try:
            # FIPS 203 section 7.2: the library checks that every coefficient is reduced
            key = self._public.from_public_bytes(peer)
        except ValueError:
            raise InvalidPublicValue("not an encapsulation key") from None
        shared, ciphertext = key.encapsulate()
        return ciphertext, Secret(shared)


KEMS: Final[dict[int, Group]] = {
    iana.Group.ML_KEM_768: MlKem(iana.Group.ML_KEM_768, 1184, 1088, MLKEM768PrivateKey, MLKEM768PublicKey),
    iana.Group.ML_KEM_1024: MlKem(iana.Group.ML_KEM_1024, 1568, 1568, MLKEM1024PrivateKey, MLKEM1024PublicKey),
}
