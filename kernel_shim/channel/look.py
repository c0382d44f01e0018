"""What a kernel's tables tell is looked for, as often as somebody asks, and again until the tables could be read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import KernelError

FIRST_PAUSE: Final = 0.1  # s, after a look that was in vain; doubles
LAST_PAUSE: Final = 10.0  # s


class Look:
    """`find` reads the tables once, and raises what a request raises. What is asked for while it reads, it does once more."""

    def __init__(self, find: Callable[[], Awaitable[object]], name: str) -> None:
        self._find = find
        self._name = name
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def ask(self) -> None:
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look(), name=self._name)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        pause = FIRST_PAUSE
        while self._again:
            self._again = False
            try:
                await self._find()
            except ChannelClosed:
                return
            except (KernelError, TimeoutError):
                self._again = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE)
