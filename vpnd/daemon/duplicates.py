"""What both sides brought up at the same moment, or one side twice, is reduced to one: `vpnd.daemon.crossings` judges, here it is carried out.

The superfluous one is deleted after a while in which packets under way arrive, and what it was judged by is looked at again: it may be busy, or have been kept.
"""

from __future__ import annotations

import asyncio
from typing import Final

from vpnd.daemon.crossings import STANDING, doubled, doubled_children, gives_way, still_superfluous, superfluous_child, superfluous_ike
from vpnd.daemon.ends import Ends
from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.ike.effects import ChildSa, Reason
from vpnd.ike.sa import Child, IkeSaState

LOOKS: Final = 4  # at what is doubled, before it is taken to be wanted twice
AGAIN: Final = 15.0  # s, from one look to the next: what the peer is in the middle of is over then
SETTLE: Final = 1.0  # s, for which the superfluous one still takes packets


class Duplicates:
    """Hears of what comes up."""

    def __init__(self, manager: Manager, ends: Ends) -> None:
        self._manager = manager
        self._ends = ends
        self._looking: set[Entry] = set()  # IKE SAs that have company and are looked at again

    def child_established(self, entry: Entry, child: ChildSa) -> None:
        self._look_at_child(entry, child, LOOKS)
        if not doubled(entry.sa, child):
            self._settle_ikes(entry)
        self._look_later(entry, LOOKS)

    def ike_established(self, entry: Entry) -> None:
        """Its CHILD_SAs are still to come, or none is."""
        self._look_later(entry, LOOKS)

    # CHILD_SAs of one IKE SA

    def _look_at_child(self, entry: Entry, child: ChildSa, looks: int) -> None:
        crossed = superfluous_child(entry.sa, child)
        for extra in doubled_children(entry.sa, child) if crossed is None else [crossed]:
            asyncio.get_running_loop().call_later(SETTLE, self._drop_child, entry, extra)
        if looks and doubled(entry.sa, child):
            place = entry.sa.children[child.id].place
            asyncio.get_running_loop().call_later(AGAIN, self._look_at_place, entry, place, looks - 1)

    def _look_at_place(self, entry: Entry, place: int, looks: int) -> None:
        """What was about to end may have been kept."""
        entry = entry.current
        standing = next((child for child in entry.sa.children.of_place(place) if child.state in STANDING), None)
        if standing is not None and not entry.sa.closed:
            self._look_at_child(entry, standing.sa, looks)

    def _drop_child(self, entry: Entry, extra: Child) -> None:
        """While it still is superfluous, or what it was rekeyed to: the peer may be rekeying it at this moment."""
        needless = still_superfluous(entry.current.sa, extra)
        for child in needless:
            self._ends.end(entry, child.sa.id)
        if needless:
            asyncio.get_running_loop().call_later(AGAIN, self._drop_child, entry, extra)

    # IKE SAs

    def _company(self, entry: Entry) -> list[Entry]:
        """Others of the connection between the same two peers, but not those that are reauthenticated, nor pairs that the peer made, which are its to judge."""
        ours, name = entry.sa.original_initiator, entry.sa.connection.name
        others = (peer for peer in self._manager.peers_of(entry) if peer is not entry and peer.sa.connection.name == name)
        return [peer for peer in others if not peer.leaving and (ours or peer.sa.original_initiator)]

    def _look_later(self, entry: Entry, looks: int) -> None:
        if looks and entry not in self._looking and self._company(entry):
            self._looking.add(entry)
            asyncio.get_running_loop().call_later(AGAIN, self._look_again, entry, looks - 1)

    def _look_again(self, entry: Entry, looks: int) -> None:
        """What is to end may have been busy."""
        self._looking.discard(entry)
        entry = entry.current
        if not entry.sa.closed:
            self._settle_ikes(entry)
            self._look_later(entry, looks)

    def _settle_ikes(self, entry: Entry) -> None:
        if entry.leaving:
            return
        company = self._company(entry)
        loser = superfluous_ike(entry.sa, (peer.sa for peer in company))
        for peer in (entry, *company):
            if peer.sa is loser:
                asyncio.get_running_loop().call_later(SETTLE, self._drop_ike, peer)

    def _drop_ike(self, entry: Entry) -> None:
        """If it still is superfluous, and one after the other: judged in pairs, of three each may be the worse one."""
        entry = entry.current
        company = self._company(entry)
        if entry.leaving or any(peer.sa.state is IkeSaState.DELETING for peer in company):
            return
        loop = asyncio.get_running_loop()
        better = [peer for peer in company if gives_way(entry.sa, peer.sa)]
        if any(gives_way(entry.sa, peer.sa, surely=True) for peer in better):
            self._manager.run(entry, entry.sa.delete(loop.time(), Reason.REPLACED))
        elif better:
            for peer in better:
                self._manager.run(peer, peer.sa.confirm(loop.time()))
            loop.call_later(SETTLE, self._drop_ike, entry)
