"""Larval SAs that Linux leaves behind an ACQUIRE, and how one goes that nothing comes of; alike for both of its channels."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Awaitable, Callable, Hashable
from typing import Final

from kernel_shim.model import KernelError, Spi

MAX_ACQUIRES: Final = 65536  # remembered, so that their larval SAs can be removed; beyond it the oldest expire by themselves
TRIES: Final = 5  # to remove a larval SA, each of which leaves another when its answer was lost


class Removal:
    """Removes larval SAs. What a removal left that was cut short, as its answers were lost, goes before the next one of the same ends.

    Nothing but its SPI leads to it, and while it stands the kernel asks for nothing of its flow.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, set[Spi]] = {}  # SPIs of larval SAs that may stand, by their ends

    async def remove(self, ends: Hashable, claim: Callable[[Spi], Awaitable[Spi]], delete: Callable[[Spi], Awaitable[None]]) -> None:
        """A larval SA can only be deleted by an SPI, so it is given one first: `claim` gives it that SPI, or tells the one that an earlier try gave it.

        Where it is gone `claim` makes another. When that is repeated the first of those has this SPI, a second stands without any, and it raises
        KernelError(ENOENT). What else `claim` and `delete` raise comes out; TimeoutError when one may stand still.
        """
        left = self._left.setdefault(ends, set())
        try:
            for spi in sorted(left):
                await _delete(spi, delete, left)
            await _claim_and_delete(claim, delete, left)
        finally:
            if not left and self._left.get(ends) is left:
                del self._left[ends]


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
