"""How often strangers may make us write a log line."""

from __future__ import annotations


class Throttle:
    """Up to `burst` at once, then `rate` a second (`now` in monotonic seconds)."""

    def __init__(self, burst: int, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._level = 0.0
        self._at = 0.0
        self._suppressed = 0

    def admit(self, now: float) -> int | None:
        """None: not now. Else how many were not admitted since the last that was."""
        self._level = max(0.0, self._level - (now - self._at) * self._rate)
        self._at = now
        if self._level + 1.0 > self._burst:
            self._suppressed += 1
            return None
        self._level += 1.0
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
