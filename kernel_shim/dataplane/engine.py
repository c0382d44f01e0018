"""The userspace kernel as one object: SPD, SAD, pending packets and the two pipelines, on a clock that the caller owns."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kernel_shim.channel.userspace import USERSPACE
from kernel_shim.dataplane import inspection
from kernel_shim.dataplane.bundle import Bundle, Held
from kernel_shim.dataplane.delivery import Admission, Delivery
from kernel_shim.dataplane.inbound import Inbound
from kernel_shim.dataplane.labels import Labels
from kernel_shim.dataplane.mtu import PathMtus
from kernel_shim.dataplane.outbound import Outbound
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.policies import Policies
from kernel_shim.dataplane.resolution import Resolution
from kernel_shim.dataplane.sealing import TAIL_ROOM
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.inspection import CachedBundle, PendingQueue, Snapshot
from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    Endpoint,
    IPAddress,
    KernelError,
    KernelEvent,
    Migration,
    Policy,
    PolicyIndex,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    SpiRequest,
)
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.lfib import Key
from kernel_shim.mpls.node import LabelNode, NodeEntry
from kernel_shim.packet import virtio
from kernel_shim.packet.ip import LARGEST_PACKET
from kernel_shim.policy.acquire import AcquireTable
from kernel_shim.policy.bundle import BundleCache, Generations
from kernel_shim.policy.flowkey import FieldUsage, FlowKeys, fields_of_traffic_selectors
from kernel_shim.policy.pending import PendingQueues
from kernel_shim.policy.spd import SecurityPolicyDatabase
from kernel_shim.reasons import DropReason
from kernel_shim.sa.database import Sad, covers
from kernel_shim.sa.entry import SaEntry

FRAME_CAPACITY: Final = virtio.LENGTH + LARGEST_PACKET
DATAGRAM_CAPACITY: Final = LARGEST_PACKET  # the most that one UDP_GRO receive yields

DRAIN_SLICES: Final = 4  # slices of waiting packets sent between two looks at the sockets; about a millisecond


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`epoch` is the Unix time at monotonic 0; `path_mtu` what a path is taken to carry before anything is known of it.

    `udp_segmentation`: the TUN takes VIRTIO_NET_HDR_GSO_UDP_L4 (TUN_F_USO4 and USO6, Linux 6.2).
    `plain_esp`: the sink sends ESP without UDP too, to endpoints of port 0.
    """

    epoch: float = 0.0
    path_mtu: int = 1500
    slot: int = 0
    udp_segmentation: bool = False
    plain_esp: bool = False


class Engine:
    """Implements `kernel_shim.kernel.Kernel`, and takes packets.

    The engine owns both read buffers, so that nothing is copied: the caller reads into `outbound_buffer` or
    `inbound_buffer`, then says how much; both are free for the next read when the call returns.
    After the reads of one wake-up the caller calls `flush`; until then packets may stay in open batches.
    `now` is monotonic seconds. `entropy` gives that many random bytes.
    """

    def __init__(self, config: EngineConfig, entropy: Callable[[int], bytes], sink: Sink) -> None:
        self._config: Final = config
        self._now = 0.0
        self._listeners: list[Callable[[KernelEvent], None]] = []
        self._frame: Final = memoryview(bytearray(FRAME_CAPACITY + TAIL_ROOM))
        self.outbound_buffer: Final = self._frame[:FRAME_CAPACITY]
        self.inbound_buffer: Final = memoryview(bytearray(DATAGRAM_CAPACITY))
        self._traffic: Final = Traffic()
        self._generations: Final = Generations()
        self._paths: Final = PathMtus(config.path_mtu)
        self._spd: Final = SecurityPolicyDatabase(self._generations)
        self._sad: Final = Sad(entropy, self._emit, self._generations.bump_sad, self._sa_gone, config.slot, plain=config.plain_esp)
        self._pending: Final[PendingQueues[Held]] = PendingQueues()
        self._acquires: Final = AcquireTable()
        self._policies: Final = Policies(self._spd, self._pending, self._acquires, self._refresh_masks, lambda: self._drain(self._now), self._emit)
        self._fields: Final = {Direction.OUT: FieldUsage(), Direction.IN: FieldUsage()}
        self._out_keys: Final = FlowKeys(self._fields[Direction.OUT].mask)
        self._in_keys: Final = FlowKeys(self._fields[Direction.IN].mask)
        self._bundles: Final[BundleCache[Bundle]] = BundleCache(self._generations, self._out_keys.mask)
        self._admissions: Final[BundleCache[Admission]] = BundleCache(self._generations, self._in_keys.mask)
        self._node: Final = LabelNode(self._labels_changed)
        self._tunnels_moved = False  # tunnels or SAs have other ends than when SAs found their tunnels; many at once are looked at once
        resolution = Resolution(self._spd, self._sad, self._out_keys, self._bundles, self._paths, self._node)
        self._outbound: Final = Outbound(
            sink,
            self._traffic,
            self._sad,
            self._out_keys,
            self._bundles,
            self._pending,
            self._acquires,
            resolution,
            self._emit,
        )
        self._labels: Final = Labels(self._node, sink, self._traffic, self._spd, self._generations, self._outbound.take, resolution.tunnel_limit, TAIL_ROOM)
        self._delivery: Final = Delivery(
            sink,
            self._traffic,
            self._spd,
            self._in_keys,
            self._admissions,
            self._outbound,
            self._labels,
            udp_segmentation=config.udp_segmentation,
        )
        self._inbound: Final = Inbound(self.inbound_buffer, self._traffic, self._sad, self._delivery, self._emit)

    # Packets

    def outbound(self, length: int, now: float) -> None:
        """Take the frame of `length` bytes that a TUN read put at the start of `outbound_buffer`. Never raises."""
        self._now = now
        self._outbound.take(self._frame, length, now)

    def from_vrf(self, vrf: str, length: int, now: float) -> None:
        """As `outbound`, of a frame that came from the interface of `vrf`."""
        self._now = now
        self._outbound.take(self._frame, length, now, self._labels.vrf(vrf))

    def inbound(self, local: Endpoint, remote: Endpoint, length: int, segment_size: int, now: float, traffic_class: int = 0) -> None:
        """Take `length` bytes of ESP from `inbound_buffer`: datagrams of `segment_size` bytes, the last may be shorter.

        `segment_size` is what UDP_GRO says, `length` when it says nothing. `local` is the address and port it was received on; port 0 without UDP.
        `traffic_class` is that of their IP headers.
        Never raises.
        """
        self._now = now
        if self._tunnels_moved:
            self._tunnels_moved = False
            for entry in self._sad:
                self._find_tunnel(entry)
        self._inbound.take(local, remote, length, segment_size, now, traffic_class)

    def labels_in_clear(self, local: Endpoint, remote: Endpoint, encapsulation: Encapsulation, packet: memoryview, now: float) -> None:
        """Take what stood behind the IP or UDP header of a packet with labels that no SA protected; ports are 0 without UDP. Never raises."""
        self._now = now
        self._labels.take_clear(local, remote, encapsulation, packet, now)

    def send(self, frame: bytes, now: float) -> None:
        """`outbound` of a frame that is elsewhere."""
        self.outbound_buffer[: len(frame)] = frame
        self.outbound(len(frame), now)

    def receive(self, local: Endpoint, remote: Endpoint, datagrams: bytes, segment_size: int, now: float, traffic_class: int = 0) -> None:
        """`inbound` of datagrams that are elsewhere."""
        self.inbound_buffer[: len(datagrams)] = datagrams
        self.inbound(local, remote, len(datagrams), segment_size, now, traffic_class)

    def flush(self, now: float) -> None:
        """Send every batch that is open: the end of one wake-up."""
        self._now = now
        self._delivery.flush(now)  # before the batches: it may lead into another tunnel
        self._outbound.batches.flush_all()
        self._out_keys.fragments.age(now)
        self._in_keys.fragments.age(now)
        self._outbound.count_fragments_lost(now)

    def path_mtu(self, local: Endpoint, remote: Endpoint, mtu: int, now: float) -> None:
        """The path from `local` to `remote` carries IP packets of `mtu` bytes (from an error queue or EMSGSIZE)."""
        if self._paths.learn(local.address, remote.address, mtu, now):
            self._generations.bump_route()

    def next_deadline(self) -> float | None:
        """When `tick` is due; None when nothing waits."""
        if self._pending.has_ready:
            return self._now
        deadlines = (
            *(self._sad.next_deadline(), self._acquires.next_deadline(), self._pending.next_deadline()),
            *(self._paths.next_deadline(), self._policies.next_deadline()),
        )
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def tick(self, now: float) -> None:
        """Do what is due: lifetimes, acquires to repeat, packets that waited too long, slices of a drain."""
        self._now = now
        self._sad.tick(now)
        self._policies.expire(now)
        if self._paths.expire(now):
            self._generations.bump_route()
        self._poll_acquires(now)
        self._outbound.lost(self._pending.expire(now), now)
        self._drain(now)

    # SAD

    def capabilities(self) -> Capabilities:
        return replace(USERSPACE, encapsulation_required=not self._config.plain_esp)

    def get_spi(self, request: SpiRequest, now: float) -> SaStatus:
        self._now = now
        entry = self._sad.reserve(request, now)
        self._sa_came(entry)
        return entry.status(self._config.epoch)

    def add_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self._now = now
        entry = self._sad.add(sa, now)
        return self._installed(entry, now)

    def update_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self._now = now
        entry = self._sad.update(sa, now)
        return self._installed(entry, now)

    def delete_sa(self, sa: SaId) -> SaStatus:
        return self._sad.delete(sa).status(self._config.epoch)

    def get_sa(self, sa: SaId) -> SaStatus:
        return self._sad.get(sa).status(self._config.epoch)

    def sas(self) -> Sequence[SaStatus]:
        return [entry.status(self._config.epoch) for entry in self._sad]

    def flush_sas(self) -> int:
        return self._sad.flush()

    # SPD

    def add_policy(self, policy: Policy, now: float) -> Policy:
        self._now = now
        return self._policies.add(policy, now)

    def update_policy(self, policy: Policy, now: float) -> Policy:
        self._now = now
        return self._policies.update(policy, now)

    def migrate(self, migration: Migration, now: float) -> Policy:
        self._now = now
        self._tunnels_moved = True
        return self._policies.migrate(migration, self._sad.move)

    def delete_policy(self, direction: Direction, selector: Selector) -> Policy:
        return self._policies.delete(direction, selector)

    def delete_policy_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        return self._policies.delete_index(direction, index)

    def get_policy(self, direction: Direction, index: PolicyIndex) -> Policy:
        return self._spd.get(direction, index)

    def policies(self) -> Sequence[Policy]:
        return self._spd.snapshot()

    def flush_policies(self) -> int:
        count = self._policies.flush()
        self._outbound.lost(self._pending.discard_all(DropReason.PENDING_POLICY_GONE), self._now)
        self._refresh_masks()
        return count

    # Labels

    def put_label_entry(self, entry: NodeEntry, now: float) -> None:
        """Add or replace. KernelError(EINVAL) for what means nothing or is beyond a bound."""
        self._now = now
        try:
            self._node.put(entry)
        except ValueError as error:
            raise KernelError(errno.EINVAL, str(error)) from error
        self._drain(now)

    def remove_label_entry(self, key: Key, now: float) -> None:
        """KernelError(ESRCH) when there is none."""
        self._now = now
        if not self._node.remove(key):
            raise KernelError(errno.ESRCH, f"no {key.kind} {' '.join(map(str, key.name))}")
        if key.kind == "vrf":
            self._labels.drop_vrf(str(key.name[0]))
        elif key.kind == "tunnel":
            self._labels.drop_peer(str(key.name[0]))

    def set_vrf_addresses(self, vrf: str, addresses: Iterable[IPAddress]) -> None:
        """The host's own towards that customer, one of each IP version at most."""
        self._node.set_addresses(vrf, addresses)

    def label_entries(self) -> Sequence[NodeEntry]:
        return list(self._node.entries())

    # Key manager

    def acquire_failed(self, sequence: AcquireSequence, errno: int, now: float) -> None:
        self._now = now
        peer = self._acquires.failed(sequence, now)
        if peer is not None:
            self._outbound.lost(self._pending.discard(peer, DropReason.ACQUIRE_FAILED), now)

    def key_manager_listens(self, listening: bool, now: float) -> None:
        self._now = now
        self._acquires.listening(listening, now)
        self._poll_acquires(now)

    def subscribe(self, listener: Callable[[KernelEvent], None]) -> None:
        self._listeners.append(listener)

    def statistics(self) -> Mapping[str, int]:
        counts = self._traffic.statistics()
        for reason, number in self._pending.drops.items():
            counts[f"drop_{reason.value}"] += number
        counts |= self._bundles.statistics() | self._pending.statistics() | self._acquires.statistics()
        counts |= {f"admission_{name.removeprefix('bundle_')}": number for name, number in self._admissions.statistics().items()}
        counts |= self._labels.statistics()
        counts |= {"sas": len(self._sad), "policies": len(self._spd), "spd_lookups": self._spd.lookups, "spd_probes": self._spd.probes}
        return counts

    def pending_queues(self) -> Snapshot[PendingQueue]:
        return inspection.pending_queues(self._pending, self._acquires)

    def cached_bundles(self) -> Snapshot[CachedBundle]:
        return inspection.cached_bundles(self._bundles, self._labels.owner)

    # Inside

    def _emit(self, event: KernelEvent) -> None:
        for listener in self._listeners:
            listener(event)

    def _installed(self, entry: SaEntry, now: float) -> SaStatus:
        """An SA has keys: packets that came or waited for it go on."""
        status = entry.status(self._config.epoch)
        self._sa_came(entry)
        if entry.sa.direction is Direction.IN:
            self._inbound.waiting_octets -= entry.waiting_octets
            waiting, entry.waiting, entry.waiting_octets = entry.waiting, [], 0
            for early in waiting:
                self._inbound.take_one(early.local, early.remote, memoryview(early.packet), now, early.traffic_class)
            self.flush(now)
            return status
        sa = entry.sa
        wanted = self._acquires.peer(sa.acquire) if sa.acquire else None
        if wanted is not None:
            peer = self._acquires.satisfied(sa.acquire, covered=covers(sa, wanted[1]), now=now)
            if peer is not None:
                self._pending.ready(peer)
        for index in self._policies.of(sa.reqid):
            self._pending.ready_policy(index, sa.destination)
        self._drain(now)
        return status

    def _drain(self, now: float) -> None:
        for _ in range(DRAIN_SLICES):
            if not self._outbound.drain(now):
                break
        self._outbound.batches.flush_all()

    def _poll_acquires(self, now: float) -> None:
        due = self._acquires.poll(now)
        for acquire in due.acquires:
            self._emit(acquire)
        for peer in due.timed_out:
            self._outbound.lost(self._pending.discard(peer, DropReason.ACQUIRE_TIMEOUT), now)
        for peer in due.retry:
            self._outbound.ask_again(peer, now)

    def _sa_came(self, entry: SaEntry) -> None:
        """Flow keys must hold what the selectors of SAs read, too."""
        sa = entry.sa
        fields = fields_of_traffic_selectors(sa.source_selectors, sa.destination_selectors)
        usage = self._fields[sa.direction]
        if entry.fields is not None:
            usage.remove(entry.fields)
        usage.add(fields)
        entry.fields = fields
        self._find_tunnel(entry)
        self._refresh_masks()

    def _sa_gone(self, entry: SaEntry) -> None:
        if entry.state is SaState.DEAD and entry.waiting:
            self._traffic.drop(DropReason.LARVAL_GONE, len(entry.waiting))
            self._inbound.waiting_octets -= entry.waiting_octets
            entry.waiting = []
        if entry.fields is not None:
            self._fields[entry.sa.direction].remove(entry.fields)
            entry.fields = None
        self._refresh_masks()

    def _labels_changed(self, key: Key) -> None:
        if key.kind == "tunnel":
            self._tunnels_moved = True
        self._generations.bump_route()
        if self._labels.refresh_masks():
            self._outbound.lost(self._pending.rekey(self._outbound.key_of), self._now)
        self._pending.ready_all()

    def _find_tunnel(self, entry: SaEntry) -> None:
        sa = entry.sa
        entry.tunnel = self._node.between(sa.destination, sa.source) if sa.direction is Direction.IN else None

    def _refresh_masks(self) -> None:
        outbound = self._spd.fields_read(Direction.OUT)
        if self._out_keys.set_mask(outbound | self._fields[Direction.OUT].mask):
            self._bundles.set_mask(self._out_keys.mask)
            self._outbound.lost(self._pending.rekey(self._outbound.key_of), self._now)
        # An inbound flow's fate hangs on the outbound policies as well: they say whether it goes into another tunnel.
        inbound = self._spd.fields_read(Direction.IN) | self._spd.fields_read(Direction.FORWARD) | outbound
        if self._in_keys.set_mask(inbound | self._fields[Direction.IN].mask):
            self._admissions.set_mask(self._in_keys.mask)
