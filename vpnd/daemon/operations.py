"""What an operator can ask of the daemon: `vpnd.control.backend.ControlBackend` on the manager and its demands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import Action, KernelError, ReqId, SaId, SaStatus
from vpnd.auth.credentials import CredentialError
from vpnd.config.capabilities import impossible
from vpnd.config.model import ChildConfig, Configuration, ConnectionConfig, PrivateKeySource, SharedSecret, StartAction
from vpnd.control.backend import (
    ChildRekeyed,
    ChildState,
    ChildStatus,
    ChildUpDown,
    ControlError,
    DaemonEvent,
    DaemonStats,
    IkeRekeyed,
    IkeState,
    IkeStatus,
    IkeUpDown,
    LogLine,
    PolicyStatus,
)
from vpnd.daemon.demands import Demands
from vpnd.daemon.entry import Entry
from vpnd.daemon.interfaces import Interfaces
from vpnd.daemon.manager import Manager
from vpnd.daemon.traps import NoAddressYet, selectors
from vpnd.ike.effects import ChildFailed, ChildSa, IkeClosed, Reason, RekeyFailed
from vpnd.ike.sa import Child, ChildSaState, IkeSaState
from vpnd.peers import host_names

SINGLE_LOOKUPS: Final = 16  # up to so many SAs are asked for one by one, beyond that the SAD is dumped once
QUEUED_LINES: Final = 1000  # log lines kept for one slow control client

Usage = Mapping[SaId, SaStatus]
NO_USAGE: Final[Usage] = {}


class Operations:
    """The control server's backend."""

    def __init__(self, manager: Manager, demands: Demands, interfaces: Interfaces | None = None) -> None:
        self._interfaces = interfaces or Interfaces()
        self._manager = manager
        self._demands = demands
        self._started = time.time()
        self._monotonic = asyncio.get_running_loop().time
        self._started_monotonic = self._monotonic()
        manager.listener = self

    # News, shown and passed on

    def ike_established(self, entry: Entry) -> None:
        self._manager.news.publish(IkeUpDown(True, self._ike_status(entry, NO_USAGE)))

    def ike_rekeyed(self, old: Entry, new: Entry) -> None:
        self._manager.news.publish(IkeRekeyed(self._ike_status(old, NO_USAGE, children=()), self._ike_status(new, NO_USAGE, children=())))
        self._demands.ike_rekeyed(old, new)

    def reauthentication_due(self, entry: Entry) -> None:
        pass

    def child_rekeyed(self, entry: Entry, old: ChildSa, child: ChildSa) -> None:
        before, after = self._child_event_status(entry, old), self._child_event_status(entry, child)
        self._manager.news.publish(ChildRekeyed(self._ike_status(entry, NO_USAGE, children=()), before, after))
        self._demands.child_rekeyed(entry, old, child)

    def rekey_failed(self, entry: Entry, effect: RekeyFailed) -> None:
        self._demands.rekey_failed(entry, effect.child_id)

    def child_established(self, entry: Entry, child: ChildSa) -> None:
        self._publish_child(True, entry, child)
        self._demands.child_established(entry, child)

    def child_closed(self, entry: Entry, child: ChildSa, reason: Reason) -> None:
        if reason is not Reason.REKEYED:  # its successor stands: nothing went down
            self._publish_child(False, entry, child)
        self._demands.child_closed(entry, child, reason)

    def child_failed(self, entry: Entry, effect: ChildFailed) -> None:
        self._demands.child_failed(entry, effect)

    def ike_closed(self, entry: Entry, effect: IkeClosed) -> None:
        if entry.sa.established_at is not None and effect.reason is not Reason.REKEYED:
            self._manager.news.publish(IkeUpDown(False, self._ike_status(entry, NO_USAGE)))
        self._demands.ike_closed(entry, effect)

    def _publish_child(self, up: bool, entry: Entry, child: ChildSa) -> None:
        self._manager.news.publish(ChildUpDown(up, self._ike_status(entry, NO_USAGE, children=[self._child_event_status(entry, child)])))

    def _child_event_status(self, entry: Entry, child: ChildSa) -> ChildStatus:
        known = entry.sa.children.get(child.id)
        if known is not None:
            return self._child_status(known, NO_USAGE, self._monotonic())
        return ChildStatus(
            child.name,
            child.id,
            child.reqid,
            ChildState.DELETED,
            child.mode,
            child.encapsulated,
            child.inbound.spi,
            child.outbound.spi,
            None,
            child.local_ts,
            child.remote_ts,
        )

    def subscribe(self, listener: Callable[[DaemonEvent], None]) -> Callable[[], None]:
        return self._manager.news.subscribe(listener)

    # Status

    def stats(self) -> DaemonStats:
        return DaemonStats(
            uptime=self._monotonic() - self._started_monotonic,
            since=self._started,
            ike_total=len(self._manager),
            ike_half_open=self._manager.registry.half_open_total,
            policies=len(self._demands.traps.installed),
            counters=self._manager.counters.snapshot(),
        )

    async def list_sas(
        self, *, ike: str | None = None, ike_id: int | None = None, child: str | None = None, child_id: int | None = None
    ) -> Sequence[IkeStatus]:
        chosen: list[tuple[Entry, list[Child] | None]] = []
        for entry in self._manager.entries():
            if (ike is not None and entry.sa.connection.name != ike) or (ike_id is not None and entry.sa.unique_id != ike_id):
                continue
            if child is None and child_id is None:
                chosen.append((entry, None))
                continue
            fitting = [one for one in entry.sa.children.values() if child in (None, one.sa.name) and child_id in (None, one.sa.id)]
            if fitting:
                chosen.append((entry, fitting))
        children = [one for entry, some in chosen for one in (entry.sa.children.values() if some is None else some)]
        usage = await self._usage([sa for one in children for sa in (one.sa.inbound.id, one.sa.outbound.id)])
        now = self._monotonic()
        return [
            self._ike_status(
                entry, usage, children=[self._child_status(one, usage, now) for one in (list(entry.sa.children.values()) if some is None else some)]
            )
            for entry, some in chosen
        ]

    async def _usage(self, ids: Sequence[SaId]) -> Usage:
        try:
            channel = self._manager.kernel.channel
            if len(ids) > SINGLE_LOOKUPS:
                return {status.sa.id: status for status in await channel.sas()}
            usage = {}
            for sa in ids:
                try:
                    usage[sa] = await channel.get_sa(sa)
                except KernelError:
                    continue
            return usage
        except (TimeoutError, ChannelClosed):
            return NO_USAGE

    def _ike_status(self, entry: Entry, usage: Usage, *, children: Sequence[ChildStatus] | None = None) -> IkeStatus:
        sa, now = entry.sa, self._monotonic()
        return IkeStatus(
            name=sa.connection.name,
            unique_id=sa.unique_id,
            state=IkeState(sa.state.value),
            local=sa.local,
            local_id=sa.local_id,
            remote=sa.remote,
            remote_id=sa.remote_id,
            initiator=sa.initiator,
            spi_initiator=sa.spi_initiator,
            spi_responder=sa.spi_responder,
            proposal=sa.proposal,
            nat_local=sa.nat_local,
            nat_remote=sa.nat_remote,
            nat_fake=sa.nat_fake,
            nat_any=sa.nat_local or sa.nat_remote or sa.nat_fake,
            established=None if sa.established_at is None else now - sa.established_at,
            rekey_in=None if sa.rekey_at is None else sa.rekey_at - now,
            tasks_queued=sa.tasks_queued,
            tasks_active=sa.tasks_active,
            children=[self._child_status(child, usage, now) for child in sa.children.values()] if children is None else children,
        )

    def _child_status(self, child: Child, usage: Usage, now: float) -> ChildStatus:
        sa = child.sa
        inbound, outbound = usage.get(sa.inbound.id), usage.get(sa.outbound.id)
        age = now - child.installed_at
        epoch = time.time()

        def since(status: SaStatus | None) -> float | None:
            return None if status is None or status.used is None else max(0.0, epoch - status.used)

        return ChildStatus(
            name=sa.name,
            unique_id=sa.id,
            reqid=sa.reqid,
            state=ChildState(child.state.value),
            mode=sa.mode,
            encapsulated=sa.encapsulated,
            spi_in=sa.inbound.spi,
            spi_out=sa.outbound.spi,
            proposal=child.proposal,
            local_ts=sa.local_ts,
            remote_ts=sa.remote_ts,
            bytes_in=inbound.octets if inbound else 0,
            packets_in=inbound.packets if inbound else 0,
            used_in=since(inbound),
            bytes_out=outbound.octets if outbound else 0,
            packets_out=outbound.packets if outbound else 0,
            used_out=since(outbound),
            rekey_in=sa.outbound.soft.seconds - age if sa.outbound.soft.seconds and child.state is ChildSaState.INSTALLED else None,
            life_in=sa.outbound.hard.seconds - age if sa.outbound.hard.seconds else None,
            installed=age,
        )

    def list_policies(self, *, trap: bool, shunt: bool, child: str | None = None, ike: str | None = None) -> Sequence[PolicyStatus]:
        names = {Action.BYPASS: "PASS", Action.DISCARD: "DROP"}
        found = []
        for connection, config in self._demands.traps.installed:
            is_shunt = config.action is not Action.PROTECT
            if not (shunt if is_shunt else trap) or child not in (None, config.name) or ike not in (None, connection.name):
                continue
            found.append(
                PolicyStatus(
                    config.name,
                    connection.name,
                    names.get(config.action, config.mode.name),
                    selectors([ts for ts in config.local_ts if ts.addresses], None) or (),
                    selectors([ts for ts in config.remote_ts if ts.addresses], None) or (),
                )
            )
        return found

    # Connections

    def connections(self) -> Mapping[str, ConnectionConfig]:
        return self._manager.connections

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
        await self._interfaces.load(connection)
        before: Mapping[str, ChildConfig] = old.children if old else {}
        for name in before:
            if self._demands.traps.trapped(connection.name, name) and before[name] != connection.children.get(name):
                await self._demands.traps.uninstall(connection.name, name)
        self._manager.connections[connection.name] = connection
        self._demands.look_up(connection)
        try:
            await self._start_children(connection, old)
        except ControlError:
            await self.unload_connection(connection.name)  # whole or not at all, so that loading it again tries again
            raise

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
            await self._start_action(connection, child)

    async def _start_action(self, connection: ConnectionConfig, child: ChildConfig) -> None:
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
        if StartAction.START in child.start_action:
            self._demands.demand(connection, child)

    def _orphaned(self, connection: ConnectionConfig, child: ChildConfig) -> bool:
        """Whether an earlier run left SAs of this child, which the peer still uses: they want a successor now."""
        reqid = self._manager.reqid(connection, child)
        return any(status.sa.reqid == reqid for status in self._manager.kernel.orphans)

    async def unload_connection(self, name: str) -> None:
        connection = self._manager.connections.pop(name, None)
        if connection is None:
            raise ControlError(f"connection '{name}' not found")
        await self._interfaces.unload(name)
        for child in connection.children:
            if self._demands.traps.trapped(name, child):
                await self._demands.traps.uninstall(name, child)

    def _find(self, child: str, ike: str | None) -> tuple[ConnectionConfig, ChildConfig]:
        for connection in self._manager.connections.values():
            if ike in (None, connection.name) and child in connection.children:
                return connection, connection.children[child]
        raise ControlError(f"CHILD_SA config '{child}' not found")

    # Credentials

    def load_shared(self, secret: SharedSecret) -> None:
        self._manager.credentials.load_shared(secret)

    def unload_shared(self, name: str) -> None:
        self._manager.credentials.unload_shared(name)

    def shared_names(self) -> Sequence[str]:
        return self._manager.credentials.shared_names()

    def load_key(self, key: PrivateKeySource) -> str:
        try:
            return self._manager.credentials.load_key(key)
        except CredentialError as error:
            raise ControlError(str(error)) from error

    def unload_key(self, identifier: str) -> None:
        self._manager.credentials.unload_key(identifier)

    def key_ids(self) -> Sequence[str]:
        return self._manager.credentials.key_ids()

    def load_certificate(self, der: bytes, *, authority: bool) -> None:
        try:
            self._manager.credentials.load_certificate(der, authority=authority)
        except CredentialError as error:
            raise ControlError(str(error)) from error

    def clear_credentials(self) -> None:
        self._manager.credentials.clear()

    # Actions

    async def _with_log(self, work: asyncio.Future[None], timeout: float) -> AsyncIterator[LogLine]:
        """The daemon's log lines until `work` is done; its error, or a time-out, is raised after them."""
        lines: asyncio.Queue[LogLine | None] = asyncio.Queue(QUEUED_LINES)

        def take(event: DaemonEvent) -> None:
            if isinstance(event, LogLine) and not lines.full():
                lines.put_nowait(event)

        unsubscribe = self._manager.news.subscribe(take)
        deadline = self._monotonic() + timeout if timeout else None
        waiting: asyncio.Future[LogLine | None] | None = None
        try:
            while not work.done() or not lines.empty():
                waiting = asyncio.ensure_future(lines.get())
                left = None if deadline is None else max(0.0, deadline - self._monotonic())
                both: set[asyncio.Future[Any]] = {waiting, work}
                done, _ = await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if waiting in done:
                    line = waiting.result()
                    if line is not None:
                        yield line
                else:
                    waiting.cancel()
                    if not done:
                        raise ControlError(f"not done after {timeout:g} s")
            work.result()
        finally:
            unsubscribe()
            if waiting is not None:
                waiting.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def initiate(self, *, child: str | None, ike: str | None, timeout: float) -> AsyncIterator[LogLine]:
        if child is None:
            raise ControlError("missing child configuration name")
        connection, config = self._find(child, ike)

        async def up() -> None:
            await self._demands.up(connection, config)

        async for line in self._with_log(asyncio.ensure_future(up()), timeout):
            yield line

    def rekey(self, *, child: str | None = None, ike: str | None = None, child_id: int | None = None, ike_id: int | None = None) -> int:
        now, found = self._monotonic(), 0
        for entry in self._manager.entries():
            sa = entry.sa
            if (ike is not None and sa.connection.name != ike) or (ike_id is not None and sa.unique_id != ike_id):
                continue
            if child is not None or child_id is not None:
                for one in list(sa.children.values()):
                    if child in (None, one.sa.name) and child_id in (None, one.sa.id) and one.state in (ChildSaState.INSTALLED, ChildSaState.REKEYING):
                        found += 1
                        self._manager.run(entry, sa.rekey_child(one.sa.id, now))
            elif sa.state in (IkeSaState.ESTABLISHED, IkeSaState.REKEYING):
                found += 1
                self._manager.run(entry, sa.rekey(now))
        return found

    async def terminate(
        self,
        *,
        child: str | None = None,
        ike: str | None = None,
        child_id: int | None = None,
        ike_id: int | None = None,
        force: bool = False,
        timeout: float = 0.0,
    ) -> AsyncIterator[LogLine]:
        now = self._monotonic()
        ended: list[Callable[[], bool]] = []
        for entry in self._manager.entries():
            sa = entry.sa
            if (ike is not None and sa.connection.name != ike) or (ike_id is not None and sa.unique_id != ike_id):
                continue
            if child is not None or child_id is not None:
                for one in list(sa.children.values()):
                    if child in (None, one.sa.name) and child_id in (None, one.sa.id):
                        ended.append(_gone(entry, one.sa.id))
                        self._manager.run(entry, sa.delete_child(one.sa.id, now))
            else:
                ended.append(_closed(entry))
                self._manager.run(entry, sa.abort(now, Reason.DELETED) if force else sa.delete(now))
        if not ended:
            raise ControlError("no matching SAs to terminate found")
        async for line in self._with_log(asyncio.ensure_future(self._until(ended)), timeout):
            yield line

    async def _until(self, conditions: Sequence[Callable[[], bool]]) -> None:
        """Looks again after everything that the manager says."""
        changed = asyncio.Event()
        unsubscribe = self._manager.news.subscribe(lambda _event: changed.set())
        try:
            while not all(condition() for condition in conditions):
                changed.clear()
                await changed.wait()
        finally:
            unsubscribe()

    async def install(self, child: str, ike: str | None) -> None:
        connection, config = self._find(child, ike)
        await self._demands.traps.install(connection, config)

    async def uninstall(self, child: str, ike: str | None) -> None:
        for connection, config in self._demands.traps.installed:
            if config.name == child and ike in (None, connection.name):
                await self._demands.traps.uninstall(connection.name, child)
                return
        raise ControlError(f"policy '{child}' not found")

    async def wait(self, child: str, timeout: float) -> None:
        connection, config = self._find(child, None)
        for entry in self._manager.entries():
            if entry.sa.connection.name == connection.name and any(one.sa.name == config.name for one in entry.sa.children.values()):
                return
        try:
            async with asyncio.timeout(timeout or None):
                await self._demands.established(connection.name, config.name)
        except TimeoutError:
            raise ControlError(f"CHILD_SA '{child}' is not up after {timeout:g} s") from None


def _gone(entry: Entry, child_id: int) -> Callable[[], bool]:
    return lambda: entry.sa.closed or child_id not in entry.sa.children


def _closed(entry: Entry) -> Callable[[], bool]:
    return lambda: entry.sa.closed
