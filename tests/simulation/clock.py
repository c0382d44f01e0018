"""An event loop whose time is not the world's: when nothing is left to do it goes on at the next deadline at once.

Sockets within the process work as ever: what is ready is served before time moves on.
"""

from __future__ import annotations

import asyncio
import math
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
            # by a little more, and never by nothing: what is due is past then, whatever rounding did to its distance
            self.now = math.nextafter(self.now + max(0.0, timeout), math.inf)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing in it may use threads or wait for another process."""

    def __init__(self, start: float = 1000.0) -> None:
        self._virtual: Final = _Selector(start)
        super().__init__(self._virtual)
        # No timer is early: one that is set anew because its time has not come would else be due again, and time would stand still.
        self._clock_resolution = 0.0

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
