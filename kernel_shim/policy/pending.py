"""Packets that wait for an SA: a queue for each policy and peer, bounded each and together, oldest dropped first.

Within a queue each flow has a line of its own, so that one peer's SA may release some flows while others wait on, and no
packet ever overtakes an older one of its flow. When a queue is made ready, its flows are looked up again, in slices and
with the queues taking turns:

    while (run := pending.next_run()) is not None:   # or one slice a wake-up
        take | keep | move | drop                    # what the lookup of run.flow said

Losses are counted, by segment, under their reason in `drops`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Generic

from kernel_shim.model import IPAddress, PolicyIndex, Unresolved
from kernel_shim.policy.peer import PeerKey
from kernel_shim.policy.waiting import Dropped, PacketT, QueueStatus, Run, Waiting, WaitQueue, order_of
from kernel_shim.reasons import DropReason

__all__ = ["Dropped", "PendingQueues", "QueueStatus", "Run"]

# A queue holds what one TCP window or a second of 5 Mbit/s brings while an exchange with a distant peer goes on.
MAX_QUEUE_SEGMENTS: Final = 512  # Linux's hold queue has 101, WireGuard's 128: too few for offloaded senders
MAX_QUEUE_BYTES: Final = 1 << 20
MAX_QUEUE_SECONDS: Final = 30.0  # a key manager's first three tries (0, 4 and 11 s) and an answer
MAX_BLOCK_SECONDS: Final = 165.0  # as long as a key manager may try at all (`acquire.ACQUIRE_SECONDS`)
# All queues together: 128 full ones, and no more memory than a small gateway can spare.
MAX_TOTAL_SEGMENTS: Final = 128 * MAX_QUEUE_SEGMENTS
MAX_TOTAL_BYTES: Final = 64 << 20
SLICE_SEGMENTS: Final = 32  # about 0.1 ms of sealing: a hundred queues that become ready at once each send something within 10 ms

_LIFETIME: Final = {Unresolved.QUEUE: MAX_QUEUE_SECONDS, Unresolved.BLOCK: MAX_BLOCK_SECONDS}
_REFUSED: Final = {Unresolved.DROP: DropReason.UNRESOLVED_DROP, Unresolved.EAGAIN: DropReason.UNRESOLVED_EAGAIN}


class PendingQueues(Generic[PacketT]):
    """All waiting packets.

    `flows` maps the flow keys (those of the bundle cache) that have packets waiting to the queue that holds them: while
    a flow is in it, each new packet of the flow goes through `join`, even though its lookup would now succeed.
    `size` is in octets; `segments` is how many packets an offloaded read stands for. `now` never goes back.
    """

    def __init__(self) -> None:
        self._flows: dict[bytes, PeerKey] = {}
        self.flows: Mapping[bytes, PeerKey] = self._flows
        self.drops: Counter[DropReason] = Counter()
        self._queues: dict[PeerKey, WaitQueue[PacketT]] = {}
        self._by_policy: dict[PolicyIndex, dict[IPAddress | None, dict[PeerKey, None]]] = {}  # by destination within the policy
        self._ready: OrderedDict[PeerKey, None] = OrderedDict()
        # By the lifetime they were given; so each is in order of arrival and of deadline.
        self._ages: dict[Unresolved, deque[Waiting[PacketT]]] = {mode: deque() for mode in _LIFETIME}
        self._order = 0
        self._packets = self._segments = self._octets = 0
        self._accepted = self._released = 0

    # Coming in

    def offer(self, key: PeerKey, flow: bytes, packet: PacketT, size: int, segments: int, mode: Unresolved, now: float) -> DropReason | None:
        """Wait in the queue `key`, or in that which holds the flow already. None when it waits (older ones may have been dropped), else why not."""
        refused = _REFUSED.get(mode)
        if refused is None and (size > MAX_QUEUE_BYTES or (mode is Unresolved.QUEUE and segments > MAX_QUEUE_SEGMENTS)):
            refused = DropReason.PENDING_TOO_LARGE
        if refused is not None:
            self.drops[refused] += segments
            return refused
        key = self._flows.get(flow, key)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._open(key, mode)
        self._order += 1
        waiting = Waiting(self._order, flow, packet, size, segments, now + _LIFETIME[mode])
        queue.arrivals.append(waiting)
        self._ages[mode].append(waiting)
        self._file(waiting, queue)
        self._accepted += segments
        self._enforce(queue)
        return None

    def join(self, flow: bytes, packet: PacketT, size: int, segments: int, now: float) -> DropReason | None:
        """Wait behind the packets of `flow`, which must be in `flows`."""
        key = self._flows[flow]
        return self.offer(key, flow, packet, size, segments, self._queues[key].mode, now)

    # Going out

    def ready(self, key: PeerKey) -> None:
        """Look at every flow of this queue once more: an SA came, or a policy changed. Cheap when the queue is empty."""
        queue = self._queues.get(key)
        if queue is not None:
            queue.todo = deque(queue.flows)
            self._ready[key] = None

    def ready_policy(self, policy: PolicyIndex, destination: IPAddress | None = None) -> None:
        """`ready` for every peer of a policy, or for those alone that an SA to `destination` may serve."""
        if destination is None:
            keys = self._keys_of(policy)
        else:
            destinations = self._by_policy.get(policy, {})
            keys = [*destinations.get(None, ()), *destinations.get(destination, ())]
        for key in keys:
            self.ready(key)

    def ready_all(self) -> None:
        """`ready` for every queue: the SPD changed."""
        for key in self._queues:
            self.ready(key)

    @property
    def has_ready(self) -> bool:
        """Whether `next_run` may have something; may be true once too often."""
        return bool(self._ready)

    def next_run(self, limit: int = SLICE_SEGMENTS) -> Run[PacketT] | None:
        """Packets to look up again, of the queue whose turn it is; queues take turns. None when no ready queue is left.

        At most `limit` segments, or one packet. An unanswered run comes again.
        """
        while self._ready:
            key = next(iter(self._ready))
            queue = self._queues.get(key)
            while queue is not None and queue.todo:
                flow = queue.todo[0]
                line = queue.flows.get(flow)
                if line is None:
                    queue.todo.popleft()
                    continue
                self._ready.move_to_end(key)
                chosen: list[Waiting[PacketT]] = []
                segments = 0
                for waiting in line:
                    segments += waiting.segments
                    if chosen and segments > limit:
                        break
                    chosen.append(waiting)
                return Run(key, flow, tuple([waiting.packet for waiting in chosen]), tuple(chosen))
            if queue is not None:
                queue.todo = None
            del self._ready[key]
        return None

    def take(self, run: Run[PacketT]) -> list[PacketT]:
        """The flow of `run` has an SA, or needs none: its packets wait no more, and are for the caller to send. More of the flow may follow."""
        taken = []
        for waiting in run.waiting:
            if waiting.queue is not None:
                taken.append(waiting.packet)
                self._released += waiting.segments
                self._retire(waiting)
        return taken

    def keep(self, run: Run[PacketT]) -> None:
        """The flow of `run` is still unresolved: leave it where it is until its queue is ready again."""
        queue = self._queues.get(run.key)
        if queue is not None and queue.todo and queue.todo[0] == run.flow:
            queue.todo.popleft()

    def move(self, run: Run[PacketT], key: PeerKey, mode: Unresolved) -> None:
        """The flow of `run` is now unresolved for another policy or peer: all of its packets wait there, in order, until their old deadline.

        Under a mode that does not queue they are dropped.
        """
        if mode in _REFUSED:
            self.drop(run, _REFUSED[mode])
            return
        if key == run.key:
            self.keep(run)
            return
        line = list(self._line(run))
        if not line:
            return
        for waiting in line:
            self._unfile(waiting)
        target = self._queues.get(key) or self._open(key, mode)
        target.arrivals = sorted([*(w for w in target.arrivals if w.queue is target), *line], key=order_of)
        for waiting in line:
            self._file(waiting, target)
        self._enforce(target)

    def drop(self, run: Run[PacketT], reason: DropReason) -> list[Dropped[PacketT]]:
        """The flow of `run` may not be sent: drop all of its packets."""
        return self._drop_all(list(self._line(run)), reason)

    def discard(self, key: PeerKey, reason: DropReason) -> list[Dropped[PacketT]]:
        """Drop a whole queue: the negotiation failed or timed out."""
        queue = self._queues.get(key)
        return [] if queue is None else self._drop_all([waiting for waiting in queue.arrivals if waiting.queue is queue], reason)

    def discard_all(self, reason: DropReason) -> list[Dropped[PacketT]]:
        return [dropped for key in list(self._queues) for dropped in self.discard(key, reason)]

    # Time

    def expire(self, now: float) -> list[Dropped[PacketT]]:
        """Drop what waited for too long."""
        late = []
        for ages in self._ages.values():
            while ages and (ages[0].queue is None or ages[0].deadline <= now):
                waiting = ages.popleft()
                if waiting.queue is not None:
                    late.append(waiting)
        return self._drop_all(late, DropReason.PENDING_AGED)

    def next_deadline(self) -> float | None:
        """When `expire` next has something to do; monotonic seconds."""
        deadline: float | None = None
        for mode in self._ages:
            head = self._head(mode)
            if head is not None and (deadline is None or head.deadline < deadline):
                deadline = head.deadline
        return deadline

    # The rest

    def rekey(self, cut: Callable[[PacketT], bytes | None]) -> list[Dropped[PacketT]]:
        """Flow keys are cut by another mask from now on: file every waiting packet anew. Linear in what waits.

        A packet without a key any more (a later fragment, now that ports are read) is dropped.
        """
        everything = sorted((waiting for queue in self._queues.values() for waiting in queue.arrivals if waiting.queue is queue), key=order_of)
        homes = [(waiting, waiting.queue) for waiting in everything]
        ready = list(self._ready)
        for waiting in everything:
            self._unfile(waiting)
        lost = []
        for waiting, home in homes:
            assert home is not None
            flow = cut(waiting.packet)
            if flow is None:
                self.drops[DropReason.FRAGMENT_WITHOUT_FIRST] += waiting.segments
                lost.append(Dropped(home.key, waiting.packet, DropReason.FRAGMENT_WITHOUT_FIRST))
                continue
            waiting.flow = flow
            key = self._flows.get(flow, home.key)
            queue = self._queues.get(key) or self._open(key, home.mode)
            queue.arrivals.append(waiting)
            self._file(waiting, queue)
        for queue in list(self._queues.values()):
            queue.todo = None
            self._enforce(queue)
        for key in ready:
            self.ready(key)
        return lost

    def head(self, key: PeerKey) -> PacketT | None:
        """The oldest packet of a queue."""
        queue = self._queues.get(key)
        oldest = queue.oldest() if queue is not None else None
        return oldest.packet if oldest is not None else None

    def snapshot(self) -> list[QueueStatus]:
        return [QueueStatus(q.key, q.mode, len(q.flows), q.packets, q.segments, q.octets) for q in self._queues.values()]

    def statistics(self) -> dict[str, int]:
        return {
            "pending_queues": len(self._queues),
            "pending_flows": len(self._flows),
            "pending_packets": self._packets,
            "pending_segments": self._segments,
            "pending_bytes": self._octets,
            "pending_accepted": self._accepted,
            "pending_released": self._released,
        }

    # Inside

    def _open(self, key: PeerKey, mode: Unresolved) -> WaitQueue[PacketT]:
        queue = self._queues[key] = WaitQueue(key, mode)
        self._by_policy.setdefault(key.policy, {}).setdefault(key.destination, {})[key] = None
        return queue

    def _close(self, queue: WaitQueue[PacketT]) -> None:
        del self._queues[queue.key]
        self._ready.pop(queue.key, None)
        destinations = self._by_policy[queue.key.policy]
        peers = destinations[queue.key.destination]
        del peers[queue.key]
        if not peers:
            del destinations[queue.key.destination]
            if not destinations:
                del self._by_policy[queue.key.policy]

    def _keys_of(self, policy: PolicyIndex) -> list[PeerKey]:
        return [key for keys in self._by_policy.get(policy, {}).values() for key in keys]

    def _file(self, waiting: Waiting[PacketT], queue: WaitQueue[PacketT]) -> None:
        """To the end of its flow's line, and into the sums; `arrivals` is the caller's."""
        waiting.queue = queue
        line = queue.flows.get(waiting.flow)
        if line is None:
            line = queue.flows[waiting.flow] = []
            self._flows[waiting.flow] = queue.key
        line.append(waiting)
        queue.packets += 1
        queue.segments += waiting.segments
        queue.octets += waiting.size
        self._packets += 1
        self._segments += waiting.segments
        self._octets += waiting.size

    def _unfile(self, waiting: Waiting[PacketT]) -> None:
        """Out of its line and the sums; an empty line or queue goes."""
        queue = waiting.queue
        assert queue is not None
        waiting.queue = None
        line = queue.flows[waiting.flow]
        line.remove(waiting)  # nearly always the first
        if not line:
            del queue.flows[waiting.flow]
            del self._flows[waiting.flow]
        queue.packets -= 1
        queue.segments -= waiting.segments
        queue.octets -= waiting.size
        self._packets -= 1
        self._segments -= waiting.segments
        self._octets -= waiting.size
        if not queue.packets:
            self._close(queue)

    def _retire(self, waiting: Waiting[PacketT]) -> None:
        """`_unfile`, for good; what `arrivals` and `_ages` still hold of the dead stays below what they hold of the living."""
        queue = waiting.queue
        assert queue is not None
        self._unfile(waiting)
        if len(queue.arrivals) > 2 * queue.packets + 64:
            queue.arrivals = [w for w in queue.arrivals if w.queue is queue]
        for mode, ages in self._ages.items():
            if len(ages) > 2 * self._packets + 64:
                self._ages[mode] = deque(w for w in ages if w.queue is not None)

    def _line(self, run: Run[PacketT]) -> Iterable[Waiting[PacketT]]:
        queue = self._queues.get(run.key)
        return queue.flows.get(run.flow, ()) if queue is not None else ()

    def _drop_all(self, doomed: Iterable[Waiting[PacketT]], reason: DropReason) -> list[Dropped[PacketT]]:
        dropped = []
        for waiting in doomed:
            assert waiting.queue is not None
            dropped.append(Dropped(waiting.queue.key, waiting.packet, reason))
            self.drops[reason] += waiting.segments
            self._retire(waiting)
        return dropped

    def _enforce(self, queue: WaitQueue[PacketT]) -> None:
        while queue.mode is Unresolved.QUEUE and queue.segments > MAX_QUEUE_SEGMENTS:
            self._drop_oldest(queue, DropReason.PENDING_OVERFLOW_PACKETS)
        while queue.octets > MAX_QUEUE_BYTES:
            self._drop_oldest(queue, DropReason.PENDING_OVERFLOW_BYTES)
        while self._segments > MAX_TOTAL_SEGMENTS or self._octets > MAX_TOTAL_BYTES:
            # The queue that grows pays first while it has more than its share; else the oldest of all.
            over = queue.segments * len(self._queues) > self._segments or queue.octets * len(self._queues) > self._octets
            self._drop_oldest(queue if over else None, DropReason.PENDING_OVERFLOW_GLOBAL)

    def _drop_oldest(self, queue: WaitQueue[PacketT] | None, reason: DropReason) -> None:
        heads = (self._head(mode) for mode in self._ages)
        victim = queue.oldest() if queue is not None else min((head for head in heads if head is not None), key=order_of)
        assert victim is not None
        self.drops[reason] += victim.segments
        self._retire(victim)

    def _head(self, mode: Unresolved) -> Waiting[PacketT] | None:
        ages = self._ages[mode]
        while ages and ages[0].queue is None:
            ages.popleft()
        return ages[0] if ages else None
