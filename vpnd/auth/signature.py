"""Signatures of the AUTH payload: RFC 7427 (method 14), RFC 8420 (Ed25519) and the classic methods 1 and 9 to 11.

A scheme is what signs; a policy is which schemes one side may use. SHA-1 is used and accepted only where it is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from vpnd.auth.der import DerError, DerReader, integer, object_identifier, sequence, tagged
from vpnd.ike.iana import AuthenticationMethod, HashAlgorithm

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class Family(Enum):
    RSA = "rsa"
    RSA_PSS = "rsa/pss"
    ECDSA = "ecdsa"
    ED25519 = "ed25519"


@dataclass(frozen=True, slots=True)
class Scheme:
    family: Family
    hash: HashAlgorithm

    def __str__(self) -> str:
        return self.family.value if self.hash is HashAlgorithm.IDENTITY else f"{self.family.value}-{_HASH_NAMES[self.hash]}"


# Of the specifications

_HASH_NAMES: Final = {
    HashAlgorithm.SHA1: "sha1",
    HashAlgorithm.SHA2_256: "sha256",
    HashAlgorithm.SHA2_384: "sha384",
    HashAlgorithm.SHA2_512: "sha512",
    HashAlgorithm.IDENTITY: "identity",
}
_HASHES: Final[dict[HashAlgorithm, hashes.HashAlgorithm]] = {
    HashAlgorithm.SHA1: hashes.SHA1(),  # noqa: S303
    HashAlgorithm.SHA2_256: hashes.SHA256(),
    HashAlgorithm.SHA2_384: hashes.SHA384(),
    HashAlgorithm.SHA2_512: hashes.SHA512(),
}
_HASH_OIDS: Final = {
    HashAlgorithm.SHA1: "1.3.14.3.2.26",
    HashAlgorithm.SHA2_256: "2.16.840.1.101.3.4.2.1",
    HashAlgorithm.SHA2_384: "2.16.840.1.101.3.4.2.2",
    HashAlgorithm.SHA2_512: "2.16.840.1.101.3.4.2.3",
}
_OID_HASHES: Final = {oid: hash_id for hash_id, oid in _HASH_OIDS.items()}
_OID_PSS: Final = "1.2.840.113549.1.1.10"
_OID_MGF1: Final = "1.2.840.113549.1.1.8"
_NULL: Final = b"\x05\x00"
_SCHEME_OIDS: Final = {
    Scheme(Family.RSA, HashAlgorithm.SHA1): "1.2.840.113549.1.1.5",
    Scheme(Family.RSA, HashAlgorithm.SHA2_256): "1.2.840.113549.1.1.11",
    Scheme(Family.RSA, HashAlgorithm.SHA2_384): "1.2.840.113549.1.1.12",
    Scheme(Family.RSA, HashAlgorithm.SHA2_512): "1.2.840.113549.1.1.13",
    Scheme(Family.ECDSA, HashAlgorithm.SHA1): "1.2.840.10045.4.1",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_256): "1.2.840.10045.4.3.2",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_384): "1.2.840.10045.4.3.3",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_512): "1.2.840.10045.4.3.4",
    Scheme(Family.ED25519, HashAlgorithm.IDENTITY): "1.3.101.112",
}
_OID_SCHEMES: Final = {oid: scheme for scheme, oid in _SCHEME_OIDS.items()}
_CLASSIC_ECDSA: Final[dict[int, tuple[str, HashAlgorithm, int]]] = {  # method: curve name, hash, octets of r and of s (RFC 4754 section 7)
    AuthenticationMethod.ECDSA_SHA256_P256: ("secp256r1", HashAlgorithm.SHA2_256, 32),
    AuthenticationMethod.ECDSA_SHA384_P384: ("secp384r1", HashAlgorithm.SHA2_384, 48),
    AuthenticationMethod.ECDSA_SHA512_P521: ("secp521r1", HashAlgorithm.SHA2_512, 66),
}
_CURVE_METHODS: Final = {curve: method for method, (curve, _, _) in _CLASSIC_ECDSA.items()}

# Of this implementation

# what SIGNATURE_HASH_ALGORITHMS announces
SUPPORTED_HASHES: Final = (HashAlgorithm.SHA2_256, HashAlgorithm.SHA2_384, HashAlgorithm.SHA2_512, HashAlgorithm.IDENTITY)
MINIMUM_RSA_BITS: Final = 2048  # unless a policy names fewer
_STRONG: Final = frozenset(scheme for scheme in _SCHEME_OIDS if scheme.hash is not HashAlgorithm.SHA1) | frozenset(
    Scheme(Family.RSA_PSS, hash_id) for hash_id in SUPPORTED_HASHES if hash_id is not HashAlgorithm.IDENTITY
)


class SignatureRefused(Exception):
    """The peer's AUTH payload does not stand; the text is safe to log."""


class NoCommonScheme(Exception):
    """Our key, our policy and the peer's hash algorithms share no scheme."""


@dataclass(frozen=True, slots=True)
class SignaturePolicy:
    schemes: Set[Scheme] = _STRONG
    rsa_bits: int = MINIMUM_RSA_BITS
    ecdsa_bits: int = 256
    preferred: tuple[Scheme, ...] = ()  # as named, first is best

    @classmethod
    def of(cls, constraints: Sequence[str]) -> SignaturePolicy:
        """What swanctl.conf's `pubkey-...`, `rsa-...`, `ecdsa-...` and `ike:...` say; ValueError for a word that is none of theirs.

        Words are joined by hyphens: a key type (`pubkey`, `rsa`, `rsa/pss`, `ecdsa`, `ed25519`), then hashes and least key sizes for it.
        """
        families: list[Family] = []
        schemes: list[Scheme] = []
        bits = {Family.RSA: MINIMUM_RSA_BITS, Family.ECDSA: 256}
        for constraint in constraints:
            current: tuple[Family, ...] = tuple(Family)
            named = False
            for word in constraint.removeprefix("ike:").lower().split("-"):
                if word in ("pubkey", ""):
                    current = tuple(Family)
                elif word in _FAMILY_WORDS:
                    current = _FAMILY_WORDS[word]
                    families += current
                elif word in _HASH_WORDS:
                    named = True
                    schemes += [Scheme(family, hash_id) for family in current for hash_id in (_HASH_WORDS[word],) if _exists(family, hash_id)]
                elif word.isdecimal() and len(word) <= 5:
                    for family in current:
                        bits[Family.RSA if family is Family.RSA_PSS else family] = int(word)
                else:
                    raise ValueError(f"unknown signature constraint {word!r} in {constraint!r}")
            if not named and Family.ED25519 in current and Family.ECDSA not in current:
                schemes.append(Scheme(Family.ED25519, HashAlgorithm.IDENTITY))
        if not families and not schemes:
            return cls(_STRONG, bits[Family.RSA], bits[Family.ECDSA])
        for family in families:  # a key type without a hash of its own: any strong one
            if not any(scheme.family is family for scheme in schemes):
                schemes += sorted((scheme for scheme in _STRONG if scheme.family is family), key=lambda scheme: scheme.hash)
        return cls(frozenset(schemes), bits[Family.RSA], bits[Family.ECDSA], tuple(dict.fromkeys(schemes)))


_FAMILY_WORDS: Final[dict[str, tuple[Family, ...]]] = {
    "rsa": (Family.RSA, Family.RSA_PSS),
    "rsa/pss": (Family.RSA_PSS,),
    "ecdsa": (Family.ECDSA,),
    "ed25519": (Family.ED25519,),
}
_HASH_WORDS: Final = {name: hash_id for hash_id, name in _HASH_NAMES.items()}


def _exists(family: Family, hash_id: HashAlgorithm) -> bool:
    return (family is Family.ED25519) == (hash_id is HashAlgorithm.IDENTITY)


def algorithm_identifier(scheme: Scheme) -> bytes:
    """The DER AlgorithmIdentifier of RFC 7427 appendix A."""
    if scheme.family is Family.RSA_PSS:
        digest = sequence(object_identifier(_HASH_OIDS[scheme.hash]), _NULL)
        salt = _HASHES[scheme.hash].digest_size
        parameters = sequence(tagged(0, digest), tagged(1, sequence(object_identifier(_OID_MGF1), digest)), tagged(2, integer(salt)))
        return sequence(object_identifier(_OID_PSS), parameters)
    oid = object_identifier(_SCHEME_OIDS[scheme])
    return sequence(oid, _NULL) if scheme.family is Family.RSA else sequence(oid)


@dataclass(frozen=True, slots=True)
class _Announced:
    scheme: Scheme
    salt: int = 0


def parse_algorithm_identifier(der: bytes) -> _Announced:
    """SignatureRefused for what is malformed or unknown."""
    try:
        outer = DerReader(der)
        fields = outer.sequence()
        outer.end()
        oid = fields.object_identifier()
        if oid == _OID_PSS:
            return _pss_parameters(fields)
        scheme = _OID_SCHEMES.get(oid)
        if scheme is None:
            raise SignatureRefused(f"unknown signature algorithm {oid}")
        if not fields.at_end():
            fields.null()
        fields.end()
    except DerError as error:
        raise SignatureRefused(f"malformed AlgorithmIdentifier: {error}") from error
    return _Announced(scheme)


def _pss_parameters(fields: DerReader) -> _Announced:
    # RFC 4055 section 3.1: absent parameters mean SHA-1, MGF1 with SHA-1 and 20 octets of salt
    hash_id, mask_id, salt = HashAlgorithm.SHA1, HashAlgorithm.SHA1, 20
    if not fields.at_end():
        parameters = fields.sequence()
        if (inner := parameters.optional(0)) is not None:
            hash_id = _hash_of(inner.sequence())
        if (inner := parameters.optional(1)) is not None:
            mask = inner.sequence()
            if mask.object_identifier() != _OID_MGF1:
                raise SignatureRefused("RSASSA-PSS with a mask function other than MGF1")
            mask_id = _hash_of(mask.sequence())
        if (inner := parameters.optional(2)) is not None:
            salt = inner.integer()
        if (inner := parameters.optional(3)) is not None and inner.integer() != 1:
            raise SignatureRefused("RSASSA-PSS with an unknown trailer")
    if mask_id is not hash_id:
        raise SignatureRefused("RSASSA-PSS with two hash functions")
    if not 0 <= salt <= 512:
        raise SignatureRefused("RSASSA-PSS with an absurd salt length")
    return _Announced(Scheme(Family.RSA_PSS, hash_id), salt)


def _hash_of(algorithm: DerReader) -> HashAlgorithm:
    oid = algorithm.object_identifier()
    if oid not in _OID_HASHES:
        raise SignatureRefused(f"unknown hash algorithm {oid}")
    return _OID_HASHES[oid]


@dataclass(frozen=True, slots=True)
class Signature:
    """What goes into the AUTH payload."""

    method: int
    data: bytes
    scheme: Scheme


def choose_scheme(key: PrivateKey, policy: SignaturePolicy, peer_hashes: Iterable[int]) -> Scheme:
    """The scheme to sign with under RFC 7427. NoCommonScheme when there is none."""
    offered = set(peer_hashes)
    usable = [scheme for scheme in _preferences(key, policy) if scheme in policy.schemes and scheme.hash in offered]
    if not usable:
        raise NoCommonScheme(f"no signature scheme for our {_kind(key)} key that both policy and peer allow")
    return usable[0]


def _preferences(key: PrivateKey, policy: SignaturePolicy) -> list[Scheme]:
    families = _families(key.public_key())
    if policy.preferred:
        return [scheme for scheme in policy.preferred if scheme.family in families]
    # RFC 7427 negotiates hashes but no padding: PKCS#1 v1.5 is the one that every peer verifies
    schemes = sorted((scheme for scheme in _STRONG if scheme.family in families), key=lambda scheme: (scheme.family is Family.RSA_PSS, scheme.hash))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        own = _curve_hash(key.curve)
        schemes.sort(key=lambda scheme: scheme.hash is not own)
    return schemes


def sign(key: PrivateKey, octets: bytes, policy: SignaturePolicy, peer_hashes: Iterable[int]) -> Signature:
    """Sign `octets` as the peer can verify it; no `peer_hashes` means that it lacks RFC 7427. NoCommonScheme."""
    offered = tuple(peer_hashes)
    if offered:
        scheme = choose_scheme(key, policy, offered)
        identifier = algorithm_identifier(scheme)
        return Signature(AuthenticationMethod.DIGITAL_SIGNATURE, bytes([len(identifier)]) + identifier + _raw_sign(key, octets, scheme), scheme)
    if isinstance(key, rsa.RSAPrivateKey):
        # RFC 7296 section 3.8 asks for SHA-1 here; ours does so only when it is named
        candidates = [scheme for scheme in _preferences(key, policy) if scheme.family is Family.RSA and scheme in policy.schemes]
        candidates.sort(key=lambda scheme: scheme.hash is not HashAlgorithm.SHA1)
        if not candidates:
            raise NoCommonScheme("the peer lacks RFC 7427 and our policy allows no RSASSA-PKCS1-v1_5")
        return Signature(AuthenticationMethod.RSA_SIGNATURE, _raw_sign(key, octets, candidates[0]), candidates[0])
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVE_METHODS:
        method = _CURVE_METHODS[key.curve.name]
        _, hash_id, width = _CLASSIC_ECDSA[method]
        scheme = Scheme(Family.ECDSA, hash_id)
        if scheme not in policy.schemes:
            raise NoCommonScheme(f"the peer lacks RFC 7427 and our policy does not allow {scheme}")
        r, s = decode_dss_signature(_raw_sign(key, octets, scheme))
        return Signature(method, r.to_bytes(width, "big") + s.to_bytes(width, "big"), scheme)
    raise NoCommonScheme(f"the peer lacks RFC 7427, which our {_kind(key)} key needs")


def verify(key: PublicKey, octets: bytes, method: int, data: bytes, policy: SignaturePolicy) -> Scheme:
    """The scheme that the peer signed `octets` with. SignatureRefused with the reason when it does not stand."""
    check_strength(key, policy)
    if method == AuthenticationMethod.DIGITAL_SIGNATURE:
        if not data or len(data) < 1 + data[0]:
            raise SignatureRefused("truncated digital signature")
        announced = parse_algorithm_identifier(data[1 : 1 + data[0]])
        _allow(announced.scheme, key, policy)
        _raw_verify(key, octets, data[1 + data[0] :], announced)
        return announced.scheme
    if method == AuthenticationMethod.RSA_SIGNATURE and isinstance(key, rsa.RSAPublicKey):
        for scheme in sorted((scheme for scheme in policy.schemes if scheme.family is Family.RSA), key=lambda scheme: scheme.hash):
            try:
                _raw_verify(key, octets, data, _Announced(scheme))
            except SignatureRefused:
                continue
            return scheme
        raise SignatureRefused("RSA signature does not verify with any allowed hash")
    if method in _CLASSIC_ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        curve, hash_id, width = _CLASSIC_ECDSA[method]
        if key.curve.name != curve or len(data) != 2 * width:
            raise SignatureRefused(f"authentication method {method} does not fit the peer's key")
        scheme = Scheme(Family.ECDSA, hash_id)
        _allow(scheme, key, policy)
        der = encode_dss_signature(int.from_bytes(data[:width], "big"), int.from_bytes(data[width:], "big"))
        _raw_verify(key, octets, der, _Announced(scheme))
        return scheme
    raise SignatureRefused(f"authentication method {method} does not fit the peer's key")


def check_strength(key: PublicKey, policy: SignaturePolicy) -> None:
    """SignatureRefused for a key smaller than the policy asks."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < policy.rsa_bits:
        raise SignatureRefused(f"RSA key of {key.key_size} bits is too small")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.key_size < policy.ecdsa_bits:
        raise SignatureRefused(f"ECDSA key of {key.curve.key_size} bits is too small")


def _allow(scheme: Scheme, key: PublicKey, policy: SignaturePolicy) -> None:
    if scheme not in policy.schemes:
        raise SignatureRefused(f"signature scheme {scheme} is not allowed")
    if scheme.family not in _families(key):
        raise SignatureRefused(f"signature scheme {scheme} does not fit the peer's key")


def _families(key: PublicKey) -> tuple[Family, ...]:
    if isinstance(key, rsa.RSAPublicKey):
        return (Family.RSA, Family.RSA_PSS)
    return (Family.ECDSA,) if isinstance(key, ec.EllipticCurvePublicKey) else (Family.ED25519,)


def _kind(key: PrivateKey) -> str:
    return _families(key.public_key())[0].value


def _curve_hash(curve: ec.EllipticCurve) -> HashAlgorithm:
    return HashAlgorithm.SHA2_256 if curve.key_size <= 256 else HashAlgorithm.SHA2_384 if curve.key_size <= 384 else HashAlgorithm.SHA2_512


def _raw_sign(key: PrivateKey, octets: bytes, scheme: Scheme) -> bytes:
    try:
        if isinstance(key, rsa.RSAPrivateKey):
            digest = _HASHES[scheme.hash]
            if scheme.family is Family.RSA_PSS:
                return key.sign(octets, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
            return key.sign(octets, padding.PKCS1v15(), digest)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key.sign(octets, ec.ECDSA(_HASHES[scheme.hash]))
        return key.sign(octets)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise NoCommonScheme(f"our key cannot sign with {scheme}") from error


def _raw_verify(key: PublicKey, octets: bytes, signature: bytes, announced: _Announced) -> None:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            digest = _HASHES[announced.scheme.hash]
            if announced.scheme.family is Family.RSA_PSS:
                key.verify(signature, octets, padding.PSS(padding.MGF1(digest), announced.salt), digest)
            else:
                key.verify(signature, octets, padding.PKCS1v15(), digest)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, octets, ec.ECDSA(_HASHES[announced.scheme.hash]))
        else:
            key.verify(signature, octets)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureRefused(f"signature ({announced.scheme}) does not verify") from error
