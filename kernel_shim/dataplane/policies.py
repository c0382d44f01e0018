"""The SPD of the engine, and what else knows of a policy: its lifetime, the SAs that it asks for, the packets that wait for them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final

from kernel_shim.dataplane.bundle import Held
from kernel_shim.model import (
    NO_MARK,
    PROTOCOL_ESP,
    Action,
    Direction,
    KernelError,
    KernelEvent,
    Migration,
    Move,
    Policy,
    PolicyExpire,
    PolicyIndex,
    ReqId,
    Selector,
)
from kernel_shim.policy.acquire import AcquireTable
from kernel_shim.policy.lifetimes import PolicyLifetimes
from kernel_shim.policy.migration import moved
from kernel_shim.policy.pending import PendingQueues
from kernel_shim.policy.spd import SecurityPolicyDatabase, direction_of


class Policies:
    """Changes to `spd`, and what follows from each: other fields may count in flow keys (`refresh_masks`), and waiting packets may have a way now (`drain`).

    A lifetime that ends goes to `emit`. `now` is monotonic seconds. KernelError as of `kernel_shim.kernel.Kernel`.
    """

    def __init__(
        self,
        spd: SecurityPolicyDatabase,
        pending: PendingQueues[Held],
        acquires: AcquireTable,
        refresh_masks: Callable[[], None],
        drain: Callable[[], None],
        emit: Callable[[KernelEvent], None],
    ) -> None:
        self._spd, self._pending, self._acquires = spd, pending, acquires
        self._refresh_masks, self._drain, self._emit = refresh_masks, drain, emit
        self._lifetimes: Final = PolicyLifetimes()
        self._indexes: Final[dict[ReqId, set[PolicyIndex]]] = {}

    def of(self, reqid: ReqId) -> Collection[PolicyIndex]:
        """The outbound policies that an SA of this reqid serves."""
        return self._indexes.get(reqid, ())

    def add(self, policy: Policy, now: float) -> Policy:
        _check(policy)
        added = self._spd.add(policy)
        self._lifetimes.watch(added, now)
        return self._came(added)

    def update(self, policy: Policy, now: float) -> Policy:
        _check(policy)
        updated = self._replace(policy)
        self._lifetimes.watch(updated, now)
        return updated

    def migrate(self, migration: Migration, move_sas: Callable[[Sequence[Move]], object]) -> Policy:
        """Give a policy and its SAs, by `move_sas`, other outer addresses. KernelError(ENODATA) when none of its templates is between the old ones."""
        policy = self._spd.find(migration.direction, migration.selector)
        templates = moved(policy.templates, migration.moves)
        if templates is None:
            raise KernelError(errno.ENODATA, f"no template of policy {migration.direction.name} {migration.selector} is between these addresses")
        move_sas(migration.moves)
        return self._replace(replace(policy, templates=templates))

    def delete(self, direction: Direction, selector: Selector) -> Policy:
        return self._gone(self._spd.delete(direction, selector))

    def delete_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        return self._gone(self._spd.delete_index(direction, index))

    def flush(self) -> int:
        """How many there were. What waits for their SAs is the caller's to discard."""
        count = self._spd.flush()
        self._indexes.clear()
        self._lifetimes.clear()
        self._acquires.clear()
        return count

    def next_deadline(self) -> float | None:
        """When `expire` is due."""
        return self._lifetimes.next_deadline()

    def expire(self, now: float) -> None:
        """Tell of lifetimes that have ended, and delete the policies of hard ones."""
        for index, hard in self._lifetimes.due(now):
            direction = direction_of(index)
            policy = self.delete_index(direction, index) if hard else self._spd.get(direction, index)
            self._emit(PolicyExpire(policy, hard))

    def _replace(self, policy: Policy) -> Policy:
        try:
            old = self._spd.find(policy.direction, policy.selector)
        except KernelError:
            old = None
        new = self._spd.update(policy)
        if old is not None:
            self._forget_reqids(old)
            if old.templates != new.templates:
                self._acquires.forget_policy(old.index)
        return self._came(new)

    def _came(self, policy: Policy) -> Policy:
        if policy.direction is Direction.OUT:
            for template in policy.templates:
                self._indexes.setdefault(template.reqid, set()).add(policy.index)
        self._refresh_masks()
        self._pending.ready_all()
        self._drain()
        return policy

    def _gone(self, policy: Policy) -> Policy:
        self._lifetimes.forget(policy.index)
        self._forget_reqids(policy)
        if policy.direction is Direction.OUT:
            self._acquires.forget_policy(policy.index)
            self._pending.ready_policy(policy.index)
        self._refresh_masks()
        self._drain()
        return policy

    def _forget_reqids(self, policy: Policy) -> None:
        if policy.direction is not Direction.OUT:
            return
        for template in policy.templates:
            indexes = self._indexes.get(template.reqid)
            if indexes is not None:
                indexes.discard(policy.index)
                if not indexes:
                    del self._indexes[template.reqid]


def _check(policy: Policy) -> None:
    """What the SPD takes and the pipelines could not carry out."""
    if policy.selector.if_id or policy.selector.mark != NO_MARK:
        # Never to be matched, and the packets that it was for would find another policy: a TUN's packets carry neither.
        raise KernelError(errno.EOPNOTSUPP, "a policy with a mark or an interface id: packets of a TUN have none")
    if policy.action is not Action.PROTECT:
        if policy.templates:
            raise KernelError(errno.EINVAL, "templates on a policy that does not protect")
        return
    if len(policy.templates) != 1:
        raise KernelError(errno.EINVAL, f"a policy with {len(policy.templates)} templates; one is supported")
    if policy.templates[0].protocol != PROTOCOL_ESP:
        raise KernelError(errno.EPROTONOSUPPORT, f"protocol {policy.templates[0].protocol}; only ESP is supported")
