"""One heap of deadlines for everything that waits."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
COMPACT_FACTOR: Final = 4  # stale heap entries tolerated per live one before the heap is rebuilt
COMPACT_MINIMUM: Final = 256


class Deadlines(Generic[K]):
    """At most one deadline (monotonic seconds) a key; setting another replaces it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._current: dict[K, tuple[float, int]] = {}
        self._ticket = 0

    def set(self, key: K, deadline: float | None) -> None:
        """None takes the deadline away."""
        current = self._current.get(key)
        if deadline is None:
            self._current.pop(key, None)
            return
        if current is not None and current[0] == deadline:
            return
        self._ticket += 1
        self._current[key] = (deadline, self._ticket)
        heapq.heappush(self._heap, (deadline, self._ticket, key))
        if len(self._heap) > COMPACT_MINIMUM + COMPACT_FACTOR * len(self._current):
            self._heap = [(when, ticket, name) for name, (when, ticket) in self._current.items()]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """The earliest deadline, None when nothing waits."""
        while self._heap:
            deadline, ticket, key = self._heap[0]
            if self._current.get(key) == (deadline, ticket):
                return deadline
            heapq.heappop(self._heap)
        return None

    def due(self, now: float) -> K | None:
        """Take the key whose deadline has come, earliest first; None when none has."""
        deadline = self.next()
        if deadline is None or deadline > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._current[key]
        return key

    def __len__(self) -> int:
        return len(self._current)
