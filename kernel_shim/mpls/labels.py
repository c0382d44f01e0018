"""Label stacks on the wire (RFC 3032) and sets of labels."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, NewType

Label = NewType("Label", int)
Buffer = bytes | bytearray | memoryview

LABEL_BITS: Final = 20
# Special-purpose labels (RFC 3032 section 2.1, RFC 6790, RFC 7274)
IPV4_EXPLICIT_NULL: Final = Label(0)
ROUTER_ALERT: Final = Label(1)
IPV6_EXPLICIT_NULL: Final = Label(2)
IMPLICIT_NULL: Final = Label(3)  # a word of signalling, never seen in a packet
ENTROPY_INDICATOR: Final = Label(7)
GENERIC_ASSOCIATED_CHANNEL: Final = Label(13)
OAM_ALERT: Final = Label(14)
EXTENSION: Final = Label(15)
FIRST_LABEL: Final = Label(16)  # the first that means what its LFIB says
LAST_LABEL: Final = Label((1 << LABEL_BITS) - 1)

ENTRY: Final = 4  # octets
LARGEST_TTL: Final = 255

# Limits of this implementation
MAX_DEPTH: Final = 16  # entries of one stack

_WORD: Final = struct.Struct("!I")


class MalformedStack(ValueError):
    """The stack ends before an entry with the bottom bit, or is deeper than `MAX_DEPTH`; `too_deep` says which."""

    def __init__(self, detail: str, *, too_deep: bool = False) -> None:
        super().__init__(detail)
        self.too_deep = too_deep


class Entry(NamedTuple):
    """One entry of a stack: label, traffic class (RFC 5462), TTL. The bottom bit follows from where it stands."""

    label: Label
    tc: int
    ttl: int


def read_stack(packet: Buffer, begin: int = 0) -> tuple[Entry, ...]:
    """The stack that starts at `begin`, outermost entry first. Raises MalformedStack."""
    entries: list[Entry] = []
    at, end = begin, len(packet)
    while True:
        if len(entries) == MAX_DEPTH:
            raise MalformedStack(f"no bottom of stack in {MAX_DEPTH} entries", too_deep=True)
        if at + ENTRY > end:
            raise MalformedStack("the packet ends before the bottom of its stack")
        (word,) = _WORD.unpack_from(packet, at)
        entries.append(Entry(Label(word >> 12), word >> 9 & 7, word & 0xFF))
        at += ENTRY
        if word & 0x100:
            return tuple(entries)


def write_stack(entries: Iterable[Entry]) -> bytes:
    """The stack on the wire; the last entry gets the bottom bit."""
    words = [entry.label << 12 | entry.tc << 9 | entry.ttl for entry in entries]
    if words:
        words[-1] |= 0x100
    return struct.pack(f"!{len(words)}I", *words)


class LabelRange(NamedTuple):
    """Labels `first` to `last`, both included."""

    first: Label
    last: Label

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class LabelSet:
    """Labels as few disjoint ranges; immutable. Membership costs one binary search."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, ranges: Iterable[LabelRange] = ()) -> None:
        """Ranges may overlap. Raises ValueError for one outside 0 to 2^20-1 or that ends before it begins."""
        firsts: list[int] = []
        lasts: list[int] = []
        for first, last in sorted(ranges):
            if not 0 <= first <= last <= LAST_LABEL:
                raise ValueError(f"not a range of labels: {first}-{last}")
            if firsts and first <= lasts[-1] + 1:
                lasts[-1] = max(lasts[-1], last)
            else:
                firsts.append(first)
                lasts.append(last)
        self._firsts: Final = tuple(firsts)
        self._lasts: Final = tuple(lasts)

    def __contains__(self, label: int) -> bool:
        at = bisect_right(self._firsts, label)
        return at > 0 and label <= self._lasts[at - 1]

    def __iter__(self) -> Iterator[LabelRange]:
        return (LabelRange(Label(first), Label(last)) for first, last in zip(self._firsts, self._lasts, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelSet) and (self._firsts, self._lasts) == (other._firsts, other._lasts)

    def __hash__(self) -> int:
        return hash((self._firsts, self._lasts))

    def __str__(self) -> str:
        return ", ".join(map(str, self)) or "none"

    def __repr__(self) -> str:
        return f"LabelSet({self})"
