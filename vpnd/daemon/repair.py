"""What the kernel did not do is asked for again, each thing with a back-off of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Final, Generic, TypeVar

REPAIR_FIRST: Final = 0.5  # s, until what the kernel refused or did not answer is tried again; doubles
REPAIR_LAST: Final = 60.0  # s

T = TypeVar("T", bound=Hashable)


class Repair(Generic[T]):
    """`again` is called with what is due. It stays known, and its pauses grow, until it is `done`."""

    def __init__(self, again: Callable[[Sequence[T]], None]) -> None:
        self._again = again
        self._pauses: dict[T, float] = {}
        self._due: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    @property
    def items(self) -> Collection[T]:
        return list(self._pauses)

    def failed(self, item: T) -> None:
        """It was tried in vain, and is tried again after a pause."""
        pause = min(self._pauses[item] * 2, REPAIR_LAST) if item in self._pauses else REPAIR_FIRST
        self._pauses[item] = pause
        self._due[item] = due = asyncio.get_running_loop().time() + pause
        if self._timer is None or due < self._timer.when():  # thousands may fail together
            self._set_timer()

    def done(self, item: T) -> None:
        """It needs no further try."""
        if self._pauses.pop(item, None) is not None:
            self._due.pop(item, None)

    def at_once(self) -> None:
        """Another kernel, or the same one again: all of it is due now, and pauses begin anew."""
        now = asyncio.get_running_loop().time()
        self._due = dict.fromkeys(self._pauses, now)
        self._pauses = dict.fromkeys(self._pauses, REPAIR_FIRST)
        self._set_timer()

    def stop(self) -> None:
        self._stopped = True
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        idle = self._stopped or not self._due
        self._timer = None if idle else asyncio.get_running_loop().call_at(min(self._due.values()), self._tick)

    def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        ready = [item for item, due in self._due.items() if due <= now]
        for item in ready:
            del self._due[item]
        self._set_timer()
        if ready:
            self._again(ready)
