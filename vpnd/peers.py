"""Which connection is for which addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network

from kernel_shim.model import AddressRange, Endpoint, IPAddress
from vpnd.config.model import ConnectionConfig

ANY: tuple[str, ...] = ("%any", "%any4", "%any6", "0.0.0.0", "::", "0.0.0.0/0", "::/0")  # noqa: S104  # what swanctl.conf calls any address

EXACT, WITHIN, BY_ANY, NOT = 3, 2, 1, 0


def fixed_address(pattern: str) -> IPAddress | None:
    """The one address that a pattern names; None for any, a network, a range or a host name."""
    if pattern in ANY:
        return None
    try:
        return ip_address(pattern)
    except ValueError:
        return None


def host_names(patterns: Iterable[str]) -> list[str]:
    """Those patterns that only a resolver can turn into an address."""
    return [pattern for pattern in patterns if pattern not in ANY and fixed_address(pattern) is None and _range(pattern) is None]


def _range(pattern: str) -> AddressRange | None:
    try:
        if "-" in pattern and "/" not in pattern:
            first, _, last = pattern.partition("-")
            return AddressRange(ip_address(first.strip()), ip_address(last.strip()))
        return AddressRange.of(ip_network(pattern, strict=False))
    except ValueError:
        return None


def match(patterns: Sequence[str], address: IPAddress, resolved: Mapping[str, IPAddress]) -> int:
    """How closely `local_addrs` or `remote_addrs` fit an address: EXACT, WITHIN a network or range, BY_ANY, or NOT."""
    best = NOT
    for pattern in patterns:
        if pattern in ANY:
            family = 6 if ":" in pattern or pattern == "%any6" else 0 if pattern == "%any" else 4
            if family in (0, address.version):
                best = max(best, BY_ANY)
        elif address in (fixed_address(pattern), resolved.get(pattern)):
            return EXACT
        elif (covered := _range(pattern)) is not None and address in covered:
            best = max(best, WITHIN)
    return best


def candidates(connections: Iterable[ConnectionConfig], local: Endpoint, remote: Endpoint, resolved: Mapping[str, IPAddress]) -> list[ConnectionConfig]:
    """Connections that fit a request from `remote` to `local`, the closest remote match first, in order of loading among equals."""
    ranked = []
    for connection in connections:
        quality = (match(connection.remote_addrs, remote.address, resolved), match(connection.local_addrs, local.address, resolved))
        if NOT not in quality:
            ranked.append((quality, connection))
    ranked.sort(key=lambda item: item[0], reverse=True)
    return [connection for _, connection in ranked]
