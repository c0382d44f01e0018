"""How the engine's own tables look from outside (`kernel_shim.inspection`). No keys, and nothing that keeps a deleted SA alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kernel_shim.dataplane.bundle import Bundle
from kernel_shim.dataplane.origin import TAG, LabelCover
from kernel_shim.inspection import CachedBundle, PendingQueue, Snapshot
from kernel_shim.model import Action, PolicyIndex, SaId
from kernel_shim.policy.acquire import AcquireTable
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import FieldMask, flow_of_masked_key
from kernel_shim.policy.pending import PendingQueues
from kernel_shim.policy.waiting import PacketT, QueueStatus


def pending_queues(pending: PendingQueues[PacketT], acquires: AcquireTable) -> Snapshot[PendingQueue]:
    def translate(row: QueueStatus) -> PendingQueue:
        key = row.key
        return PendingQueue(key.policy, key.source, key.destination, row.mode, acquires.sequence(key), row.flows, row.packets, row.segments, row.octets)

    return Snapshot(pending.snapshot(), translate)


class _Row(NamedTuple):
    key: bytes
    action: Action
    policy: PolicyIndex
    sa: SaId | None
    limit: int
    peer: str
    labels: tuple[int, ...]


Owner = Callable[[bytes], tuple[str, bytes, FieldMask] | None]


def cached_bundles(cache: BundleCache[Bundle], owner: Owner) -> Snapshot[CachedBundle]:
    """`owner` knows the VRF of keys that are longer than those of the host's own flows."""
    mask = cache.mask

    def translate(row: _Row) -> CachedBundle:
        vrf, key, cut_by = (owner(row.key) or ("", b"", FieldMask(0))) if len(row.key) >= TAG else ("", row.key, mask)
        rest = (row.action, row.policy, row.sa, row.limit, vrf, row.peer, row.labels)
        if not key:
            return CachedBundle(4, None, None, None, None, None, *rest)
        it = flow_of_masked_key(key, cut_by)
        return CachedBundle(it.version, it.source, it.destination, it.protocol, it.source_port, it.destination_port, *rest)

    return Snapshot([_row(key, bundle) for key, bundle in cache.current()], translate)


def _row(key: bytes, bundle: Bundle) -> _Row:
    policy, entry, cover = bundle.policy, bundle.entry, bundle.cover
    peer, labels = (cover.peer, cover.labels) if isinstance(cover, LabelCover) else ("", ())
    index = policy.index if policy is not None else PolicyIndex(0)
    return _Row(key, bundle.action, index, entry.sa.id if entry is not None else None, bundle.limit, peer, labels)
