"""What one node is told about labels, entry by entry: VRFs, tunnels to peers, what a peer may send, labels, routes.

An entry has a key; putting another of the same key replaces it. So a key manager keeps the entries that should be there,
reads those that are, and repairs the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import PLATFORM, Key, Lfib, Paths, Peer

# Limits of this implementation
MAX_VRFS: Final = 1024
MAX_TUNNELS: Final = 16384


@dataclass(frozen=True, slots=True)
class Vrf:
    """A customer's network. `interface` is the device by which its packets come and go.

    `members` are the host's interfaces towards the customer: what they receive is routed by `table` and nothing else; 0 leaves that to the host.
    """

    name: str
    interface: str
    table: int = 0
    members: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return Key("vrf", (self.name,))


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How labelled packets travel to the peer of this name and come from it.

    Between `local` and `remote`, as `encapsulation` says, inside the SA that a policy asks for. `managed`: the operator says
    that the network between is managed, so that a policy may also let it pass in clear (RFC 7510 section 3.1).
    """

    peer: str
    local: IPAddress
    remote: IPAddress
    encapsulation: Encapsulation = Encapsulation.GRE
    managed: bool = False

    @property
    def key(self) -> Key:
        return Key("tunnel", (self.peer,))


@dataclass(frozen=True, slots=True)
class LabelBinding:
    """An entry of the ILM."""

    label: Label
    paths: Paths
    space: str = PLATFORM

    @property
    def key(self) -> Key:
        return Key("label", (self.space, self.label))


@dataclass(frozen=True, slots=True)
class VrfRoute:
    """An entry of the FTN."""

    vrf: str
    prefix: IPNetwork
    paths: Paths

    @property
    def key(self) -> Key:
        return Key("route", (self.vrf, self.prefix))


@dataclass(frozen=True, slots=True)
class Classes:
    """How traffic classes and code points stand for each other, in all of the node."""

    map: ClassMap

    @property
    def key(self) -> Key:
        return Key("classes", ())


NodeEntry = Vrf | Tunnel | Peer | LabelBinding | VrfRoute | Classes


class LabelNode:
    """`changed(entry)` is called after every change that packets may depend on, with the key of what came or went."""

    def __init__(self, changed: Callable[[Key], None]) -> None:
        self._changed: Final = changed
        self.lfib: Final = Lfib()
        self.forwarder: Final = Forwarder(self.lfib)
        self._vrfs: dict[str, Vrf] = {}
        self._tunnels: dict[str, Tunnel] = {}
        self._ends: dict[tuple[IPAddress, IPAddress], Tunnel] = {}
        self._udp_tunnels = 0
        self._classes: Classes | None = None
        self._addresses: dict[tuple[str, int], bytes] = {}

    def put(self, entry: NodeEntry) -> None:
        """Add, or replace what has the same key. Raises ValueError, and nothing has changed then."""
        if isinstance(entry, LabelBinding):
            self.lfib.bind(entry.label, entry.paths, entry.space)
        elif isinstance(entry, VrfRoute):
            self.lfib.route(entry.vrf, entry.prefix, entry.paths)
        elif isinstance(entry, Peer):
            self.lfib.admit(entry)
        elif isinstance(entry, Tunnel):
            self._connect(entry)
        elif isinstance(entry, Classes):
            self._classify(entry)
        else:
            self._put_vrf(entry)
        self._changed(entry.key)

    def remove(self, key: Key) -> bool:
        """Whether there was such an entry."""
        kind, name = key
        if kind == "label":
            space, label = name
            removed = isinstance(space, str) and isinstance(label, int) and self.lfib.unbind(Label(label), space)
        elif kind == "route":
            vrf, prefix = name
            removed = isinstance(vrf, str) and isinstance(prefix, IPNetwork) and self.lfib.unroute(vrf, prefix)
        elif kind == "peer":
            removed = self.lfib.dismiss(str(name[0]))
        elif kind == "tunnel":
            removed = self._disconnect(str(name[0]))
        elif kind == "classes":
            removed = self._classes is not None
            self._classify(None)
        else:
            removed = self._vrfs.pop(str(name[0]), None) is not None
        if removed:
            self._changed(key)
        return removed

    def entries(self) -> Iterator[NodeEntry]:
        if self._classes is not None:
            yield self._classes
        yield from self._vrfs.values()
        yield from self._tunnels.values()
        yield from self.lfib.peers()
        for space, label, paths in self.lfib.labels():
            yield LabelBinding(label, paths, space)
        for vrf in sorted(self.lfib.vrfs()):
            for prefix, paths in self.lfib.routes(vrf):
                yield VrfRoute(vrf, prefix, paths)

    def vrfs(self) -> Iterator[Vrf]:
        return iter(self._vrfs.values())

    def vrf(self, name: str) -> Vrf | None:
        return self._vrfs.get(name)

    def set_addresses(self, vrf: str, addresses: Iterable[IPAddress]) -> None:
        """This node's own in that VRF, one of each IP version at most: its errors come from there."""
        for version in (4, 6):
            self._addresses.pop((vrf, version), None)
        self._addresses.update({(vrf, address.version): address.packed for address in addresses})

    def address(self, vrf: str, version: int) -> bytes:
        return self._addresses.get((vrf, version), b"")

    def tunnel(self, peer: str) -> Tunnel | None:
        return self._tunnels.get(peer)

    def between(self, local: IPAddress, remote: IPAddress) -> Tunnel | None:
        return self._ends.get((local, remote))

    @property
    def spreads(self) -> bool:
        """Whether packets of one destination may take several ways, so that their whole flow counts."""
        return self.lfib.spread > 0 or self._udp_tunnels > 0

    def _put_vrf(self, vrf: Vrf) -> None:
        if vrf.name not in self._vrfs and len(self._vrfs) >= MAX_VRFS:
            raise ValueError(f"more than {MAX_VRFS} VRFs")
        if vrf.name == PLATFORM or any(it.interface == vrf.interface and it.name != vrf.name for it in self._vrfs.values()):
            raise ValueError(f"VRF {vrf.name!r} with interface {vrf.interface!r}: one of the two is taken")
        for other in self._vrfs.values():
            if other.name != vrf.name and ((vrf.table and vrf.table == other.table) or set(vrf.members) & set(other.members)):
                raise ValueError(f"VRF {vrf.name!r} shares its table or an interface with {other.name!r}")
        self._vrfs[vrf.name] = vrf

    def _classify(self, classes: Classes | None) -> None:
        self._classes = classes
        self.forwarder.classes = classes.map if classes is not None else ClassMap.class_selectors()
        self.lfib.generation += 1

    def _connect(self, tunnel: Tunnel) -> None:
        other = self._ends.get((tunnel.local, tunnel.remote))
        if other is not None and other.peer != tunnel.peer:
            raise ValueError(f"{tunnel.local} to {tunnel.remote} leads to {other.peer} already")
        if tunnel.peer not in self._tunnels and len(self._tunnels) >= MAX_TUNNELS:
            raise ValueError(f"more than {MAX_TUNNELS} tunnels")
        self._disconnect(tunnel.peer)
        self._tunnels[tunnel.peer] = self._ends[tunnel.local, tunnel.remote] = tunnel
        self._udp_tunnels += tunnel.encapsulation is Encapsulation.UDP

    def _disconnect(self, peer: str) -> bool:
        tunnel = self._tunnels.pop(peer, None)
        if tunnel is None:
            return False
        del self._ends[tunnel.local, tunnel.remote]
        self._udp_tunnels -= tunnel.encapsulation is Encapsulation.UDP
        return True
