"""An event loop whose time is not the world's: when nothing is left to do it goes on at the next deadline at once.

Sockets within the process work as ever: what is ready is served before time moves on.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")


class Stuck(RuntimeError):
    """Nothing is ready and nothing will ever be: somebody waits in vain."""


class _Selector(selectors.DefaultSelector):
    """Never waits: it moves the clock instead."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.now = start

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Stuck("no event and no timer")
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing in it may use threads or wait for another process."""

    def __init__(self, start: float = 1000.0) -> None:
        self._virtual: Final = _Selector(start)
        super().__init__(self._virtual)
        # asyncio takes timers of this much more than now as due: with less, time would stand still before them.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
