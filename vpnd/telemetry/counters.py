"""Counters by name, bounded by the closed set of names in the code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Counters:
    """Monotonic counts since the daemon started."""

    def __init__(self) -> None:
        self._values: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        self._values[name] += amount

    def snapshot(self) -> Mapping[str, int]:
        return dict(self._values)
