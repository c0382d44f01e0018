"""The label node as it should be, and its being carried over to the kernel.

Each entry has an owner: the configuration is one, a routing protocol's feed another. Where two owners name the same key the one
named first in `OWNERS` counts, so what an operator wrote is never overruled. What stands already is not touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import structlog

from kernel_shim.channel.api import ChannelClosed, LabelChannel
from kernel_shim.model import KernelError
from kernel_shim.mpls.lfib import Key
from kernel_shim.mpls.node import NodeEntry
from vpnd.daemon.repair import Repair
from vpnd.telemetry.counters import Counters

STATIC: Final = "static"
FPM: Final = "fpm"
OWNERS: Final = (STATIC, FPM)  # the earlier one counts
FED: Final = ("label", "route")  # kinds of entries that a feed can be the owner of

_ORDER: Final = {kind: at for at, kind in enumerate(("classes", "vrf", "tunnel", "peer", "label", "route"))}
"""An entry goes in after those that it rests upon, and away before them."""

TRIED_TOGETHER: Final = 128  # entries, once one of many was refused: as many as a request holds
SLICE: Final = 1024  # entries that are looked at, put or removed before the rest of the loop has its turn

T = TypeVar("T")

log = structlog.get_logger("mpls")


class DesiredLabels:
    """Pure: who wants which entry."""

    def __init__(self) -> None:
        self._by_owner: Final[Mapping[str, dict[Key, NodeEntry]]] = {owner: {} for owner in OWNERS}

    def __getitem__(self, key: Key) -> NodeEntry | None:
        return next((entries[key] for entries in self._by_owner.values() if key in entries), None)

    def __bool__(self) -> bool:
        return any(self._by_owner.values())

    @property
    def wanted(self) -> Mapping[Key, None]:
        """In the order in which they were wanted."""
        return {key: None for entries in self._by_owner.values() for key in entries}

    def keys(self) -> list[Key]:
        """As `wanted`, some of them twice."""
        return [key for entries in self._by_owner.values() for key in entries]

    def owner(self, key: Key) -> str:
        return next((owner for owner, entries in self._by_owner.items() if key in entries), "")

    def put(self, owner: str, entries: Iterable[NodeEntry]) -> list[Key]:
        """The keys that changed."""
        mine, changed = self._by_owner[owner], []
        for entry in entries:
            if mine.get(entry.key) != entry:
                mine[entry.key] = entry
                changed.append(entry.key)
        return changed

    def withdraw(self, owner: str, keys: Iterable[Key]) -> list[Key]:
        mine = self._by_owner[owner]
        return [key for key in keys if mine.pop(key, None) is not None]

    def replace(self, owner: str, entries: Sequence[NodeEntry]) -> list[Key]:
        """All that `owner` wants from now on; the keys that changed."""
        wanted = {entry.key for entry in entries}
        gone = self.withdraw(owner, [key for key in self._by_owner[owner] if key not in wanted])
        return [*gone, *self.put(owner, entries)]


class LabelSynchroniser:
    """Keeps one kernel's label node as `desired` says. Changes that are known at once go over at once, in one turn."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.desired: Final = DesiredLabels()
        self._standing: dict[Key, NodeEntry] = {}  # as far as it is known
        self._carrying = False  # more may stand than is known; also after a stop in the midst of it
        self._channel: LabelChannel | None = None
        self._changed: dict[Key, None] = {}  # an ordered set
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._repair: Repair[Key] = Repair(self._again)
        self._refused: dict[Key, str] = {}
        self.adopt: Callable[[Sequence[NodeEntry]], bool] = lambda entries: False  # whether what nobody wants may stay for now

    @property
    def standing(self) -> Mapping[Key, NodeEntry]:
        return self._standing

    @property
    def refused(self) -> Mapping[Key, str]:
        """What the kernel does not take, and why."""
        return self._refused

    def origin(self, key: Key) -> tuple[str, str]:
        """Whose an entry is, and how it stands: see `vpnd.mpls.listing.Origin`."""
        wanted, stands = self.desired[key], self._standing.get(key)
        if key in self._refused:
            return self.desired.owner(key), f"refused: {self._refused[key]}"
        state = "ok" if wanted == stands else "foreign" if wanted is None else "missing" if stands is None else "differs"
        return self.desired.owner(key), state

    def entries(self) -> list[NodeEntry]:
        """What stands, and what should and does not."""
        return [*self._standing.values(), *(entry for key in self.desired.wanted if key not in self._standing and (entry := self.desired[key]) is not None)]

    # What should stand

    def put(self, owner: str, entries: Iterable[NodeEntry]) -> None:
        self._touch(self.desired.put(owner, entries))

    def withdraw(self, owner: str, keys: Iterable[Key]) -> None:
        self._touch(self.desired.withdraw(owner, keys))

    def replace(self, owner: str, entries: Sequence[NodeEntry]) -> int:
        """All that `owner` wants from now on; how many entries differ from before."""
        changed = self.desired.replace(owner, entries)
        self._touch(changed)
        return len(changed)

    async def settled(self) -> None:
        """Until what is known to differ was tried."""
        while self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    # The kernel

    async def attach(self, channel: LabelChannel) -> None:
        """A kernel came: what is right in it stays as it is, the rest is repaired. Raises what the channel raises."""
        self._channel = channel
        await self.examine(attached=True)
        self._repair.at_once()

    def detach(self) -> None:
        self._channel = None
        self._standing = {}

    async def remove_all(self) -> None:
        """The orderly end, after `stop`: nothing is left in the kernel. Raises what the channel raises."""
        if self._channel is None:
            return
        standing = await self._channel.labels() if self._carrying else list(self._standing.values())
        if standing:
            await self._channel.delete_labels(sorted(standing, key=lambda entry: _order(entry.key), reverse=True))
        self._standing.clear()

    async def stop(self) -> None:
        self._repair.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def examine(self, *, attached: bool = False) -> None:
        """Hold the kernel's entries against those that should be there, and repair the difference. When it was just `attached` a feed may adopt some."""
        channel = self._channel
        if channel is None:
            return
        async with self._turn:
            found = await channel.labels()
            self._changed.clear()  # what changes from here on has a turn of its own
            standing: dict[Key, NodeEntry] = {}
            drifted = 0
            async for entry in _in_slices(found):
                standing[entry.key] = entry
                drifted += self._standing.get(entry.key) != entry
            async for key in _in_slices(list(self._standing)):
                drifted += key not in standing
            if self._channel is not channel:
                return  # it went meanwhile
            if self._standing and drifted:
                self._counters.add("kernel_labels_drifted", drifted)
            self._standing = standing
            if attached and (orphans := [entry for key, entry in standing.items() if key.kind in FED and self.desired[key] is None]) and self.adopt(orphans):
                self.desired.put(FPM, orphans)
            wrong: dict[Key, None] = {}
            async for key in _in_slices([*self.desired.keys(), *standing]):
                if standing.get(key) != self.desired[key]:
                    wrong[key] = None
            if wrong:
                await self._carry(channel, list(wrong))

    # Inside

    def _touch(self, keys: Iterable[Key]) -> None:
        self._changed.update(dict.fromkeys(keys))
        if self._changed and self._channel is not None and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._carry_changes(), name="labels")

    def _again(self, keys: Sequence[Key]) -> None:
        self._touch(keys)

    async def _carry_changes(self) -> None:
        while self._changed:
            async with self._turn:
                channel, changed = self._channel, self._changed
                if channel is None:
                    return  # the next attachment examines everything
                self._changed = {}
                try:
                    await self._carry(channel, [key async for key in _in_slices(list(changed)) if self._standing.get(key) != self.desired[key]])
                except ChannelClosed:
                    self._changed = {**changed, **self._changed}
                    return
                async for key in _in_slices(list(changed)):
                    if self._standing.get(key) == self.desired[key]:
                        self._refused.pop(key, None)
                        self._repair.done(key)

    async def _carry(self, channel: LabelChannel, keys: Sequence[Key]) -> None:
        """ChannelClosed when the kernel goes away; what it refuses is tried again later."""
        self._carrying = True
        standing, desired = self._standing, self.desired
        gone: list[list[NodeEntry]] = [[] for _ in _ORDER]
        wanted: list[list[NodeEntry]] = [[] for _ in _ORDER]
        async for key in _in_slices(keys):
            entry = desired[key]
            if entry is not None:
                wanted[_order(key)].append(entry)
            elif key in standing:
                gone[_order(key)].append(standing[key])
                self._refused.pop(key, None)
        for some in _slices([entry for entries in reversed(gone) for entry in entries]):
            if await self._try(channel.delete_labels, some):
                for entry in some:
                    del standing[entry.key]
                self._counters.add("kernel_labels_removed", len(some))
            else:
                for entry in some:
                    self._repair.failed(entry.key)
        failed: list[NodeEntry] = []
        for some in _slices([entry for entries in wanted for entry in entries]):
            if not await self._put(channel, some):
                # One of them stands in the way of another, or means nothing: its neighbours one by one, what changed its place last.
                for few in _slices(some, TRIED_TOGETHER):
                    if not await self._put(channel, few):
                        failed += [entry for entry in few if not await self._put(channel, [entry])]
        moved = [standing[entry.key] for entry in failed if entry.key in standing]
        if moved and await self._try(channel.delete_labels, moved):
            for entry in moved:
                del standing[entry.key]
        for entry in failed:
            if not await self._put(channel, [entry], last=True):
                self._repair.failed(entry.key)
        self._carrying = False

    async def _put(self, channel: LabelChannel, entries: Sequence[NodeEntry], *, last: bool = False) -> bool:
        try:
            await channel.put_labels(entries)
        except (KernelError, TimeoutError) as error:
            if last:
                reason = error.detail if isinstance(error, KernelError) else "no answer"
                for entry in entries:
                    if self._refused.get(entry.key) != reason:
                        log.warning("not taken by the kernel", entry=describe(entry.key), reason=reason)
                    self._refused[entry.key] = reason
                self._counters.add("kernel_labels_refused", len(entries))
            return False
        for entry in entries:
            self._standing[entry.key] = entry
            self._refused.pop(entry.key, None)
        self._counters.add("kernel_labels_put", len(entries))
        return True

    @staticmethod
    async def _try(request: Callable[[Sequence[NodeEntry]], Awaitable[None]], entries: Sequence[NodeEntry]) -> bool:
        try:
            await request(entries)
        except (KernelError, TimeoutError) as error:
            log.warning("entries of the label node not removed", entries=len(entries), error=str(error))
            return False
        return True


def _slices(items: Sequence[T], size: int = SLICE) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


async def _in_slices(items: Sequence[T]) -> AsyncIterator[T]:
    """One by one; the rest of the loop has its turn in between."""
    for some in _slices(items):
        for item in some:
            yield item
        await asyncio.sleep(0)


def _order(key: Key) -> int:
    return _ORDER[key.kind]


def describe(key: Key) -> str:
    """For a person: `route red 10.0.0.0/25`."""
    return " ".join((key.kind, *(str(part) for part in key.name if part != "")))
