"""Which reqids are free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kernel_shim.model import ReqId

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

    def fresh(self) -> ReqId:
        while self._next in self._taken:
            self._next = self._next + 1 if self._next < REQID_LAST else REQID_FIRST
        self._taken.add(self._next)
        return ReqId(self._next)
