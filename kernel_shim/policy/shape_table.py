"""The policies of one direction, address family and interface id: a hash table for each shape of selector."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final, final

from kernel_shim.model import Policy
from kernel_shim.policy.shapes import Field, Interval, Placement, bounds_of, place, place_anywhere

# A lookup may probe every shape, at about 0.1 us each. Beyond the bound a selector of a new shape is kept as an interval.
MAX_SHAPES: Final = 128

# A rank is `priority << RANK_SHIFT` plus the age, so that one comparison decides: lower priority first, then older.
RANK_SHIFT: Final = 48


@final
class Entry:
    """A policy in the tables. `places` are its shapes and keys; `match` is there only where a key alone does not decide."""

    __slots__ = ("low", "match", "places", "policy", "rank")

    def __init__(self, policy: Policy, rank: int) -> None:
        self.policy = policy
        self.rank = rank
        self.places: tuple[tuple[Shape, int], ...] = ()
        self.match: Callable[[int], bool] | None = None
        self.low = 0  # where its interval begins, if it has one


class Bucket:
    """Several entries of one key, best first."""

    __slots__ = ("entries",)

    def __init__(self, *entries: Entry) -> None:
        self.entries = sorted(entries, key=_rank)

    def best(self, number: int) -> Entry | None:
        return self.entries[0]


class IntervalBucket:
    """Entries of one key that hold a range of a field, sorted by its low end.

    `_reach[i]` is the highest end of the first `i + 1` of them: going down from the last one that begins in time, nothing
    further down can match once the reach is too low.
    """

    __slots__ = ("_field", "_lows", "_reach", "_spans")

    def __init__(self, field: Field) -> None:
        self._field = field
        self._spans: list[tuple[int, int, int, Entry]] = []  # low, rank, high
        self._lows: list[int] = []
        self._reach: list[int] = []

    def __len__(self) -> int:
        return len(self._spans)

    def insert(self, high: int, entry: Entry) -> None:
        item = (entry.low, entry.rank, high, entry)
        self._spans.insert(bisect_left(self._spans, item), item)
        self._lows = []

    def remove(self, entry: Entry) -> None:
        del self._spans[bisect_left(self._spans, (entry.low, entry.rank))]
        self._lows = []

    def best(self, number: int) -> Entry | None:
        if not self._lows:
            self._index()
        value = number >> self._field.shift & (1 << self._field.width) - 1
        found: Entry | None = None
        position = bisect_right(self._lows, value) - 1
        while position >= 0 and self._reach[position] >= value:
            _, rank, high, entry = self._spans[position]
            if value <= high and (found is None or rank < found.rank) and entry.match is not None and entry.match(number):
                found = entry
            position -= 1
        return found

    def _index(self) -> None:
        self._lows = [span[0] for span in self._spans]
        self._reach = []
        reach = 0
        for span in self._spans:
            reach = max(reach, span[2])
            self._reach.append(reach)


class Shape:
    """One hash table: all entries whose keys are cut by `mask`."""

    __slots__ = ("_counts", "_priorities", "interval", "mask", "table")

    def __init__(self, mask: int, interval: Interval | None) -> None:
        self.mask = mask
        self.interval = interval.field if interval is not None else None
        self.table: dict[int, Entry | Bucket | IntervalBucket] = {}
        self._counts: dict[int, int] = {}
        self._priorities: list[int] = []  # a heap; those that are gone are popped when they come up

    @property
    def best_priority(self) -> int:
        while self._priorities[0] not in self._counts:
            heappop(self._priorities)
        return self._priorities[0]

    def count(self, priority: int) -> bool:
        """True when the best priority may have changed."""
        if priority in self._counts:
            self._counts[priority] += 1
            return False
        self._counts[priority] = 1
        heappush(self._priorities, priority)
        return self._priorities[0] == priority

    def uncount(self, priority: int) -> bool:
        """True when the best priority may have changed."""
        self._counts[priority] -= 1
        if self._counts[priority]:
            return False
        del self._counts[priority]
        # Priorities that come and go must not make the heap grow for ever.
        if len(self._priorities) > 2 * len(self._counts) + 16:
            self._priorities = sorted(self._counts)
        return True


Probe = tuple[int, int, Callable[[int], Entry | Bucket | IntervalBucket | None]]


class ShapeTable:
    """All shapes. `order` is what a lookup walks: (best possible rank, mask, probe), best first; empty when `sort` must make it anew."""

    __slots__ = ("_shapes", "order")

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, Field | None], Shape] = {}
        self.order: list[Probe] = []

    def __len__(self) -> int:
        return len(self._shapes)

    def sort(self) -> list[Probe]:
        shapes = sorted(self._shapes.values(), key=lambda shape: shape.best_priority)
        self.order = [(shape.best_priority << RANK_SHIFT, shape.mask, shape.table.get) for shape in shapes]
        return self.order

    def insert(self, entry: Entry) -> None:
        placement = place(entry.policy.selector)
        if self._new_shapes(placement) + len(self._shapes) > MAX_SHAPES:
            placement = place_anywhere(entry.policy.selector)
        interval = placement.interval
        if interval is not None:
            entry.match = bounds_of(entry.policy.selector).match
            entry.low = interval.low
        field = interval.field if interval is not None else None
        places = []
        for mask, key in placement.keys:
            shape = self._shapes.get((mask, field))
            if shape is None:
                shape = self._shapes[mask, field] = Shape(mask, interval)
                self.order = []
            places.append((shape, key))
            table = shape.table
            there = table.get(key)
            if interval is not None:
                if there is None:
                    there = table[key] = IntervalBucket(interval.field)
                assert isinstance(there, IntervalBucket)
                there.insert(interval.high, entry)
            elif there is None:
                table[key] = entry
            elif isinstance(there, Entry):
                table[key] = Bucket(there, entry)
            else:
                assert isinstance(there, Bucket)
                there.entries.append(entry)
                there.entries.sort(key=_rank)
            if shape.count(entry.policy.priority):
                self.order = []
        entry.places = tuple(places)

    def remove(self, entry: Entry) -> None:
        for shape, key in entry.places:
            there = shape.table[key]
            if isinstance(there, Entry):
                del shape.table[key]
            elif isinstance(there, Bucket):
                there.entries.remove(entry)
                if len(there.entries) == 1:
                    shape.table[key] = there.entries[0]
            else:
                there.remove(entry)
                if not len(there):
                    del shape.table[key]
            if shape.uncount(entry.policy.priority):
                self.order = []
            if not shape.table:
                del self._shapes[shape.mask, shape.interval]
                self.order = []
        entry.places = ()
        entry.match = None

    def _new_shapes(self, placement: Placement) -> int:
        field = placement.interval.field if placement.interval is not None else None
        return len({mask for mask, _ in placement.keys if (mask, field) not in self._shapes})


def _rank(entry: Entry) -> int:
    return entry.rank
