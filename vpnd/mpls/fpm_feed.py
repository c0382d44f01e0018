"""What a routing daemon says over connection after connection, and what the label node makes of it. Pure: bytes, events and `now` in, entries out.

Routes outlive the connection that said them. A new one says everything again; what it has not said once it has been quiet for
`settle` seconds goes, and all goes that nobody has said again `grace` seconds after the connection's end. One that has said nothing yet is
not quiet but slow, or no routing daemon: it, too, has `grace` seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kernel_shim.mpls.fpm import FpmDecoder
from kernel_shim.mpls.fpm_rib import FpmRib, RibFull, Surroundings
from kernel_shim.mpls.lfib import Key
from kernel_shim.mpls.node import LabelBinding, NodeEntry, VrfRoute


@dataclass(frozen=True, slots=True)
class Difference:
    """Entries that are to stand, and keys of those that are not any more, since the last one that was taken."""

    put: tuple[NodeEntry, ...]
    gone: tuple[Key, ...]


class Heard(NamedTuple):
    """What messages said: changes, of them those beyond the bounds, which count for nothing, and next hops that led nowhere known."""

    changes: int
    beyond_bounds: int
    unresolved: int


class FpmFeed:
    """Times are monotonic seconds."""

    def __init__(self, surroundings: Surroundings, settle: float, grace: float) -> None:
        self.settle, self.grace = settle, grace
        self._rib = FpmRib(surroundings)
        self._decoder: FpmDecoder | None = None
        self._adopted: set[Key] = set()
        self._dropped: set[Key] = set()
        self._connected_at = 0.0
        self._heard_at: float | None = None  # on this connection
        self._ended_at: float | None = None  # and what stands was not confirmed since
        self._unconfirmed = False  # of what stands, the connection has not said all yet

    def __len__(self) -> int:
        """Routes and labels that the daemon says there are."""
        return len(self._rib)

    @property
    def connected(self) -> bool:
        return self._decoder is not None

    def surround(self, surroundings: Surroundings) -> None:
        self._rib.surround(surroundings)

    def adopt(self, entries: Iterable[NodeEntry], now: float) -> None:
        """An earlier run's labels and routes carry packets on until they are said again or `grace` has passed."""
        known = {entry.key for entry in self._rib.entries()}
        self._adopted |= {entry.key for entry in entries if isinstance(entry, LabelBinding | VrfRoute)} - known
        if self.connected:
            self._unconfirmed = True
        elif self._ended_at is None:
            self._ended_at = now

    # Connections

    def begin(self, now: float) -> None:
        """A connection came; one that was there has ended."""
        self._decoder = FpmDecoder()
        self._rib.begin()
        self._connected_at, self._heard_at = now, None
        self._ended_at = None
        self._unconfirmed = True

    def hear(self, data: bytes, now: float) -> Heard:
        """FpmError for what cannot be read: nothing of `data` counts then, and the connection is to be closed."""
        if self._decoder is None:
            return Heard(0, 0, 0)
        changes = self._decoder.feed(data)
        self._heard_at = now
        beyond, unresolved = 0, self._rib.unresolved
        for change in changes:
            try:
                self._rib.apply(change)
            except RibFull:
                beyond += 1
        return Heard(len(changes), beyond, self._rib.unresolved - unresolved)

    def end(self, now: float) -> bool:
        """The connection is over; whether that was in the middle of a message, which is then lost."""
        amid = self._decoder is not None and self._decoder.amid
        self._decoder = None
        self._ended_at = now
        return amid

    # Time

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        if self._decoder is not None:
            latest = self._connected_at + self.grace
            quiet = latest if self._heard_at is None else self._heard_at + self.settle
            return min(quiet, latest) if self._unconfirmed else None
        return None if self._ended_at is None else self._ended_at + self.grace

    def tick(self, now: float) -> int:
        """How many routes and labels went, for nobody said them again."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return 0
        if self._decoder is None:
            self._rib.begin()
        self._unconfirmed, self._ended_at = False, None
        swept = self._rib.sweep() + len(self._adopted)
        self._dropped |= self._adopted
        self._adopted.clear()
        return swept

    # Entries

    def take(self) -> Difference:
        """What became of entries since the last call."""
        changes = self._rib.take_changes()
        gone = self._dropped - changes.keys() | {key for key, entry in changes.items() if entry is None}
        self._dropped = set()
        self._adopted -= changes.keys()
        return Difference(tuple(entry for entry in changes.values() if entry is not None), tuple(gone))
