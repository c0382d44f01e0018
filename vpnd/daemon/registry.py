"""Every IKE SA of the daemon, found by what names it: SPI, initial request, connection, identities, SAs of its children."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from kernel_shim.model import Endpoint, SaId
from vpnd.daemon.entry import Entry
from vpnd.gate import origin_of
from vpnd.ike.identity import Identity
from vpnd.ike.sa import IkeSa

K = TypeVar("K")
InitKey = tuple[int, Endpoint]  # an initiator's SPI and address
Identities = tuple[Identity | None, Identity | None]  # local, remote


class Registry:
    """An entry is in `of_connection` from when its peer is authenticated, of an initiator at once; in `of_peer` once it is established."""

    def __init__(self) -> None:
        self._by_spi: dict[int, Entry] = {}
        self._by_init: dict[InitKey, Entry] = {}
        self.half_open: Counter[bytes] = Counter()  # by `vpnd.gate.origin_of` the remote address
        self.half_open_total = 0
        self._of_connection: dict[str, dict[int, Entry]] = {}
        self._of_peer: dict[Identities, dict[int, Entry]] = {}
        self._child_of: dict[SaId, tuple[Entry, int]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._by_spi)

    # Coming and going

    def enter(self, sa: IkeSa) -> Entry:
        entry = Entry(sa)
        self._by_spi[sa.spi_local] = entry
        self._idle.clear()
        return entry

    def enter_half_open(self, sa: IkeSa, key: InitKey) -> Entry:
        """A responder whose peer is not authenticated."""
        entry = self.enter(sa)
        entry.init_key = key
        entry.half_open = origin_of(key[1].address)
        self._by_init[key] = entry
        self.half_open[entry.half_open] += 1
        self.half_open_total += 1
        return entry

    def enter_initiator(self, sa: IkeSa) -> Entry:
        entry = self.enter(sa)
        self._of_connection.setdefault(sa.connection.name, {})[sa.spi_local] = entry
        return entry

    def established(self, entry: Entry) -> None:
        """Both sides are authenticated."""
        self._not_half_open(entry)
        sa = entry.sa
        self._of_connection.setdefault(sa.connection.name, {})[sa.spi_local] = entry
        self._of_peer.setdefault((sa.local_id, sa.remote_id), {})[sa.spi_local] = entry

    def closed(self, entry: Entry) -> None:
        sa = entry.sa
        self._not_half_open(entry)
        self._by_spi.pop(sa.spi_local, None)
        _discard(self._of_connection, sa.connection.name, sa.spi_local)
        _discard(self._of_peer, (sa.local_id, sa.remote_id), sa.spi_local)
        if entry.init_key is not None:
            self._by_init.pop(entry.init_key, None)
        if not self._by_spi:
            self._idle.set()

    def _not_half_open(self, entry: Entry) -> None:
        if entry.half_open is not None:
            self.half_open_total -= 1
            self.half_open[entry.half_open] -= 1
            if not self.half_open[entry.half_open]:
                del self.half_open[entry.half_open]
            entry.half_open = None

    async def all_closed(self) -> None:
        """Returns once there is no IKE SA."""
        await self._idle.wait()

    # Looking

    def __contains__(self, spi: int) -> bool:
        return spi in self._by_spi

    def entries(self) -> Iterator[Entry]:
        """Every IKE SA, in order of creation."""
        return iter(list(self._by_spi.values()))

    def by_spi(self, spi: int) -> Entry | None:
        """`spi` is ours."""
        return self._by_spi.get(spi)

    def by_init(self, key: InitKey) -> Entry | None:
        return self._by_init.get(key)

    def of_connection(self, name: str) -> list[Entry]:
        return list(self._of_connection.get(name, {}).values())

    def of_peer(self, identities: Identities) -> list[Entry]:
        return list(self._of_peer.get(identities, {}).values())

    def usable(self, connection: str) -> Entry | None:
        """The youngest usable IKE SA of a connection: one that stands, or else one that we are bringing up."""
        best: Entry | None = None
        for entry in self.of_connection(connection):
            if entry.usable and (best is None or best.sa.established_at is None or entry.sa.established_at is not None):
                best = entry
        return best

    def in_contact(self, connection: str) -> bool:
        """Whether a peer of the connection is authenticated, or about to be: when both sides initiate at once, neither must close the other's."""
        if any(entry.sa.established_at is not None for entry in self.of_connection(connection)):
            return True
        return self.half_open_total > 0 and any(entry.half_open and entry.sa.connection.name == connection for entry in self._by_init.values())

    # SAs of children

    def own(self, sa: SaId, entry: Entry, child_id: int) -> None:
        self._child_of[sa] = (entry, child_id)

    def hand_over(self, heir: Entry) -> None:
        """The SAs of its children are its own from now on: nothing keeps those that it came of by rekeying."""
        for child in heir.sa.children.values():
            for sa in (child.sa.inbound.id, child.sa.outbound.id):
                if sa in self._child_of:
                    self._child_of[sa] = (heir, child.sa.id)

    def disown(self, sa: SaId) -> None:
        self._child_of.pop(sa, None)

    def child_with(self, sa: SaId) -> tuple[Entry, int] | None:
        found = self._child_of.get(sa)
        return (found[0].current, found[1]) if found is not None else None


def _discard(index: dict[K, dict[int, Entry]], key: K, spi: int) -> None:
    group = index.get(key)
    if group is not None:
        group.pop(spi, None)
        if not group:
            del index[key]
