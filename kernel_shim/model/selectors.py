"""Which packets: one side of a flow (traffic selector), both (selector), and one packet's (flow). RFC 4301 section 4.4.1.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from kernel_shim.model.addresses import AddressRange, IPAddress
from kernel_shim.model.numbers import ANY_PROTOCOL, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports `low` to `high`, both included. For ICMP and ICMPv6 a port is `type << 8 | code`, on both sides (RFC 7296 section 3.13.1)."""

    low: int = 0
    high: int = 65535

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 65535:
            raise ValueError(f"not a port range: {self.low}-{self.high}")

    @property
    def any(self) -> bool:
        return self.low == 0 and self.high == 65535

    def contains(self, other: PortRange) -> bool:
        return self.low <= other.low and other.high <= self.high

    def intersection(self, other: PortRange) -> PortRange | None:
        low, high = max(self.low, other.low), min(self.high, other.high)
        return PortRange(low, high) if low <= high else None

    def __contains__(self, port: int) -> bool:
        return self.low <= port <= self.high


ANY_PORT: Final = PortRange()


@dataclass(frozen=True, slots=True)
class TrafficSelector:
    """One side of a flow: addresses, protocol (0 is any) and ports."""

    addresses: AddressRange
    protocol: int = ANY_PROTOCOL
    ports: PortRange = ANY_PORT

    def contains(self, other: TrafficSelector) -> bool:
        return self.addresses.contains(other.addresses) and self.protocol in (ANY_PROTOCOL, other.protocol) and self.ports.contains(other.ports)

    def intersection(self, other: TrafficSelector) -> TrafficSelector | None:
        """RFC 7296 section 2.9: what narrowing yields; None when the two share no packet."""
        addresses, ports = self.addresses.intersection(other.addresses), self.ports.intersection(other.ports)
        if addresses is None or ports is None or (self.protocol != other.protocol and ANY_PROTOCOL not in (self.protocol, other.protocol)):
            return None
        return TrafficSelector(addresses, self.protocol or other.protocol, ports)

    def __str__(self) -> str:
        """As swanctl writes it: `10.0.0.0/24[tcp/80]`."""
        if self.protocol == ANY_PROTOCOL and self.ports.any:
            return str(self.addresses)
        names = {PROTOCOL_ICMP: "icmp", PROTOCOL_TCP: "tcp", PROTOCOL_UDP: "udp", PROTOCOL_ICMPV6: "ipv6-icmp"}
        protocol = names.get(self.protocol, str(self.protocol) if self.protocol else "")
        if self.ports.any:
            return f"{self.addresses}[{protocol}]"
        ports = str(self.ports.low) if self.ports.low == self.ports.high else f"{self.ports.low}-{self.ports.high}"
        return f"{self.addresses}[{protocol}/{ports}]"


@dataclass(frozen=True, slots=True)
class Mark:
    """A packet matches when `packet mark & mask == value`."""

    value: int = 0
    mask: int = 0


NO_MARK: Final = Mark()


@dataclass(frozen=True, slots=True)
class Selector:
    """Which packets a policy is for, in the direction in which they travel."""

    source: AddressRange
    destination: AddressRange
    protocol: int = ANY_PROTOCOL
    source_ports: PortRange = ANY_PORT
    destination_ports: PortRange = ANY_PORT
    if_id: int = 0
    mark: Mark = NO_MARK

    def __post_init__(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError("selector of two address families")

    @classmethod
    def between(cls, source: TrafficSelector, destination: TrafficSelector) -> Self:
        """The selector of traffic from `source` to `destination`. Raises ValueError when they share no protocol or family."""
        if source.protocol != destination.protocol and ANY_PROTOCOL not in (source.protocol, destination.protocol):
            raise ValueError(f"selectors of two protocols: {source} and {destination}")
        return cls(source.addresses, destination.addresses, source.protocol or destination.protocol, source.ports, destination.ports)

    def reversed(self) -> Selector:
        return Selector(self.destination, self.source, self.protocol, self.destination_ports, self.source_ports, self.if_id, self.mark)

    @property
    def version(self) -> int:
        return self.source.version

    def __str__(self) -> str:
        source = TrafficSelector(self.source, self.protocol, self.source_ports)
        destination = TrafficSelector(self.destination, self.protocol, self.destination_ports)
        return f"{source} => {destination}"


@dataclass(frozen=True, slots=True)
class Flow:
    """The selectors of one packet. For ICMP both ports are `type << 8 | code`; for a protocol without ports both are 0."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0

    def __str__(self) -> str:
        return f"{self.source}[{self.source_port}] => {self.destination}[{self.destination_port}] proto {self.protocol}"
