"""Which connection is for which addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Final

from kernel_shim.model import AddressRange, Endpoint, IPAddress
from vpnd.config.model import ConnectionConfig

ANY: tuple[str, ...] = ("%any", "%any4", "%any6", "0.0.0.0", "::", "0.0.0.0/0", "::/0")  # noqa: S104  # what swanctl.conf calls any address

REMEMBERED_PATTERNS: Final = 1 << 15  # parsed once; more of them only cost time
EXACT, WITHIN, BY_ANY, NOT = 3, 2, 1, 0


@lru_cache(REMEMBERED_PATTERNS)
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


@lru_cache(REMEMBERED_PATTERNS)
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


class Connections(MutableMapping[str, ConnectionConfig]):
    """Connections by name, in order of loading. Whoever sends an IKE_SA_INIT makes us look for his: the fixed addresses of peers are an index."""

    def __init__(self) -> None:
        self._by_name: dict[str, ConnectionConfig] = {}
        self._order: dict[str, int] = {}
        self._loaded = 0
        self._fixed: dict[IPAddress, set[str]] = {}
        self._loose: set[str] = set()  # with a remote address that is not fixed

    def __getitem__(self, name: str) -> ConnectionConfig:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __setitem__(self, name: str, connection: ConnectionConfig) -> None:
        if name in self._by_name:
            self._unindex(name)
        else:
            self._loaded += 1
            self._order[name] = self._loaded
        self._by_name[name] = connection
        for address in map(fixed_address, connection.remote_addrs):
            if address is None:
                self._loose.add(name)
            else:
                self._fixed.setdefault(address, set()).add(name)

    def __delitem__(self, name: str) -> None:
        self._unindex(name)
        del self._by_name[name], self._order[name]

    def _unindex(self, name: str) -> None:
        self._loose.discard(name)
        for address in map(fixed_address, self._by_name[name].remote_addrs):
            if address is not None and (names := self._fixed.get(address)) is not None:
                names.discard(name)
                if not names:
                    del self._fixed[address]

    def candidates(self, local: Endpoint, remote: Endpoint, resolved: Mapping[str, IPAddress]) -> list[ConnectionConfig]:
        """As the function of that name, over all connections."""
        names = sorted(self._loose | self._fixed.get(remote.address, set()), key=self._order.__getitem__)
        return candidates([self._by_name[name] for name in names], local, remote, resolved)
