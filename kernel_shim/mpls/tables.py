"""The tables of an `Lfib`: labels by number, routes by longest match. Equal paths are kept once, however many labels and routes lead there.

What a lookup costs with a million entries is what it must fetch from memory: so a label has four octets, and its paths are those of many others.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

from kernel_shim.model import IPNetwork

# Limits of this implementation
_PAGE_BITS: Final = 10
_PAGE: Final = 1 << _PAGE_BITS  # labels

P = TypeVar("P", bound=Hashable)


class SharedPaths(Generic[P]):
    """Tuples of paths by number, with a count of who has them. Number 0 is ()."""

    __slots__ = ("_counts", "_free", "_numbers", "paths")

    def __init__(self) -> None:
        self.paths: list[tuple[P, ...]] = [()]
        self._counts = [1]
        self._numbers: dict[tuple[P, ...], int] = {(): 0}
        self._free: list[int] = []

    def take(self, paths: tuple[P, ...]) -> int:
        number = self._numbers.get(paths)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.paths[number], self._counts[number] = paths, 0
            else:
                number = len(self.paths)
                self.paths.append(paths)
                self._counts.append(0)
            self._numbers[paths] = number
        self._counts[number] += 1
        return number

    def give(self, paths: tuple[P, ...]) -> None:
        """Back, what was taken."""
        number = self._numbers[paths]
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._numbers[paths]
            self.paths[number] = ()
            self._free.append(number)

    def __len__(self) -> int:
        """Different ones, () among them."""
        return len(self._numbers)


class LabelTable(Generic[P]):
    """One label space: pages of neighbouring labels, each the number of its paths."""

    __slots__ = ("_pages", "_paths", "_shared")

    def __init__(self, shared: SharedPaths[P]) -> None:
        self._shared: Final = shared
        self._paths: Final = shared.paths
        self._pages: dict[int, array[int]] = {}

    def put(self, label: int, paths: tuple[P, ...]) -> tuple[P, ...]:
        """What was there, or (); nothing is put as ()."""
        page = self._pages.get(label >> _PAGE_BITS)
        if page is None:
            page = self._pages[label >> _PAGE_BITS] = array("I", bytes(4 * _PAGE))
        at = label & _PAGE - 1
        replaced = self._paths[page[at]]
        page[at] = self._shared.take(paths) if paths else 0
        if replaced:
            self._shared.give(replaced)
        if not paths and not any(page):
            del self._pages[label >> _PAGE_BITS]
        return replaced

    def find(self, label: int) -> tuple[P, ...] | None:
        page = self._pages.get(label >> _PAGE_BITS)
        if page is None:
            return None
        number = page[label & _PAGE - 1]
        return self._paths[number] if number else None

    def items(self) -> Iterator[tuple[int, tuple[P, ...]]]:
        for index, page in self._pages.items():
            for at, number in enumerate(page):
                if number:
                    yield index << _PAGE_BITS | at, self._paths[number]

    def __bool__(self) -> bool:
        return bool(self._pages)


class RouteTable(Generic[P]):
    """One VRF, one family: a table for each prefix length, longest first."""

    __slots__ = ("_bits", "_lengths", "_shared", "_tables")

    def __init__(self, bits: int, shared: SharedPaths[P]) -> None:
        self._bits: Final = bits
        self._shared: Final = shared
        self._tables: dict[int, dict[int, tuple[P, ...]]] = {}
        self._lengths: tuple[int, ...] = ()

    def put(self, prefix: IPNetwork, paths: tuple[P, ...]) -> tuple[P, ...]:
        """What was there, or ()."""
        table = self._tables.get(prefix.prefixlen)
        if table is None:
            table = self._tables[prefix.prefixlen] = {}
            self._lengths = tuple(sorted(self._tables, reverse=True))
        key = int(prefix.network_address) >> (self._bits - prefix.prefixlen)
        replaced = table.get(key, ())
        table[key] = self._shared.paths[self._shared.take(paths)]
        if replaced:
            self._shared.give(replaced)
        return replaced

    def take(self, prefix: IPNetwork) -> tuple[P, ...]:
        """What was there, or ()."""
        table = self._tables.get(prefix.prefixlen, {})
        paths = table.pop(int(prefix.network_address) >> (self._bits - prefix.prefixlen), ())
        if paths:
            self._shared.give(paths)
        if paths and not table:
            del self._tables[prefix.prefixlen]
            self._lengths = tuple(sorted(self._tables, reverse=True))
        return paths

    def __contains__(self, prefix: IPNetwork) -> bool:
        return int(prefix.network_address) >> (self._bits - prefix.prefixlen) in self._tables.get(prefix.prefixlen, ())

    def find(self, address: int) -> tuple[P, ...] | None:
        bits, tables = self._bits, self._tables
        for length in self._lengths:
            paths = tables[length].get(address >> (bits - length))
            if paths is not None:
                return paths
        return None

    @property
    def lengths(self) -> int:
        return len(self._lengths)

    def items(self) -> Iterator[tuple[int, int, tuple[P, ...]]]:
        """Prefix length, its bits from the left, paths."""
        for length in self._lengths:
            for key, paths in self._tables[length].items():
                yield length, key << (self._bits - length), paths

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))
