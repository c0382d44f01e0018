"""The name of a gateway that REDIRECT and REDIRECTED_FROM carry (RFC 5685 sections 8.2 and 8.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from kernel_shim.model import IPAddress
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.reader import Reader

# Of the specification
IPV4: Final = 1
IPV6: Final = 2
FQDN: Final = 3
BROADCAST: Final = IPv4Address("255.255.255.255")  # RFC 919

# Of this implementation
MAX_NAME: Final = 253  # octets of a domain name in text

_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?")


@dataclass(frozen=True, slots=True)
class GatewayId:
    """An address, or a domain name."""

    where: IPAddress | str

    def __str__(self) -> str:
        return str(self.where)

    @classmethod
    def parse(cls, text: str) -> GatewayId:
        """Raises ValueError for what is neither the address of a host nor a domain name."""
        try:
            address = ip_address(text)
        except ValueError:
            if not _NAME.fullmatch(text) or text.replace(".", "").isdigit():
                raise ValueError(f"{text!r} is neither an address nor a domain name") from None
            return cls(text)
        if not reachable(address):
            raise ValueError(f"{text} is not the address of a host")
        return cls(address)

    def encode(self) -> bytes:
        """Type, length and identity."""
        if isinstance(self.where, str):
            data = self.where.encode("ascii")
            return bytes((FQDN, len(data))) + data
        return bytes((IPV4 if self.where.version == 4 else IPV6, len(self.where.packed))) + self.where.packed


def decode_gateway(data: bytes) -> tuple[GatewayId, bytes]:
    """The gateway, and what follows it (a nonce). Raises MalformedMessage."""
    reader = Reader(data, "REDIRECT")
    kind, length = reader.u8(), reader.u8()
    identity = reader.take(length)
    rest = reader.rest()
    if (kind, length) in ((IPV4, 4), (IPV6, 16)):
        address = IPv4Address(identity) if kind == IPV4 else IPv6Address(identity)
        if reachable(address):
            return GatewayId(address), rest
    elif kind == FQDN and length <= MAX_NAME and (text := identity.decode("ascii", "replace")).isascii() and _NAME.fullmatch(text):
        return GatewayId(text), rest
    raise MalformedMessage("REDIRECT.gateway", f"type {kind} of {length} octets")


def reachable(address: IPAddress) -> bool:
    """Whether a host on the network can have it, seen from another one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped is None and address != BROADCAST and not (address.is_multicast or address.is_unspecified or address.is_loopback)
