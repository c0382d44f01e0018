"""When policies end: one heap of deadlines for all that have a lifetime."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from kernel_shim.model import Policy, PolicyIndex

_STALE: Final = 64


class _Deadline(NamedTuple):
    at: float
    hard: bool
    policy: PolicyIndex
    serial: int  # of the watch that made it


class PolicyLifetimes:
    """Clock values are monotonic seconds."""

    def __init__(self) -> None:
        self._deadlines: list[_Deadline] = []
        self._watched: dict[PolicyIndex, int] = {}
        self._serial = 0

    def watch(self, policy: Policy, now: float) -> None:
        """The policy was put there, or replaced: its lifetime begins."""
        self.forget(policy.index)
        if not policy.soft_seconds and not policy.hard_seconds:
            return
        self._serial += 1
        self._watched[policy.index] = self._serial
        for seconds, hard in ((policy.soft_seconds, False), (policy.hard_seconds, True)):
            if seconds:
                heappush(self._deadlines, _Deadline(now + seconds, hard, policy.index, self._serial))

    def forget(self, index: PolicyIndex) -> None:
        """The policy is gone."""
        if self._watched.pop(index, None) is not None and len(self._deadlines) > 4 * len(self._watched) + _STALE:
            self._deadlines = [it for it in self._deadlines if self._stands(it)]
            heapify(self._deadlines)

    def clear(self) -> None:
        self._deadlines.clear()
        self._watched.clear()

    def next_deadline(self) -> float | None:
        while self._deadlines and not self._stands(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0].at if self._deadlines else None

    def due(self, now: float) -> list[tuple[PolicyIndex, bool]]:
        """The policies whose soft or (True) hard lifetime has ended, and was not told before."""
        ended: list[tuple[PolicyIndex, bool]] = []
        while self._deadlines and self._deadlines[0].at <= now:
            deadline = heappop(self._deadlines)
            if self._stands(deadline):
                ended.append((deadline.policy, deadline.hard))
        return ended

    def _stands(self, deadline: _Deadline) -> bool:
        return self._watched.get(deadline.policy) == deadline.serial
