"""Connections come and go: what loading, changing and unloading one does to traps, reqids and CHILD_SAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kernel_shim.model import Action, ReqId
from vpnd.config.capabilities import impossible
from vpnd.config.model import ChildConfig, Configuration, ConnectionConfig, StartAction
from vpnd.control.backend import ControlError
from vpnd.daemon.background import Background
from vpnd.daemon.demands import Demands
from vpnd.daemon.interfaces import Interfaces
from vpnd.daemon.manager import Manager
from vpnd.daemon.traps import NoAddressYet
from vpnd.peers import host_names


class Loading:
    def __init__(self, manager: Manager, demands: Demands, interfaces: Interfaces) -> None:
        self._interfaces = interfaces
        self._background = Background()
        self._manager = manager
        self._demands = demands

    async def load(self, configuration: Configuration) -> None:
        """All of a configuration. ControlError for the first connection that cannot be loaded."""
        for reqid in {child.reqid for connection in configuration.connections.values() for child in connection.children.values() if child.reqid}:
            self._manager.kernel.reserve_reqid(ReqId(reqid))
        for connection in configuration.connections.values():
            await self.load_connection(connection)
        if self._manager.capabilities.if_ids:
            await self._interfaces.loaded()

    async def load_connection(self, connection: ConnectionConfig) -> None:
        capabilities = self._manager.capabilities
        for child in connection.children.values():
            for option, what in impossible(child, capabilities):
                raise ControlError(f"child '{child.name}': {option}: the kernel '{capabilities.name}' {what}")
        old = self._manager.connections.get(connection.name)
        if old == connection:
            return
        self._claim_reqids(connection)
        self._manager.markings.configured(connection)
        await self._interfaces.load(connection)
        before: Mapping[str, ChildConfig] = old.children if old else {}
        for name, child in before.items():
            successor = connection.children.get(name)
            # a trap that is only changed is replaced: what it protects must not leave in clear in between
            if successor != child and self._demands.traps.trapped(connection.name, name) and not (successor and StartAction.TRAP in successor.start_action):
                await self._demands.traps.uninstall(connection.name, name)
        self._manager.connections[connection.name] = connection
        if old is not None and replace(old, children=connection.children) == connection:
            for entry in self._manager.entries():
                entry.sa.reconfigure(old, connection)
        self._demands.look_up(connection)
        try:
            await self._start_children(connection, old)
        except ControlError:
            await self._unload(connection.name, connection)  # whole or not at all, so that loading it again tries again
            raise
        for name, child in before.items():
            if name not in connection.children:
                self._unconfigured(connection.name, child)

    def _claim_reqids(self, connection: ConnectionConfig) -> None:
        """A reqid leads from a policy to its SAs, and from an ACQUIRE to its child: two children must not share one."""
        for child in connection.children.values():
            if not child.reqid:
                continue
            owner = self._manager.reqids.child(child.reqid)
            if owner is not None and (owner[0], owner[1].name) != (connection.name, child.name):
                standing = connection if owner[0] == connection.name else self._manager.connections.get(owner[0])
                if standing is not None and owner[1].name in standing.children:
                    raise ControlError(f"child '{child.name}': reqid {child.reqid} is that of child '{owner[1].name}' of connection '{owner[0]}'")
            self._manager.reqid(connection, child)

    async def _start_children(self, connection: ConnectionConfig, old: ConnectionConfig | None) -> None:
        before: Mapping[str, ChildConfig] = old.children if old else {}
        for child in connection.children.values():
            if before.get(child.name) == child and old is not None and (old.local_addrs, old.remote_addrs) == (connection.local_addrs, connection.remote_addrs):
                continue
            await self._start_action(connection, child, before.get(child.name))

    async def _start_action(self, connection: ConnectionConfig, child: ChildConfig, old: ChildConfig | None = None) -> None:
        if StartAction.TRAP in child.start_action:
            if child.action is Action.PROTECT and host_names(connection.remote_addrs):
                await self._demands.traps.install_when_resolved(connection, child)  # a resolver that does not answer holds nobody up
            else:
                try:
                    await self._demands.traps.install(connection, child)
                except NoAddressYet:
                    await self._demands.traps.install_when_resolved(connection, child)
            if child.action is Action.PROTECT and not self._demands.traps.held(connection.name, child.name) and self._orphaned(connection, child):
                self._demands.demand(connection, child)
        if StartAction.START in child.start_action and old is not None and StartAction.START in old.start_action:
            self._succeed(connection, child)
        elif StartAction.START in child.start_action:
            self._demands.demand(connection, child)

    def _orphaned(self, connection: ConnectionConfig, child: ChildConfig) -> bool:
        """Whether an earlier run left SAs of this child, which the peer still uses: they want a successor now."""
        reqid = self._manager.reqid(connection, child)
        return any(status.sa.reqid == reqid for status in self._manager.kernel.orphans)

    async def unload_connection(self, name: str) -> None:
        """As strongSwan: what was trapped is trapped no more, what was started is deleted, and other SAs go on until they end. ControlError when unknown."""
        connection = self._manager.connections.get(name)
        if connection is None:
            raise ControlError(f"connection '{name}' not found")
        await self._unload(name, connection)
        for child in connection.children.values():
            self._unconfigured(name, child)

    async def _unload(self, name: str, connection: ConnectionConfig) -> None:
        self._manager.connections.pop(name, None)
        self._manager.redirects.forget(name)
        self._manager.exchanges.forget(name)
        await self._interfaces.unload(name)
        for child in connection.children:
            if self._demands.traps.trapped(name, child):
                await self._demands.traps.uninstall(name, child)

    def _unconfigured(self, connection: str, child: ChildConfig) -> None:
        """A child that is configured no more. When it was started, its CHILD_SAs are deleted, and IKE SAs that have no other."""
        self._demands.ends.forget((connection, child.name))
        if StartAction.START in child.start_action:
            self._demands.ends.close_all(connection, child.name)

    def _succeed(self, connection: ConnectionConfig, child: ChildConfig) -> None:
        """Make what `child` says now before what it said before is deleted."""
        self._background.start(self._make_then_close(connection, child))

    async def _make_then_close(self, connection: ConnectionConfig, child: ChildConfig) -> None:
        try:
            await self._demands.up(connection, child)
        except ControlError:
            return  # it is tried again, and what there is goes on
        self._demands.ends.close_all(connection.name, child.name, but=child)


def clashing_reqids(connections: Mapping[str, ConnectionConfig]) -> str:
    """Which two children have one reqid; empty when none do."""
    owners: dict[int, str] = {}
    for connection in connections.values():
        for child in connection.children.values():
            owner = f"child '{child.name}' of connection '{connection.name}'"
            if child.reqid and owners.setdefault(child.reqid, owner) != owner:
                return f"{owner}: reqid {child.reqid} is that of {owners[child.reqid]}"
    return ""
