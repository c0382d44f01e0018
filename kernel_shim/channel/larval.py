"""Larval SAs that Linux leaves behind an ACQUIRE, and how one goes that nothing comes of; alike for both of its channels."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from kernel_shim.model import KernelError, Spi

MAX_ACQUIRES: Final = 65536  # remembered, so that their larval SAs can be removed; beyond it the oldest expire by themselves
TRIES: Final = 5  # to remove a larval SA, each of which leaves another when its answer was lost


async def remove_larval(claim: Callable[[Spi], Awaitable[Spi]], delete: Callable[[Spi], Awaitable[None]]) -> None:
    """A larval SA can only be deleted by an SPI, so it is given one first: `claim` gives it that SPI, or tells the one that an earlier try gave it.

    Where it is gone `claim` makes another. When that is repeated the first of those has this SPI, a second stands without any, and it raises
    KernelError(ENOENT). What else `claim` and `delete` raise comes out; TimeoutError when one may stand still.
    """
    for _ in range(TRIES):
        spi, left = Spi(secrets.randbelow(0xFFFFFF00) + 0x100), False  # 0 to 255 are reserved (RFC 4303 section 2.1)
        try:
            spi = await claim(spi)
        except TimeoutError:
            await delete(spi)
            raise
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            left = True
        await delete(spi)
        if not left:
            return
    raise TimeoutError("a larval SA stands still")
