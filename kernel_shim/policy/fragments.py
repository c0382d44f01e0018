"""Remembers the ports of first fragments, for the fragments that follow them."""

from __future__ import annotations

from typing import Final

FRAGMENT_SECONDS: Final = 30.0  # as long as Linux waits for the rest of a datagram (net.ipv4.ipfrag_time)
MAX_FRAGMENTS: Final = 8192  # about 1 MB; more datagrams than that are never in flight in fragments at once


class FragmentMemory:
    """Datagram name -> ports and protocol, in two halves: the older half is forgotten when the younger is full or old.

    So neither remembering nor forgetting ever walks the table, and no entry outlives two times FRAGMENT_SECONDS.
    """

    __slots__ = ("_limit", "_older", "_rotated", "_younger")

    def __init__(self, limit: int = MAX_FRAGMENTS) -> None:
        self._limit = max(1, limit // 2)
        self._younger: dict[bytes, bytes] = {}
        self._older: dict[bytes, bytes] = {}
        self._rotated = 0.0

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def remember(self, name: bytes, value: bytes) -> None:
        if len(self._younger) >= self._limit and name not in self._younger:
            self._older, self._younger = self._younger, {}
        self._younger[name] = value

    def recall(self, name: bytes) -> bytes | None:
        found = self._younger.get(name)
        return self._older.get(name) if found is None else found

    def age(self, now: float) -> None:
        """To be called now and then, every FRAGMENT_SECONDS or more often."""
        if now - self._rotated >= FRAGMENT_SECONDS:
            self._older, self._younger = self._younger, {}
            self._rotated = now
