"""What we hear of the host's addresses."""

from __future__ import annotations

import asyncio

from vpnd.io.addresses import watch_addresses


async def test_what_came_before_the_watch_is_looked_for() -> None:
    """An address may come after the first look and before the first message: nothing else would tell of it."""
    told = asyncio.Event()
    watch = asyncio.create_task(watch_addresses(told.set))
    async with asyncio.timeout(30.0):
        await told.wait()
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
