"""The cache in front of everything: masked flow key -> bundle, valid while nothing changed.

A change of SPD, SAD or routes bumps a number and costs nothing else; an entry made before it is dropped when it is next
touched. The content of a bundle is the data plane's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from kernel_shim.policy.flowkey import FieldMask

BundleT = TypeVar("BundleT")

# One entry is about 300 bytes besides its bundle. More flows than this at once are found again in the SPD.
MAX_BUNDLES: Final = 65536


class Generations:
    """Three counters of change, and `stamp`, which differs whenever any of them does."""

    __slots__ = ("route", "sad", "spd", "stamp")

    def __init__(self) -> None:
        self.spd = self.sad = self.route = self.stamp = 0

    def bump_spd(self) -> None:
        self.spd += 1
        self.stamp += 1

    def bump_sad(self) -> None:
        self.sad += 1
        self.stamp += 1

    def bump_route(self) -> None:
        self.route += 1
        self.stamp += 1


class BundleCache(Generic[BundleT]):
    """Bounded; the entry that was made first is evicted first, whether used or not: a hit writes nothing.

    A bundle must be stored under the stamp that held before its SPD lookup began, which `put` takes from `generations`:
    make the bundle and put it in one go.
    """

    __slots__ = ("_entries", "_generations", "_limit", "cleared", "evicted", "hits", "mask", "misses", "stale")

    def __init__(self, generations: Generations, mask: FieldMask = FieldMask.FLOW, limit: int = MAX_BUNDLES) -> None:
        self._generations = generations
        self._entries: OrderedDict[bytes, tuple[int, BundleT]] = OrderedDict()
        self._limit = limit
        self.mask = mask
        self.hits = self.misses = self.stale = self.evicted = self.cleared = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> BundleT | None:
        """The bundle of `key`, if it is current. One dictionary probe. A stale entry counts as `stale` and as a miss."""
        entry = self._entries.get(key)
        if entry is not None:
            if entry[0] == self._generations.stamp:
                self.hits += 1
                return entry[1]
            del self._entries[key]
            self.stale += 1
        self.misses += 1
        return None

    def put(self, key: bytes, bundle: BundleT) -> None:
        entries = self._entries
        if key in entries:
            entries.move_to_end(key)
        elif len(entries) >= self._limit:
            entries.popitem(last=False)
            self.evicted += 1
        entries[key] = (self._generations.stamp, bundle)

    def current(self) -> Iterator[tuple[bytes, BundleT]]:
        """The entries that are valid now, in the order in which they were made; counts as no use of them."""
        stamp = self._generations.stamp
        return ((key, bundle) for key, (made, bundle) in self._entries.items() if made == stamp)

    def remove(self, key: bytes) -> None:
        """Forget one entry, if there."""
        self._entries.pop(key, None)

    def set_mask(self, mask: FieldMask) -> bool:
        """Keys are cut by `mask` from now on; a change empties the cache. True when it was one."""
        if mask == self.mask:
            return False
        self.mask = mask
        self.clear()
        return True

    def clear(self) -> None:
        self.cleared += len(self._entries)
        self._entries.clear()

    def statistics(self) -> dict[str, int]:
        return {
            "bundle_entries": len(self._entries),
            "bundle_hits": self.hits,
            "bundle_misses": self.misses,
            "bundle_stale": self.stale,
            "bundle_evicted": self.evicted,
            "bundle_cleared": self.cleared,
        }
