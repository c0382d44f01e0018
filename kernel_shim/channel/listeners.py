"""Who hears of a kernel's events, and of its end; alike for every channel."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from kernel_shim.model import KernelEvent

MAX_HELD_EVENTS: Final = 8192  # until the first listener comes


class EventListeners:
    """Those that listen. Events that come before the first listener are kept for it, within `MAX_HELD_EVENTS`."""

    def __init__(self) -> None:
        self._events: list[Callable[[KernelEvent], None]] = []
        self._overruns: list[Callable[[], None]] = []
        self._closed: list[Callable[[], None]] = []
        self._held: deque[KernelEvent] = deque()
        self._gone = False

    @property
    def any(self) -> bool:
        """Whether somebody hears."""
        return bool(self._events)

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        self._events.append(listener)
        while self._held:
            asyncio.get_running_loop().call_soon(listener, self._held.popleft())

    def on_overrun(self, listener: Callable[[], None]) -> None:
        self._overruns.append(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Also when the kernel side went away before."""
        self._closed.append(listener)
        if self._gone:
            asyncio.get_running_loop().call_soon(listener)

    def tell(self, event: KernelEvent) -> None:
        if not self._events:
            self._held.append(event)
            if len(self._held) > MAX_HELD_EVENTS:
                self._held.popleft()
                self.tell_overrun()
        for listener in self._events:
            asyncio.get_running_loop().call_soon(listener, event)

    def tell_overrun(self) -> None:
        for listener in self._overruns:
            asyncio.get_running_loop().call_soon(listener)

    def tell_closed(self) -> None:
        self._gone = True
        for listener in self._closed:
            asyncio.get_running_loop().call_soon(listener)
