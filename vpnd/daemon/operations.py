"""What an operator can ask of the daemon: `vpnd.control.backend.ControlBackend` on the manager and its demands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from kernel_shim.model import Action, IPAddress
from kernel_shim.mpls.labels import Label
from vpnd.auth.credentials import CredentialError, LoadedCertificate
from vpnd.config.model import ChildConfig, Configuration, ConnectionConfig, DaemonConfig, LoadedConfiguration, PrivateKeySource, SharedSecret
from vpnd.control.backend import ControlError, DaemonEvent, DaemonStats, IkeStatus, LogLine, PolicyStatus
from vpnd.daemon.demands import Demands
from vpnd.daemon.entry import Entry
from vpnd.daemon.happenings import Happenings
from vpnd.daemon.inactivity import Inactivity
from vpnd.daemon.interfaces import Interfaces
from vpnd.daemon.loading import Loading
from vpnd.daemon.manager import Manager
from vpnd.daemon.mpls import Mpls
from vpnd.daemon.reauthentication import Reauthentications
from vpnd.daemon.reload import Reloading
from vpnd.daemon.status import list_sas
from vpnd.daemon.stranded import Stranded
from vpnd.daemon.traps import selectors
from vpnd.ike.effects import Reason
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.identity import Identity
from vpnd.ike.sa import ChildSaState, IkeSaState
from vpnd.mpls.trace import Step
from vpnd.peers import NOT, match
from vpnd.telemetry.exchanges import ExchangeCounters

QUEUED_LINES: Final = 1000  # log lines kept for one slow control client


class Operations:
    """The control server's backend."""

    def __init__(
        self,
        manager: Manager,
        demands: Demands,
        settings: DaemonConfig | None = None,
        interfaces: Interfaces | None = None,
        kernel_reasons: Sequence[str] = (),
        mpls: Mpls | None = None,
    ) -> None:
        settings = settings or DaemonConfig()
        self._kernel_reasons = kernel_reasons
        self._mpls = mpls or Mpls(manager.kernel)
        self._manager = manager
        self._demands = demands
        self._started = time.time()
        self._monotonic = asyncio.get_running_loop().time
        self._started_monotonic = self._monotonic()
        self._loading = Loading(manager, demands, interfaces or Interfaces())
        self._reloading: Reloading | None = None
        self._reload_turn = asyncio.Lock()
        self._reauthentications = Reauthentications(manager, make_before_break=settings.make_before_break)
        self._stranded = Stranded(manager)
        self._happenings = Happenings(manager, demands, self._reauthentications, Inactivity(manager, close_ike=settings.inactivity_close_ike))

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
            kernel=self._manager.capabilities.name,
            kernel_reasons=self._kernel_reasons,
        )

    def exchange_counters(self) -> ExchangeCounters:
        return self._manager.exchanges

    async def list_sas(
        self, *, ike: str | None = None, ike_id: int | None = None, child: str | None = None, child_id: int | None = None
    ) -> Sequence[IkeStatus]:
        return await list_sas(self._manager, ike=ike, ike_id=ike_id, child=child, child_id=child_id)

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
        await self._loading.load(configuration)

    def reload_from(self, read: Callable[[], Awaitable[LoadedConfiguration]], loaded: LoadedConfiguration) -> None:
        """`read` reads the file anew that `loaded` came from."""
        self._reloading = Reloading(self._manager, self._loading, self._mpls, read, loaded)

    async def reload(self) -> Sequence[str]:
        if self._reloading is None:
            raise ControlError("the daemon has no configuration file")
        async with self._reload_turn:
            return (await self._reloading.reload()).lines()

    async def load_connection(self, connection: ConnectionConfig) -> None:
        await self._loading.load_connection(connection)

    async def unload_connection(self, name: str) -> None:
        await self._loading.unload_connection(name)

    def _find(self, child: str, ike: str | None) -> tuple[ConnectionConfig, ChildConfig]:
        for connection in self._manager.connections.values():
            if ike in (None, connection.name) and child in connection.children:
                return connection, connection.children[child]
        raise ControlError(f"CHILD_SA config '{child}' not found")

    # Labels

    def mpls_rows(self, table: str, vrf: str | None = None) -> Iterator[Mapping[str, str | list[str]]]:
        return self._mpls.rows(table, vrf)

    def trace_from_vrf(self, vrf: str, destination: IPAddress) -> Sequence[Step]:
        return self._mpls.trace_from_vrf(vrf, destination)

    def trace_from_peer(self, peer: str, labels: Sequence[Label], destination: IPAddress | None) -> Sequence[Step]:
        return self._mpls.trace_from_peer(peer, labels, destination)

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

    def loaded_certificates(self) -> Sequence[LoadedCertificate]:
        return self._manager.credentials.listed()

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
        async for line in self._with_log(asyncio.ensure_future(self._up(child, ike)), timeout):
            yield line

    async def _up(self, child: str | None, ike: str | None) -> None:
        if child is not None:
            connection, config = self._find(child, ike)
            if config.action is not Action.PROTECT:
                raise ControlError(f"'{child}' is a shunt: it can be installed, not initiated")
            await self._demands.up(connection, config)
        elif ike is None or (known := self._manager.connections.get(ike)) is None:
            raise ControlError(f"IKE_SA config '{ike}' not found")
        else:
            await self._demands.ike_sas.up(known)

    def rekey(self, *, child: str | None = None, ike: str | None = None, child_id: int | None = None, ike_id: int | None = None, reauth: bool = False) -> int:
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
                if reauth:
                    self._reauthentications.begin(entry)
                else:
                    self._manager.run(entry, sa.rekey(now))
        return found

    def redirect(
        self, gateway: GatewayId, *, ike: str | None = None, ike_id: int | None = None, peer_ip: str | None = None, peer_id: Identity | None = None
    ) -> int:
        now, found = self._monotonic(), 0
        for entry in self._manager.entries():
            sa = entry.sa
            if (ike is not None and sa.connection.name != ike) or (ike_id is not None and sa.unique_id != ike_id) or not sa.may_be_redirected:
                continue
            if peer_ip is not None and match((peer_ip,), sa.remote.address, {}) == NOT:
                continue
            if peer_id is not None and (sa.remote_id is None or not sa.remote_id.matches(peer_id)):
                continue
            found += 1
            self._manager.run(entry, sa.redirect(gateway, now))
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
