"""A kernel in memory behind `KernelChannel`, for tests of what stands above the channel."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    IPAddress,
    KernelError,
    KernelEvent,
    Policy,
    PolicyIndex,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)

ALGORITHM = EspAlgorithm(EncryptionId.AES_GCM_16, 128)


@dataclass
class FakeKernel:
    """What outlives a channel."""

    sas: dict[SaId, SecurityAssociation] = field(default_factory=dict)
    policies: dict[tuple[Direction, Selector], Policy] = field(default_factory=dict)
    refuse: set[Selector] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    next_spi: int = 0x1000
    capabilities: Capabilities = field(default_factory=lambda: Capabilities("fake", frozenset({ALGORITHM}), encapsulation_preferred=True))
    faults: dict[str, Exception] = field(default_factory=dict)  # what the next request of that name raises


class FakeChannel:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.closed = False
        self.event: Callable[[KernelEvent], None] = lambda event: None
        self.gone: Callable[[], None] = lambda: None
        self.overrun: Callable[[], None] = lambda: None

    def _ask(self, request: str) -> FakeKernel:
        if self.closed:
            raise ChannelClosed("gone")
        self.kernel.requests.append(request)
        if (fault := self.kernel.faults.pop(request, None)) is not None:
            raise fault
        return self.kernel

    def die(self) -> None:
        self.closed = True
        self.gone()

    def capabilities(self) -> Capabilities:
        return self.kernel.capabilities

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        self.event = listener

    def on_overrun(self, listener: Callable[[], None]) -> None:
        self.overrun = listener

    def on_closed(self, listener: Callable[[], None]) -> None:
        self.gone = listener

    async def open(self) -> None:
        self._ask("open")

    async def close(self) -> None:
        self.closed = True

    async def get_spi(self, request: SpiRequest) -> Spi:
        kernel = self._ask("get_spi")
        kernel.next_spi += 1
        return Spi(kernel.next_spi)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        self._ask("add_sa").sas[sa.id] = sa

    async def update_sa(self, sa: SecurityAssociation) -> None:
        self._ask("update_sa").sas[sa.id] = sa

    async def delete_sa(self, sa: SaId) -> None:
        if self._ask("delete_sa").sas.pop(sa, None) is None:
            raise KernelError(errno.ESRCH, "no such SA")

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        kernel = self._ask("migrate_sa")
        if kernel.sas.pop(old.id, None) is None and new.id not in kernel.sas:
            raise KernelError(errno.ESRCH, "no such SA")
        kernel.sas[new.id] = new

    async def get_sa(self, sa: SaId) -> SaStatus:
        found = self._ask("get_sa").sas.get(sa)
        if found is None:
            raise KernelError(errno.ESRCH, "no such SA")
        return SaStatus(found, SaState.MATURE)

    async def sas(self) -> Sequence[SaStatus]:
        return [SaStatus(sa, SaState.MATURE) for sa in self._ask("sas").sas.values()]

    async def flush_sas(self) -> None:
        self._ask("flush_sas").sas.clear()

    async def add_policy(self, policy: Policy) -> Policy:
        return await self.update_policy(policy)

    async def update_policy(self, policy: Policy) -> Policy:
        kernel = self._ask("update_policy")
        await asyncio.sleep(0)  # others go on meanwhile
        if policy.selector in kernel.refuse:
            raise KernelError(errno.EINVAL, "refused")
        stored = replace(policy, index=PolicyIndex(8 * (len(kernel.policies) + 1)))
        kernel.policies[policy.direction, policy.selector] = stored
        return stored

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        if self._ask("delete_policy").policies.pop((direction, selector), None) is None:
            raise KernelError(errno.ENOENT, "no such policy")

    async def policies(self) -> Sequence[Policy]:
        return list(self._ask("policies").policies.values())

    async def flush_policies(self) -> None:
        self._ask("flush_policies").policies.clear()

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        self._ask("acquire_failed")

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        raise KernelError(errno.EOPNOTSUPP, "no sockets here")

    async def unbind(self, address: IPAddress) -> None:
        self._ask("unbind")

    async def statistics(self) -> Mapping[str, int]:
        return {}
