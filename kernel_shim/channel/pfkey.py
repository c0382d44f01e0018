"""PF_KEY over a UNIX SOCK_SEQPACKET socket, for asyncio: how a key manager reaches the shim."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    IPAddress,
    KernelEvent,
    Policy,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)


class PfKeyChannel:
    """A `KernelChannel` to the shim that listens at `path`. `open` raises ConnectionRefusedError or FileNotFoundError when none does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError

    def capabilities(self) -> Capabilities:
        raise NotImplementedError

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        raise NotImplementedError

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when the kernel side had to forget events: look at `sas()` and `policies()`."""
        raise NotImplementedError

    def on_closed(self, listener: Callable[[], None]) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def get_spi(self, request: SpiRequest) -> Spi:
        raise NotImplementedError

    async def add_sa(self, sa: SecurityAssociation) -> None:
        raise NotImplementedError

    async def update_sa(self, sa: SecurityAssociation) -> None:
        raise NotImplementedError

    async def delete_sa(self, sa: SaId) -> None:
        raise NotImplementedError

    async def get_sa(self, sa: SaId) -> SaStatus:
        raise NotImplementedError

    async def sas(self) -> Sequence[SaStatus]:
        raise NotImplementedError

    async def flush_sas(self) -> None:
        raise NotImplementedError

    async def add_policy(self, policy: Policy) -> Policy:
        raise NotImplementedError

    async def update_policy(self, policy: Policy) -> Policy:
        raise NotImplementedError

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        raise NotImplementedError

    async def policies(self) -> Sequence[Policy]:
        raise NotImplementedError

    async def flush_policies(self) -> None:
        raise NotImplementedError

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        raise NotImplementedError

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        raise NotImplementedError

    async def unbind(self, address: IPAddress) -> None:
        raise NotImplementedError

    async def statistics(self) -> Mapping[str, int]:
        raise NotImplementedError
