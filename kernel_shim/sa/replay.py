"""The anti-replay window (RFC 4303 section 3.4.3) and the upper half of extended sequence numbers (appendix A)."""

from __future__ import annotations

from typing import Final

SMALLEST_WINDOW: Final = 32
LARGEST_WINDOW: Final = 4096

_HALF: Final = 1 << 32
_LOW: Final = _HALF - 1


class ReplayWindow:
    """`size` packets behind `top`, the highest sequence number accepted. Size 0 accepts everything.

    Check, then authenticate, then accept: only an authenticated packet moves the window.
    """

    __slots__ = ("_bits", "_esn", "_mask", "size", "top")

    def __init__(self, size: int, esn: bool) -> None:
        self.size: Final = size
        self.top = 0
        self._esn = esn
        self._bits = 0  # bit n: top - n was seen
        self._mask = (1 << size) - 1

    def extend(self, low: int) -> int:
        """The 64-bit sequence number that the 32 bits of a packet stand for, or -1 (RFC 4303 appendix A2.2)."""
        if not self._esn:
            return low
        high, top_low = self.top >> 32, self.top & _LOW
        span = max(self.size, SMALLEST_WINDOW)
        if top_low >= span - 1:
            if low < top_low - span + 1:
                high += 1
        elif low >= (top_low - span + 1) & _LOW:
            high -= 1
        return -1 if high < 0 else high << 32 | low

    def fresh(self, sequence: int) -> bool:
        """Whether a packet with this number may still be accepted."""
        if self.size == 0:
            return sequence >= 0
        if sequence > self.top:
            return True
        distance = self.top - sequence
        return sequence > 0 and distance < self.size and not self._bits >> distance & 1

    def accept(self, sequence: int) -> None:
        """Note an authenticated packet that is `fresh`."""
        self.accept_run(sequence, 1)

    def accept_run(self, first: int, count: int) -> None:
        """Note `count` packets with consecutive numbers, all of them fresh."""
        last = first + count - 1
        run = (1 << count) - 1
        if last > self.top:
            distance = last - self.top
            self._bits = ((self._bits << distance | run) if distance < self.size else run) & self._mask
            self.top = last
        else:
            self._bits |= run << self.top - last & self._mask
