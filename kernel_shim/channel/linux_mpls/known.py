"""The entries that stand in Linux as they were put, or else read, and what rests upon which device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kernel_shim.channel.linux_mpls.routes import stays_within
from kernel_shim.mpls.lfib import Key, Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute


class Known:
    """Every change and every question costs the same, however many there are."""

    def __init__(self) -> None:
        self._entries: dict[Key, NodeEntry] = {}
        self._upon: dict[Key, dict[Key, None]] = {}
        self._vrfs: dict[str, Vrf] = {}
        self._tunnels: dict[Key, Tunnel] = {}
        self._own: dict[Key, VrfRoute] = {}

    def get(self, key: Key) -> NodeEntry | None:
        return self._entries.get(key)

    def entries(self) -> Sequence[NodeEntry]:
        return list(self._entries.values())

    def stands(self, key: Key) -> bool:
        """Whether Linux has something for it."""
        return key in self._entries and key not in self._own

    @property
    def vrfs(self) -> Mapping[str, Vrf]:
        return self._vrfs

    @property
    def tunnels(self) -> Mapping[Key, Tunnel]:
        return self._tunnels

    @property
    def own_routes(self) -> Mapping[Key, VrfRoute]:
        """For which Linux needs none."""
        return self._own

    def upon(self, device: Key) -> list[NodeEntry]:
        """What goes with a VRF's or tunnel's device, or loses a path."""
        return [self._entries[key] for key in self._upon.get(device, ())]

    def put(self, entry: NodeEntry) -> None:
        key = entry.key
        self.drop(key)
        self._entries[key] = entry
        for device in _rests_upon(entry):
            self._upon.setdefault(device, {})[key] = None
        if isinstance(entry, Vrf):
            self._vrfs[entry.name] = entry
        elif isinstance(entry, Tunnel):
            self._tunnels[key] = entry
        elif isinstance(entry, VrfRoute) and stays_within(entry):
            self._own[key] = entry

    def drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        for device in _rests_upon(entry):
            keys = self._upon.get(device, {})
            keys.pop(key, None)
            if not keys:
                self._upon.pop(device, None)
        if isinstance(entry, Vrf):
            del self._vrfs[entry.name]
        self._tunnels.pop(key, None)
        self._own.pop(key, None)

    def as_put(self, entry: NodeEntry) -> NodeEntry:
        """What was put, if the kernel tells as much of it."""
        known = self._entries.get(entry.key)
        return known if known is not None and (known == entry or _as_told(known) == _as_told(entry)) else entry


def _rests_upon(entry: NodeEntry) -> Iterator[Key]:
    """Keys of devices."""
    if isinstance(entry, Peer):
        yield Key("tunnel", (entry.name,))
    elif isinstance(entry, LabelBinding | VrfRoute):
        if isinstance(entry, VrfRoute):
            yield Key("vrf", (entry.vrf,))
        for path in entry.paths:
            if isinstance(path.next_hop, ToPeer):
                yield Key("tunnel", (path.next_hop.peer,))
            elif isinstance(path.next_hop, ToVrf | ToInterface):
                yield Key("vrf", (path.next_hop.vrf,))


def _as_told(entry: NodeEntry) -> NodeEntry:
    """As much of it as Linux tells."""
    match entry:
        case Tunnel():
            return replace(entry, managed=False)
        case LabelBinding():
            return replace(entry, paths=tuple(_path_as_told(path) for path in entry.paths))
        case VrfRoute():
            return replace(entry, paths=tuple(_path_as_told(path if path.labels else replace(path, ttl=TtlModel.UNIFORM)) for path in entry.paths))
    return entry


def _path_as_told(path: Nhlfe) -> Nhlfe:
    hop = ToVrf(path.next_hop.vrf) if isinstance(path.next_hop, ToInterface) else path.next_hop
    return Nhlfe(hop, path.labels, TtlModel.UNIFORM if path.ttl is TtlModel.UNIFORM else TtlModel.PIPE)
