"""CHILD_SAs that no packet uses are deleted after their `inactivity` (swanctl.conf).

A kernel's counters are looked at several times in that time; a rekeying does not count as use. One timer for all CHILD_SAs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from vpnd.daemon.background import Background
from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.daemon.status import usage_of
from vpnd.ike.effects import ChildSa, Reason
from vpnd.ike.sa import Child
from vpnd.schedule import Deadlines

LOOKS: Final = 4  # at the counters, in the time without a packet; it may last so much longer
SHORTEST: Final = 0.5  # s, between two looks at the same CHILD_SA


@dataclass(slots=True)
class _Watched:
    entry: Entry
    packets: int = 0
    used: float = 0.0  # when they were last found to have grown


class Inactivity:
    """`close_ike`: an IKE SA whose last CHILD_SA is deleted for this goes with it."""

    def __init__(self, manager: Manager, *, close_ike: bool) -> None:
        self._manager = manager
        self._close_ike = close_ike
        self._watched: dict[int, _Watched] = {}
        self._looks: Deadlines[int] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._background = Background()

    def child_established(self, entry: Entry, child: ChildSa, replaces: ChildSa | None = None) -> None:
        """`replaces` has been as long without a packet as its successor will be."""
        known = entry.sa.children.get(child.id)
        if known is None or not known.config.inactivity:
            return
        old = self._watched.get(replaces.id) if replaces else None
        now = asyncio.get_running_loop().time()
        self._watched[child.id] = _Watched(entry, used=old.used if old else now)
        self._look_later(known, now)

    def child_closed(self, child: ChildSa) -> None:
        self._watched.pop(child.id, None)
        self._looks.set(child.id, None)

    def _look_later(self, child: Child, now: float) -> None:
        self._looks.set(child.sa.id, now + max(SHORTEST, child.config.inactivity / LOOKS))
        self._arm()

    def _arm(self) -> None:
        due = self._looks.next()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, lambda: self._background.start(self._look()))

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        due: list[tuple[_Watched, Child]] = []
        while (child_id := self._looks.due(now)) is not None:
            watched = self._watched[child_id]
            child = watched.entry.current.sa.children.get(child_id)
            if child is not None:
                due.append((watched, child))
        usage = await usage_of(self._manager, [sa for _, child in due for sa in (child.sa.inbound.id, child.sa.outbound.id)])
        for watched, child in due:
            if child.sa.id not in self._watched:
                continue  # closed meanwhile
            seen = [status for sa in (child.sa.inbound.id, child.sa.outbound.id) if (status := usage.get(sa)) is not None]
            packets = sum(status.packets for status in seen)
            if packets != watched.packets or not seen:  # a kernel that says nothing does not say that there was nothing
                watched.packets, watched.used = packets, now
            if now - watched.used >= child.config.inactivity:
                self._close(watched.entry.current, child)
            else:
                self._look_later(child, now)
        self._arm()

    def _close(self, entry: Entry, child: Child) -> None:
        now = asyncio.get_running_loop().time()
        self._manager.say(f"deleting CHILD_SA {child.sa.name}{{{child.sa.id}}} after {child.config.inactivity:g} s without a packet", entry)
        self._manager.counters.add("child_inactive")
        if self._close_ike and len(entry.sa.children) == 1:
            self._manager.run(entry, entry.sa.delete(now, Reason.INACTIVE))
        else:
            self._manager.run(entry, entry.sa.delete_child(child.sa.id, now, Reason.INACTIVE))

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
