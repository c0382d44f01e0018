"""IKE SAs that come up: for a CHILD_SA that is wanted, or for their own sake (RFC 6023)."""

from __future__ import annotations

import asyncio

from kernel_shim.model import Endpoint, IPAddress
from vpnd.config.model import Childless, ConnectionConfig
from vpnd.control.backend import ControlError
from vpnd.daemon.endpoints import Endpoints
from vpnd.daemon.entry import Entry
from vpnd.daemon.manager import Manager
from vpnd.ike.effects import IkeClosed, Reason


class NoWay(Exception):
    """No address of the peer, or no route to it."""


def begin(manager: Manager, endpoints: Endpoints, connection: ConnectionConfig, remote: IPAddress | None) -> Entry:
    """A new IKE SA of ours that has sent nothing yet. NoWay where it cannot be sent anything."""
    local = endpoints.local(connection, remote)
    if remote is None or local is None:
        raise NoWay(f"no address for {', '.join(connection.remote_addrs)}" if remote is None else f"no route to {remote}")
    entry = manager.add_initiator(connection, Endpoint(local, connection.local_port), Endpoint(remote, connection.remote_port))
    redirection = manager.redirects.take(connection.name)
    entry.sa.redirected_from = redirection.origin if redirection is not None else None
    manager.say(f"initiating IKE_SA {connection.name}[{entry.sa.unique_id}] to {remote}", entry)
    if (ours := manager.addresses()) and local not in ours:
        manager.say(f"{local} (local_addrs of {connection.name}) is no address that we listen on: nothing can be sent from it", entry, warning=True)
    return entry


class IkeDemands:
    """Those that somebody waits for without wanting a CHILD_SA."""

    def __init__(self, manager: Manager, endpoints: Endpoints) -> None:
        self._manager = manager
        self._endpoints = endpoints
        self._waiting: dict[Entry, list[asyncio.Future[IkeClosed | None]]] = {}

    async def up(self, connection: ConnectionConfig) -> None:
        """An IKE SA of the connection that stands, without asking for a CHILD_SA. ControlError when there is none."""
        if connection.childless is Childless.NEVER:
            raise ControlError(f"connection '{connection.name}' says childless = never: name a child")
        while True:
            closed = await self._attempt(connection)
            if closed is None:
                return
            if closed.reason not in (Reason.REDIRECTED, Reason.ADDRESS_GONE):
                raise ControlError(f"IKE_SA {connection.name}: {closed.reason.value}{f' ({closed.detail})' if closed.detail else ''}")

    async def _attempt(self, connection: ConnectionConfig) -> IkeClosed | None:
        """None: it stands."""
        entry = self._manager.established(connection.name)
        if entry is None:
            remote = await self._endpoints.gateway(connection)
            entry = self._manager.established(connection.name)  # somebody else may have begun one meanwhile
        if entry is not None and entry.sa.established_at is not None:
            self._manager.say(f"IKE_SA {connection.name}[{entry.sa.unique_id}] stands already", entry)
            return None
        fresh = entry is None
        if entry is None:
            try:
                entry = begin(self._manager, self._endpoints, connection, remote)
            except NoWay as error:
                raise ControlError(f"IKE_SA {connection.name}: {error}") from error
        future: asyncio.Future[IkeClosed | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(entry, []).append(future)
        if fresh:
            self._manager.run(entry, entry.sa.initiate(asyncio.get_running_loop().time(), childless=True))
        return await future

    # News of the manager

    def established(self, entry: Entry) -> None:
        self._settle(entry, None)

    def closed(self, entry: Entry, effect: IkeClosed) -> None:
        self._settle(entry, effect)

    def _settle(self, entry: Entry, outcome: IkeClosed | None) -> None:
        for future in self._waiting.pop(entry, ()):
            if not future.done():
                future.set_result(outcome)
