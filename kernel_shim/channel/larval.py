"""Larval SAs that Linux leaves behind an ACQUIRE, and how one goes that nothing comes of; alike for both of its channels."""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from kernel_shim.model import AcquireSequence, KernelError, Spi

T = TypeVar("T")

MAX_ACQUIRES: Final = 65536  # remembered, so that their larval SAs can be removed; beyond it the oldest expire by themselves
TRIES: Final = 5  # to remove a larval SA, each of which leaves another when its answer was lost


@dataclass(eq=False)
class _Ends:
    """`left`: SPIs of larval SAs that may stand."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    left: set[Spi] = field(default_factory=set)
    users: int = 0


class Removal:
    """Removes larval SAs, those of the same ends one after the other. What one left that was cut short, as its answers were lost, goes with the next.

    Nothing but its SPI leads to it, or to one without SPI its ends; and while it stands the kernel asks for nothing of its flow.
    """

    def __init__(self) -> None:
        self._of: dict[Hashable, _Ends] = {}

    async def remove(self, ends: Hashable, claim: Callable[[Spi], Awaitable[Spi]], delete: Callable[[Spi], Awaitable[None]]) -> None:
        """A larval SA can only be deleted by an SPI, so it is given one first: `claim` gives it that SPI, or tells the one that an earlier try gave it.

        Where it is gone `claim` makes another. When that is repeated the first of those has this SPI, a second stands without any, and it raises
        KernelError(ENOENT). What else `claim` and `delete` raise comes out; TimeoutError when one may stand still.
        """
        these = self._of.setdefault(ends, _Ends())
        these.users += 1
        try:
            async with these.lock:
                for spi in sorted(these.left):
                    await _delete(spi, delete, these.left)
                await _claim_and_delete(claim, delete, these.left)
        finally:
            these.users -= 1
            if not these.users and not these.left:
                del self._of[ends]


class Refusals(Generic[T]):
    """ACQUIREs that nothing comes of; `drop` removes the larval SA of one, whose name T is."""

    def __init__(self, drop: Callable[[T], Awaitable[None]]) -> None:
        self._drop = drop
        self._unfinished: dict[AcquireSequence, T] = {}  # failed, and to be asked again

    async def refuse(self, sequence: AcquireSequence, known: T | None) -> T | None:
        """What was dropped, None if nobody knows. What `drop` raises comes out: then this is to be asked again, whatever else is heard of that ACQUIRE."""
        larval = self._unfinished.pop(sequence, known)
        if larval is None:
            return None
        try:
            await self._drop(larval)
        except BaseException:
            self._unfinished[sequence] = larval
            raise
        return larval


async def _claim_and_delete(claim: Callable[[Spi], Awaitable[Spi]], delete: Callable[[Spi], Awaitable[None]], left: set[Spi]) -> None:
    for _ in range(TRIES):
        spi, again = Spi(secrets.randbelow(0xFFFFFF00) + 0x100), False  # 0 to 255 are reserved (RFC 4303 section 2.1)
        left.add(spi)
        try:
            told = await claim(spi)
        except TimeoutError:
            await _delete(spi, delete, left)
            raise
        except KernelError as error:
            if error.errno != errno.ENOENT:
                left.discard(spi)
                raise
            told, again = spi, True
        if told != spi:
            left.discard(spi)
        await _delete(told, delete, left)
        if not again:
            return
    raise TimeoutError("a larval SA stands still")


async def _delete(spi: Spi, delete: Callable[[Spi], Awaitable[None]], left: set[Spi]) -> None:
    left.add(spi)
    await delete(spi)
    left.discard(spi)
