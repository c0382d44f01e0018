"""How a key manager sees a kernel, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

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
from kernel_shim.mpls.node import NodeEntry


class ChannelClosed(ConnectionError):
    """The kernel side went away; every request that was under way ends with this."""


class KernelChannel(Protocol):
    """A connection to one kernel. Requests raise `KernelError` when refused, `TimeoutError` when unanswered, `ChannelClosed`.

    Every request ends; a request that timed out may be made again, for each of them is idempotent or its repetition is recognised.
    """

    def capabilities(self) -> Capabilities: ...

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """`listener` is called from the event loop for each event, in order; those that came since `open` first."""

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when events may have been lost: `sas` and `policies` tell what they told."""

    def on_closed(self, listener: Callable[[], None]) -> None:
        """`listener` is called once when the kernel side went away without `close`."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def get_spi(self, request: SpiRequest) -> Spi: ...
    async def add_sa(self, sa: SecurityAssociation) -> None: ...
    async def update_sa(self, sa: SecurityAssociation) -> None: ...
    async def delete_sa(self, sa: SaId) -> None: ...

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        """Give the standing SA `old` the addresses and UDP encapsulation of `new` (MOBIKE, RFC 4555; a NAT's new port); nothing else of the two may differ.

        SPI, keys, sequence numbers, replay window state and lifetimes go on; no sequence number is used twice. Policies are not touched:
        the caller updates them. That `new` stands already and `old` does not is success, so a repetition is harmless.
        KernelError(ESRCH) when neither stands, EINVAL when they differ in more, EOPNOTSUPP where the kernel cannot. After any other
        error the SA may be gone: its owner makes a successor.
        """

    async def get_sa(self, sa: SaId) -> SaStatus: ...
    async def sas(self) -> Sequence[SaStatus]: ...
    async def flush_sas(self) -> None: ...

    async def add_policy(self, policy: Policy) -> Policy: ...
    async def update_policy(self, policy: Policy) -> Policy: ...
    async def delete_policy(self, direction: Direction, selector: Selector) -> None: ...
    async def policies(self) -> Sequence[Policy]: ...
    async def flush_policies(self) -> None: ...

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None: ...

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        """Descriptors (port 500, port 4500) of the IKE sockets of a local address; the caller owns them. Only where `binds_ike_sockets`."""

    async def unbind(self, address: IPAddress) -> None: ...

    async def statistics(self) -> Mapping[str, int]: ...


@runtime_checkable
class LabelChannel(Protocol):
    """The part of a channel whose kernel forwards labels (`Capabilities.labels`)."""

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        """Add or replace entries. What was put before an entry that is refused stands; putting it all again is harmless."""

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        """Take entries away, by their keys; it is no error that one is gone."""

    async def labels(self) -> Sequence[NodeEntry]: ...
