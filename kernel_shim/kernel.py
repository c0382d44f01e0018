"""What the userspace kernel offers to the PF_KEY server, and nothing of how it does it.

`kernel_shim.dataplane.engine.Engine` implements it; `kernel_shim.pfkey.server` calls it.
Every call is synchronous, raises `KernelError` with the errno that Linux would give, and leaves no half-applied state.
`now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    IPAddress,
    KernelEvent,
    Migration,
    Policy,
    PolicyIndex,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    SpiRequest,
)
from kernel_shim.mpls.lfib import Key
from kernel_shim.mpls.node import NodeEntry


class Kernel(Protocol):
    """The SAD and SPD operations of RFC 2367 and the SADB_X_SPD messages."""

    def capabilities(self) -> Capabilities: ...

    # SAD
    def get_spi(self, request: SpiRequest, now: float) -> SaStatus:
        """Reserve an SPI: a larval SA, with the slot in its SPI. Packets for it wait, within bounds, for its keys."""

    def add_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        """EEXIST when (destination, SPI) is taken by an SA that is not larval."""

    def update_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        """Give keys to a larval SA, or new lifetimes, encapsulation ports and outer addresses to a mature one. ESRCH when there is none.

        After a `NewMapping` the kernel goes on sending to the old address: the key manager decides, and updates the outbound SA.
        An SA whose destination changes is found by its SPI and key; its sequence numbers go on. The templates of its policies
        name outer addresses too: update the policies in the same breath, or their packets ask for a new SA.
        """

    def delete_sa(self, sa: SaId) -> SaStatus:
        """ESRCH when there is none."""

    def get_sa(self, sa: SaId) -> SaStatus: ...
    def sas(self) -> Sequence[SaStatus]:
        """A snapshot: later changes do not show in it."""

    def flush_sas(self) -> int:
        """How many went."""

    # SPD
    def add_policy(self, policy: Policy, now: float) -> Policy:
        """The policy with its index. EEXIST when the same selector, direction and priority stand already."""

    def update_policy(self, policy: Policy, now: float) -> Policy:
        """Add or replace; a replaced policy keeps its index."""

    def delete_policy(self, direction: Direction, selector: Selector) -> Policy: ...
    def delete_policy_index(self, direction: Direction, index: PolicyIndex) -> Policy: ...
    def get_policy(self, direction: Direction, index: PolicyIndex) -> Policy:
        """ENOENT when there is none, as for the two deletions."""

    def migrate(self, migration: Migration, now: float) -> Policy:
        """The policy as it is afterwards. Its SAs keep sequence numbers, replay windows and lifetimes.

        ENOENT without such a policy, ENODATA when no template of it matches, EEXIST when an SA with the new name stands.
        """

    def policies(self) -> Sequence[Policy]: ...
    def flush_policies(self) -> int: ...

    # Key manager
    def acquire_failed(self, sequence: AcquireSequence, errno: int, now: float) -> None:
        """The key manager gives up on an ACQUIRE (RFC 2367 section 3.1.6).

        Its queue is discarded with a counted reason, the senders get ICMP unreachable, the policy backs off.
        """

    def key_manager_listens(self, listening: bool, now: float) -> None:
        """Whether any key manager is registered. ACQUIREs made while none is are state, and are repeated when one comes."""

    def subscribe(self, listener: Callable[[KernelEvent], None]) -> None:
        """Call `listener` for every event; it must not call back."""

    def statistics(self) -> Mapping[str, int]:
        """Counters by name: packets, bytes, drops by reason, cache hits, queue depths."""


class LabelKernel(Protocol):
    """The label node of a kernel that forwards MPLS."""

    def put_label_entry(self, entry: NodeEntry, now: float) -> None:
        """Add or replace. KernelError(EINVAL) for what means nothing or is beyond a bound."""

    def remove_label_entry(self, key: Key, now: float) -> None:
        """KernelError(ESRCH) when there is none."""

    def label_entries(self) -> Sequence[NodeEntry]:
        """A snapshot."""


class IkeSocketProvider(Protocol):
    """Opens the sockets of one local address and hands the IKE ones over."""

    def bind(self, address: IPAddress) -> tuple[int, int]:
        """Descriptors of UDP port 500 and of the IKE member of the port 4500 group. KernelError(EADDRNOTAVAIL, EADDRINUSE, EACCES)."""

    def unbind(self, address: IPAddress) -> None: ...
