"""The words of swanctl proposals (`aes128gcm16-prfsha256-x25519`) and what is proposed by default.

Only algorithms that are implemented have a word. Weak ones have one as well where they are implemented, and are in no default.
"""

from __future__ import annotations

from typing import Final

from vpnd.ike.iana import ADDITIONAL_KEY_EXCHANGE_TYPES, Encryption, Esn, Group, Integrity, PrfId, ProtocolId, TransformType
from vpnd.ike.transform import Proposal, Transform, is_aead

MAX_PROPOSALS: Final = 32  # of one configuration option; each is sent to every peer


def _encryption(number: Encryption, bits: int = 0) -> Transform:
    return Transform(TransformType.ENCR, number, bits)


def _integrity(number: Integrity) -> Transform:
    return Transform(TransformType.INTEG, number)


def _prf(number: PrfId) -> Transform:
    return Transform(TransformType.PRF, number)


def _group(number: Group) -> Transform:
    return Transform(TransformType.KE, number)


ESN: Final = Transform(TransformType.ESN, Esn.EXTENDED)
NO_ESN: Final = Transform(TransformType.ESN, Esn.NONE)

_AES_MODES: Final = {
    "": Encryption.AES_CBC,
    "gcm8": Encryption.AES_GCM_8,
    "gcm64": Encryption.AES_GCM_8,
    "gcm12": Encryption.AES_GCM_12,
    "gcm96": Encryption.AES_GCM_12,
    "gcm": Encryption.AES_GCM_16,
    "gcm16": Encryption.AES_GCM_16,
    "gcm128": Encryption.AES_GCM_16,
    "ccm8": Encryption.AES_CCM_8,
    "ccm64": Encryption.AES_CCM_8,
    "ccm12": Encryption.AES_CCM_12,
    "ccm96": Encryption.AES_CCM_12,
    "ccm": Encryption.AES_CCM_16,
    "ccm16": Encryption.AES_CCM_16,
    "ccm128": Encryption.AES_CCM_16,
}
_KEY_BITS: Final = {"aes": 128, "aes128": 128, "aes192": 192, "aes256": 256}

_METHODS: Final = {
    "modp2048": Group.MODP_2048,
    "modp3072": Group.MODP_3072,
    "modp4096": Group.MODP_4096,
    "modp6144": Group.MODP_6144,
    "modp8192": Group.MODP_8192,
    "ecp256": Group.ECP_256,
    "ecp384": Group.ECP_384,
    "ecp521": Group.ECP_521,
    "curve25519": Group.CURVE_25519,
    "x25519": Group.CURVE_25519,
    "curve448": Group.CURVE_448,
    "x448": Group.CURVE_448,
    "mlkem768": Group.ML_KEM_768,
    "mlkem1024": Group.ML_KEM_1024,
}

_COMMON: Final[dict[str, Transform]] = {
    **{size + mode: _encryption(number, bits) for size, bits in _KEY_BITS.items() for mode, number in _AES_MODES.items()},
    "chacha20poly1305": _encryption(Encryption.CHACHA20_POLY1305),
    "sha": _integrity(Integrity.HMAC_SHA1_96),
    "sha1": _integrity(Integrity.HMAC_SHA1_96),
    "sha256": _integrity(Integrity.HMAC_SHA2_256_128),
    "sha2_256": _integrity(Integrity.HMAC_SHA2_256_128),
    "sha384": _integrity(Integrity.HMAC_SHA2_384_192),
    "sha2_384": _integrity(Integrity.HMAC_SHA2_384_192),
    "sha512": _integrity(Integrity.HMAC_SHA2_512_256),
    "sha2_512": _integrity(Integrity.HMAC_SHA2_512_256),
    **{size + "ctr": _encryption(Encryption.AES_CTR, bits) for size, bits in _KEY_BITS.items()},
    **{word: _group(number) for word, number in _METHODS.items()},
    **{
        f"ke{number}_{word}": Transform(kind, method)
        for number, kind in enumerate(ADDITIONAL_KEY_EXCHANGE_TYPES, 1)
        for word, method in (*_METHODS.items(), ("none", Group.NONE))
    },
}
_IKE: Final[dict[str, Transform]] = {
    **_COMMON,
    "prfsha1": _prf(PrfId.HMAC_SHA1),
    "prfsha256": _prf(PrfId.HMAC_SHA2_256),
    "prfsha384": _prf(PrfId.HMAC_SHA2_384),
    "prfsha512": _prf(PrfId.HMAC_SHA2_512),
}
IKE_TRANSFORMS: Final = tuple(dict.fromkeys(_IKE.values()))
_ESP: Final[dict[str, Transform]] = {
    **_COMMON,
    "null": _encryption(Encryption.NULL),
    "modpnone": _group(Group.NONE),
    "esn": ESN,
    "noesn": NO_ESN,
}
_KEYWORDS: Final = {ProtocolId.IKE: _IKE, ProtocolId.ESP: _ESP}

_PRF_OF_INTEGRITY: Final = {
    Integrity.HMAC_SHA1_96: PrfId.HMAC_SHA1,
    Integrity.HMAC_SHA2_256_128: PrfId.HMAC_SHA2_256,
    Integrity.HMAC_SHA2_384_192: PrfId.HMAC_SHA2_384,
    Integrity.HMAC_SHA2_512_256: PrfId.HMAC_SHA2_512,
}

_DEFAULT_TEXT: Final = {
    # a peer that knows no additional key exchanges refuses a proposal that asks for one as a whole (RFC 7296 section 3.3.6), so the others have none
    ProtocolId.IKE: (
        "aes256gcm16-aes128gcm16-chacha20poly1305-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384-modp2048-ke1_mlkem768-ke1_mlkem1024",
        "aes256gcm16-aes128gcm16-chacha20poly1305-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384-modp2048",
        "aes256-aes128-sha256-sha384-sha512-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384-modp2048",
    ),
    # peers differ in whether a rekeyed CHILD_SA must have a key exchange of its own, must not, or may
    ProtocolId.ESP: (
        "aes256gcm16-aes128gcm16-chacha20poly1305-x25519-ecp256-ecp384-modp2048-modpnone-esn-noesn",
        "aes256-aes128-sha256-sha384-sha512-x25519-ecp256-ecp384-modp2048-modpnone-esn-noesn",
    ),
}


def default_proposals(protocol: ProtocolId) -> tuple[Proposal, ...]:
    """What the word `default` means: combined-mode ciphers first, with ML-KEM beside the key exchange and then without, then AES-CBC with HMAC; strong
    algorithms only.

    Numbered from 1. ESP ones leave it to the peer whether CREATE_CHILD_SA has a key exchange (PFS); an offer has one.
    """
    return tuple(_parse_one(protocol, text).numbered(number) for number, text in enumerate(_DEFAULT_TEXT[protocol], 1))


def parse_proposals(protocol: ProtocolId, text: str) -> tuple[Proposal, ...]:
    """A comma-separated list of swanctl proposals, numbered from 1. Raises ValueError that names the proposal or the word.

    As in strongSwan a PRF follows from the integrity algorithm when none is named, an integrity algorithm beside a combined-mode
    cipher is dropped, and ESP without `esn` has no extended sequence numbers. `default` is `default_proposals`.
    """
    if protocol not in _KEYWORDS:
        raise ValueError(f"no proposals for protocol {protocol.name}")
    proposals: list[Proposal] = []
    for item in (part.strip() for part in text.split(",")):
        if not item:
            raise ValueError(f"empty proposal in {text!r}")
        proposals.extend(default_proposals(protocol) if item.lower() == "default" else (_parse_one(protocol, item),))
    if len(proposals) > MAX_PROPOSALS:
        raise ValueError(f"{len(proposals)} proposals, at most {MAX_PROPOSALS} are allowed")
    return tuple(proposal.numbered(number) for number, proposal in enumerate(proposals, 1))


def _parse_one(protocol: ProtocolId, text: str) -> Proposal:
    transforms: list[Transform] = []
    for word in text.lower().split("-"):
        transform = _KEYWORDS[protocol].get(word)
        if transform is None:
            raise ValueError(f"unknown or unsupported algorithm {word!r} in proposal {text!r}")
        if transform not in transforms:
            transforms.append(transform)
    return _complete(protocol, transforms, text)


def _complete(protocol: ProtocolId, transforms: list[Transform], text: str) -> Proposal:
    encryption, prf, integrity, groups, esn = ([t for t in transforms if t.type == number] for number in range(1, 6))
    additional = sorted((t for t in transforms if t.type in ADDITIONAL_KEY_EXCHANGE_TYPES), key=lambda transform: transform.type)
    if not encryption:
        raise ValueError(f"no encryption algorithm in proposal {text!r}")
    aead = {is_aead(transform) for transform in encryption}
    if len(aead) > 1:
        raise ValueError(f"combined-mode and other ciphers in one proposal {text!r}")
    if protocol is ProtocolId.IKE:
        prf = prf or [_prf(_PRF_OF_INTEGRITY[Integrity(transform.id)]) for transform in integrity]
        if not prf:
            raise ValueError(f"no PRF in proposal {text!r}")
        if not groups:
            raise ValueError(f"no key exchange method in proposal {text!r}")
    else:
        esn = esn or [NO_ESN]
        if additional and not groups:
            raise ValueError(f"additional key exchanges without a first one in proposal {text!r}")
    if aead == {True}:
        integrity = []
    elif not integrity:
        raise ValueError(f"no integrity algorithm in proposal {text!r}")
    return Proposal(protocol, (*encryption, *integrity, *prf, *groups, *esn, *additional))
