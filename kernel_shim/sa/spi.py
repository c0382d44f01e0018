"""SPIs with a slot: the low 6 bits say which of 64 slots an inbound SA belongs to, and slots map to workers.

A steering program reads the slot as `spi & 63` from the packet's fourth byte; the other 26 bits are random.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Container
from typing import Final

from kernel_shim.model import KernelError, Spi

SLOT_BITS: Final = 6
SLOTS: Final = 1 << SLOT_BITS
LOWEST_SPI: Final = 0x100  # RFC 4303 section 2.1: 1 to 255 are reserved, 0 is for local use

_ATTEMPTS: Final = 64  # of random SPIs; with a million SAs in a slot's 67 million the chance that all are taken is nil
_LOOKED_AT: Final = 4096  # SPIs in order, after those attempts: a range that a caller made narrow


def choose_spi(minimum: int, maximum: int, slot: int, taken: Container[int], entropy: Callable[[int], bytes]) -> Spi:
    """A free SPI in `minimum` to `maximum` with `slot`; a range of one SPI is taken as it is, whatever its slot.

    KernelError: EINVAL for a range outside 0x100 to 0xFFFFFFFF, ENOENT when nothing is free, as Linux.
    """
    if not LOWEST_SPI <= minimum <= maximum <= 0xFFFFFFFF:
        raise KernelError(errno.EINVAL, f"SPI range {minimum:#x}-{maximum:#x}")
    if minimum == maximum:
        if minimum in taken:
            raise KernelError(errno.ENOENT, f"SPI {minimum:#x} is taken")
        return Spi(minimum)
    first = minimum + (slot - minimum) % SLOTS
    count = (maximum - first) // SLOTS + 1 if first <= maximum else 0
    if count > 0:
        for _ in range(_ATTEMPTS):
            spi = first + int.from_bytes(entropy(8), "big") % count * SLOTS
            if spi not in taken:
                return Spi(spi)
        for index in range(min(count, _LOOKED_AT)):
            if first + index * SLOTS not in taken:
                return Spi(first + index * SLOTS)
    raise KernelError(errno.ENOENT, f"no free SPI in {minimum:#x}-{maximum:#x} for slot {slot}")
