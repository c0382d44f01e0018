"""The routing daemon's feed as an owner of labels and routes: it listens where the configuration says and hands on what became of entries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from kernel_shim.model import IPAddress
from kernel_shim.mpls.fpm_rib import Surroundings
from kernel_shim.mpls.node import MAX_VRFS, NodeEntry
from vpnd.daemon.label_synchroniser import FPM, LabelSynchroniser
from vpnd.io.fpm import FpmServer, Link, links
from vpnd.mpls.fpm_feed import FpmFeed
from vpnd.mpls.model import FpmConfig, MplsConfig
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.wording import explained

LISTEN_RETRY: Final = 5.0  # s
HOST_TABLES: Final = frozenset({0, 253, 254, 255})  # none said, default, main, local (linux/rtnetlink.h)
LINKS_PAUSE: Final = 1.0  # s between two readings of the host's interfaces

log = structlog.get_logger("fpm")


class RoutingFeed:
    """Nothing happens before the first `configure` that names an address."""

    def __init__(self, labels: LabelSynchroniser, counters: Counters) -> None:
        self._labels, self._counters = labels, counters
        labels.adopt = self._adopt
        self._config = MplsConfig()
        self._links: Mapping[int, Link] = {}
        self._unknown = False  # whether an interface was named that is not among them
        defaults = FpmConfig()
        self.feed: Final = FpmFeed(self._surroundings(), defaults.settle, defaults.grace)
        self._server: FpmServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, config: MplsConfig) -> None:
        """From now on this counts. What stands stays unless it means something else now."""
        old, self._config = self._config, config
        self.feed.surround(self._surroundings())
        if config.fpm is not None:
            self.feed.settle, self.feed.grace = config.fpm.settle, config.fpm.grace
        if config.fpm is None or old.fpm is None or _listening(config.fpm) != _listening(old.fpm):
            previous, self._serving = self._serving, None
            if previous is not None or config.fpm is not None:
                self._serving = asyncio.get_running_loop().create_task(self._serve(previous, config.fpm), name="fpm")
        self._changed()

    def links_changed(self) -> None:
        """Interfaces of the host came, went, or belong to another VRF device now."""
        self._unknown = self._config.fpm is not None
        self._changed()

    async def close(self) -> None:
        for task in (self._serving, self._reading):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            await self._server.close()

    # Inside

    def _adopt(self, entries: Iterable[NodeEntry]) -> bool:
        """Entries in the kernel that nobody wants: an earlier run's routing daemon may have said them. Whether they may stay for now."""
        if self._config.fpm is None:
            return False
        self.feed.adopt(entries, asyncio.get_running_loop().time())
        self._set_timer()
        return True

    async def _serve(self, previous: asyncio.Task[None] | None, config: FpmConfig | None) -> None:
        if previous is not None:
            previous.cancel()
            await asyncio.gather(previous, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
            self._server = None
        while config is not None:
            server = FpmServer(self.feed, self._changed, self._counters, config.users)
            try:
                await server.open(config.address, config.port)
            except OSError as error:
                log.warning("no place for a routing daemon to connect", address=str(config.address), port=config.port, error=explained(error))
                await asyncio.sleep(LISTEN_RETRY)
                continue
            self._server = server
            log.info("routing daemons may connect", address=str(config.address), port=config.port)
            return

    def _changed(self) -> None:
        difference = self.feed.take()
        if difference.put:
            self._labels.put(FPM, difference.put)
        if difference.gone:
            self._labels.withdraw(FPM, difference.gone)
        if self._unknown and (self._reading is None or self._reading.done()):
            self._reading = asyncio.get_running_loop().create_task(self._read_links(), name="fpm-links")
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.feed.deadline
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)

    def _tick(self) -> None:
        swept = self.feed.tick(asyncio.get_running_loop().time())
        if swept:
            self._counters.add("fpm_swept", swept)
            log.info("routes that were not said again go", routes=swept)
        self._changed()

    # What numbers and addresses mean here

    def _surroundings(self) -> Surroundings:
        config = self._config
        names = {name: vrf.name for vrf in config.vrfs.values() for name in (vrf.name, vrf.interface, *vrf.members)}
        # What is said of a VRF's own table, the daemon has read there: it is what became of its routes, and no route of its own.
        echoes = HOST_TABLES | {vrf.table for vrf in config.vrfs.values()}
        tables = {link.table: names[link.name] for link in self._links.values() if link.table not in echoes and link.name in names}
        strange: set[int] = set()
        peers: dict[IPAddress, str] = {}
        for peer in config.peers.values():
            for address in (*((peer.remote,) if peer.remote is not None else ()), *peer.next_hops):
                peers.setdefault(address, peer.name)

        def vrf_of_table(table: int) -> str | None:
            vrf = tables.get(table)
            if vrf is None and table not in echoes and table not in strange and len(strange) < MAX_VRFS:
                strange.add(table)  # looked for once
                self._unknown = True
            return vrf

        def vrf_of_interface(index: int) -> str | None:
            link = self._links.get(index)
            if link is None:
                self._unknown |= bool(index)
                return None
            return names.get(link.name) or tables.get(link.table)

        complete = frozenset(vrf.name for vrf in config.vrfs.values() if vrf.prefixes)
        return Surroundings(vrf_of_table, vrf_of_interface, peers.get, complete=complete)

    async def _read_links(self) -> None:
        while self._unknown:
            try:
                self._links = await links()
            except OSError as error:
                log.warning("interfaces not read", error=explained(error))
            self._unknown = False
            self.feed.surround(self._surroundings())
            self._unknown = False  # what is not there now is looked for when it is named again, or interfaces change
            self._changed()
            await asyncio.sleep(LINKS_PAUSE)


def _listening(config: FpmConfig) -> tuple[object, ...]:
    """What cannot change while it listens."""
    return config.address, config.port, config.users
