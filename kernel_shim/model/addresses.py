"""Addresses: of hosts, ranges of them, and with a port."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, summarize_address_range
from typing import NamedTuple, Self

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


class Endpoint(NamedTuple):
    """A UDP address; with port 0 the address alone, of ESP without UDP."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses `first` to `last`, both included, of one family."""

    first: IPAddress
    last: IPAddress

    def __post_init__(self) -> None:
        if self.first.version != self.last.version:
            raise ValueError(f"address range of two families: {self.first}-{self.last}")
        if int(self.first) > int(self.last):
            raise ValueError(f"address range ends before it begins: {self.first}-{self.last}")

    @classmethod
    def of(cls, network: IPNetwork) -> Self:
        return cls(network.network_address, network.broadcast_address)

    @classmethod
    def host(cls, address: IPAddress) -> Self:
        return cls(address, address)

    @classmethod
    def everything(cls, version: int) -> Self:
        return cls.of(IPv4Network("0.0.0.0/0") if version == 4 else IPv6Network("::/0"))

    @property
    def version(self) -> int:
        return self.first.version

    def prefixes(self) -> Iterator[IPNetwork]:
        """The fewest prefixes that cover exactly this range, ascending."""
        return summarize_address_range(self.first, self.last)

    def contains(self, other: AddressRange) -> bool:
        return self.version == other.version and int(self.first) <= int(other.first) and int(other.last) <= int(self.last)

    def intersection(self, other: AddressRange) -> AddressRange | None:
        if self.version != other.version:
            return None
        first, last = max(self.first, other.first, key=int), min(self.last, other.last, key=int)
        return AddressRange(first, last) if int(first) <= int(last) else None

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        networks = list(self.prefixes())
        return str(networks[0]) if len(networks) == 1 else f"{self.first}-{self.last}"
