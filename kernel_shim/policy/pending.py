"""Packets that wait for an SA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from kernel_shim.model import PolicyIndex, Unresolved
from kernel_shim.policy.peer import PeerKey
from kernel_shim.reasons import DropReason

PacketT = TypeVar("PacketT")

MAX_QUEUE_SEGMENTS: Final = 512
MAX_QUEUE_BYTES: Final = 1 << 20
MAX_QUEUE_SECONDS: Final = 30.0
MAX_BLOCK_SECONDS: Final = 165.0
MAX_TOTAL_SEGMENTS: Final = 65536
MAX_TOTAL_BYTES: Final = 64 << 20
SLICE_SEGMENTS: Final = 64


@dataclass(frozen=True, slots=True)
class Dropped(Generic[PacketT]):
    """A packet whose wait ended badly; its loss is counted already. The sender is owed an ICMP unreachable."""

    key: PeerKey
    packet: PacketT
    reason: DropReason


@dataclass(frozen=True, slots=True)
class Run(Generic[PacketT]):
    """The oldest waiting packets of one flow. They still wait: answer with `take`, `keep`, `move` or `drop`."""

    key: PeerKey
    flow: bytes
    packets: Sequence[PacketT]


class PendingQueues(Generic[PacketT]):
    """All waiting packets.

    `flows` maps the flow keys (those of the bundle cache) that have packets waiting to the queue that holds them: while
    a flow is in it, each new packet of the flow goes through `join`, even though its lookup would now succeed.
    """

    flows: Mapping[bytes, PeerKey]
    drops: Counter[DropReason]

    def offer(self, key: PeerKey, flow: bytes, packet: PacketT, size: int, segments: int, mode: Unresolved, now: float) -> DropReason | None:
        """Wait in the queue `key`. None when it waits (others may have been dropped, counted), else why not (counted)."""
        raise NotImplementedError

    def join(self, flow: bytes, packet: PacketT, size: int, segments: int, now: float) -> DropReason | None:
        """Wait behind the packets of `flow` that wait already; `flow` must be in `flows`."""
        raise NotImplementedError

    def ready(self, key: PeerKey) -> None:
        """Look at every flow of this queue once more: an SA came, or a policy changed. Cheap when the queue is empty."""
        raise NotImplementedError

    def ready_policy(self, policy: PolicyIndex) -> None:
        """`ready` for every peer of a policy."""
        raise NotImplementedError

    def ready_all(self) -> None:
        """`ready` for every queue: the SPD changed."""
        raise NotImplementedError

    def next_run(self, limit: int = SLICE_SEGMENTS) -> Run[PacketT] | None:
        """Packets to look up again, of the queue whose turn it is; queues take turns. None when no ready queue is left."""
        raise NotImplementedError

    def take(self, run: Run[PacketT]) -> None:
        """The packets of `run` were sent: they wait no more."""
        raise NotImplementedError

    def keep(self, run: Run[PacketT]) -> None:
        """The flow of `run` is still unresolved: leave it where it is until its queue is ready again."""
        raise NotImplementedError

    def move(self, run: Run[PacketT], key: PeerKey, mode: Unresolved, now: float) -> None:
        """The flow of `run` is now unresolved for another policy or peer: all of its packets wait there, in order, with their age."""
        raise NotImplementedError

    def drop(self, run: Run[PacketT], reason: DropReason) -> list[Dropped[PacketT]]:
        """The flow of `run` may not be sent: drop all of its packets."""
        raise NotImplementedError

    def discard(self, key: PeerKey, reason: DropReason) -> list[Dropped[PacketT]]:
        """Drop a whole queue: the negotiation failed or timed out."""
        raise NotImplementedError

    def discard_all(self, reason: DropReason) -> list[Dropped[PacketT]]:
        raise NotImplementedError

    def expire(self, now: float) -> list[Dropped[PacketT]]:
        """Drop what waited for too long."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `expire` next has something to do; monotonic seconds."""
        raise NotImplementedError

    def rekey(self, cut: Callable[[PacketT], bytes | None]) -> None:
        """Flow keys are cut by another mask from now on: file every waiting packet anew. Linear in what waits."""
        raise NotImplementedError

    def head(self, key: PeerKey) -> PacketT | None:
        """The oldest packet of a queue."""
        raise NotImplementedError

    def statistics(self) -> dict[str, int]:
        raise NotImplementedError
