"""Why CHILD_SAs come up: ACQUIREs of traps, start actions, the operator.

A demand is one CHILD_SA that is wanted now. There is at most one a child configuration at a time: further ACQUIREs
wait for its outcome, and those whose flow it turns out not to cover make the next demand. Nor is a peer asked for one
that it was asked for already, for a demand that came to its end otherwise or by a reauthentication: what comes of that is waited for.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from kernel_shim.model import (
    Acquire,
    AcquireSequence,
    Expire,
    Flow,
    IPAddress,
    KernelEvent,
    NewMapping,
    TrafficSelector,
)
from vpnd.config.model import ChildConfig, ConnectionConfig, StartAction
from vpnd.control.backend import ControlError
from vpnd.daemon.background import Background
from vpnd.daemon.crossings import standing_child
from vpnd.daemon.duplicates import Duplicates
from vpnd.daemon.endpoints import Endpoints, backoff
from vpnd.daemon.ends import Ends
from vpnd.daemon.entry import ChildKey, Entry
from vpnd.daemon.ike_demands import IkeDemands, NoWay, begin
from vpnd.daemon.manager import Manager
from vpnd.daemon.traps import Traps
from vpnd.ike.effects import NO_ACQUIRE, ChildFailed, ChildSa, IkeClosed, Reason
from vpnd.ike.sa import ChildSaState

MAXIMUM_WAITING: Final = 1024  # ACQUIREs that wait for one demand; the kernel repeats those beyond
JUST_NOW: Final = 1.0  # s; longer than an event waits to be read

log = structlog.get_logger("child")


class ChildNotUp(ControlError):
    """A demand ended without a CHILD_SA."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        super().__init__(f"CHILD_SA {name}: {reason.value}" + (f" ({detail})" if detail else ""))
        self.reason = reason


@dataclass(slots=True)
class Demand:
    connection: ConnectionConfig
    child: ChildConfig
    flow: Flow | None
    acquires: dict[AcquireSequence, Flow | None] = field(default_factory=dict)
    waiters: list[asyncio.Future[ChildSa]] = field(default_factory=list)
    attempts: int = 1
    entry: Entry | None = None
    joined: bool = False  # it waits for what somebody else asked the peer of `entry` for


class Demands:
    """Hears the news of the manager, by way of `vpnd.daemon.operations`, and the kernel's events."""

    def __init__(self, manager: Manager, mark: int) -> None:
        self._manager = manager
        self._endpoints = Endpoints(manager, mark)
        self.traps: Final = Traps(manager, self._endpoints)
        self.ends: Final = Ends(manager, self.traps, self.demand)
        self.duplicates: Final = Duplicates(manager, self.ends)
        self.ike_sas: Final = IkeDemands(manager, self._endpoints)
        self._demands: dict[ChildKey, Demand] = {}
        self._waiting: dict[ChildKey, list[asyncio.Future[None]]] = {}  # `wait` of the control socket
        self._retries: dict[ChildKey, asyncio.TimerHandle] = {}
        self._turn = asyncio.Lock()  # of demands that begin
        self._background = Background()
        self._stopping = False

    # Demands

    def demand(self, connection: ConnectionConfig, child: ChildConfig, *, flow: Flow | None = None, acquire: AcquireSequence = NO_ACQUIRE) -> Demand:
        """Want a CHILD_SA; joins the demand that is under way."""
        key = (connection.name, child.name)
        demand = self._demands.get(key)
        if demand is None:
            demand = self._demands[key] = Demand(connection, child, flow)
            if acquire:
                demand.acquires[acquire] = flow
            self._background.start(self._pursue(key, demand))
        elif acquire and len(demand.acquires) < MAXIMUM_WAITING:
            demand.acquires[acquire] = flow
        return demand

    async def up(self, connection: ConnectionConfig, child: ChildConfig) -> ChildSa:
        """A CHILD_SA that stands; ChildNotUp when it fails."""
        future: asyncio.Future[ChildSa] = asyncio.get_running_loop().create_future()
        self.demand(connection, child).waiters.append(future)
        return await future

    async def _pursue(self, key: ChildKey, demand: Demand, delay: float = 0.0) -> None:
        if delay:
            await asyncio.sleep(delay)
        name = demand.connection.name
        known = self._manager.established(name) is not None
        remote = None if known else await self._endpoints.gateway(demand.connection)
        async with self._turn:
            await asyncio.sleep(0)  # a thousand ACQUIREs at once do not hold up the datagrams
            if self._demands.get(key) is not demand:
                return  # settled meanwhile
            if known and self._manager.established(name) is None:
                self._background.start(self._pursue(key, demand))  # it went, so the address is needed after all
            else:
                self._begin(key, demand, remote)

    def _begin(self, key: ChildKey, demand: Demand, remote: IPAddress | None) -> None:
        name = demand.connection.name
        now = asyncio.get_running_loop().time()
        entry = self._manager.established(name)  # another demand may have made one meanwhile
        fresh = entry is None
        if entry is None:
            try:
                entry = begin(self._manager, self._endpoints, demand.connection, remote)
            except NoWay as error:
                self._failed(key, demand, Reason.PEER_SILENT, str(error))
                return
        elif not demand.acquires and not self.ends.succession_of(key) and (child := standing_child(entry.sa, demand.child)) is not None:
            self._manager.say(f"CHILD_SA {child.sa.name}{{{child.sa.id}}} stands already", entry)
            self._settle(key, demand, child.sa)
            return
        demand.entry = entry
        demand.joined = entry.sa.asks_for(demand.child.name)
        if demand.joined:
            return
        acquire = next(iter(demand.acquires), NO_ACQUIRE)
        reqid = self._manager.reqid(demand.connection, demand.child)
        effects = entry.sa.create_child(demand.child, now, flow=demand.flow, acquire=acquire, reqid=reqid)
        if fresh:
            effects = [*effects, *entry.sa.initiate(now)]
        self._manager.run(entry, effects)

    def _failed(self, key: ChildKey, demand: Demand, reason: Reason, detail: str) -> None:
        if demand.entry is None and detail:
            self._manager.say(f"CHILD_SA {demand.child.name} of connection {key[0]} not brought up: {detail}", group="CFG", warning=True)
        tries = demand.connection.keyingtries
        config = self._manager.configured(*key)
        if reason is Reason.PEER_SILENT and (tries == 0 or demand.attempts < tries) and config is not None and not self._stopping:
            # without an entry nothing was sent, so no retransmission has taken time
            delay = 0.0 if demand.entry is not None else backoff(demand.attempts)
            demand.connection, demand.child = config
            demand.attempts += 1
            demand.entry = None
            self._background.start(self._pursue(key, demand, delay))
            return
        # no ticket is tried twice, so what comes after a failed resumption is a full exchange
        elsewhere = reason in (Reason.REDIRECTED, Reason.RESUMPTION_FAILED, Reason.ADDRESS_GONE) or self._stands_elsewhere(demand, reason)
        if elsewhere and config is not None and not self._stopping:
            demand.entry = None
            self._background.start(self._pursue(key, demand))
            return
        del self._demands[key]
        self.ends.retire(key)
        error = ChildNotUp(demand.child.name, reason, detail)
        for waiter in demand.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._background.start(self._refuse(list(demand.acquires)))
        if StartAction.START in demand.child.start_action and not self._stopping:
            self._retry_later(key, demand)

    def _stands_elsewhere(self, demand: Demand, reason: Reason) -> bool:
        """Whether it fails because its IKE SA goes, and another one of the connection stays: one of the two was superfluous, or came to nothing."""
        superfluous = reason in (Reason.REPLACED, Reason.PEER_DELETED, Reason.PEER_RESTARTED) or demand.joined
        if not superfluous or demand.entry is None or demand.entry.usable:
            return False
        other = self._manager.established(demand.connection.name)
        return other is not None and other.sa.established_at is not None

    async def _refuse(self, acquires: Sequence[AcquireSequence]) -> None:
        for sequence in acquires:
            await self._manager.kernel.acquire_failed(sequence, errno.EHOSTUNREACH)

    def _retry_later(self, key: ChildKey, demand: Demand) -> None:
        delay = backoff(demand.attempts)
        attempts = demand.attempts + 1

        def again() -> None:
            self._retries.pop(key, None)
            config = self._manager.configured(*key)
            if config is not None and not self._stopping:
                self.demand(*config).attempts = attempts

        if (old := self._retries.pop(key, None)) is not None:
            old.cancel()
        self._retries[key] = asyncio.get_running_loop().call_later(delay, again)

    def look_up(self, connection: ConnectionConfig) -> None:
        """Resolve its names in the background, so that a peer who asks first is recognised by its address."""
        self._endpoints.look_up(connection)

    # News of the manager

    def child_established(self, entry: Entry, child: ChildSa) -> None:
        key = (entry.sa.connection.name, child.name)
        for waiter in self._waiting.pop(key, []):
            if not waiter.done():
                waiter.set_result(None)
        self.duplicates.child_established(entry, child)
        self.ends.established(entry, child)
        demand = self._demands.get(key)
        if demand is None or demand.entry is not entry:
            return
        left = {sequence: flow for sequence, flow in demand.acquires.items() if flow is not None and not covers(child, flow)}
        if left and entry.sa.asks_for(child.name):
            return  # ours is still to come
        self._settle(key, demand, child)
        if not left:
            self._manager.run(entry, entry.sa.child_unwanted(child.name, asyncio.get_running_loop().time()))
        else:
            sequence, flow = next(iter(left.items()))
            if flow == demand.flow and not demand.joined:
                # the peer narrowed away the very flow that asked: asking again would yield the same
                self._background.start(self._refuse(list(left)))
                return
            following = self.demand(demand.connection, demand.child, flow=flow, acquire=sequence)
            following.acquires.update(left)

    def _settle(self, key: ChildKey, demand: Demand, child: ChildSa) -> None:
        del self._demands[key]
        for future in demand.waiters:
            if not future.done():
                future.set_result(child)

    def ike_rekeyed(self, old: Entry, new: Entry) -> None:
        for demand in self._demands.values():
            if demand.entry is old:
                demand.entry = new

    def child_failed(self, entry: Entry, effect: ChildFailed) -> None:
        key = (entry.sa.connection.name, effect.name)
        demand = self._demands.get(key)
        if demand is None or demand.entry is not entry:
            return
        if demand.joined and entry.usable:
            demand.entry = None
            self._background.start(self._pursue(key, demand))  # what was refused to somebody else is not refused to it
        else:
            self._failed(key, demand, effect.reason, effect.detail)

    def ike_closed(self, entry: Entry, effect: IkeClosed) -> None:
        name = entry.sa.connection.name
        now = self._manager.connections.get(name, entry.sa.connection)  # it may have been loaded anew since
        for child in {*entry.sa.connection.children, *now.children}:
            demand = self._demands.get((name, child))
            if demand is not None and demand.entry is entry:
                self._failed((name, child), demand, effect.reason, effect.detail)

    async def established(self, connection: str, child: str) -> None:
        """Returns at the next CHILD_SA of that name; starts nothing."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault((connection, child), [])
        waiting.append(future)
        try:
            await future
        finally:
            if future in waiting:
                waiting.remove(future)

    # News of the kernel

    def kernel_event(self, event: KernelEvent) -> None:
        match event:
            case Acquire():
                self._acquire(event)
            case Expire(sa, _reqid, hard):
                self._manager.counters.add("child_expired_hard" if hard else "child_expired_soft")
                if hard:
                    self._manager.kernel.forget(sa)
                found = self._manager.child_with(sa)
                if found is not None and hard:
                    self.ends.replace(*found)
                elif found is not None:
                    entry, child_id = found
                    self._manager.run(entry, entry.sa.child_worn(child_id, asyncio.get_running_loop().time()))
            case NewMapping():
                self._manager.counters.add("nat_mappings_changed")
                found = self._manager.child_with(event.sa)
                if found is not None:
                    self._manager.run(found[0], found[0].sa.mapping_changed(event.new, asyncio.get_running_loop().time()))

    def _acquire(self, event: Acquire) -> None:
        self._manager.counters.add("acquires")
        known = self._manager.reqids.child(event.reqid)
        connection = self._manager.connections.get(known[0]) if known else None
        if known is None or connection is None or self._stopping:
            self._background.start(self._refuse([event.sequence]))
            return
        if self._manager.installing(event.reqid) or (event.flow is not None and self._covered(connection.name, known[1].name, event.flow)):
            return  # the kernel asks again should that SA not cover the flow
        key = (connection.name, known[1].name)
        if not self.traps.trapped(*key) and key not in self._demands and not self.ends.succession_of(key):
            # a late packet of a CHILD_SA that is being deleted: nobody asked for it to come back by itself
            self._background.start(self._refuse([event.sequence]))
            return
        self._manager.say(f"creating acquire job for policy {event.flow or event.selector} with reqid {{{event.reqid}}}", group="KNL")
        self.demand(connection, known[1], flow=event.flow, acquire=event.sequence)

    def _covered(self, connection: str, child: str, flow: Flow) -> bool:
        """Whether an SA for the flow came up while its ACQUIRE was on its way. An older one the kernel has lost, or it would not ask."""
        now = asyncio.get_running_loop().time()
        return any(
            one.sa.name == child and one.state is ChildSaState.INSTALLED and now - one.installed_at < JUST_NOW and covers(one.sa, flow)
            for entry in self._manager.registry.of_connection(connection)
            for one in entry.sa.children.values()
        )

    # End

    def stop(self) -> None:
        """Nothing new is begun; what is under way fails."""
        self._stopping = True
        self.traps.stop()
        self._endpoints.stop()
        self.ends.stop()
        for handle in self._retries.values():
            handle.cancel()
        for key, demand in list(self._demands.items()):
            self._failed(key, demand, Reason.SHUTDOWN, "")


def covers(child: ChildSa, flow: Flow) -> bool:
    """Whether a packet of the flow may go through the CHILD_SA."""

    def side(ts: TrafficSelector, address: IPAddress, port: int) -> bool:
        return address in ts.addresses and ts.protocol in (0, flow.protocol) and port in ts.ports

    return any(side(ts, flow.source, flow.source_port) for ts in child.local_ts) and any(
        side(ts, flow.destination, flow.destination_port) for ts in child.remote_ts
    )
