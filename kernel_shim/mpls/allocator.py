"""Giving out labels from configured ranges."""

from __future__ import annotations

from collections import deque
from typing import Final

from kernel_shim.mpls.labels import FIRST_LABEL, Label, LabelSet


class LabelsExhausted(RuntimeError):
    """Every label of the ranges is taken."""


class LabelAllocator:
    """Labels of `ranges`, each given out once until it is released. One that was released is given out again last of all,
    so that packets still under way under its old meaning meet an unknown label and not a wrong one.
    """

    def __init__(self, ranges: LabelSet) -> None:
        """Raises ValueError when a range holds special-purpose labels."""
        if any(first < FIRST_LABEL for first, _ in ranges):
            raise ValueError(f"labels below {FIRST_LABEL} are special-purpose labels")
        self._ranges: Final = ranges
        self._taken: set[int] = set()
        self._released: deque[int] = deque()
        self._spans: Final = deque(ranges)
        self._next = self._spans[0].first if self._spans else Label(0)

    @property
    def taken(self) -> int:
        return len(self._taken)

    def allocate(self) -> Label:
        """Raises LabelsExhausted."""
        while self._spans:
            label = self._next
            if label < self._spans[0].last:
                self._next = Label(label + 1)
            else:
                self._spans.popleft()
                if self._spans:
                    self._next = self._spans[0].first
            if label not in self._taken:
                self._taken.add(label)
                return label
        while self._released:
            label = Label(self._released.popleft())
            if label not in self._taken:
                self._taken.add(label)
                return label
        raise LabelsExhausted(f"no free label in {self._ranges}")

    def reserve(self, label: Label) -> None:
        """Take this one. Raises ValueError when it is taken or outside the ranges."""
        if label not in self._ranges:
            raise ValueError(f"label {label} is outside {self._ranges}")
        if label in self._taken:
            raise ValueError(f"label {label} is taken")
        self._taken.add(label)

    def release(self, label: Label) -> None:
        """Raises KeyError when it is not taken."""
        self._taken.remove(label)
        self._released.append(label)
