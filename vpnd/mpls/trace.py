"""What would become of a packet: label by label, with the decisions of the data plane's own `Forwarder` on what stands in the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from kernel_shim.model import IPAddress
from kernel_shim.mpls.diffserv import ClassMap
from kernel_shim.mpls.forward import Forwarder, choose
from kernel_shim.mpls.labels import Entry, Label, MalformedStack, read_stack
from kernel_shim.mpls.lfib import PLATFORM, Key, Lfib, Paths, Peer, ToInterface, ToPeer, ToStack, ToVrf
from kernel_shim.mpls.node import Classes, LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute
from kernel_shim.mpls.switch import MAX_LOOKUPS
from kernel_shim.reasons import DropReason

Protection = Callable[[Tunnel], Sequence[str]]
"""What the SPD and the SAs say to a tunnel, in lines; the last one begins with the verdict."""

_SPECIAL: Final = {0: "IPv4 explicit null", 1: "router alert", 2: "IPv6 explicit null", 3: "implicit null", 7: "entropy label indicator"}
_TTL: Final = 64
_FLOW: Final = 0  # with several ways of equal cost the trace follows one of them


@dataclass(frozen=True, slots=True)
class Step:
    """`at`: what is looked at; `found`: what is said there."""

    at: str
    found: str


class _Standing(Lfib):
    """Looks up what stands, one key at a time, however much that is."""

    def __init__(self, entries: Mapping[Key, NodeEntry]) -> None:
        super().__init__()
        self.entries: Final = entries

    def incoming(self, label: Label, space: str = PLATFORM) -> Paths | None:
        entry = self.entries.get(Key("label", (space, label)))
        return entry.paths if isinstance(entry, LabelBinding) else None

    def route_to(self, vrf: str, destination: IPAddress) -> VrfRoute | None:
        for length in range(destination.max_prefixlen, -1, -1):
            entry = self.entries.get(Key("route", (vrf, ip_network((destination, length), strict=False))))
            if isinstance(entry, VrfRoute):
                return entry
        return None

    def outgoing(self, vrf: str, destination: IPAddress) -> Paths | None:
        route = self.route_to(vrf, destination)
        return route.paths if route is not None else None

    def peer(self, name: str) -> Peer | None:
        entry = self.entries.get(Key("peer", (name,)))
        return entry if isinstance(entry, Peer) else None


class Trace:
    """`protection` says how a tunnel is protected."""

    def __init__(self, entries: Mapping[Key, NodeEntry], protection: Protection) -> None:
        self._lfib: Final = _Standing(entries)
        classes = entries.get(Key("classes", ()))
        self._forwarder: Final = Forwarder(self._lfib, classes.map if isinstance(classes, Classes) else ClassMap.class_selectors())
        self._protection = protection

    def departure(self, vrf: str, destination: IPAddress) -> list[Step]:
        """A packet that a customer sends. Raises KeyError when there is no such VRF."""
        if not isinstance(entry := self._lfib.entries.get(Key("vrf", (vrf,))), Vrf):
            raise KeyError(vrf)
        return [Step(f"VRF {vrf}", f"interface {entry.interface}"), *self._from_vrf(vrf, destination)]

    def arrival(self, peer_name: str, labels: Sequence[Label], destination: IPAddress | None) -> list[Step]:
        """A packet under `labels`, outermost first, that came out of the SA of a peer. Raises KeyError when there is no such peer."""
        if not isinstance(tunnel := self._lfib.entries.get(Key("tunnel", (peer_name,))), Tunnel):
            raise KeyError(peer_name)
        steps = [Step(f"peer {peer_name}", f"out of the SA between {tunnel.remote} and {tunnel.local}, {tunnel.encapsulation.name.lower()}")]
        peer = self._lfib.peer(peer_name)
        if peer is None:
            return [*steps, _dropped(DropReason.MPLS_PEER_UNKNOWN)]
        steps += self._label_by_label(peer, labels)
        stack = tuple(Entry(label, 0, _TTL) for label in labels)
        way = self._forwarder.arrive(peer, stack, destination.version if destination is not None else 4, lambda: _FLOW)
        if isinstance(way, DropReason):
            return [*steps, _dropped(way)]
        if isinstance(way.next_hop, ToInterface):
            return [*steps, Step("result", f"IP comes to light and goes out of VRF {way.next_hop.vrf}")]
        if isinstance(way.next_hop, ToVrf):
            if destination is None:
                return [*steps, Step("result", f"IP comes to light and is looked up in VRF {way.next_hop.vrf}")]
            return [*steps, *self._from_vrf(way.next_hop.vrf, destination)]
        return [*steps, *self._to_peer(way.next_hop.peer, way.stack)]

    def _label_by_label(self, peer: Peer, labels: Sequence[Label]) -> Iterator[Step]:
        for label in labels:
            if label in _SPECIAL:
                yield Step(f"label {label}", _SPECIAL[label])
                continue
            allowed = "in" if label in peer.accepts else "not in"
            space = f"the space of {peer.space}" if peer.space != PLATFORM else "the platform's space"
            paths = self._lfib.incoming(label, peer.space)
            means = " or ".join(map(str, paths)) if paths is not None else "nothing"
            yield Step(f"label {label}", f"{allowed} what {peer.name} may send ({peer.accepts}); in {space} it means: {means}")
            if paths is None or label not in peer.accepts or not isinstance(choose(paths, lambda: _FLOW).next_hop, ToStack):
                return

    def _from_vrf(self, vrf: str, destination: IPAddress) -> Iterator[Step]:
        for _ in range(MAX_LOOKUPS):
            route = self._lfib.route_to(vrf, destination)
            if route is None:
                yield Step(f"{destination} in VRF {vrf}", "no route")
                yield _dropped(DropReason.MPLS_NO_ROUTE)
                return
            yield Step(f"{destination} in VRF {vrf}", f"{route.prefix}: " + " or ".join(map(str, route.paths)))
            path = choose(route.paths, lambda: _FLOW)
            hop = path.next_hop
            if isinstance(hop, ToInterface):
                yield Step("result", f"goes out of VRF {hop.vrf}")
                return
            if isinstance(hop, ToPeer):
                yield from self._to_peer(hop.peer, self._forwarder.imposed(path, _TTL, 0, lambda: _FLOW))
                return
            assert isinstance(hop, ToVrf)
            vrf = hop.vrf
        yield _dropped(DropReason.MPLS_NO_ROUTE)

    def _to_peer(self, name: str, stack: bytes) -> Iterator[Step]:
        try:
            entries = read_stack(stack)
        except MalformedStack:
            yield Step("result", f"to {name} as IP without a label, where a policy protects it")
            return
        yield Step("stack", ", ".join(f"{it.label} (TC {it.tc}, TTL {it.ttl})" for it in entries))
        tunnel = self._lfib.entries.get(Key("tunnel", (name,)))
        if not isinstance(tunnel, Tunnel):
            yield Step(f"peer {name}", "no tunnel")
            yield _dropped(DropReason.MPLS_NO_ROUTE)
            return
        yield Step(f"peer {name}", f"{tunnel.local} to {tunnel.remote}, {tunnel.encapsulation.name.lower()}{', managed network' if tunnel.managed else ''}")
        *before, result = self._protection(tunnel)
        for line in before:
            yield Step("protection", line)
        yield Step("result", result)


def _dropped(reason: DropReason) -> Step:
    return Step("result", f"dropped: {reason.text}")
