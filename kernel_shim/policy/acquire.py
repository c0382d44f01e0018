"""Asking the key manager for SAs: an ACQUIRE is state, not a message.

For each policy and peer at most one ACQUIRE is outstanding, and it carries the flow that caused it. It is repeated while
it lasts, so a lost notice, a full socket or a key manager that comes late costs time and nothing else.

    state     input              next
    -         need               ASKING    sent now, or as soon as rate and listener allow
    ASKING    need               ASKING    coalesced
    ASKING    repeat is due      ASKING    sent again
    ASKING    time ran out       BACKOFF   timed out
    ASKING    failed             BACKOFF
    ASKING    satisfied          -         when the SA covers the flow that asked
    ASKING    satisfied          BACKOFF   when it does not: to ask again at once would only bring the same SA
    BACKOFF   need               BACKOFF   refused; but another flow than the one left uncovered may ask: ASKING
    BACKOFF   its end            RESTING   the peer may be asked for again
    RESTING   need               ASKING    a next failure backs off for longer
    RESTING   its end            -         failures are forgotten
    any       resolved, forget   -

A peer whose SAs are narrower than the flows is asked for flow by flow: packets that an SA left uncovered lead to a next
`need` as soon as the one before is satisfied.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import Final

from kernel_shim.model import Acquire, AcquireSequence, Flow, Policy, PolicyIndex, Template
from kernel_shim.policy.peer import PeerKey

# Specification.
SEQUENCE_LIMIT: Final = 1 << 32  # sadb_msg_seq (RFC 2367 section 2.3)

# Ours.
ACQUIRE_SECONDS: Final = 165.0  # the sum of a key manager's retransmissions, vpnd's and strongSwan's by default; it reports failure itself
REPEAT_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # a lost notice costs a second; the last one goes on
BACKOFF_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 30.0)  # after the first failure in a row, the second, ...; the last one goes on
REST_SECONDS: Final = 60.0  # failures further apart than this are not in a row
MAX_ACQUIRES: Final = 131072  # about 60 MB
MAX_ACQUIRES_PER_POLICY: Final = 16384  # one wildcard policy, scanned through, must not fill the table
ACQUIRE_RATE: Final = 1000.0  # a second; somewhat more than a key manager can negotiate
ACQUIRE_BURST: Final = 256  # at about 300 octets each, well within the socket buffer of a key manager that is busy for a moment


class Need(Enum):
    """What became of a wish for an SA."""

    ASKED = "asked"
    WAITING = "waiting"  # one is under way
    BACKING_OFF = "backing_off"  # the last one failed: the packet is not worth keeping
    TABLE_FULL = "table_full"


class AcquireState(Enum):
    ASKING = "asking"
    BACKOFF = "backoff"
    RESTING = "resting"


@dataclass(frozen=True, slots=True)
class Due:
    """What time brought: ACQUIREs to send (new or repeated), peers that timed out, peers that may be asked for again."""

    acquires: tuple[Acquire, ...] = ()
    timed_out: tuple[PeerKey, ...] = ()
    retry: tuple[PeerKey, ...] = ()


class _Entry:
    __slots__ = ("acquire", "deadline", "ends", "failures", "flow", "key", "narrow", "repeats", "state", "unsent")

    def __init__(self, key: PeerKey, flow: Flow, acquire: Acquire) -> None:
        self.key = key
        self.flow = flow
        self.acquire = acquire
        self.state = AcquireState.ASKING
        self.deadline = 0.0  # of whatever comes next
        self.ends = 0.0
        self.repeats = 0
        self.failures = 0
        self.narrow = False  # in back-off because an SA did not cover `flow`
        self.unsent = False  # stands in the line for the key manager


class AcquireTable:
    """One ACQUIRE at a time for each policy and peer. `now` is monotonic seconds.

    `first_sequence` lets a restarted kernel number its ACQUIREs apart from those of its former life.
    """

    def __init__(self, first_sequence: int = 1) -> None:
        self._entries: dict[PeerKey, _Entry] = {}
        self._by_sequence: dict[int, _Entry] = {}  # those in state ASKING, oldest first
        self._by_policy: dict[PolicyIndex, dict[PeerKey, None]] = {}
        self._deadlines: list[tuple[float, int, _Entry]] = []  # a heap; an item is void when its entry has another deadline
        self._pushed = 0
        self._unsent: deque[_Entry] = deque()
        self._next_sequence = max(1, first_sequence % SEQUENCE_LIMIT)
        self._listening = False
        self._tokens = float(ACQUIRE_BURST)
        self._refilled = 0.0
        self._asked = self._sent = self._coalesced = self._failed = self._timed_out = self._narrow = self._refused = 0

    def __len__(self) -> int:
        return len(self._entries)

    def need(self, key: PeerKey, policy: Policy, template: Template, flow: Flow, now: float) -> tuple[Need, Acquire | None]:
        """A packet of `flow` has no SA. An Acquire that comes back is to be sent now; without one `poll` will send it."""
        entry = self._entries.get(key)
        failures = 0
        if entry is not None:
            if entry.state is AcquireState.ASKING:
                self._coalesced += 1
                return Need.WAITING, None
            if entry.state is AcquireState.BACKOFF and now < entry.deadline and not (entry.narrow and entry.flow != flow):
                self._refused += 1
                return Need.BACKING_OFF, None
            failures = entry.failures
            self._remove(entry)
        elif len(self._entries) >= MAX_ACQUIRES or len(self._by_policy.get(key.policy, ())) >= MAX_ACQUIRES_PER_POLICY:
            self._refused += 1
            return Need.TABLE_FULL, None
        sequence = self._new_sequence()
        acquire = Acquire(sequence, policy.index, template.reqid, template.mode, key.source, key.destination, policy.selector, flow)
        entry = _Entry(key, flow, acquire)
        entry.failures = failures
        entry.ends = now + ACQUIRE_SECONDS
        self._entries[key] = self._by_sequence[sequence] = entry
        self._by_policy.setdefault(key.policy, {})[key] = None
        self._schedule_repeat(entry, now)
        self._asked += 1
        if self._listening and not self._unsent and self._token(now):
            self._sent += 1
            return Need.ASKED, acquire
        self._line_up(entry)
        return Need.ASKED, None

    def state(self, key: PeerKey) -> AcquireState | None:
        """None when nothing is known of the peer."""
        entry = self._entries.get(key)
        return entry.state if entry is not None else None

    def peer(self, sequence: AcquireSequence) -> tuple[PeerKey, Flow] | None:
        """Whom an outstanding ACQUIRE is for, and the flow that caused it."""
        entry = self._by_sequence.get(sequence)
        return (entry.key, entry.flow) if entry is not None else None

    def asked(self, key: PeerKey) -> Flow | None:
        """The flow that the outstanding ACQUIRE of a peer is for; None when none is outstanding."""
        entry = self._entries.get(key)
        return entry.flow if entry is not None and entry.state is AcquireState.ASKING else None

    def sequence(self, key: PeerKey) -> AcquireSequence:
        """Of the outstanding ACQUIRE of a peer; 0 when none is."""
        entry = self._entries.get(key)
        return entry.acquire.sequence if entry is not None and entry.state is AcquireState.ASKING else AcquireSequence(0)

    def satisfied(self, sequence: AcquireSequence, *, covered: bool, now: float) -> PeerKey | None:
        """An outbound SA came for it; `covered` says whether its selectors cover the flow of the ACQUIRE. None: not outstanding."""
        entry = self._by_sequence.get(sequence)
        if entry is None:
            return None
        if covered:
            self._remove(entry)
        else:
            self._narrow += 1
            self._back_off(entry, now, narrow=True)
        return entry.key

    def resolved(self, key: PeerKey) -> None:
        """The peer has an SA for what was asked, whoever made it: forget the ACQUIRE and its failures.

        While one is outstanding make sure that the SA covers `asked(key)`, else the same will be asked for twice.
        """
        entry = self._entries.get(key)
        if entry is not None:
            self._remove(entry)

    def failed(self, sequence: AcquireSequence, now: float) -> PeerKey | None:
        """The key manager gave up: back off. Discard the queue of the peer that is given back. None: not outstanding."""
        entry = self._by_sequence.get(sequence)
        if entry is None:
            return None
        self._failed += 1
        self._back_off(entry, now, narrow=False)
        return entry.key

    def forget_policy(self, policy: PolicyIndex) -> list[PeerKey]:
        """The policy is gone, or its templates changed, and with that what was asked for it."""
        keys = list(self._by_policy.get(policy, ()))
        for key in keys:
            self._remove(self._entries[key])
        return keys

    def clear(self) -> None:
        self._entries.clear()
        self._by_sequence.clear()
        self._by_policy.clear()
        self._deadlines.clear()
        self._unsent.clear()

    def listening(self, listening: bool, now: float) -> None:
        """Whether a key manager listens. When one comes, everything outstanding is due at once in `poll`, for it may be another one."""
        self._listening = listening
        for entry in self._by_sequence.values() if listening else ():
            entry.repeats = 0
            self._schedule_repeat(entry, now)
            self._line_up(entry)

    def poll(self, now: float) -> Due:
        """To be called when `next_deadline` has come, and after `listening`."""
        timed_out: list[PeerKey] = []
        retry: list[PeerKey] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, _, entry = heappop(self._deadlines)
            if self._entries.get(entry.key) is not entry or entry.deadline != deadline:
                continue
            if entry.state is AcquireState.ASKING and now >= entry.ends:
                self._timed_out += 1
                timed_out.append(entry.key)
                self._back_off(entry, now, narrow=False)
            elif entry.state is AcquireState.ASKING:
                self._schedule_repeat(entry, now)
                self._line_up(entry)
            elif entry.state is AcquireState.BACKOFF:
                entry.state = AcquireState.RESTING
                self._schedule(entry, now + REST_SECONDS)
                retry.append(entry.key)
            else:
                self._remove(entry)
        acquires: list[Acquire] = []
        while self._listening and self._unsent:
            entry = self._unsent[0]
            if entry.state is AcquireState.ASKING and self._entries.get(entry.key) is entry:
                if not self._token(now):
                    break
                acquires.append(entry.acquire)
                self._sent += 1
            self._unsent.popleft()
            entry.unsent = False
        return Due(tuple(acquires), tuple(timed_out), tuple(retry))

    def next_deadline(self) -> float | None:
        """When `poll` next has something to do; monotonic seconds."""
        while self._deadlines and not self._valid(self._deadlines[0]):
            heappop(self._deadlines)
        deadline = self._deadlines[0][0] if self._deadlines else None
        if self._listening and self._unsent:
            token = self._refilled + max(0.0, 1.0 - self._tokens) / ACQUIRE_RATE
            deadline = token if deadline is None else min(deadline, token)
        return deadline

    def outstanding(self) -> list[Acquire]:
        """A snapshot, oldest first."""
        return [entry.acquire for entry in self._by_sequence.values()]

    def statistics(self) -> dict[str, int]:
        return {
            "acquire_outstanding": len(self._by_sequence),
            "acquire_unsent": len(self._unsent),
            "acquire_asked": self._asked,
            "acquire_sent": self._sent,
            "acquire_coalesced": self._coalesced,
            "acquire_failed": self._failed,
            "acquire_timed_out": self._timed_out,
            "acquire_narrow": self._narrow,
            "acquire_refused": self._refused,
        }

    # Inside

    def _back_off(self, entry: _Entry, now: float, *, narrow: bool) -> None:
        self._by_sequence.pop(entry.acquire.sequence, None)
        entry.state = AcquireState.BACKOFF
        entry.narrow = narrow
        pause = BACKOFF_SECONDS[min(entry.failures, len(BACKOFF_SECONDS) - 1)]
        entry.failures += 1
        self._schedule(entry, now + pause)

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._by_sequence.pop(entry.acquire.sequence, None)
        peers = self._by_policy[entry.key.policy]
        del peers[entry.key]
        if not peers:
            del self._by_policy[entry.key.policy]
        if len(self._deadlines) > 2 * len(self._entries) + 64:
            self._deadlines = [item for item in self._deadlines if self._valid(item)]
            heapify(self._deadlines)
        if len(self._unsent) > 2 * len(self._entries) + 64:
            self._unsent = deque(other for other in self._unsent if self._entries.get(other.key) is other)

    def _valid(self, item: tuple[float, int, _Entry]) -> bool:
        return self._entries.get(item[2].key) is item[2] and item[2].deadline == item[0]

    def _line_up(self, entry: _Entry) -> None:
        # Without a listener nothing stands in line: `listening` lines all of them up, in order of age.
        if self._listening and not entry.unsent:
            entry.unsent = True
            self._unsent.append(entry)

    def _schedule_repeat(self, entry: _Entry, now: float) -> None:
        pause = REPEAT_SECONDS[min(entry.repeats, len(REPEAT_SECONDS) - 1)]
        entry.repeats += 1
        self._schedule(entry, min(now + pause, entry.ends))

    def _schedule(self, entry: _Entry, deadline: float) -> None:
        entry.deadline = deadline
        self._pushed += 1
        heappush(self._deadlines, (deadline, self._pushed, entry))

    def _token(self, now: float) -> bool:
        if now > self._refilled:
            self._tokens = min(float(ACQUIRE_BURST), self._tokens + (now - self._refilled) * ACQUIRE_RATE)
            self._refilled = now
        # A hair less than one: the deadline for a token is computed by division.
        if self._tokens < 0.999:
            return False
        self._tokens -= 1.0
        return True

    def _new_sequence(self) -> AcquireSequence:
        while True:
            sequence = self._next_sequence
            self._next_sequence = sequence + 1 if sequence + 1 < SEQUENCE_LIMIT else 1
            if sequence not in self._by_sequence:
                return AcquireSequence(sequence)
