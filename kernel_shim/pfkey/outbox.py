"""What one client of the shim has yet to be sent.

Replies are never dropped: a client that leaves `MAX_QUEUED_REPLIES` unread is not read from. Events are state, not messages: each is kept under
the name of what it is about, a newer one takes the place of an older, and only what is asked for is encoded. A dump is a snapshot, taken once
and sent entry by entry as the client reads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Final

from kernel_shim.inspection import CachedBundle, PendingQueue, Snapshot
from kernel_shim.model import Acquire, AcquireSequence, Expire, KernelEvent, NewMapping, Policy, PolicyExpire, PolicyIndex, SaId, SaStatus
from kernel_shim.pfkey.private import LabelEntries

MAX_QUEUED_REPLIES: Final = 64  # more than a client of ours keeps under way (client.MAX_UNDER_WAY)
MAX_QUEUED_NOTICES: Final = 1024  # what other clients changed: a courtesy, for monitors
MAX_PENDING_ACQUIRES: Final = 4096  # beyond it the kernel is asked to repeat them
MAX_PENDING_EXPIRES: Final = 65536  # one entry an SA, and as many of policies; beyond it the client is told to look
MAX_PENDING_MAPPINGS: Final = 65536


Entries = tuple[SaStatus | Policy | LabelEntries, ...] | Snapshot[PendingQueue] | Snapshot[CachedBundle]


@dataclass(frozen=True, slots=True)
class Output:
    """One datagram for a client, with the descriptors to pass along (SCM_RIGHTS)."""

    data: bytes
    descriptors: tuple[int, ...] = ()


@dataclass(slots=True)
class Dump:
    """A dump under way: `entries` is the snapshot, `position` the next one, `request` the sadb_msg_seq of who asked."""

    type: int
    request: int
    pid: int
    entries: Entries
    position: int = 0

    @property
    def remaining(self) -> int:
        return len(self.entries) - self.position


@dataclass(slots=True)
class Outbox:
    replies: deque[Output] = field(default_factory=deque)
    notices: deque[bytes] = field(default_factory=deque)
    dump: Dump | None = None
    dump_is_next: bool = False  # events and dump take turns
    overrun: bool = False  # events were forgotten, and the client is to be told
    missed_acquires: bool = False  # the kernel is to be asked for them again
    overruns: int = 0
    _acquires: OrderedDict[AcquireSequence, Acquire] = field(default_factory=OrderedDict)
    _expires: OrderedDict[SaId, Expire] = field(default_factory=OrderedDict)
    _mappings: OrderedDict[SaId, NewMapping] = field(default_factory=OrderedDict)
    _policy_expires: OrderedDict[PolicyIndex, PolicyExpire] = field(default_factory=OrderedDict)

    @property
    def full(self) -> bool:
        return len(self.replies) >= MAX_QUEUED_REPLIES

    @property
    def acquires_drained(self) -> bool:
        return not self._acquires

    def __bool__(self) -> bool:
        return bool(self.replies or self.notices or self.dump or self.overrun or self._acquires or self._expires or self._mappings or self._policy_expires)

    def add_event(self, event: KernelEvent) -> None:
        if isinstance(event, Acquire):
            if event.sequence in self._acquires or len(self._acquires) < MAX_PENDING_ACQUIRES:
                self._acquires[event.sequence] = event
            else:
                self.missed_acquires = True
                self.overruns += 1
        elif isinstance(event, Expire):
            waiting = self._expires.get(event.sa)
            if waiting is None or not waiting.hard:  # a hard one is the last word
                self._expires[event.sa] = event
            self._bound(self._expires, MAX_PENDING_EXPIRES)
        elif isinstance(event, PolicyExpire):
            # One of a policy that had the index before is older news than this.
            self._policy_expires[event.policy.index] = event
            self._bound(self._policy_expires, MAX_PENDING_EXPIRES)
        else:
            waiting_mapping = self._mappings.get(event.sa)
            # What the client knows is still the address before the first one that waits.
            old = waiting_mapping.old if waiting_mapping is not None else event.old
            self._mappings[event.sa] = NewMapping(event.sa, event.reqid, old, event.new)
            self._bound(self._mappings, MAX_PENDING_MAPPINGS)

    def forget_acquire(self, sequence: AcquireSequence) -> None:
        self._acquires.pop(sequence, None)

    def next_event(self) -> KernelEvent | None:
        """Takes the oldest event: ACQUIREs first, for packets wait on them."""
        for waiting in (self._acquires, self._mappings, self._expires, self._policy_expires):
            if waiting:
                return waiting.popitem(last=False)[1]
        return None

    def add_notice(self, data: bytes) -> None:
        if len(self.notices) < MAX_QUEUED_NOTICES:
            self.notices.append(data)
        else:
            self._forgot()

    def _bound(self, waiting: OrderedDict[Any, Any], bound: int) -> None:
        if len(waiting) > bound:
            waiting.popitem(last=False)
            self._forgot()

    def _forgot(self) -> None:
        self.overrun = True
        self.overruns += 1
