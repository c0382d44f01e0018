"""What systemd does to a service before it starts: capabilities are taken away for good (capabilities(7))."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final

NUMBERS: Final = {"CAP_CHOWN": 0, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_ADMIN": 12}  # linux/capability.h
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
VERSION_3: Final = 0x20080522
LAST_CAPABILITY: Final = "/proc/sys/kernel/cap_last_cap"

_libc = ctypes.CDLL(None, use_errno=True)


def mask(names: Iterable[str]) -> int:
    return sum(1 << NUMBERS[name] for name in names)


def confine(kept: int) -> None:
    """Leave this process, of one thread yet, the capabilities in the mask `kept` and no other, as `CapabilityBoundingSet=` and `NoNewPrivileges=` do."""
    with open(LAST_CAPABILITY) as file:
        last = int(file.read())
    for number in range(last + 1):
        if not kept >> number & 1:
            _check(_libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)))  # effective, permitted, inheritable


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
