"""Where a connection's peer is, and by which address of ours it is reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from kernel_shim.model import IPAddress
from vpnd.config.model import ConnectionConfig
from vpnd.daemon.background import Background
from vpnd.daemon.manager import Manager
from vpnd.ike.gateway_id import reachable
from vpnd.io.addresses import resolve, source_towards
from vpnd.peers import ANY, fixed_address, host_names

RETRY_FIRST: Final = 1.0  # s, until what failed is tried again; doubles
RETRY_LAST: Final = 60.0  # s
REFRESH: Final = 60.0  # s, after which a name is looked up again


def backoff(attempts: int) -> float:
    """Seconds to wait after so many failed attempts."""
    return min(RETRY_FIRST * 2.0 ** min(attempts - 1, 10), RETRY_LAST)


class Endpoints:
    """Resolves names, and remembers them in the manager, which recognises peers by them. `mark` keeps the question for a route off the capture routes."""

    def __init__(self, manager: Manager, mark: int) -> None:
        self._manager = manager
        self._mark = mark
        self._looking_up: set[str] = set()  # connections whose peer's name is being resolved
        self._background = Background()
        self._stopping = False
        self.moved: Callable[[str], None] = lambda connection: None  # hears of connections whose peer has another address than before

    async def remote(self, connection: ConnectionConfig) -> IPAddress | None:
        """The first of `remote_addrs` that is an address or resolves to one; None when there is none."""
        for pattern in connection.remote_addrs:
            if pattern in ANY:
                continue
            address = fixed_address(pattern) or await resolve(pattern)
            if address is not None:
                before = self._manager.resolved.get(pattern, address)
                self._manager.resolved[pattern] = address
                if before != address:
                    self._manager.say(f"{pattern} of connection '{connection.name}' is at {address} now, no longer at {before}", group="CFG")
                    self.moved(connection.name)
                return address
        return None

    async def gateway(self, connection: ConnectionConfig) -> IPAddress | None:
        """Where its next IKE SA goes: to where it was redirected, else to its `remote`."""
        redirection = self._manager.redirects.next(connection.name)
        where = redirection.gateway.where if redirection is not None else None
        address = await resolve(where) if isinstance(where, str) else where
        # who sent us there chose what the name stands for
        return address if address is not None and reachable(address) else await self.remote(connection)

    def look_up(self, connection: ConnectionConfig) -> None:
        """Resolve its names in the background, again and again, so that a peer who asks first is recognised by its address."""
        if connection.name not in self._looking_up and host_names(connection.remote_addrs):
            self._looking_up.add(connection.name)
            self._background.start(self._look_up(connection.name))

    async def _look_up(self, name: str) -> None:
        attempt = 1
        try:
            while (connection := self._manager.connections.get(name)) is not None and not self._stopping:
                if not host_names(connection.remote_addrs):
                    return
                known = await self.remote(connection) is not None
                await asyncio.sleep(REFRESH if known else backoff(attempt))
                attempt = 1 if known else attempt + 1
        finally:
            self._looking_up.discard(name)

    def local(self, connection: ConnectionConfig, remote: IPAddress | None) -> IPAddress | None:
        """The configured one of the peer's family, else the one by which the host reaches the peer; None without a route."""
        for pattern in connection.local_addrs:
            address = fixed_address(pattern)
            if address is not None and (remote is None or address.version == remote.version):
                return address
        return source_towards(remote, self._mark) if remote is not None else None

    def stop(self) -> None:
        self._stopping = True
