"""Labels between the two pipelines: where the packets of a VRF begin and where labelled ones end.

A flow's landing is remembered, so that its packets cost a lookup and no walk through the stack; what cannot land in a VRF
(to be swapped, an error, a router alert) goes through `LabelSwitch` packet by packet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from kernel_shim.dataplane.origin import TAG, Carried, Origin, TransitOrigin, VrfOrigin
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.model import Action, Direction, Endpoint, Flow, Mode, SecurityAssociation
from kernel_shim.mpls.encapsulation import PLAIN_GRE, Encapsulation, NotLabels, begin_of_stack
from kernel_shim.mpls.labels import ENTRY, MAX_DEPTH, read_stack
from kernel_shim.mpls.lfib import ToInterface, ToPeer
from kernel_shim.mpls.node import LabelNode, Tunnel
from kernel_shim.mpls.switch import AsIp, LabelSwitch, Sent, bring_to_light, flow_hash, onward
from kernel_shim.packet import virtio
from kernel_shim.packet.ip import LARGEST_PACKET, UDP_HEADER, Buffer, Malformed, destination, layout, source
from kernel_shim.policy.bundle import BundleCache, Generations
from kernel_shim.policy.flowkey import FieldMask, FlowKeys
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.reasons import DropReason

_PLAIN: Final = len(PLAIN_GRE)


@dataclass(frozen=True, slots=True)
class Landing:
    """`ttl` and `traffic_class` are for the IP header that comes to light, as in `kernel_shim.mpls.forward.Way`.

    `again`: by the VRF's routes, to another peer.
    """

    vrf: str
    ttl: int | None
    traffic_class: int | None
    again: bool


class Inside(NamedTuple):
    """Offsets in an ESP payload: of the stack, of what is under it, and where that ends. `inner` is `stack` when the stack has no end."""

    stack: int
    inner: int
    end: int


def inside(tunnel: Tunnel, sa: SecurityAssociation, payload: Buffer, next_header: int) -> Inside | None:
    """Where labels are in what came out of `sa`; None when it is no packet of `tunnel`. Raises NotLabels when it should be one and is not."""
    base, end, protocol = 0, len(payload), next_header
    if next_header == tunnel.encapsulation == Encapsulation.GRE and end >= _PLAIN + ENTRY and payload[:_PLAIN] == PLAIN_GRE and payload[_PLAIN + 2] & 1:
        return Inside(_PLAIN, _PLAIN + ENTRY, end)  # the common case: one label, nothing optional
    if sa.mode is Mode.TUNNEL:
        try:
            parsed = layout(payload)
        except Malformed:
            return None
        if parsed.fragment or source(payload) != tunnel.remote or destination(payload) != tunnel.local:
            return None
        base, end, protocol = parsed.upper, parsed.length, parsed.protocol
    if protocol != tunnel.encapsulation:
        return None
    begin, stop = begin_of_stack(protocol, payload[base:end])
    at, stop = base + begin, base + stop
    for inner in range(at + ENTRY, min(at + MAX_DEPTH * ENTRY, stop) + 1, ENTRY):
        if payload[inner - 2] & 1:
            return Inside(at, inner, stop)
    return Inside(at, at, stop)


class Labels:
    """`hand_out(frame, length, now, origin)` takes a frame into the outbound pipeline; `limit(carried)` is the longest packet that fits a tunnel."""

    def __init__(
        self,
        node: LabelNode,
        sink: Sink,
        traffic: Traffic,
        spd: SecurityPolicyDatabase,
        generations: Generations,
        hand_out: Callable[[memoryview, int, float, Origin | None], None],
        limit: Callable[[Carried], int],
        tail_room: int,
    ) -> None:
        self._node, self._sink, self._traffic, self._spd = node, sink, traffic, spd
        self._hand_out = hand_out
        self._keys: Final = FlowKeys(FieldMask.FLOW)
        self._landings: Final[BundleCache[Landing]] = BundleCache(generations)
        self._vrfs: dict[str, VrfOrigin] = {}
        self._transits: dict[str, TransitOrigin] = {}
        self._spreads = node.spreads
        self._number = 0
        self._buffer: Final = memoryview(bytearray(virtio.LENGTH + LARGEST_PACKET + tail_room))
        self._switch: Final = LabelSwitch(node.forwarder, lambda peer: self._limit_to(peer, limit), address=node.address)

    # Where packets begin

    def vrf(self, name: str) -> VrfOrigin:
        """The origin of a VRF's packets; made when it is first asked for."""
        origin = self._vrfs.get(name)
        if origin is None:
            self._number += 1
            origin = self._vrfs[name] = VrfOrigin(name, self._number, self._node, self._sink)
        return origin

    def drop_vrf(self, name: str) -> None:
        self._vrfs.pop(name, None)

    def drop_peer(self, name: str) -> None:
        self._transits.pop(name, None)

    def refresh_masks(self) -> bool:
        """Whether flow keys are cut by another mask from now on. Asked after each of a million entries, so VRFs are not looked at in vain."""
        if self._spreads == self._node.spreads:
            return False
        self._spreads = self._node.spreads
        changed = [origin.keys.set_mask(origin.wanted_mask) for origin in self._vrfs.values()]
        return any(changed)

    def _transit(self, peer: str) -> TransitOrigin:
        origin = self._transits.get(peer)
        if origin is None:
            self._number += 1
            origin = self._transits[peer] = TransitOrigin(peer, self._number, self._node)
        return origin

    def _limit_to(self, peer: str, limit: Callable[[Carried], int]) -> int:
        tunnel = self._node.tunnel(peer)
        return limit(Carried(tunnel, None, 0)) if tunnel is not None else 0

    def owner(self, key: bytes) -> tuple[str, bytes, FieldMask] | None:
        """The VRF of a flow key that one of the origins here cut, the flow's part of it and its mask; None for a packet that is passed on."""
        found = next((origin for origin in self._vrfs.values() if origin.is_of(key)), None)
        return (found.vrf, key[TAG:], found.keys.mask) if found is not None else None

    # Where they end

    def land(self, tunnel: Tunnel, tag: bytes, payload: memoryview, at: Inside, admit: Callable[[], DropReason | None]) -> Landing | DropReason | None:
        """Where the packet under the labels in a `payload` of the SA `tag` goes; None for what goes the long way.

        `admit` says whether the tunnel's own packet may come in. Of a flow that is known it has said so, and nothing has changed since: of that packet
        only UDP ports may differ within a tunnel and an SA, and the name has them.
        """
        stack, packet = bytes(payload[at.stack : at.inner]), payload[at.inner : at.end]
        key = self._keys.cut(packet, 0)
        name = b""
        if key is not None:
            name = tag + stack + key
            if tunnel.encapsulation is Encapsulation.UDP:
                name += payload[at.stack - UDP_HEADER : at.stack - UDP_HEADER + 4]
            landing = self._landings.get(name)
            if landing is not None:
                return landing
        reason = admit()
        if reason is not None:
            return reason
        landing = self._decide(tunnel, stack, packet) if key is not None else None
        if landing is not None:
            self._landings.put(name, landing)
        return landing

    def _decide(self, tunnel: Tunnel, stack: bytes, packet: memoryview) -> Landing | None:
        peer, entries, forwarder = self._node.lfib.peer(tunnel.peer), read_stack(stack), self._node.forwarder
        if peer is None:
            return None
        way = forwarder.arrive(peer, entries, packet[0] >> 4, lambda: flow_hash(packet, entries))
        if isinstance(way, DropReason) or isinstance(way.next_hop, ToPeer) or way.alert:
            return None
        if isinstance(way.next_hop, ToInterface):
            return Landing(way.next_hop.vrf, way.ttl, way.traffic_class, again=False)
        found = onward(forwarder, way.next_hop.vrf, packet)
        if isinstance(found, DropReason):
            return None
        if isinstance(found[0], ToInterface):
            return Landing(found[0].vrf, way.ttl, way.traffic_class, again=False)
        # An error that its TTL calls for shows the stack, which only the long way has.
        left = min(packet[8 if packet[0] >> 4 == 4 else 7], 255 if way.ttl is None else way.ttl)
        return Landing(way.next_hop.vrf, way.ttl, way.traffic_class, again=True) if left > 1 else None

    def finish(self, landing: Landing, packet: memoryview) -> None:
        bring_to_light(self._node.forwarder.classes, packet, landing.ttl, landing.traffic_class)

    def take_clear(self, local: Endpoint, remote: Endpoint, encapsulation: Encapsulation, packet: memoryview, now: float) -> None:
        """What came without protection: only from a peer whose network is managed, and where no policy asks for more."""
        tunnel = self._node.between(local.address, remote.address)
        if tunnel is None or not tunnel.managed or tunnel.encapsulation is not encapsulation:
            return self._traffic.drop(DropReason.MPLS_PEER_UNKNOWN)
        flow = Flow(remote.address, local.address, encapsulation, remote.port, local.port)
        policy = self._spd.lookup(Direction.IN, flow)
        if policy is not None and policy.action is not Action.BYPASS:
            return self._traffic.drop(DropReason.CLEAR_WHERE_PROTECTED)
        begin, end = 0, len(packet)
        if encapsulation is not Encapsulation.UDP:
            try:
                begin, end = begin_of_stack(encapsulation, packet)
            except NotLabels:
                return self._traffic.drop(DropReason.MPLS_ENCAPSULATION)
        self.take(tunnel, packet[begin:end], now)

    def take(self, tunnel: Tunnel, labelled: memoryview, now: float) -> None:
        """The long way of stack and payload that came through `tunnel`."""
        outcome = self._switch.from_peer(tunnel.peer, labelled, now)
        if outcome.reason is not None:
            self._traffic.drop(outcome.reason)
        self._traffic.router_alerts += outcome.alert
        for sent in outcome.sent:
            self._send(sent, now)

    def _send(self, sent: Sent, now: float) -> None:
        length = virtio.LENGTH + len(sent.packet)
        frame = self._buffer[:length]
        frame[: virtio.LENGTH] = virtio.NO_OFFLOAD
        frame[virtio.LENGTH :] = sent.packet
        hop = sent.next_hop
        if isinstance(hop, ToInterface):
            self._sink.write_vrf(hop.vrf, frame)
        elif isinstance(hop, AsIp):
            self._send_bare(frame, length, now)
        else:
            self._hand_out(self._buffer, length, now, self._transit(hop.peer))

    def _send_bare(self, frame: memoryview, length: int, now: float) -> None:
        """IP without a label left goes like the host's own, and only where a policy protects it: it came protected."""
        key = self._keys.cut(frame, virtio.LENGTH)
        policy = self._spd.lookup_key(Direction.OUT, key) if key is not None else None
        if policy is None or policy.action is not Action.PROTECT:
            return self._traffic.drop(DropReason.POLICY_ABSENT)
        self._hand_out(self._buffer, length, now, None)

    def statistics(self) -> dict[str, int]:
        counts = {f"landing_{name.removeprefix('bundle_')}": number for name, number in self._landings.statistics().items()}
        return counts | {"labels": len(self._node.lfib), "vrfs": len(self._vrfs)}
