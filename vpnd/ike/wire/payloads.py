"""The payloads of RFC 7296 section 3 and RFC 7383, as values. How they look on the wire is in `codec`."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernel_shim.model import TrafficSelector
from vpnd.ike.identity import Identity
from vpnd.ike.transform import Proposal


@dataclass(frozen=True, slots=True)
class SaPayload:
    proposals: tuple[Proposal, ...]


@dataclass(frozen=True, slots=True)
class KePayload:
    group: int
    data: bytes


@dataclass(frozen=True, slots=True)
class IdiPayload:
    identity: Identity


@dataclass(frozen=True, slots=True)
class IdrPayload:
    identity: Identity


@dataclass(frozen=True, slots=True)
class CertPayload:
    encoding: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CertReqPayload:
    """`data` is a run of SHA-1 hashes of trusted CAs' public keys, 20 octets each, for X.509 encodings."""

    encoding: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class AuthPayload:
    method: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NoncePayload:
    data: bytes


@dataclass(frozen=True, slots=True)
class NotifyPayload:
    """`protocol` and `spi` name an existing SA, or are 0 and empty."""

    type: int
    data: bytes = b""
    protocol: int = 0
    spi: bytes = b""


@dataclass(frozen=True, slots=True)
class DeletePayload:
    """`spis` is empty for the IKE SA itself."""

    protocol: int
    spis: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class VendorIdPayload:
    data: bytes


@dataclass(frozen=True, slots=True)
class UnknownSelector:
    """A traffic selector that is no range of addresses and ports (other types, and OPAQUE ports), as it came."""

    type: int
    protocol: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TsiPayload:
    """`unknown` selectors follow `selectors` when encoded."""

    selectors: tuple[TrafficSelector, ...]
    unknown: tuple[UnknownSelector, ...] = ()


@dataclass(frozen=True, slots=True)
class TsrPayload:
    """As `TsiPayload`."""

    selectors: tuple[TrafficSelector, ...]
    unknown: tuple[UnknownSelector, ...] = ()


@dataclass(frozen=True, slots=True)
class SkPayload:
    """Still encrypted: `body` is IV, ciphertext and ICV; `first` the type of the first payload inside. Always a message's last."""

    first: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SkfPayload:
    """RFC 7383: fragment `number` of `total`, counted from 1; `first` is 0 except in the first."""

    first: int
    number: int
    total: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ConfigValue:
    """An attribute of a configuration payload; an empty value asks for one."""

    type: int
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class CpPayload:
    type: int
    attributes: tuple[ConfigValue, ...] = ()


@dataclass(frozen=True, slots=True)
class EapPayload:
    """An EAP message (RFC 3748 section 4). `data` begins with the EAP type in a request or response and is empty otherwise."""

    code: int
    identifier: int
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class UnknownPayload:
    """A payload of a type that is not listed here, as it came."""

    type: int
    data: bytes
    critical: bool = False


Payload = (
    SaPayload
    | KePayload
    | IdiPayload
    | IdrPayload
    | CertPayload
    | CertReqPayload
    | AuthPayload
    | NoncePayload
    | NotifyPayload
    | DeletePayload
    | VendorIdPayload
    | TsiPayload
    | TsrPayload
    | SkPayload
    | SkfPayload
    | CpPayload
    | EapPayload
    | UnknownPayload
)
