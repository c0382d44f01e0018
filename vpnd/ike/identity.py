"""IKE identities (RFC 7296 section 3.5): text as in swanctl.conf, wire form, and matching with wildcards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from kernel_shim.model import IPAddress
from vpnd.ike.iana import IdType


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity: its type (`IdType`, or any number a peer sends) and the octets of its identification data."""

    type: int
    data: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """An identity from configuration text. Raises ValueError that says at which character."""
        raise NotImplementedError

    @classmethod
    def of_address(cls, address: IPAddress) -> Self:
        return cls(IdType.IPV4_ADDR if address.version == 4 else IdType.IPV6_ADDR, address.packed)

    @classmethod
    def of_dn(cls, der: bytes) -> Self:
        """The identity of a certificate's subject: `der` is the Name as DER."""
        return cls(IdType.DER_ASN1_DN, der)

    @property
    def any(self) -> bool:
        """Whether this is `%any`, which matches every identity and never goes on the wire."""
        return self.type == IdType.ANY

    def matches(self, pattern: Identity) -> bool:
        """Whether `pattern`, which may hold wildcards, covers this identity."""
        return self.match_quality(pattern) > 0

    def match_quality(self, pattern: Identity) -> int:
        """How closely `pattern` covers this identity: 0 not at all, 1 by `%any`, more by wildcards, most exactly."""
        raise NotImplementedError

    def __str__(self) -> str:
        """As strongSwan prints it."""
        raise NotImplementedError


ANY_IDENTITY: Final = Identity(IdType.ANY, b"")
