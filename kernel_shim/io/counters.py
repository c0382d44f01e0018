"""Counters of the shim's edge, by name."""

from __future__ import annotations

from collections import Counter


class Counters:
    """Names are dotted and come from a closed set in the code; values only grow."""

    def __init__(self) -> None:
        self._values: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        self._values[name] += amount

    def value(self, name: str) -> int:
        return self._values[name]

    def values(self) -> dict[str, int]:
        return dict(self._values)
