"""The label forwarding information base (RFC 3031 section 3.10 to 3.13): ILM, FTN, NHLFE, and which peer may use which label.

Every lookup is one hash probe for a label, and at most one for each prefix length in use for an address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NamedTuple

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.labels import FIRST_LABEL, IMPLICIT_NULL, LAST_LABEL, MAX_DEPTH, Label, LabelSet
from kernel_shim.mpls.tables import LabelTable, RouteTable, SharedPaths

# Limits of this implementation
MAX_LABELS: Final = 1 << 20  # in all label spaces together
MAX_ROUTES: Final = 4 << 20  # in all VRFs together
MAX_PATHS: Final = 64  # of one group

PLATFORM: Final = ""  # the label space of the whole node (RFC 3031 section 3.14); any other is a peer's or an interface's own


class Key(NamedTuple):
    """What names an entry of a node: its kind, and what is unique within the kind."""

    kind: str
    name: tuple[object, ...]


class TtlModel(Enum):
    """RFC 3443 section 2."""

    UNIFORM = "uniform"
    PIPE = "pipe"
    SHORT_PIPE = "short-pipe"


@dataclass(frozen=True, slots=True)
class ToPeer:
    """On to this peer, through its tunnel; as bare IP when no label is left."""

    peer: str


@dataclass(frozen=True, slots=True)
class ToInterface:
    """Out of the VRF's own interface: the payload is IP."""

    vrf: str


@dataclass(frozen=True, slots=True)
class ToVrf:
    """Looked up again by its IP destination in this VRF."""

    vrf: str


@dataclass(frozen=True, slots=True)
class ToStack:
    """Looked up again by the label beneath; by IP in `vrf` when there is none."""

    vrf: str = PLATFORM


NextHop = ToPeer | ToInterface | ToVrf | ToStack


@dataclass(frozen=True, slots=True)
class Nhlfe:
    """What becomes of a packet: the top label is taken off (if one led here), `push` is put on, outermost first, and it goes to `next_hop`.

    `push` of one label is a swap, none a pop; IMPLICIT_NULL among them stands for no label (penultimate-hop popping).
    `traffic_class` None takes it from the label or DSCP that was on top. `entropy` adds an entropy label (RFC 6790) beneath.
    `ttl` says how the LSP that starts or ends here treats the TTL.
    Raises ValueError when it means nothing.
    """

    next_hop: NextHop
    push: tuple[Label, ...] = ()
    ttl: TtlModel = TtlModel.UNIFORM
    traffic_class: int | None = None
    entropy: bool = False

    def __post_init__(self) -> None:
        if any(not (FIRST_LABEL <= label <= LAST_LABEL or label <= IMPLICIT_NULL) for label in self.push):
            raise ValueError(f"not labels to push: {self.push}")
        if self.push and not isinstance(self.next_hop, ToPeer):
            raise ValueError("labels are pushed for a peer only")
        if len(self.push) + (2 if self.entropy else 0) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} labels")
        if self.traffic_class is not None and not 0 <= self.traffic_class < 8:
            raise ValueError(f"not a traffic class: {self.traffic_class}")
        if self.entropy and not self.labels:
            raise ValueError("an entropy label needs a label above it")

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that really go on."""
        return tuple(label for label in self.push if label != IMPLICIT_NULL)

    def __str__(self) -> str:
        """For a person: `100 to pe2 (pipe)`, `looked up in VRF red (uniform)`."""
        hop, labels = self.next_hop, " ".join(map(str, self.labels))
        more = [self.ttl.value, *([f"TC {self.traffic_class}"] if self.traffic_class is not None else []), *(["entropy"] if self.entropy else [])]
        if isinstance(hop, ToPeer):
            what = f"{labels or 'no label'} to {hop.peer}"
        elif isinstance(hop, ToInterface):
            what = f"out of VRF {hop.vrf}"
        elif isinstance(hop, ToVrf):
            what = f"looked up in VRF {hop.vrf}"
        else:
            what = "the label beneath"
        return f"{what} ({', '.join(more)})"


Paths = tuple[Nhlfe, ...]  # more than one: equal cost, chosen by flow


@dataclass(frozen=True, slots=True)
class Peer:
    """A neighbour that may send labels: which ones, and in which space they are looked up."""

    name: str
    accepts: LabelSet
    space: str = PLATFORM

    @property
    def key(self) -> Key:
        return Key("peer", (self.name,))


class Lfib:
    """All of a node's label state. `generation` grows with every change."""

    def __init__(self) -> None:
        self.generation = 0
        self._shared: Final = SharedPaths[Nhlfe]()
        self._ilm: dict[str, LabelTable[Nhlfe]] = {}
        self._label_count = 0
        self._routes: dict[tuple[str, int], RouteTable[Nhlfe]] = {}
        self._route_count = 0
        self.spread = 0  # entries that ask for a flow's hash: equal paths and entropy labels
        self._peers: dict[str, Peer] = {}

    # ILM

    def bind(self, label: Label, paths: Paths, space: str = PLATFORM) -> None:
        """Packets that arrive with `label` on top take one of `paths`; replaces what was bound. Raises ValueError."""
        if not FIRST_LABEL <= label <= LAST_LABEL:
            raise ValueError(f"label {label} cannot be bound")
        if self._label_count >= MAX_LABELS and self.incoming(label, space) is None:
            raise ValueError(f"more than {MAX_LABELS} labels")
        _checked(paths)
        labels = self._ilm.get(space)
        if labels is None:
            labels = self._ilm[space] = LabelTable(self._shared)
        replaced = labels.put(label, paths)
        self._label_count += not replaced
        self.spread += _spreads(paths) - _spreads(replaced)
        self.generation += 1

    def unbind(self, label: Label, space: str = PLATFORM) -> bool:
        """Whether it was bound."""
        labels = self._ilm.get(space)
        paths = labels.put(label, ()) if labels is not None else ()
        if labels is None or not paths:
            return False
        if not labels:
            del self._ilm[space]
        self._label_count -= 1
        self.spread -= _spreads(paths)
        self.generation += 1
        return True

    def incoming(self, label: Label, space: str = PLATFORM) -> Paths | None:
        labels = self._ilm.get(space)
        return labels.find(label) if labels is not None else None

    def labels(self) -> Iterator[tuple[str, Label, Paths]]:
        for space, labels in self._ilm.items():
            for label, paths in labels.items():
                yield space, Label(label), paths

    # FTN

    def route(self, vrf: str, prefix: IPNetwork, paths: Paths) -> None:
        """Packets of `vrf` to `prefix` take one of `paths`; replaces what was there. Raises ValueError."""
        _checked(paths)
        if vrf != PLATFORM and any(isinstance(path.next_hop, ToPeer) and not path.labels for path in paths):
            raise ValueError(f"route to {prefix}: without a label its peer cannot tell the VRF")
        if any(isinstance(path.next_hop, ToStack) or path.next_hop == ToVrf(vrf) for path in paths):
            raise ValueError(f"route to {prefix} leads back to where it was looked up")
        routes = self._routes.get((vrf, prefix.version))
        if self._route_count >= MAX_ROUTES and (routes is None or prefix not in routes):
            raise ValueError(f"more than {MAX_ROUTES} routes")
        if routes is None:
            routes = self._routes[vrf, prefix.version] = RouteTable(prefix.max_prefixlen, self._shared)
        replaced = routes.put(prefix, paths)
        self._route_count += not replaced
        self.spread += _spreads(paths) - _spreads(replaced)
        self.generation += 1

    def unroute(self, vrf: str, prefix: IPNetwork) -> bool:
        """Whether there was such a route."""
        routes = self._routes.get((vrf, prefix.version))
        paths = routes.take(prefix) if routes is not None else ()
        if routes is None or not paths:
            return False
        self._route_count -= 1
        self.spread -= _spreads(paths)
        if not len(routes):
            del self._routes[vrf, prefix.version]
        self.generation += 1
        return True

    def outgoing(self, vrf: str, destination: IPAddress) -> Paths | None:
        """By longest match."""
        routes = self._routes.get((vrf, destination.version))
        return None if routes is None else routes.find(int(destination))

    def prefix_lengths(self, vrf: str, version: int) -> int:
        """How many are in use: the hash probes that a lookup costs at most."""
        routes = self._routes.get((vrf, version))
        return routes.lengths if routes is not None else 0

    def routes(self, vrf: str) -> Iterator[tuple[IPNetwork, Paths]]:
        """Longest prefixes first."""
        for version in (4, 6):
            routes = self._routes.get((vrf, version))
            if routes is not None:
                for length, address, paths in routes.items():
                    yield IPv4Network((address, length)) if version == 4 else IPv6Network((address, length)), paths

    def vrfs(self) -> frozenset[str]:
        """Those that have a route."""
        return frozenset(vrf for vrf, _ in self._routes)

    # Peers

    def admit(self, peer: Peer) -> None:
        """What this peer may send, from now on."""
        self._peers[peer.name] = peer
        self.generation += 1

    def dismiss(self, name: str) -> bool:
        """Whether it was known; it may send no label then."""
        self.generation += 1
        return self._peers.pop(name, None) is not None

    def peer(self, name: str) -> Peer | None:
        return self._peers.get(name)

    def peers(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        """Labels that are bound, in all spaces."""
        return self._label_count


def _checked(paths: Paths) -> Paths:
    if not 1 <= len(paths) <= MAX_PATHS:
        raise ValueError(f"1 to {MAX_PATHS} paths expected, not {len(paths)}")
    return paths


def _spreads(paths: Paths) -> bool:
    return len(paths) > 1 or any(path.entropy for path in paths)
