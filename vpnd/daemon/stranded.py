"""IKE SAs whose own address is gone and which cannot move, for without MOBIKE, or before the peer answers, none does: they are made anew from another one."""

from __future__ import annotations

import asyncio
from typing import Final

from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.ike.effects import Reason
from vpnd.peers import fixed_address

GRACE: Final = 2.0  # s, within which an address may come back, as where somebody renews it


class Stranded:
    """Hears of every change of the host's addresses and routes."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._doubted: set[Entry] = set()
        manager.stranded = self.look

    def look(self) -> None:
        for entry in self._manager.entries():
            if entry not in self._doubted and self._is_stranded(entry):
                self._doubted.add(entry)
                asyncio.get_running_loop().call_later(GRACE, self._leave, entry)

    def _is_stranded(self, entry: Entry) -> bool:
        """Only who asked first can ask again, and where the configuration names the address, that has to come back."""
        sa = entry.sa
        if sa.mobike or not sa.original_initiator or not entry.usable:
            return False
        address = sa.local.address
        if address in self._manager.addresses() or address in map(fixed_address, sa.connection.local_addrs):
            return False
        return self._manager.source_towards(sa.remote.address) not in (None, address)

    def _leave(self, entry: Entry) -> None:
        """The peer is not told, for nothing that we send from here would pass; the next IKE SA says INITIAL_CONTACT."""
        self._doubted.discard(entry)
        entry = entry.current
        if self._is_stranded(entry):
            self._manager.run(entry, entry.sa.abort(asyncio.get_running_loop().time(), Reason.ADDRESS_GONE))
