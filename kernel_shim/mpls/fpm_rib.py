"""What a routing daemon said, and the entries of the label node that follow from it.

A route of a VRF's table, or a label, leads to the peer whose tunnel ends at its gateway, or stays in a VRF. A new connection says everything again: what it has
not said again when `sweep` is called goes. Until then the old routes carry packets on, by the next hops that their own connection said: the numbers of
next hops are a daemon's own, and one that started anew gives them to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.fpm import FpmChange, GroupChange, Hop, RouteChange
from kernel_shim.mpls.labels import FIRST_LABEL, Label
from kernel_shim.mpls.lfib import MAX_PATHS, Key, Nhlfe, Paths, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, VrfRoute

# Limits of this implementation
MAX_ROUTES: Final = 1 << 20  # routes and labels together
MAX_GROUPS: Final = 1 << 18
MAX_NESTING: Final = 4  # groups of groups


class RibFull(RuntimeError):
    """More routes or groups than the bounds; the daemon has said something that was not kept."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What numbers and addresses mean on this host; None means nothing to labels.

    `complete`: VRFs of whose own prefixes there are entries. Of the others the host's table knows them: zebra 8.4 says that connected
    subnets are gone when bgpd ends, though they are not.
    """

    vrf_of_table: Callable[[int], str | None]
    vrf_of_interface: Callable[[int], str | None]
    peer_of: Callable[[IPAddress], str | None]
    ttl: TtlModel = TtlModel.PIPE
    complete: frozenset[str] = frozenset()


_Name = tuple[int, IPNetwork] | Label  # of a route: table and prefix; of a label: itself


@dataclass(slots=True)
class _Said:
    hops: tuple[Hop, ...]
    group: int
    round: int


class FpmRib:
    """`take_changes` gives what became of entries since the last call: None for one that is not there any more, if it ever was known."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._said: dict[_Name, _Said] = {}
        self._groups: dict[int, GroupChange] = {}  # of the newest connection
        self._users: dict[int, set[_Name]] = {}  # of a group, by whom it is named
        self._holders: dict[int, set[int]] = {}  # of a group, the groups that it is a member of
        self._entries: dict[_Name, NodeEntry] = {}
        self._changes: dict[Key, NodeEntry | None] = {}
        self._round = 0
        self.unresolved = 0  # hops that led nowhere known, in all that was said so far

    def __len__(self) -> int:
        """Routes and labels that the daemon says there are."""
        return len(self._said)

    def entries(self) -> Iterator[NodeEntry]:
        return iter(self._entries.values())

    def take_changes(self) -> Mapping[Key, NodeEntry | None]:
        changes, self._changes = self._changes, {}
        return changes

    def begin(self) -> None:
        """A new connection: the daemon says everything again, next hops before the routes that name them."""
        self._round += 1
        for number, names in self._users.items():
            hops = tuple(dict.fromkeys(self._hops((), number)))
            for name in names:
                said = self._said[name]
                self._said[name] = _Said(said.hops + hops, 0, said.round)
        self._groups, self._users, self._holders = {}, {}, {}

    def sweep(self) -> int:
        """Forget what the newest connection has not said; how many routes and labels that were."""
        stale = [name for name, said in self._said.items() if said.round != self._round]
        for name in stale:
            self._forget(name)
        return len(stale)

    def surround(self, surroundings: Surroundings) -> None:
        """Numbers and addresses mean something else now."""
        self._surroundings = surroundings
        for name in self._said:
            self._resolve(name)

    def apply(self, change: FpmChange) -> None:
        """Raises RibFull, and nothing has changed then."""
        if isinstance(change, GroupChange):
            self._put_group(change)
            return
        name: _Name = (change.table, change.prefix) if isinstance(change, RouteChange) else change.label
        if change.gone:
            self._forget(name)
            return
        if name not in self._said and len(self._said) >= MAX_ROUTES:
            raise RibFull(f"more than {MAX_ROUTES} routes and labels")
        self._release(name)
        self._said[name] = _Said(change.hops, change.group, self._round)
        if change.group:
            self._users.setdefault(change.group, set()).add(name)
        self._resolve(name)

    # Inside

    def _forget(self, name: _Name) -> None:
        self._release(name)
        if self._said.pop(name, None) is not None:
            self._set_entry(name, None)

    def _release(self, name: _Name) -> None:
        said = self._said.get(name)
        if said is not None and said.group:
            users = self._users.get(said.group)
            if users is not None:
                users.discard(name)
                if not users:
                    del self._users[said.group]

    def _put_group(self, change: GroupChange) -> None:
        number = change.number
        old = self._groups.pop(number, None)
        if old is not None:
            for member in old.members:
                self._holders.get(member, set()).discard(number)
        if not change.gone:
            if len(self._groups) >= MAX_GROUPS:
                raise RibFull(f"more than {MAX_GROUPS} next hops")
            self._groups[number] = change
            for member in change.members:
                self._holders.setdefault(member, set()).add(number)
        if old == change:
            return
        for name in self._affected(number, MAX_NESTING):
            self._resolve(name)

    def _affected(self, number: int, nesting: int) -> set[_Name]:
        names = set(self._users.get(number, ()))
        if nesting:
            for holder in self._holders.get(number, ()):
                names |= self._affected(holder, nesting - 1)
        return names

    def _hops(self, hops: tuple[Hop, ...], group: int, nesting: int = MAX_NESTING) -> Iterator[Hop]:
        yield from hops
        known = self._groups.get(group)
        if known is None or not nesting:
            return
        if known.hop is not None:
            yield known.hop
        for member in known.members:
            yield from self._hops((), member, nesting - 1)

    def _resolve(self, name: _Name) -> None:
        said = self._said[name]
        hops = self._hops(said.hops, said.group)
        if isinstance(name, tuple):
            table, prefix = name
            vrf = self._surroundings.vrf_of_table(table)
            if vrf is None or prefix.is_link_local:
                return self._set_entry(name, None)
            paths = self._paths(hops, lambda hop: self._path_of_route(vrf, hop))
            return self._set_entry(name, VrfRoute(vrf, prefix, paths) if paths else None)
        if name < FIRST_LABEL:
            return self._set_entry(name, None)
        paths = self._paths(hops, self._path_of_label)
        self._set_entry(name, LabelBinding(name, paths) if paths else None)

    def _paths(self, hops: Iterator[Hop], path_of: Callable[[Hop], Nhlfe | None]) -> Paths:
        paths: dict[Nhlfe, None] = {}
        for hop in hops:
            path = path_of(hop)
            if path is None:
                self.unresolved += 1
            elif len(paths) < MAX_PATHS:
                paths[path] = None
        return tuple(paths)

    def _path_of_route(self, vrf: str, hop: Hop) -> Nhlfe | None:
        peer = self._surroundings.peer_of(hop.gateway) if hop.gateway is not None else None
        if hop.labels:
            return Nhlfe(ToPeer(peer), hop.labels, self._surroundings.ttl) if peer is not None else None
        if peer is not None:
            return None  # without a label it could not tell the VRF
        other = self._surroundings.vrf_of_interface(hop.interface) if hop.gateway is None else None
        return Nhlfe(self._into(other)) if other is not None and other != vrf else Nhlfe(ToInterface(vrf))

    def _path_of_label(self, hop: Hop) -> Nhlfe | None:
        peer = self._surroundings.peer_of(hop.gateway) if hop.gateway is not None else None
        if peer is not None:
            return Nhlfe(ToPeer(peer), hop.labels, self._surroundings.ttl)
        vrf = self._surroundings.vrf_of_interface(hop.interface)
        return Nhlfe(self._into(vrf), ttl=self._surroundings.ttl) if vrf is not None and not hop.labels else None

    def _into(self, vrf: str) -> ToVrf | ToInterface:
        return ToVrf(vrf) if vrf in self._surroundings.complete else ToInterface(vrf)

    def _set_entry(self, name: _Name, entry: NodeEntry | None) -> None:
        old = self._entries.pop(name, None)
        if entry is not None:
            self._entries[name] = entry
        if entry == old:
            return
        if old is not None and (entry is None or entry.key != old.key):
            self._changes[old.key] = None
        if entry is not None:
            self._changes[entry.key] = entry
