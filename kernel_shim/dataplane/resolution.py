"""From a flow to what becomes of its packets: SPD, then SAD, then a bundle in the cache. Labels' tunnels are flows like others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kernel_shim.dataplane.bundle import Bundle, payload_limit, protect
from kernel_shim.dataplane.mtu import PathMtus
from kernel_shim.dataplane.origin import Carried, LabelCover, Origin
from kernel_shim.model import Action, Direction, Flow, Mode, Policy, SaState, Template
from kernel_shim.mpls.lfib import ToInterface
from kernel_shim.mpls.node import LabelNode
from kernel_shim.packet import virtio
from kernel_shim.packet.ip import LARGEST_PACKET
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FlowKeys, flow_of_key
from kernel_shim.policy.peer import PeerKey, peer_of
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.sa.database import Sad, covers
from kernel_shim.sa.entry import SaEntry

ESTIMATED_OVERHEAD: Final = 84  # octets: IPv6, UDP, ESP with IV and ICV, as long as nobody knows better

_BEGIN: Final = virtio.LENGTH


@dataclass(frozen=True, slots=True)
class Wanted:
    """A protected flow without an SA."""

    policy: Policy
    template: Template
    flow: Flow

    @property
    def peer(self) -> PeerKey:
        return peer_of(self.policy, self.template, self.flow)


class Resolution:
    def __init__(self, spd: SecurityPolicyDatabase, sad: Sad, keys: FlowKeys, cache: BundleCache[Bundle], paths: PathMtus, node: LabelNode) -> None:
        self._spd, self._sad, self._keys, self._cache, self._paths, self._node = spd, sad, keys, cache, paths, node

    def resolve(self, key: bytes, view: bytes | memoryview, origin: Origin | None = None) -> Bundle | Wanted | None:
        """A bundle, now in the cache; a wish for an SA; None when the packet cannot be looked up, the `reason` of keys or origin says why."""
        if origin is not None:
            return self._labelled(key, memoryview(view)[_BEGIN:], origin)
        full = self._keys.full_key(view, _BEGIN)
        if full is None:
            return None
        policy = self._spd.lookup_key(Direction.OUT, full)
        if policy is None or policy.action is Action.BYPASS:
            # What no policy names is here only because it shares a capture route with what one does.
            bundle = Bundle(Action.BYPASS, policy)
        elif policy.action is Action.DISCARD:
            bundle = Bundle(Action.DISCARD, policy)
        else:
            template, flow = policy.templates[0], flow_of_key(full)
            entry = self.select(template, flow)
            if entry is None:
                return Wanted(policy, template, flow)
            bundle = protect(policy, entry, self._paths, flow.source.version)
        self._cache.put(key, bundle)
        return bundle

    def _labelled(self, key: bytes, packet: memoryview, origin: Origin) -> Bundle | Wanted | None:
        """A label tunnel is a flow like any other to the SPD; in clear it goes only through a managed network."""
        carried = origin.carry(packet)
        if carried is None:
            return None
        if isinstance(carried, ToInterface):
            bundle = Bundle(Action.BYPASS, None, landing=carried.vrf)
        else:
            found = self.tunnel_sa(carried)
            if isinstance(found, Wanted):
                return found
            policy, entry = found
            if entry is not None:
                assert policy is not None
                cover = LabelCover(self._node.forwarder, carried.tunnel, carried.path, carried.number, entry.sa.mode)
                limit = min(payload_limit(entry, self._paths) - cover.length, LARGEST_PACKET - cover.length)
                bundle = Bundle(Action.PROTECT, policy, entry, limit, cover)
            elif carried.tunnel.managed and (policy is None or policy.action is Action.BYPASS):
                cover = LabelCover(self._node.forwarder, carried.tunnel, carried.path, carried.number, Mode.TUNNEL)
                bundle = Bundle(Action.BYPASS, policy, limit=self._paths.get(carried.tunnel.local, carried.tunnel.remote) - cover.length, cover=cover)
            else:
                bundle = Bundle(Action.DISCARD, policy)
        self._cache.put(key, bundle)
        return bundle

    def tunnel_sa(self, carried: Carried) -> tuple[Policy | None, SaEntry | None] | Wanted:
        """The policy for a tunnel's packets, and its SA."""
        flow = carried.flow
        policy = self._spd.lookup(Direction.OUT, flow)
        if policy is None or policy.action is not Action.PROTECT:
            return policy, None
        entry = self.select(policy.templates[0], flow)
        return (policy, entry) if entry is not None else Wanted(policy, policy.templates[0], flow)

    def tunnel_limit(self, carried: Carried) -> int:
        """The longest stack with payload that fits a tunnel, in octets; an estimate while it has no SA."""
        tunnel = carried.tunnel
        found = self.tunnel_sa(carried)
        entry = None if isinstance(found, Wanted) else found[1]
        mode = Mode.TRANSPORT if entry is not None and entry.sa.mode is Mode.TRANSPORT else Mode.TUNNEL
        room = payload_limit(entry, self._paths) if entry is not None else self._paths.get(tunnel.local, tunnel.remote) - ESTIMATED_OVERHEAD
        return room - LabelCover(self._node.forwarder, tunnel, carried.path, carried.number, mode).length

    def select(self, template: Template, flow: Flow) -> SaEntry | None:
        """The newest mature SA that the template asks for and that covers the flow; a dying one when there is no other."""
        destination = template.destination or flow.destination
        dying = None
        for entry in reversed(self._sad.outbound(template.reqid) if template.reqid else self._sad.outbound_to(destination)):
            sa = entry.sa
            if sa.mode is not template.mode or sa.destination != destination or (template.source or sa.source) != sa.source or not covers(sa, flow):
                continue
            if entry.state is SaState.MATURE:
                return entry
            if dying is None and entry.usable:
                dying = entry
        return dying
