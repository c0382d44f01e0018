"""Which reqids are free."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from kernel_shim.model import KernelError, ReqId

REQID_FIRST: Final = 1
REQID_LAST: Final = 0x7FFFFFFF  # xfrm takes the top bit to tell ours from others'


class ReqIdPool:
    """Gives out those that nobody has."""

    def __init__(self) -> None:
        self._next = REQID_FIRST
        self._taken: set[int] = set()

    def reserve(self, reqids: Iterable[ReqId]) -> None:
        """Configured, or seen in the kernel: never given out."""
        self._taken.update(reqids)

    def fresh(self, last: int = REQID_LAST) -> ReqId:
        """Of 1 to `last`. KernelError(ENOSPC) when all are taken."""
        if len(self._taken) >= last and all(reqid in self._taken for reqid in range(REQID_FIRST, last + 1)):
            raise KernelError(errno.ENOSPC, f"all {last} reqids of the kernel are taken")
        while self._next in self._taken or self._next > last:
            self._next = self._next + 1 if self._next < last else REQID_FIRST
        self._taken.add(self._next)
        return ReqId(self._next)
