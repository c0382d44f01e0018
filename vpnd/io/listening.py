"""The IKE sockets of every address that this host has, as addresses come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import Endpoint, IPAddress, KernelError
from vpnd.io.addresses import local_addresses, path_mtu, source_towards, watch_addresses
from vpnd.io.ike_sockets import Bypass, open_ike_sockets
from vpnd.io.udp import IkeSockets
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.wording import explained

SETTLE: Final = 0.1  # s; changes of addresses come in groups
RETRY: Final = 1.0  # s, after which what failed is tried again

log = structlog.get_logger("vpnd")


class SocketTable:
    """The IKE sockets of every local address; implements `vpnd.daemon.manager.Sockets`."""

    def __init__(self, receive: Callable[[Endpoint, Endpoint, bytes], None], counters: Counters) -> None:
        self._receive, self._counters = receive, counters
        self._by_address: dict[IPAddress, IkeSockets] = {}

    @property
    def addresses(self) -> set[IPAddress]:
        return set(self._by_address)

    async def add(self, address: IPAddress, descriptors: tuple[int, int]) -> None:
        sockets = IkeSockets(address, descriptors, self._receive, lambda: self._counters.add("ike_send_refused"))
        await sockets.open()
        self._by_address[address] = sockets

    async def remove(self, address: IPAddress) -> None:
        sockets = self._by_address.pop(address, None)
        if sockets is not None:
            await sockets.close()

    async def clear(self) -> None:
        for address in self.addresses:
            await self.remove(address)

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        sockets = self._by_address.get(local.address)
        if sockets is None:
            self._counters.add("ike_send_refused")
        else:
            sockets.send(local.port, remote, data)

    def send_keepalive(self, local: Endpoint, remote: Endpoint) -> None:
        sockets = self._by_address.get(local.address)
        if sockets is not None:
            sockets.send_keepalive(remote)


class HostView:
    """Addresses with sockets of ours, and the host's routes as packets with our `mark` take them; implements `vpnd.daemon.manager.Host`."""

    def __init__(self, sockets: SocketTable, mark: int) -> None:
        self._sockets, self._mark = sockets, mark

    def addresses(self) -> Sequence[IPAddress]:
        return sorted(self._sockets.addresses, key=lambda address: (address.version, address))

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return source_towards(remote, self._mark)

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return path_mtu(local, remote, self._mark)


class Listening:
    """Keeps the sockets of `table` open: of the `configured` addresses, or of all that the host has when none is configured.

    `bypass` is for sockets that we open ourselves, because the kernel does not.
    """

    def __init__(self, table: SocketTable, configured: Sequence[IPAddress], bypass: Bypass) -> None:
        self._table, self._configured, self._bypass = table, configured, bypass
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def follow(self, channel: Callable[[], KernelChannel], changed: Callable[[], None]) -> None:
        """From now on look at every change of the host's addresses and routes. `channel` may raise ChannelClosed; `changed` hears what was looked at."""
        self._task = asyncio.create_task(self._follow(channel, changed), name="addresses")

    async def close(self) -> None:
        """Follow no longer, and close all sockets."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._table.clear()

    async def open(self, channel: KernelChannel) -> None:
        """Open the sockets of addresses that came, close those of addresses that went. OSError when the addresses cannot be read, ChannelClosed."""
        async with self._turn:
            wanted = list(self._configured) or await local_addresses()
            if not wanted:
                log.warning("this host has no address yet to listen on")
            for address in self._table.addresses - set(wanted):
                await self._remove(address, channel)
            for address in wanted:
                if address not in self._table.addresses:
                    await self._add(address, channel)

    async def _remove(self, address: IPAddress, channel: KernelChannel) -> None:
        await self._table.remove(address)
        try:
            await channel.unbind(address)
        except KernelError as error:
            log.warning("IKE sockets of an address not given back", address=str(address), error=error.detail)
        log.info("address gone", address=str(address))

    async def _add(self, address: IPAddress, channel: KernelChannel) -> None:
        try:
            descriptors = await channel.bind(address) if channel.capabilities().binds_ike_sockets else open_ike_sockets(address, self._bypass)
        except KernelError as error:
            log.warning("no IKE sockets on an address", address=str(address), error=error.detail)
            return
        await self._table.add(address, descriptors)
        log.info("listening", address=str(address), ports="500 4500")

    async def _follow(self, channel: Callable[[], KernelChannel], changed: Callable[[], None]) -> None:
        watcher = asyncio.create_task(self._watch(), name="address-watch")
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(SETTLE)
                self._changed.clear()
                try:
                    await self.open(channel())
                    changed()
                except ChannelClosed:
                    continue  # the reconnection binds them
                except (OSError, KernelError) as error:
                    log.warning("addresses not followed", error=explained(error))
                    await asyncio.sleep(RETRY)
                    self._changed.set()
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self) -> None:
        """Watch on after whatever ends the watching: a full socket buffer (ENOBUFS) does. Each watch begins with a look for what was missed."""
        while True:
            try:
                await watch_addresses(self._changed.set)
            except OSError as error:
                log.warning("watching of addresses begins anew", error=explained(error))
            await asyncio.sleep(RETRY)
