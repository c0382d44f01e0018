"""How the engine's own tables look from outside (`kernel_shim.inspection`). No keys, and nothing that keeps a deleted SA alive."""

from __future__ import annotations

from typing import NamedTuple

from kernel_shim.dataplane.bundle import Bundle
from kernel_shim.inspection import CachedBundle, PendingQueue, Snapshot
from kernel_shim.model import Action, PolicyIndex, SaId
from kernel_shim.policy.acquire import AcquireTable
from kernel_shim.policy.bundle import BundleCache
from kernel_shim.policy.flowkey import flow_of_masked_key
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


def cached_bundles(cache: BundleCache[Bundle]) -> Snapshot[CachedBundle]:
    mask = cache.mask

    def translate(row: _Row) -> CachedBundle:
        it = flow_of_masked_key(row.key, mask)
        flow = (it.version, it.source, it.destination, it.protocol, it.source_port, it.destination_port)
        return CachedBundle(*flow, row.action, row.policy, row.sa, row.limit)

    return Snapshot([_row(key, bundle) for key, bundle in cache.current()], translate)


def _row(key: bytes, bundle: Bundle) -> _Row:
    policy, entry = bundle.policy, bundle.entry
    return _Row(key, bundle.action, policy.index if policy is not None else PolicyIndex(0), entry.sa.id if entry is not None else None, bundle.limit)
