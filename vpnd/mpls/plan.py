"""From the `mpls` section to the entries of a label node: which VRF imports what, which label means what, who may send it.

1. `assign`    a label for each VRF, or for each of its prefixes
2. `entries`   VRFs, tunnels, peers, labels and routes, all that should stand
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from zlib import crc32

from kernel_shim.model import IPNetwork
from kernel_shim.mpls.allocator import LabelAllocator, LabelsExhausted
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import MAX_PATHS, PLATFORM, Nhlfe, Peer, ToInterface, ToPeer, ToVrf
from kernel_shim.mpls.node import Classes, LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute
from vpnd.mpls.model import LabelMode, LspConfig, MplsConfig, PeerConfig, RouteTarget, VrfConfig

Assignment = Mapping[str, Label]
"""By what a label is for: a VRF's name, or that with a prefix behind it."""


def assign(config: MplsConfig, previous: Assignment | None = None) -> Assignment:
    """The labels of all VRFs. Hand-chosen ones come first, then what was given before, then what the name leads to.

    A label that is given follows from the name alone unless that one is taken, so a node that forgot everything gives the
    same again. Raises LabelsExhausted.
    """
    given: dict[str, Label] = {}
    reserved = {vrf.label for vrf in config.vrfs.values() if vrf.label is not None} | {lsp.label for lsp in config.lsps.values()}
    allocator = LabelAllocator(config.label_range)
    for label in reserved:
        if label in config.label_range:
            allocator.reserve(label)
    wanted: list[str] = []
    for vrf in config.vrfs.values():
        if vrf.label is not None:
            given[vrf.name] = vrf.label
        elif vrf.labels is LabelMode.PER_VRF:
            wanted.append(vrf.name)
        else:
            wanted += [_prefix_name(vrf, prefix) for prefix in vrf.prefixes]
    for name in sorted(wanted, key=lambda name: name not in (previous or {})):
        for label in (*((previous[name],) if previous and name in previous else ()), _derived(name, config.label_range)):
            try:
                allocator.reserve(label)
            except ValueError:
                continue
            given[name] = label
            break
        else:
            given[name] = allocator.allocate()
    return given


def entries(config: MplsConfig, labels: Assignment) -> list[NodeEntry]:
    """All that should stand in the node, each thing after those that it rests upon."""
    found: list[NodeEntry] = []
    if config.dscp_to_tc or config.tc_to_dscp:
        found.append(Classes(ClassMap.class_selectors().but(config.dscp_to_tc, config.tc_to_dscp)))
    found += [Vrf(vrf.name, vrf.interface, vrf.table, vrf.members) for vrf in config.vrfs.values()]
    accepts = accepted(config, labels)
    for peer in config.peers.values():
        if peer.local is not None and peer.remote is not None:
            found.append(Tunnel(peer.name, peer.local, peer.remote, peer.encapsulation, peer.managed))
            found.append(Peer(peer.name, accepts[peer.name], _space(peer)))
    found += _bindings(config, labels, accepts)
    found += _routes(config)
    return found


def labels_of(vrf: VrfConfig, labels: Assignment) -> Iterator[Label]:
    if vrf.labels is LabelMode.PER_PREFIX:
        yield from (labels[_prefix_name(vrf, prefix)] for prefix in vrf.prefixes)
    else:
        yield labels[vrf.name]


def accepted(config: MplsConfig, labels: Assignment) -> Mapping[str, LabelSet]:
    """What each peer with a tunnel may send: as `accept` says, else the labels of VRFs that one of its own, or of peers behind it, imports."""
    told: dict[RouteTarget, list[Label]] = {}
    for vrf in config.vrfs.values():
        for target in vrf.exports:
            told.setdefault(target, []).extend(labels_of(vrf, labels))
    found: dict[str, set[Label]] = {peer.name: set() for peer in config.peers.values() if not peer.via}
    for peer in config.peers.values():
        mine = found[neighbour(config, peer)[0]]
        for remote in peer.vrfs.values():
            for target in remote.imports:
                mine.update(told.get(target, ()))
    for lsp in config.lsps.values():
        for name in lsp.sources:
            found[name].add(lsp.label)
    return {name: _each(mine) if (accept := config.peers[name].accept) is None else accept for name, mine in found.items()}


def _each(labels: Iterable[Label]) -> LabelSet:
    return LabelSet(LabelRange(label, label) for label in labels)


def neighbour(config: MplsConfig, peer: PeerConfig) -> tuple[str, tuple[Label, ...]]:
    """Through whose tunnel `peer` is reached, and the labels that lead on from there, outermost first."""
    push: tuple[Label, ...] = peer.push
    while peer.via:
        peer = config.peers[peer.via]
        push = peer.push + push
    return peer.name, push


def _derived(name: str, ranges: LabelSet) -> Label:
    sizes = [last - first + 1 for first, last in ranges]
    at = crc32(name.encode()) % sum(sizes)
    for (first, _), size in zip(ranges, sizes, strict=True):
        if at < size:
            return Label(first + at)
        at -= size
    raise LabelsExhausted("no labels to give")


def _prefix_name(vrf: VrfConfig, prefix: IPNetwork) -> str:
    return f"{vrf.name} {prefix}"


def _space(peer: PeerConfig) -> str:
    return peer.name if peer.own_space else PLATFORM


def _bindings(config: MplsConfig, labels: Assignment, accepts: Mapping[str, LabelSet]) -> Iterator[LabelBinding]:
    own = [(peer.name, accepts[peer.name]) for peer in config.peers.values() if peer.own_space and not peer.via]
    lsps = {(_space(config.peers[name]), lsp.label) for lsp in config.lsps.values() for name in lsp.sources}
    for vrf in config.vrfs.values():
        whole = vrf.labels is LabelMode.PER_VRF and bool(vrf.prefixes)
        # Without prefixes of its own in the FTN its table in the host knows where they are.
        path = Nhlfe(ToVrf(vrf.name) if whole else ToInterface(vrf.name), ttl=vrf.ttl)
        for label in labels_of(vrf, labels):
            for space in (PLATFORM, *(name for name, may in own if label in may and (name, label) not in lsps)):
                yield LabelBinding(label, (path,), space)
    for lsp in config.lsps.values():
        paths = tuple(_onward(config, lsp))
        for space in sorted({_space(config.peers[name]) for name in lsp.sources} or {PLATFORM}):
            yield LabelBinding(lsp.label, paths, space)


def _onward(config: MplsConfig, lsp: LspConfig) -> Iterator[Nhlfe]:
    if lsp.vrf:
        yield Nhlfe(ToVrf(lsp.vrf), ttl=lsp.ttl)
    for name in lsp.to:
        through, push = neighbour(config, config.peers[name])
        yield Nhlfe(ToPeer(through), push + lsp.push, lsp.ttl, lsp.traffic_class, lsp.entropy)


def _routes(config: MplsConfig) -> Iterator[VrfRoute]:
    """A VRF's own prefixes, then those of other VRFs here, then those of peers: the nearer of two wins."""
    here: dict[RouteTarget, list[VrfConfig]] = {}
    for vrf in config.vrfs.values():
        for target in vrf.exports:
            here.setdefault(target, []).append(vrf)
    there: dict[RouteTarget, list[tuple[Nhlfe, tuple[IPNetwork, ...]]]] = {}
    for peer in config.peers.values():
        through, push = neighbour(config, peer)
        for remote in peer.vrfs.values():
            path = Nhlfe(ToPeer(through), (*push, remote.label), peer.ttl, peer.traffic_class, peer.entropy)
            for target in remote.exports:
                there.setdefault(target, []).append((path, remote.prefixes))
    for vrf in config.vrfs.values():
        imports = sorted(vrf.imports)
        routes: dict[IPNetwork, list[Nhlfe]] = {prefix: [Nhlfe(ToInterface(vrf.name))] for prefix in vrf.prefixes}
        for other in (it for target in imports for it in here.get(target, ()) if it is not vrf):
            for prefix in other.prefixes:
                routes.setdefault(prefix, [Nhlfe(ToVrf(other.name))])
        nearer = set(routes)
        for path, prefixes in (it for target in imports for it in there.get(target, ())):
            for prefix in prefixes:
                if prefix not in nearer and path not in (paths := routes.setdefault(prefix, [])) and len(paths) < MAX_PATHS:
                    paths.append(path)
        yield from (VrfRoute(vrf.name, prefix, tuple(paths)) for prefix, paths in routes.items())
