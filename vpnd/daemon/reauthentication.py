"""Reauthentication: a new IKE SA with the same CHILD_SAs takes the place of one that has stood long enough (RFC 7296 section 2.8.3).

Make before break: the new one stands, with its CHILD_SAs, before the old one is deleted, and for a moment both take packets; none is lost.
Break before make: the old one is deleted first, and its policies hold up what is sent meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from kernel_shim.model import Endpoint
from vpnd.daemon.crossings import packets
from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.ike.effects import Effect, Reason
from vpnd.ike.sa import ChildSaState, IkeSaState

OVERLAP: Final = 1.0  # s, for which the old SAs still take packets that are under way
GOING: Final = (ChildSaState.DELETING, ChildSaState.REKEYED)


@dataclass(slots=True)
class _Renewal:
    old: Entry
    brought: set[Hashable] = field(default_factory=set)  # for which packets the new one was asked for a CHILD_SA


class Reauthentications:
    """`make_before_break`: see above."""

    def __init__(self, manager: Manager, *, make_before_break: bool) -> None:
        self._manager = manager
        self._make_before_break = make_before_break
        self._renewals: dict[Entry, _Renewal] = {}  # by the new IKE SA, from its first message on, what it is to replace

    def begin(self, entry: Entry) -> None:
        """Whatever made it due; that it is under way already is no error."""
        old = entry.current
        if old.sa.state not in (IkeSaState.ESTABLISHED, IkeSaState.REKEYING) or any(known.old.current is old for known in self._renewals.values()):
            return
        name = old.sa.connection.name
        how = "" if self._make_before_break else ", once it is deleted"
        self._manager.say(f"reauthenticating IKE_SA {name}[{old.sa.unique_id}]{how}", old)
        self._manager.counters.add("ike_reauthentications")
        if self._make_before_break:
            self._make(old)
        else:
            self._manager.run(old, old.sa.delete(self._now(), Reason.REAUTHENTICATION))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _make(self, old: Entry) -> None:
        sa = old.sa
        connection = self._manager.connections.get(sa.connection.name, sa.connection)
        local, remote = Endpoint(sa.local.address, connection.local_port), Endpoint(sa.remote.address, connection.remote_port)
        if sa.nat_remote:
            local, remote = sa.local, sa.remote  # only by the mapping that its NAT keeps it is reached
        new = self._manager.add_initiator(connection, local, remote)
        renewal = self._renewals[new] = _Renewal(old)
        old.leaving = True
        effects = self._bring_along(new, renewal)
        self._manager.run(new, [*effects, *new.sa.initiate(self._now(), resume=False)])

    def _bring_along(self, new: Entry, renewal: _Renewal) -> list[Effect]:
        """Ask once for what the old one has; of two that crossed, or that a rekeying leaves for a moment, one comes along."""
        effects: list[Effect] = []
        known = renewal.brought | {packets(child.sa) for child in new.sa.children.values()}
        for child in renewal.old.current.sa.children.values():
            what = packets(child.sa)
            if child.state not in GOING and what not in known:
                known.add(what)
                renewal.brought.add(what)
                config = new.sa.connection.children.get(child.sa.name, child.config)
                effects += new.sa.create_child(config, self._now(), reqid=child.sa.reqid, like=child.sa)
        return effects

    # News of the manager

    def settled(self, entry: Entry) -> None:
        """A CHILD_SA of it is up or refused, or it has none: with the last of them the old IKE SA has nothing left to do."""
        if entry in self._renewals and entry.sa.established_at is not None and not entry.sa.closed and not entry.sa.asks_for_children:
            asyncio.get_running_loop().call_later(OVERLAP, self._break, entry)

    def _break(self, entry: Entry) -> None:
        renewal = self._renewals.get(entry)
        if renewal is None or entry.sa.closed:
            return  # of one that is closed, `ike_closed` hears
        old = renewal.old.current
        if not old.sa.closed:
            self._manager.run(entry, self._bring_along(entry, renewal))  # what came up on the old one meanwhile
            if entry.sa.asks_for_children:
                return
            self._manager.run(old, old.sa.delete(self._now(), Reason.REPLACED))
        self._renewals.pop(entry, None)

    def ike_rekeyed(self, old: Entry, new: Entry) -> None:
        if (renewal := self._renewals.pop(old, None)) is not None:
            self._renewals[new] = renewal
            self.settled(new)

    def ike_closed(self, entry: Entry) -> None:
        """The new one did not come about: the old one goes on, and it is tried again."""
        renewal = self._renewals.pop(entry, None)
        if renewal is not None and not renewal.old.current.sa.closed:
            old = renewal.old
            old.leaving = old.current.leaving = False
            name = old.current.sa.connection.name
            self._manager.say(f"reauthentication of IKE_SA {name}[{old.current.sa.unique_id}] failed; it is tried again", old.current, warning=True)
            self._manager.run(old.current, old.current.sa.reauthenticate_later(self._now()))
