"""The data plane's kernel with its capture: a policy is in force in the host before it is said to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from kernel_shim.io.capture import Capture
from kernel_shim.kernel import Kernel
from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    IPAddress,
    KernelError,
    KernelEvent,
    Migration,
    Policy,
    PolicyExpire,
    PolicyIndex,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    SpiRequest,
)
from kernel_shim.policy.migration import moved


class CapturedKernel:
    """Implements `kernel_shim.kernel.Kernel`: the SAD is the engine's own, each SPD change goes to the host as well."""

    def __init__(self, engine: Kernel, capture: Capture, more: Callable[[], Mapping[str, int]], bind_raw: Callable[[IPAddress], None]) -> None:
        self._engine: Final = engine
        self._capture: Final = capture
        self._more: Final = more
        self._bind_raw: Final = bind_raw
        self._policies: dict[tuple[Direction, PolicyIndex], Policy] = {}
        self.listened_since: float | None = None
        engine.subscribe(self._policy_expired)

    def capabilities(self) -> Capabilities:
        return self._engine.capabilities()

    def get_spi(self, request: SpiRequest, now: float) -> SaStatus:
        return self._engine.get_spi(request, now)

    def add_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self._serve_plain(sa)
        return self._engine.add_sa(sa, now)

    def update_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self._serve_plain(sa)
        return self._engine.update_sa(sa, now)

    def _serve_plain(self, sa: SecurityAssociation) -> None:
        """A key manager with IKE sockets of its own binds no address here: ESP without UDP comes in all the same."""
        if sa.encapsulation is None:
            self._bind_raw(sa.destination if sa.direction is Direction.IN else sa.source)

    def delete_sa(self, sa: SaId) -> SaStatus:
        return self._engine.delete_sa(sa)

    def get_sa(self, sa: SaId) -> SaStatus:
        return self._engine.get_sa(sa)

    def sas(self) -> Sequence[SaStatus]:
        return self._engine.sas()

    def flush_sas(self) -> int:
        return self._engine.flush_sas()

    def add_policy(self, policy: Policy, now: float) -> Policy:
        return self._put(policy, now, self._engine.add_policy)

    def update_policy(self, policy: Policy, now: float) -> Policy:
        return self._put(policy, now, self._engine.update_policy)

    def _put(self, policy: Policy, now: float, put: Callable[[Policy, float], Policy]) -> Policy:
        self._capture.add(policy)
        try:
            done = put(policy, now)
        except KernelError:
            self._capture.remove((policy,))
            raise
        replaced = self._policies.get((done.direction, done.index))
        self._policies[done.direction, done.index] = done
        if replaced is not None:
            self._capture.remove((replaced,))
        return done

    def delete_policy(self, direction: Direction, selector: Selector) -> Policy:
        return self._gone(self._engine.delete_policy(direction, selector))

    def delete_policy_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        return self._gone(self._engine.delete_policy_index(direction, index))

    def _gone(self, policy: Policy) -> Policy:
        known = self._policies.pop((policy.direction, policy.index), None)
        if known is not None:
            self._capture.remove((known,))
        return policy

    def migrate(self, migration: Migration, now: float) -> Policy:
        before = next((it for it in self._policies.values() if (it.direction, it.selector) == (migration.direction, migration.selector)), None)
        templates = moved(before.templates, migration.moves) if before is not None else None
        if before is None or templates is None:
            return self._engine.migrate(migration, now)  # which says what is wrong
        return self._put(replace(before, templates=templates), now, lambda _, now: self._engine.migrate(migration, now))

    def _policy_expired(self, event: KernelEvent) -> None:
        if isinstance(event, PolicyExpire) and event.hard:
            self._gone(event.policy)

    def get_policy(self, direction: Direction, index: PolicyIndex) -> Policy:
        return self._engine.get_policy(direction, index)

    def policies(self) -> Sequence[Policy]:
        return self._engine.policies()

    def flush_policies(self) -> int:
        """Ends a takeover too: who flushes has had its say."""
        count = self._engine.flush_policies()
        known = list(self._policies.values())
        self._policies.clear()
        self._capture.remove(known)
        self._capture.end_takeover()
        return count

    def acquire_failed(self, sequence: AcquireSequence, errno: int, now: float) -> None:
        self._engine.acquire_failed(sequence, errno, now)

    def key_manager_listens(self, listening: bool, now: float) -> None:
        self.listened_since = now if listening else None
        self._engine.key_manager_listens(listening, now)

    def subscribe(self, listener: Callable[[KernelEvent], None]) -> None:
        self._engine.subscribe(listener)

    def statistics(self) -> Mapping[str, int]:
        return {**self._engine.statistics(), **self._more()}


class CapturedSockets:
    """Implements `kernel_shim.kernel.IkeSocketProvider`: a bound address passes the guard."""

    def __init__(self, bind: Callable[[IPAddress], tuple[int, int]], unbind: Callable[[IPAddress], None], capture: Capture) -> None:
        self._bind: Final = bind
        self._unbind: Final = unbind
        self._capture: Final = capture

    def bind(self, address: IPAddress) -> tuple[int, int]:
        descriptors = self._bind(address)
        self._capture.bound(address)
        return descriptors

    def unbind(self, address: IPAddress) -> None:
        self._unbind(address)
        self._capture.unbound(address)
