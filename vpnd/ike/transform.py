"""Transforms and proposals as values (RFC 7296 section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from kernel_shim.algorithms import AEAD_ICV, EncryptionId, EspAlgorithm, IntegrityId
from vpnd.ike.iana import ADDITIONAL_KEY_EXCHANGE_TYPES, Encryption, Esn, ProtocolId, TransformType, transform_name

NONE: Final = 0  # the id that says "no such transform" in types 3 to 12
_TEXT_ORDER: Final[dict[int, int]] = {TransformType.INTEG: TransformType.PRF, TransformType.PRF: TransformType.INTEG}  # as strongSwan prints
_ESN_NAMES: Final[dict[int, str]] = {Esn.NONE: "NO_EXT_SEQ", Esn.EXTENDED: "EXT_SEQ"}
_FIXED_KEY_BITS: Final[dict[int, int]] = {Encryption.CHACHA20_POLY1305: 256, Encryption.NULL: 0}


@dataclass(frozen=True, slots=True)
class Transform:
    """One algorithm. `key_length` is in bits, 0 when the transform carries none.

    `attributes` are those other than the key length, (type, value); a transform that has any is never chosen (RFC 7296 section 3.3.6).
    """

    type: int
    id: int
    key_length: int = 0
    attributes: tuple[tuple[int, bytes], ...] = ()

    @property
    def name(self) -> str:
        """As strongSwan's VICI names it, without key length: `AES_GCM_16`, `PRF_HMAC_SHA2_256`, `CURVE_25519`."""
        name = transform_name(self.type, self.id)
        if self.type == TransformType.PRF:
            return f"PRF_{name}"
        if self.type in ADDITIONAL_KEY_EXCHANGE_TYPES:
            return f"KE{self.type - TransformType.AKE1 + 1}_{name}"
        if self.type == TransformType.ESN:
            return _ESN_NAMES.get(self.id, f"ESN_{name}")
        return name

    @property
    def key_bits(self) -> int:
        """The length of an encryption key, also where the transform need not say it."""
        return self.key_length or _FIXED_KEY_BITS.get(self.id, 0)

    def __str__(self) -> str:
        return f"{self.name}-{self.key_length}" if self.key_length else self.name


def is_aead(encryption: Transform) -> bool:
    return encryption.id in AEAD_ICV


@dataclass(frozen=True, slots=True)
class Proposal:
    """Transforms of which one of each type protects an SA of `protocol`, in order of preference."""

    protocol: int
    transforms: tuple[Transform, ...]
    number: int = 1
    spi: bytes = b""

    def of_type(self, transform_type: int) -> tuple[Transform, ...]:
        return tuple(transform for transform in self.transforms if transform.type == transform_type)

    def first(self, transform_type: int) -> Transform | None:
        return next((transform for transform in self.transforms if transform.type == transform_type), None)

    @property
    def encryption(self) -> Transform | None:
        return self.first(TransformType.ENCR)

    @property
    def integrity(self) -> Transform | None:
        """None also when the transform is NONE, as it may be beside an AEAD."""
        transform = self.first(TransformType.INTEG)
        return transform if transform is not None and transform.id != NONE else None

    @property
    def prf(self) -> Transform | None:
        return self.first(TransformType.PRF)

    @property
    def groups(self) -> tuple[int, ...]:
        """Key exchange methods, in order of preference, NONE left out."""
        return tuple(transform.id for transform in self.of_type(TransformType.KE) if transform.id != NONE)

    @property
    def additional(self) -> tuple[int, ...]:
        """Of a chosen proposal: the additional key exchange methods (RFC 9370), in the order in which they are done."""
        found = (self.first(kind) for kind in ADDITIONAL_KEY_EXCHANGE_TYPES)
        return tuple(transform.id for transform in found if transform is not None and transform.id != NONE)

    @property
    def asks_additional(self) -> bool:
        """Whether it offers or demands an additional key exchange."""
        return any(transform.type in ADDITIONAL_KEY_EXCHANGE_TYPES and transform.id != NONE for transform in self.transforms)

    @property
    def esn(self) -> bool:
        """Of a chosen ESP proposal: whether it has extended sequence numbers."""
        transform = self.first(TransformType.ESN)
        return transform is not None and transform.id == Esn.EXTENDED

    def with_spi(self, spi: bytes) -> Self:
        return replace(self, spi=spi)

    def numbered(self, number: int) -> Self:
        return replace(self, number=number)

    def without_key_exchange(self) -> Self:
        """For the CHILD_SA of IKE_AUTH, which has no KE payload (RFC 7296 section 1.2)."""
        return replace(self, transforms=tuple(transform for transform in self.transforms if transform.type in _CHILD_OF_AUTH))

    def without_additional(self) -> Self | None:
        """The same without additional key exchanges; None when it demands one."""
        kinds = {transform.type for transform in self.transforms if transform.type in ADDITIONAL_KEY_EXCHANGE_TYPES}
        optional = {transform.type for transform in self.transforms if transform.id == NONE}
        return replace(self, transforms=tuple(t for t in self.transforms if t.type not in kinds)) if kinds <= optional else None

    def esp_algorithm(self) -> EspAlgorithm:
        """Of a chosen ESP proposal. Raises ValueError when it is not one that kernels know."""
        encryption, integrity = self.encryption, self.integrity
        if encryption is None:
            raise ValueError("no encryption algorithm")
        return esp_algorithm(encryption, integrity)

    def __str__(self) -> str:
        """As strongSwan prints it: `AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519`."""
        return "/".join(str(transform) for transform in sorted(self.transforms, key=lambda transform: _TEXT_ORDER.get(transform.type, transform.type)))


_CHILD_OF_AUTH: Final = frozenset({TransformType.ENCR, TransformType.INTEG, TransformType.ESN})


def esp_algorithm(encryption: Transform, integrity: Transform | None) -> EspAlgorithm:
    """Raises ValueError when kernels have no such algorithm."""
    return EspAlgorithm(EncryptionId(encryption.id), encryption.key_bits, IntegrityId(integrity.id if integrity else NONE))


def proposal_text(proposals: Iterable[Proposal]) -> str:
    """As strongSwan logs a list: `IKE:AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519, IKE:...`."""
    names = {ProtocolId.IKE: "IKE", ProtocolId.AH: "AH", ProtocolId.ESP: "ESP"}
    return ", ".join(f"{names[ProtocolId(p.protocol)] if p.protocol in names else p.protocol}:{p}" for p in proposals)


def number_proposals(proposals: Sequence[Proposal], spi: bytes = b"") -> tuple[Proposal, ...]:
    """The proposals numbered from 1, each with `spi`, ready to send."""
    return tuple(replace(proposal, number=number, spi=spi) for number, proposal in enumerate(proposals, 1))
