"""Which routes and rules carry protected traffic into the TUN: a pure plan, incremental, one reference count a prefix.

1. A source prefix of the policies gets a routing table of its own and a rule `from PREFIX lookup TABLE`, so that only what
   may match is captured. Beyond `SOURCE_TABLES` prefixes a shared table without a source takes the rest: what it captures
   needlessly the data plane lets out again.
2. A destination prefix is a route into the TUN in the table of each of its sources, with an `unreachable` twin.
3. A packet of this host that has no source yet is looked up in the host table, whose routes prefer an address of this host
   that the policy covers. IPv4 has a rule for "no source yet"; IPv6 has none, there the rule is for all of the host's own packets.
4. Subnets on this side of the tunnel, and what never leaves a link, are `throw` routes: the next rule decides.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_network
from itertools import islice, product
from typing import Final, NamedTuple

from kernel_shim.io.connected import Connected, HostAddress
from kernel_shim.io.settings import TABLES
from kernel_shim.model import Action, AddressRange, Direction, IPAddress, IPNetwork, KernelError, Policy

SOURCE_TABLES: Final = TABLES - 2
HOST_TABLE: Final = TABLES - 2  # offsets from the first table
SHARED_TABLE: Final = TABLES - 1
MAX_PREFIXES: Final = 256  # one address range
MAX_PAIRS: Final = 4096  # source and destination prefixes of one policy

EVERYTHING: Final[dict[int, IPNetwork]] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
LINK_SCOPE: Final[dict[int, tuple[IPNetwork, ...]]] = {
    4: (ip_network("224.0.0.0/24"), ip_network("169.254.0.0/16")),
    6: (ip_network("fe80::/10"), ip_network("ff02::/16")),
}


class Rule(NamedTuple):
    """Look packets up in the table at offset `table`: of `source`, or of this host when that is None."""

    version: int
    table: int
    source: IPNetwork | None


class Kind(Enum):
    CAPTURE = "capture"  # into the TUN, with its twin
    THROW = "throw"


class Route(NamedTuple):
    """A prefix in the table at offset `table`. `preferred` is the source for packets that have none."""

    kind: Kind
    table: int
    destination: IPNetwork
    preferred: IPAddress | None = None


class Change(NamedTuple):
    """Put `item` into the host, or take it away. Putting a route replaces the one of its prefix."""

    put: bool
    item: Rule | Route


@dataclass(slots=True)
class _Source:
    table: int
    destinations: Counter[IPNetwork] = field(default_factory=Counter)


def prefixes(addresses: AddressRange) -> tuple[IPNetwork, ...]:
    """The prefixes of a range. KernelError(ENOSPC) when they are too many."""
    found = tuple(islice(addresses.prefixes(), MAX_PREFIXES + 1))
    if len(found) > MAX_PREFIXES:
        raise KernelError(errno.ENOSPC, f"{addresses} takes more than {MAX_PREFIXES} prefixes")
    return found


def sides(policy: Policy) -> tuple[tuple[IPNetwork, ...], tuple[IPNetwork, ...]]:
    """Source and destination prefixes of a policy. KernelError(ENOSPC) when their pairs are too many."""
    source, destination = prefixes(policy.selector.source), prefixes(policy.selector.destination)
    if len(source) * len(destination) > MAX_PAIRS:
        raise KernelError(errno.ENOSPC, f"{policy.selector} takes more than {MAX_PAIRS} pairs of prefixes")
    return source, destination


class CapturePlan:
    """Feed it the outbound policies; carry out the changes that it gives, in order. `connected` is shared with the guard."""

    def __init__(self, connected: Connected) -> None:
        self._connected: Final = connected
        self._addresses: tuple[HostAddress, ...] = ()
        self._sources: dict[IPNetwork, _Source] = {}
        self._overflow: dict[IPNetwork, int] = {}  # source prefixes that share the table without a source, with their pairs
        self._shared: dict[int, _Source] = {version: _Source(SHARED_TABLE) for version in (4, 6)}
        self._host: dict[IPNetwork, Counter[IPNetwork]] = {}  # destination -> its sources
        self._preferred: dict[IPNetwork, IPAddress] = {}  # what the host table has now
        self._hosted: Counter[int] = Counter()  # routes in the host table, by IP version
        self._throws: set[tuple[int, IPNetwork]] = set()
        self._tables_changed = False
        self._connected_seen = -1
        self._slots: dict[int, list[int]] = {version: list(range(SOURCE_TABLES - 1, -1, -1)) for version in (4, 6)}
        self._adopted: dict[IPNetwork, int] = {}

    @staticmethod
    def captures(policy: Policy) -> bool:
        return policy.direction is Direction.OUT and policy.action is not Action.BYPASS

    def adopt(self, source: IPNetwork, table: int) -> None:
        """An earlier process gave this table to this source: keep to it."""
        slots = self._slots[source.version]
        if table in slots:
            slots.remove(table)
            self._adopted[source] = table

    def release_adopted(self) -> None:
        """The takeover is over: tables of sources that did not come back are free."""
        for source, table in self._adopted.items():
            self._slots[source.version].append(table)
        self._adopted.clear()

    def set_host(self, addresses: tuple[HostAddress, ...]) -> list[Change]:
        """Addresses of the host changed; `connected` knows already."""
        self._addresses = addresses
        changes: list[Change] = []
        for destination in list(self._host):
            changes += self._refresh_host(destination)
        return changes + self.refresh()

    def add(self, policy: Policy) -> list[Change]:
        """KernelError(ENOSPC) when the selector takes too many prefixes; nothing has changed then."""
        changes: list[Change] = []
        for source, destination in product(*sides(policy)):
            group, rule = self._claim(source)
            group.destinations[destination] += 1
            if group.destinations[destination] == 1:
                self._tables_changed |= destination in LINK_SCOPE[destination.version]
                changes.append(Change(True, Route(Kind.CAPTURE, group.table, destination)))
            if rule is not None:
                changes.append(Change(True, rule))
            self._host.setdefault(destination, Counter())[source] += 1
            if self._host[destination][source] == 1:
                changes += self._refresh_host(destination)
        return changes + self.refresh()

    def remove(self, policy: Policy) -> list[Change]:
        """Of a policy that `add` took."""
        changes: list[Change] = []
        for source, destination in product(*sides(policy)):
            changes += self._drop_pair(source, destination)
            sources = self._host[destination]
            sources[source] -= 1
            if not sources[source]:
                del sources[source]
                changes += self._refresh_host(destination)
            if not sources:
                del self._host[destination]
        return changes + self.refresh()

    def _claim(self, source: IPNetwork) -> tuple[_Source, Rule | None]:
        """The table of a source prefix, and the rule to put when it is new."""
        version = source.version
        group = self._sources.get(source)
        if group is not None:
            return group, None
        if source not in self._overflow:
            table = self._adopted.pop(source, None)
            if table is None and self._slots[version]:
                table = self._slots[version].pop()
            if table is not None:
                self._tables_changed = True
                group = self._sources[source] = _Source(table)
                return group, Rule(version, table, source)
        first = not self._shared[version].destinations
        self._tables_changed |= first
        self._overflow[source] = self._overflow.get(source, 0) + 1
        return self._shared[version], Rule(version, SHARED_TABLE, EVERYTHING[version]) if first else None

    def _drop_pair(self, source: IPNetwork, destination: IPNetwork) -> list[Change]:
        version = source.version
        group = self._sources.get(source)
        rule = Rule(version, group.table, source) if group is not None else Rule(version, SHARED_TABLE, EVERYTHING[version])
        if group is None:
            group = self._shared[version]
            self._overflow[source] -= 1
            if not self._overflow[source]:
                del self._overflow[source]
        changes: list[Change] = []
        group.destinations[destination] -= 1
        if not group.destinations[destination]:
            del group.destinations[destination]
            self._tables_changed |= destination in LINK_SCOPE[destination.version]
            changes.append(Change(False, Route(Kind.CAPTURE, group.table, destination)))
        if not group.destinations:
            self._tables_changed = True
            changes.append(Change(False, rule))
            if group.table != SHARED_TABLE:
                del self._sources[source]
                self._slots[version].append(group.table)
        return changes

    def _refresh_host(self, destination: IPNetwork) -> list[Change]:
        """The host table's route of one destination: there while this host has an address that one of its sources covers."""
        wanted = self._choose(destination)
        present = self._preferred.get(destination)
        if wanted == present:
            return []
        version = destination.version
        changes: list[Change] = []
        if wanted is None:
            del self._preferred[destination]
            changes.append(Change(False, Route(Kind.CAPTURE, HOST_TABLE, destination)))
            self._hosted[version] -= 1
            if not self._hosted[version]:
                self._tables_changed = True
                changes.append(Change(False, Rule(version, HOST_TABLE, None)))
            return changes
        if not self._hosted[version]:
            self._tables_changed = True
            changes.append(Change(True, Rule(version, HOST_TABLE, None)))
        self._hosted[version] += present is None
        self._preferred[destination] = wanted
        changes.append(Change(True, Route(Kind.CAPTURE, HOST_TABLE, destination, wanted)))
        return changes

    def _choose(self, destination: IPNetwork) -> IPAddress | None:
        # A source of everything covers whatever address the host chooses by itself.
        narrow = [source for source in self._host[destination] if source.prefixlen > 0]
        covered = (host.address for host in self._addresses if any(host.address.version == s.version and host.address in s for s in narrow))
        return min(covered, default=None, key=int)

    def refresh(self) -> list[Change]:
        """Bring the throw routes up to date; needed after `connected` changed by another hand."""
        if not self._tables_changed and self._connected_seen == self._connected.generation:
            return []
        self._tables_changed, self._connected_seen = False, self._connected.generation
        wanted = set(self._wanted_throws())
        changes = [Change(False, Route(Kind.THROW, *gone)) for gone in self._throws - wanted]
        changes += [Change(True, Route(Kind.THROW, *new)) for new in wanted - self._throws]
        self._throws = wanted
        return changes

    def _wanted_throws(self) -> Iterable[tuple[int, IPNetwork]]:
        inside = self._connected.inside()
        for source, group in self._sources.items():
            for subnet in inside:
                if subnet.version == source.version and source.prefixlen > 0 and subnet.subnet_of(source):  # type: ignore[arg-type]
                    yield group.table, subnet
            yield from ((group.table, network) for network in LINK_SCOPE[source.version] if network not in group.destinations)
        for version in (4, 6):
            shared = self._shared[version]
            if shared.destinations:
                yield from ((SHARED_TABLE, subnet) for subnet in inside if subnet.version == version)
                yield from ((SHARED_TABLE, network) for network in LINK_SCOPE[version] if network not in shared.destinations)
            if self._hosted[version]:
                yield from ((HOST_TABLE, subnet) for subnet in self._connected.routable(version) if subnet not in self._preferred)
                yield from ((HOST_TABLE, network) for network in LINK_SCOPE[version] if network not in self._preferred)
