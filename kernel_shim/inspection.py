"""What people look at in the userspace kernel beside SAD and SPD: packets that wait for an SA, and the bundle cache.

A `Snapshot` costs one list when it is taken; its entries are translated one by one when they are looked at, so that a
large table does not hold packets up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kernel_shim.model import AcquireSequence, Action, IPAddress, PolicyIndex, SaId, Unresolved

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PendingQueue:
    """The packets of one policy and peer that wait. `source` and `destination` are outer addresses, None is any; `acquire` 0: none is outstanding."""

    policy: PolicyIndex
    source: IPAddress | None
    destination: IPAddress | None
    mode: Unresolved
    acquire: AcquireSequence
    flows: int
    packets: int
    segments: int
    octets: int


@dataclass(frozen=True, slots=True)
class CachedBundle:
    """One entry of the bundle cache. A field of the flow that no policy and no SA reads is not in the cache, and None here.

    `policy` is 0 when none matches. `limit` is the longest inner packet in octets; without `sa` it is 0.
    """

    version: int
    source: IPAddress | None
    destination: IPAddress | None
    protocol: int | None
    source_port: int | None
    destination_port: int | None
    action: Action
    policy: PolicyIndex
    sa: SaId | None = None
    limit: int = 0
    vrf: str = ""  # whose packets they are; "" for the host's own
    peer: str = ""  # to whom they go under labels
    labels: tuple[int, ...] = ()  # outermost first; packets that are only passed on bring their own


class Snapshot(Generic[_T]):
    """`rows` as they were; `translate` makes an entry of one."""

    __slots__ = ("_rows", "_translate")

    def __init__(self, rows: Sequence[Any], translate: Callable[[Any], _T]) -> None:
        self._rows = rows
        self._translate = translate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> _T:
        return self._translate(self._rows[at])

    def __iter__(self) -> Iterator[_T]:
        return map(self._translate, self._rows)


class Inspectable(Protocol):
    """A kernel that shows more than RFC 2367 asks of it."""

    def pending_queues(self) -> Snapshot[PendingQueue]: ...

    def cached_bundles(self) -> Snapshot[CachedBundle]:
        """Those that are current, oldest first."""
