"""Keys of an IKE SA and of its CHILD_SAs, and what AUTH signs (RFC 7296 sections 2.14 to 2.18)."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.secret import Secret
from vpnd.ike.crypto.prf import Prf
from vpnd.ike.crypto.sk import SkCipher
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal, Transform
from vpnd.ike.wire.header import IkeSpi


@dataclass(frozen=True, slots=True)
class IkeSuite:
    """The algorithms of an IKE SA."""

    encryption: Transform
    prf: Prf
    integrity: Transform | None
    group: int

    @classmethod
    def of(cls, chosen: Proposal) -> IkeSuite:
        """Raises ValueError when a transform is missing or not implemented."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class IkeKeys:
    """`i` is the original initiator's direction, `r` the responder's."""

    d: Secret
    ai: Secret
    ar: Secret
    ei: Secret
    er: Secret
    pi: Secret
    pr: Secret

    def ciphers(self, suite: IkeSuite, initiator: bool) -> tuple[SkCipher, SkCipher]:
        """(ours to send, the peer's to receive) for the SA's original initiator or responder."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ChildKeys:
    """Keys of a CHILD_SA. `initiator_*` protect packets sent by the initiator *of the exchange that made it*; encryption keys end with their salt."""

    initiator_encryption: Secret
    initiator_integrity: Secret
    responder_encryption: Secret
    responder_integrity: Secret


def skeyseed(prf: Prf, nonce_i: bytes, nonce_r: bytes, shared: Secret) -> Secret:
    """RFC 7296 section 2.14: SKEYSEED = prf(Ni | Nr, g^ir)."""
    raise NotImplementedError


def rekey_skeyseed(old_prf: Prf, old_d: Secret, shared: Secret, nonce_i: bytes, nonce_r: bytes) -> Secret:
    """RFC 7296 section 2.18: SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr)."""
    raise NotImplementedError


def ike_keys(suite: IkeSuite, seed: Secret, nonce_i: bytes, nonce_r: bytes, spi_i: IkeSpi, spi_r: IkeSpi) -> IkeKeys:
    """RFC 7296 section 2.14: prf+(SKEYSEED, Ni | Nr | SPIi | SPIr), cut up."""
    raise NotImplementedError


def child_keys(prf: Prf, d: Secret, algorithm: EspAlgorithm, nonce_i: bytes, nonce_r: bytes, shared: Secret | None = None) -> ChildKeys:
    """RFC 7296 section 2.17: prf+(SK_d, [g^ir (new) |] Ni | Nr), cut up."""
    raise NotImplementedError


def signed_octets(prf: Prf, p: Secret, message: bytes, nonce: bytes, identity: Identity) -> bytes:
    """RFC 7296 section 2.15. `message` is the signer's first message (the IKE_SA_INIT with all its octets, without non-ESP marker),
    `nonce` the *other* side's, `p` and `identity` the signer's SK_p and ID."""
    raise NotImplementedError


def shared_key_auth(prf: Prf, secret: bytes, octets: bytes) -> bytes:
    """RFC 7296 section 2.15: AUTH data for a pre-shared key over `signed_octets`; compare with `hmac.compare_digest`."""
    raise NotImplementedError
