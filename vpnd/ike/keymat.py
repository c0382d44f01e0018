"""Keys of an IKE SA and of its CHILD_SAs, and what AUTH covers (RFC 7296 sections 2.14 to 2.18)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.secret import Secret
from vpnd.ike.crypto.groups import implemented_groups
from vpnd.ike.crypto.prf import Prf, prf
from vpnd.ike.crypto.sk import SkCipher, encryption_key_length, integrity_key_length, sk_cipher
from vpnd.ike.identity import Identity
from vpnd.ike.transform import Proposal, Transform
from vpnd.ike.wire.header import IkeSpi

KEY_PAD: Final = b"Key Pad for IKEv2"  # RFC 7296 section 2.15


@dataclass(frozen=True, slots=True)
class IkeSuite:
    """The algorithms of an IKE SA."""

    encryption: Transform
    prf: Prf
    integrity: Transform | None
    group: int

    @classmethod
    def of(cls, chosen: Proposal) -> Self:
        """Raises ValueError when a transform is missing or not implemented."""
        if chosen.encryption is None or chosen.prf is None or len(chosen.groups) != 1:
            raise ValueError(f"not the choice of an IKE SA's algorithms: {chosen}")
        try:
            suite = cls(chosen.encryption, prf(chosen.prf.id), chosen.integrity, chosen.groups[0])
            encryption_key_length(suite.encryption)
            integrity_key_length(suite.integrity)
        except KeyError as error:
            raise ValueError(f"not implemented for IKE: {error.args[0]} in {chosen}") from None
        if not {suite.group, *chosen.additional} <= implemented_groups():
            raise ValueError(f"key exchange method is not implemented: {chosen}")
        return suite


@dataclass(frozen=True, slots=True)
class IkeKeys:
    """SK_d and the keys of both directions: `i` is the original initiator's, `r` the responder's."""

    d: Secret
    ai: Secret
    ar: Secret
    ei: Secret
    er: Secret
    pi: Secret
    pr: Secret

    def ciphers(self, suite: IkeSuite, initiator: bool) -> tuple[SkCipher, SkCipher]:
        """(ours to send, the peer's to receive) for the SA's original initiator or responder. Once per IKE SA: a cipher counts its IVs."""
        of_initiator = sk_cipher(suite.encryption, suite.integrity, self.ei, self.ai)
        of_responder = sk_cipher(suite.encryption, suite.integrity, self.er, self.ar)
        return (of_initiator, of_responder) if initiator else (of_responder, of_initiator)


@dataclass(frozen=True, slots=True)
class ChildKeys:
    """Keys of a CHILD_SA. `initiator_*` protect packets sent by the initiator *of the exchange that made it*; encryption keys end with their salt."""

    initiator_encryption: Secret
    initiator_integrity: Secret
    responder_encryption: Secret
    responder_integrity: Secret


def skeyseed(prf: Prf, nonce_i: bytes, nonce_r: bytes, shared: Secret) -> Secret:
    """RFC 7296 section 2.14: SKEYSEED = prf(Ni | Nr, g^ir). Every PRF here takes keys of any length, so the nonces go in whole."""
    return Secret(prf(nonce_i + nonce_r, shared.reveal()))


def rekey_skeyseed(old_prf: Prf, old_d: Secret, shared: Sequence[Secret], nonce_i: bytes, nonce_r: bytes) -> Secret:
    """RFC 7296 section 2.18 and RFC 9370 section 2.2.4: SKEYSEED = prf(SK_d (old), SK(0) | Ni | Nr | SK(1) | ... SK(n)), with the old SA's PRF.

    With one shared secret it is also that of an additional key exchange in IKE_INTERMEDIATE (RFC 9370 section 2.2.2).
    """
    return Secret(old_prf(old_d.reveal(), _mixed(shared, nonce_i, nonce_r)))


def resumed_skeyseed(prf: Prf, old_d: Secret, nonce_i: bytes, nonce_r: bytes) -> Secret:
    """RFC 5723 section 5.1: SKEYSEED = prf(SK_d (old), "Resumption" | Ni | Nr)."""
    return Secret(prf(old_d.reveal(), b"Resumption" + nonce_i + nonce_r))


def ike_keys(suite: IkeSuite, seed: Secret, nonce_i: bytes, nonce_r: bytes, spi_i: IkeSpi, spi_r: IkeSpi) -> IkeKeys:
    """RFC 7296 section 2.14: {SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr} = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr)."""
    p, a, e = suite.prf.length, integrity_key_length(suite.integrity), encryption_key_length(suite.encryption)
    return IkeKeys(*_cut(suite.prf, seed, nonce_i + nonce_r + spi_i + spi_r, (p, a, a, e, e, p, p)))


def child_keys(prf: Prf, d: Secret, algorithm: EspAlgorithm, nonce_i: bytes, nonce_r: bytes, shared: Sequence[Secret] = ()) -> ChildKeys:
    """RFC 7296 section 2.17 and RFC 9370 section 2.2.4: KEYMAT = prf+(SK_d, [SK(0) |] Ni | Nr [| SK(1) | ... SK(n)]).

    `shared` is that of the KE payload in the CREATE_CHILD_SA exchange, and of those in the IKE_FOLLOWUP_KE exchanges after it. Keys of the initiator's packets
    come first, and of each direction encryption before integrity.
    """
    e, a = algorithm.encryption_key_length, algorithm.integrity_key_length
    return ChildKeys(*_cut(prf, d, _mixed(shared, nonce_i, nonce_r), (e, a, e, a)))


def _mixed(shared: Sequence[Secret], nonce_i: bytes, nonce_r: bytes) -> bytes:
    first, rest = shared[:1], shared[1:]
    return b"".join((*(secret.reveal() for secret in first), nonce_i, nonce_r, *(secret.reveal() for secret in rest)))


def _cut(prf: Prf, key: Secret, seed: bytes, lengths: Sequence[int]) -> list[Secret]:
    material = prf.plus(key.reveal(), seed, sum(lengths))
    keys: list[Secret] = []
    start = 0
    for length in lengths:
        keys.append(Secret(material[start : start + length]))
        start += length
    return keys


def signed_octets(prf: Prf, p: Secret, message: bytes, nonce: bytes, identity: Identity, intermediate: bytes = b"") -> bytes:
    """RFC 7296 section 2.15: message | nonce | prf(SK_p, rest of ID payload), and RFC 9242 section 3.3.2: | IntAuth.

    `message` is the signer's first message, the IKE_SA_INIT that was answered, with all its octets and without non-ESP marker;
    `nonce` is the *other* side's; `p` and `identity` are the signer's SK_p and ID.
    """
    return message + nonce + prf(p.reveal(), identity.body()) + intermediate


def with_ppk(prf: Prf, keys: IkeKeys, ppk: Secret) -> IkeKeys:
    """RFC 8784 section 3: SK_d, SK_pi and SK_pr, each mixed with the post-quantum pre-shared key: prf+(PPK, SK_x)."""

    def mixed(key: Secret) -> Secret:
        return Secret(prf.plus(ppk.reveal(), key.reveal(), len(key)))

    return replace(keys, d=mixed(keys.d), pi=mixed(keys.pi), pr=mixed(keys.pr))


def shared_key_auth(prf: Prf, secret: bytes, octets: bytes) -> bytes:
    """RFC 7296 section 2.15: AUTH = prf(prf(Shared Secret, "Key Pad for IKEv2"), octets); compare it with `hmac.compare_digest`."""
    return prf(prf(secret, KEY_PAD), octets)
