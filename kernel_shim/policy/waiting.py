"""The parts of the pending queues: one waiting packet, one queue of them, and what is told about them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from kernel_shim.model import Unresolved
from kernel_shim.policy.peer import PeerKey
from kernel_shim.reasons import DropReason

PacketT = TypeVar("PacketT")


@dataclass(frozen=True, slots=True)
class Dropped(Generic[PacketT]):
    """A packet whose wait ended badly; its loss is counted already. The sender is owed an ICMP unreachable."""

    key: PeerKey
    packet: PacketT
    reason: DropReason


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """One queue, for people."""

    key: PeerKey
    mode: Unresolved
    flows: int
    packets: int
    segments: int
    octets: int


class Waiting(Generic[PacketT]):
    """`queue` is where it waits, None when it does no more; the deques that hold it then forget it when it comes up."""

    __slots__ = ("deadline", "flow", "order", "packet", "queue", "segments", "size")

    def __init__(self, order: int, flow: bytes, packet: PacketT, size: int, segments: int, deadline: float) -> None:
        self.order = order
        self.flow = flow
        self.packet = packet
        self.size = size
        self.segments = segments
        self.deadline = deadline
        self.queue: WaitQueue[PacketT] | None = None


class WaitQueue(Generic[PacketT]):
    __slots__ = ("arrivals", "flows", "key", "mode", "octets", "packets", "segments", "todo")

    def __init__(self, key: PeerKey, mode: Unresolved) -> None:
        self.key = key
        self.mode = mode
        # Lists, though their heads go first: most queues hold one packet, and an empty deque takes seven times a list of one.
        self.flows: dict[bytes, list[Waiting[PacketT]]] = {}
        self.arrivals: list[Waiting[PacketT]] = []  # all flows together, oldest first
        self.todo: deque[bytes] | None = None  # flows that this pass of a drain has still to look at
        self.packets = self.segments = self.octets = 0

    def oldest(self) -> Waiting[PacketT] | None:
        arrivals = self.arrivals
        dead = 0
        while dead < len(arrivals) and arrivals[dead].queue is not self:
            dead += 1
        del arrivals[:dead]
        return arrivals[0] if arrivals else None


@dataclass(frozen=True, slots=True)
class Run(Generic[PacketT]):
    """The oldest waiting packets of one flow. They still wait: answer with `take`, `keep`, `move` or `drop`."""

    key: PeerKey
    flow: bytes
    packets: tuple[PacketT, ...]
    waiting: tuple[Waiting[PacketT], ...]


def order_of(waiting: Waiting[PacketT]) -> int:
    return waiting.order
