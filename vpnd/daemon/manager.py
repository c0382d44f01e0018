"""The IKE SAs of the daemon: which datagram is for which, when each must act, and what its effects do to sockets and kernel.

An IKE SA is a pure core (`vpnd.ike.sa`). Its effects are carried out here, step after step; a step that needs the kernel
goes on in a task of its own until its effects are done, so nothing waits per SA while nothing happens.
Why CHILD_SAs come up, and what follows when one goes, is `vpnd.daemon.demands`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol, TypeVar

import structlog

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.model import Capabilities, Direction, Endpoint, IPAddress, KernelError, ReqId, SaId, SecurityAssociation, SpiRequest
from vpnd.auth.credentials import CredentialStore
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.control.backend import DaemonEvent, LogLine
from vpnd.daemon.background import Background
from vpnd.daemon.kernel_side import KernelSide
from vpnd.gate import Admitted, Gate, GateSettings, Refused, Reply
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import (
    AllocateSpi,
    AuthenticationRejected,
    ChildClosed,
    ChildDenied,
    ChildEstablished,
    ChildFailed,
    ChildSa,
    Effect,
    IkeClosed,
    IkeEstablished,
    IkeHandedOver,
    IkeOpened,
    InitialContact,
    InstallSa,
    Reason,
    RekeyFailed,
    RemoveSa,
    Send,
    SendKeepalive,
)
from vpnd.ike.fragments import ReassemblyBudget
from vpnd.ike.iana import Exchange
from vpnd.ike.identity import Identity
from vpnd.ike.sa import IkeSa, IkeSaState
from vpnd.ike.wire.header import FLAG_INITIATOR, FLAG_RESPONSE, HEADER_LENGTH
from vpnd.peers import Connections
from vpnd.policies import PolicySpec, policies_for
from vpnd.schedule import Deadlines
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.throttle import Throttle

USABLE: Final = (IkeSaState.CONNECTING, IkeSaState.ESTABLISHED, IkeSaState.REKEYING)
KERNEL_ERRORS: Final = (KernelError, TimeoutError, ChannelClosed)

MAXIMUM_IKE_SAS: Final = 100_000  # with peers that ask; some 25 kB each
TIMERS_AT_ONCE: Final = 64  # IKE SAs whose deadline has come, before datagrams get their turn
REFUSALS_AT_ONCE: Final = 20  # log lines about IKE_SA_INITs that were refused; anybody can cause them
REFUSALS_A_SECOND: Final = 1.0

K = TypeVar("K")
ChildKey = tuple[str, str]  # connection, child

log = structlog.get_logger("ike")


class Sockets(Protocol):
    """Sends IKE messages; `vpnd.io.udp.IkeSockets` behind the application."""

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None: ...
    def send_keepalive(self, local: Endpoint, remote: Endpoint) -> None: ...


@dataclass(slots=True, eq=False)
class Entry:
    """An IKE SA and what is still to be done for it."""

    sa: IkeSa
    steps: deque[deque[Effect]] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    advancing: bool = False
    superseded: bool = False  # its peer came back with a new IKE SA
    owners: set[int] = field(default_factory=set)  # children whose policies are claimed
    installing: dict[int, int] = field(default_factory=dict)  # reqid by child whose SA in stands and whose SA out does not yet
    init_key: tuple[int, Endpoint] | None = None  # of a responder: the initiator's SPI and address
    half_open: IPAddress | None = None  # counted for this address
    heir: Entry | None = None  # rekeyed: has its children
    awaits: Entry | None = None  # whose steps, from before it handed over, come first

    @property
    def current(self) -> Entry:
        """The one that has the children now."""
        entry = self
        while entry.heir is not None:
            entry = entry.heir
        return entry


class Listener(Protocol):
    """Hears what becomes of IKE and CHILD_SAs."""

    def ike_established(self, entry: Entry) -> None: ...
    def ike_rekeyed(self, old: Entry, new: Entry) -> None: ...
    def child_established(self, entry: Entry, child: ChildSa) -> None: ...
    def child_rekeyed(self, entry: Entry, old: ChildSa, child: ChildSa) -> None: ...
    def rekey_failed(self, entry: Entry, effect: RekeyFailed) -> None: ...
    def child_closed(self, entry: Entry, child: ChildSa, reason: Reason) -> None: ...
    def child_failed(self, entry: Entry, effect: ChildFailed) -> None: ...
    def ike_closed(self, entry: Entry, effect: IkeClosed) -> None: ...


class Manager:
    """Implements `vpnd.ike.context.IkeContext` for the cores that it drives."""

    def __init__(
        self,
        kernel: KernelSide,
        sockets: Sockets,
        credentials: CredentialStore,
        settings: IkeSettings,
        gate: GateSettings,
        counters: Counters,
        path_mtu: Callable[[IPAddress, IPAddress], int] = lambda local, remote: 0,
    ) -> None:
        self.kernel: Final = kernel
        self.counters: Final = counters
        self.credentials: CredentialStore = credentials
        self._settings = settings
        self._sockets = sockets
        self._path_mtu = path_mtu
        self._reassembly = ReassemblyBudget()
        self._gate = Gate(gate, os.urandom)
        self.connections: Final = Connections()
        self.resolved: Final[dict[str, IPAddress]] = {}  # host names of remote_addrs
        self._by_spi: dict[int, Entry] = {}
        self._by_init: dict[tuple[int, Endpoint], Entry] = {}
        self._half_open: Counter[IPAddress] = Counter()
        self._half_open_total = 0
        self._of_connection: dict[str, dict[int, Entry]] = {}  # initiators, and responders whose peer is authenticated
        self._of_peer: dict[tuple[Identity | None, Identity | None], dict[int, Entry]] = {}  # established, by local and remote identity
        self._child_of: dict[SaId, tuple[Entry, int]] = {}
        self._installing: Counter[int] = Counter()  # half installed CHILD_SAs by reqid
        self._reqids: dict[tuple[str, str], ReqId] = {}
        self._child_of_reqid: dict[int, tuple[str, ChildConfig]] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._next_ike_id = 0
        self._next_child_id = 0
        self._subscribers: dict[int, Callable[[DaemonEvent], None]] = {}
        self._subscription = 0
        self.listener: Listener | None = None
        self._draining = False
        self._refusals = Throttle(REFUSALS_AT_ONCE, REFUSALS_A_SECOND)
        self._idle = asyncio.Event()
        self._idle.set()
        self._background = Background()

    # IkeContext

    @property
    def settings(self) -> IkeSettings:
        return self._settings

    @property
    def capabilities(self) -> Capabilities:
        return self.kernel.capabilities()

    @property
    def reassembly(self) -> ReassemblyBudget:
        return self._reassembly

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return self._path_mtu(local, remote)

    def entropy(self, octets: int) -> bytes:
        return os.urandom(octets)

    def utc(self, now: float) -> datetime:
        return datetime.fromtimestamp(time.time() - (asyncio.get_running_loop().time() - now), UTC)

    def new_ike_spi(self) -> int:
        while True:
            spi = int.from_bytes(os.urandom(8))
            if spi and spi not in self._by_spi:
                return spi

    def new_ike_id(self) -> int:
        self._next_ike_id += 1
        return self._next_ike_id

    def new_child_id(self) -> int:
        self._next_child_id += 1
        return self._next_child_id

    def candidates(self, local: Endpoint, remote: Endpoint) -> Sequence[ConnectionConfig]:
        return self.connections.candidates(local, remote, self.resolved)

    def reqid(self, connection: ConnectionConfig, child: ChildConfig) -> int:
        key = (connection.name, child.name)
        known = self._reqids.get(key)
        if child.reqid and known != child.reqid:
            known = self._reqids[key] = ReqId(child.reqid)
            self.kernel.reserve_reqid(known)
        elif known is None:
            known = self._reqids[key] = self.kernel.reqid_for(None)
        self._child_of_reqid[known] = (connection.name, child)
        return known

    def configured(self, connection: str, child: str) -> tuple[ConnectionConfig, ChildConfig] | None:
        """As it is configured now; it may have been unloaded."""
        known = self.connections.get(connection)
        config = known.children.get(child) if known else None
        return (known, config) if known and config else None

    def adopt_reqid(self, connection: ConnectionConfig, child: ChildConfig, reqid: ReqId) -> None:
        """Fix the reqid of a child before its first use: that of the policies which an earlier run left."""
        self._reqids.setdefault((connection.name, child.name), reqid)

    def child_of_reqid(self, reqid: int) -> tuple[str, ChildConfig] | None:
        """Connection name and child configuration that a reqid stands for."""
        return self._child_of_reqid.get(reqid)

    def first_contact(self, connection: ConnectionConfig) -> bool:
        if any(entry.sa.established_at is not None for entry in self._of_connection.get(connection.name, {}).values()):
            return False
        # a peer that is about to authenticate is in contact, too: when both sides initiate at once, neither must close the other's
        return not self._half_open_total or not any(entry.half_open and entry.sa.connection.name == connection.name for entry in self._by_init.values())

    # Looking

    def entries(self) -> Iterator[Entry]:
        """Every IKE SA, in order of creation."""
        return iter(list(self._by_spi.values()))

    def established(self, connection: str) -> Entry | None:
        """The youngest usable IKE SA of a connection: one that stands, or else one that we are bringing up."""
        best: Entry | None = None
        for entry in self._of_connection.get(connection, {}).values():
            if entry.sa.closed or entry.sa.state not in USABLE:
                continue
            if best is None or best.sa.established_at is None or entry.sa.established_at is not None:
                best = entry
        return best

    def peers_of(self, entry: Entry) -> list[Entry]:
        """The established IKE SAs between the same two identities, `entry` included."""
        return list(self._of_peer.get((entry.sa.local_id, entry.sa.remote_id), {}).values())

    def installing(self, reqid: int) -> bool:
        """Whether a CHILD_SA of that reqid is half installed: its SA out is about to come."""
        return self._installing[reqid] > 0

    def child_with(self, sa: SaId) -> tuple[Entry, int] | None:
        found = self._child_of.get(sa)
        return (found[0].current, found[1]) if found is not None else None

    @property
    def half_open(self) -> int:
        return self._half_open_total

    def __len__(self) -> int:
        return len(self._by_spi)

    async def all_closed(self) -> None:
        """Returns once there is no IKE SA."""
        await self._idle.wait()

    # Events

    def subscribe(self, listener: Callable[[DaemonEvent], None]) -> Callable[[], None]:
        self._subscription += 1
        ticket = self._subscription
        self._subscribers[ticket] = listener
        return lambda: self._subscribers.pop(ticket, None) and None

    def publish(self, event: DaemonEvent) -> None:
        for listener in list(self._subscribers.values()):
            listener(event)

    def say(self, text: str, entry: Entry | None = None, *, group: str = "IKE", level: int = 1, warning: bool = False) -> None:
        """One line for the log and for those who listen on the control socket."""
        name, number = (entry.sa.connection.name, entry.sa.unique_id) if entry else (None, None)
        (log.warning if warning else log.info)(text, **({"connection": name, "ike": number} if entry else {}))
        self.publish(LogLine(group, level, name, number, text))

    # Inputs

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def datagram(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        """An IKE message without non-ESP marker."""
        if len(data) < HEADER_LENGTH:
            self.counters.add("ike_malformed")
            return
        from_initiator = data[19] & FLAG_INITIATOR
        spi = int.from_bytes(data[8:16] if from_initiator else data[0:8])
        entry = self._by_spi.get(spi)
        if entry is not None:
            self.run(entry, entry.sa.receive(data, local, remote, self._now()))
        elif spi == 0 and from_initiator and data[18] == Exchange.IKE_SA_INIT and not data[19] & FLAG_RESPONSE:
            self._initial(local, remote, data)
        else:
            self.counters.add("ike_unknown_spi")

    def _initial(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        now = self._now()
        key = (int.from_bytes(data[0:8]), remote)
        entry = self._by_init.get(key)
        if entry is not None:
            self.run(entry, entry.sa.receive(data, local, remote, now))
            return
        if self._draining:
            self.counters.add("ike_refused_draining")
            return
        match self._gate.judge(data, remote, self._half_open_total, self._half_open[remote.address], now):
            case Reply(answer, counter):
                self.counters.add(counter)
                self._sockets.send(local, remote, answer)
            case Refused(counter):
                self.counters.add(counter)
            case Admitted():
                if len(self._by_spi) >= MAXIMUM_IKE_SAS:
                    self.counters.add("ike_sa_limit")
                    return
                if not self.kernel.connected:
                    self.counters.add("ike_refused_no_kernel")
                    return
                sa, effects = IkeSa.respond(self, data, local, remote, now)
                if sa is None:
                    for effect in effects:
                        if isinstance(effect, Send):
                            self._sockets.send(effect.local, effect.remote, effect.data)
                        elif isinstance(effect, AuthenticationRejected):
                            self.counters.add("ike_init_refused")
                            if (unsaid := self._refusals.admit(now)) is not None:
                                also = f" ({unsaid} more like it were not logged)" if unsaid else ""
                                self.say(f"IKE_SA_INIT from {remote} refused: {effect.why}{also}", warning=True)
                    return
                entry = self._enter(sa)
                entry.init_key = key
                entry.half_open = remote.address
                self._by_init[key] = entry
                self._half_open[remote.address] += 1
                self._half_open_total += 1
                self.run(entry, effects)

    def drain(self) -> None:
        """Take no new IKE SA of a peer from now on: it would be left without us."""
        self._draining = True

    def add_initiator(self, connection: ConnectionConfig, local: Endpoint, remote: Endpoint) -> Entry:
        """A new IKE SA that has sent nothing yet."""
        entry = self._enter(IkeSa.initiator_of(self, connection, local, remote, self._now()))
        self._of_connection.setdefault(connection.name, {})[entry.sa.spi_local] = entry
        return entry

    def _enter(self, sa: IkeSa) -> Entry:
        entry = Entry(sa)
        self._by_spi[sa.spi_local] = entry
        self._idle.clear()
        return entry

    # Timers

    def _tick(self) -> None:
        self._timer = None
        now = self._now()
        for _ in range(TIMERS_AT_ONCE):
            if (spi := self._deadlines.due(now)) is None:
                break
            entry = self._by_spi.get(spi)
            if entry is not None:
                self.run(entry, entry.sa.timer(now))
        self._arm()

    def _arm(self) -> None:
        deadline = self._deadlines.next()
        if self._timer is not None:
            if self._timer.when() == deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)

    # Effects

    def run(self, entry: Entry, effects: Sequence[Effect]) -> None:
        """Carry out one step, after the steps of this IKE SA that are still under way."""
        if effects:
            entry.steps.append(deque(effects))
        for effect in effects:
            if isinstance(effect, IkeOpened):
                self._open(effect.sa)
            elif isinstance(effect, IkeHandedOver):
                self._hand_over(entry, self._by_spi[effect.sa.spi_local])
        if entry.task is None and not entry.advancing and entry.awaits is None:
            entry.advancing = True
            try:
                self._advance(entry)
            finally:
                entry.advancing = False
        self._deadlines.set(entry.sa.spi_local, entry.sa.next_deadline() if entry.sa.spi_local in self._by_spi else None)
        self._arm()

    def _advance(self, entry: Entry) -> None:
        while entry.steps:
            step = entry.steps[0]
            while step:
                if isinstance(step[0], AllocateSpi | InstallSa | RemoveSa):
                    entry.task = asyncio.get_running_loop().create_task(self._continue(entry))
                    return
                self._carry_out(entry, step.popleft())
            entry.steps.popleft()
        if entry.heir is not None and entry.heir.awaits is entry:
            entry.heir.awaits = None
            self.run(entry.heir, ())

    def _open(self, sa: IkeSa) -> None:
        """An IKE SA that a rekeying made."""
        entry = self._enter(sa)
        self._of_connection.setdefault(sa.connection.name, {})[sa.spi_local] = entry
        self._of_peer.setdefault((sa.local_id, sa.remote_id), {})[sa.spi_local] = entry
        self.run(entry, ())

    def _hand_over(self, old: Entry, new: Entry) -> None:
        old.heir, new.awaits = new, old
        for child_id in new.sa.children:
            if child_id in old.owners:
                old.owners.discard(child_id)
                new.owners.add(child_id)
            if child_id in old.installing:
                new.installing[child_id] = old.installing.pop(child_id)
        self.counters.add("ike_rekeyed")
        name = new.sa.connection.name
        self.say(f"IKE_SA {name}[{new.sa.unique_id}] rekeyed from {name}[{old.sa.unique_id}]", new)
        if self.listener:
            self.listener.ike_rekeyed(old, new)

    async def _continue(self, entry: Entry) -> None:
        step = entry.steps[0]
        try:
            answer = await self._kernel_effect(entry, step)
        except Exception:  # a fault of ours must cost this IKE SA its life, not its silence
            log.exception("effect failed", connection=entry.sa.connection.name, ike=entry.sa.unique_id)
            step.clear()
            answer = entry.sa.abort(self._now(), Reason.KERNEL_REFUSED)
        if answer:
            # what follows from the answer belongs before later steps, after the rest of this one
            entry.steps.insert(1, deque(answer))
        entry.task = None
        self.run(entry, ())
        if entry.heir is not None:
            self.run(entry.heir, ())  # what the kernel said may have given it something to do

    async def _kernel_effect(self, entry: Entry, step: deque[Effect]) -> Sequence[Effect]:
        """Take the first effect of the step and carry it out; what the core says to the outcome is returned."""
        answer: Sequence[Effect] = ()
        match step.popleft():
            case AllocateSpi(token, _child, local, remote, mode, reqid, acquire):
                spi = None
                try:
                    spi = await self.kernel.get_spi(SpiRequest(remote.address, local.address, mode, ReqId(reqid), acquire=acquire))
                except KERNEL_ERRORS as error:
                    self.say(f"kernel gave no SPI: {error}", entry, group="KNL", warning=True)
                answer = entry.sa.spi_allocated(token, spi, self._now())
            case InstallSa(child_id, sa):
                try:
                    await self._install(entry, child_id, sa)
                except KERNEL_ERRORS as error:
                    self.say(f"kernel refused the {sa.direction.name.lower()}bound SA {sa.spi:08x}: {error}", entry, group="KNL", warning=True)
                    step.clear()
                    self._release(entry.current, child_id)
                    answer = entry.sa.install_failed(child_id, sa.direction, self._now())
            case RemoveSa(sa_id):
                self._child_of.pop(sa_id, None)
                await self.kernel.remove(sa_id)
            case effect:
                raise AssertionError(f"{effect} does not need the kernel")
        return answer

    async def _install(self, entry: Entry, child_id: int, sa: SecurityAssociation) -> None:
        """Policies in all directions stand before the first SA: what is sent before the SA out stands waits for it in the kernel, and is not sent in clear."""
        inbound = sa.direction is Direction.IN
        if inbound:
            local_ts, remote_ts = sa.destination_selectors, sa.source_selectors
            known = self._child_of_reqid.get(sa.reqid)
            spec = PolicySpec.of_child(known[1] if known else None, sa.mode, sa.reqid, sa.destination, sa.source)
            entry.current.owners.add(child_id)
            entry.current.installing[child_id] = sa.reqid
            self._installing[sa.reqid] += 1
            await self.kernel.claim(("child", child_id), list(policies_for(spec, local_ts, remote_ts)))
        await self.kernel.install(sa)
        self._child_of[sa.id] = (entry, child_id)
        if not inbound:
            self._installed(entry.current, child_id)

    def _installed(self, entry: Entry, child_id: int) -> None:
        reqid = entry.installing.pop(child_id, None)
        if reqid is not None:
            self._installing[reqid] -= 1
            if not self._installing[reqid]:
                del self._installing[reqid]

    def _carry_out(self, entry: Entry, effect: Effect) -> None:
        match effect:
            case Send(local, remote, data):
                self._sockets.send(local, remote, data)
            case SendKeepalive(local, remote):
                self._sockets.send_keepalive(local, remote)
            case IkeEstablished():
                self._authenticated(entry)
            case IkeClosed():
                self._closed(entry, effect)
            case IkeOpened() | IkeHandedOver():
                pass  # at once, in `run`
            case ChildEstablished(child, replaces):
                entry = entry.current
                self._installed(entry, child.id)  # of one that the peer rekeys, the SA out comes only when the old one goes
                self.counters.add("child_established" if replaces is None else "child_rekeyed")
                self.say(
                    f"CHILD_SA {child.name}{{{child.id}}} established with SPIs {child.inbound.spi:08x}_i {child.outbound.spi:08x}_o and TS "
                    f"{' '.join(map(str, child.local_ts))} === {' '.join(map(str, child.remote_ts))}"
                    + (f", rekeying {replaces.name}{{{replaces.id}}}" if replaces else ""),
                    entry,
                )
                if self.listener:
                    if replaces is None:
                        self.listener.child_established(entry, child)
                    else:
                        self.listener.child_rekeyed(entry, replaces, child)
            case RekeyFailed(child_id, reason, detail):
                entry = entry.current
                self.counters.add("rekey_failed")
                what = f"CHILD_SA {{{child_id}}}" if child_id else f"IKE_SA {entry.sa.connection.name}[{entry.sa.unique_id}]"
                self.say(f"rekeying of {what} failed: {reason.value}{f' ({detail})' if detail else ''}; it is tried again", entry, warning=True)
                if self.listener:
                    self.listener.rekey_failed(entry, effect)
            case ChildClosed(child, reason):
                entry = entry.current
                self.counters.add("child_closed")
                self.say(f"CHILD_SA {child.name}{{{child.id}}} closed: {reason.value}", entry)
                if self.listener:
                    self.listener.child_closed(entry, child, reason)
                self._release(entry, child.id)
            case ChildFailed():
                self.counters.add("child_failed")
                detail = f" ({effect.detail})" if effect.detail else ""
                self.say(f"CHILD_SA {effect.name} failed: {effect.reason.value}{detail}", entry, warning=True)
                if self.listener:
                    self.listener.child_failed(entry, effect)
            case ChildDenied(reason, detail):
                self.counters.add("child_denied")
                self.say(f"peer's request for a CHILD_SA denied: {reason.value}{f' ({detail})' if detail else ''}", entry, warning=True)
            case AuthenticationRejected(connection, peer, why):
                self.counters.add("authentication_rejected")
                self.say(
                    f"authentication of peer '{peer or '%any'}' at {entry.sa.remote} for connection '{connection or '?'}' failed: {why}", entry, warning=True
                )
            case InitialContact(local_id, remote_id):
                for other in list(self._of_peer.get((local_id, remote_id), {}).values()):
                    if other is not entry:
                        other.superseded = True
                        self.run(other, other.sa.abort(self._now(), Reason.REPLACED))
            case _:
                raise AssertionError(f"{effect} needs the kernel")

    def _authenticated(self, entry: Entry) -> None:
        self._not_half_open(entry)
        self.counters.add("ike_established")
        sa = entry.sa
        self._of_connection.setdefault(sa.connection.name, {})[sa.spi_local] = entry
        self._of_peer.setdefault((sa.local_id, sa.remote_id), {})[sa.spi_local] = entry
        self.say(
            f"IKE_SA {sa.connection.name}[{sa.unique_id}] established between {sa.local.address}[{sa.local_id}]...{sa.remote.address}[{sa.remote_id}]", entry
        )
        if self.listener:
            self.listener.ike_established(entry)

    def _closed(self, entry: Entry, effect: IkeClosed) -> None:
        sa = entry.sa
        self._not_half_open(entry)
        self._by_spi.pop(sa.spi_local, None)
        _discard(self._of_connection, sa.connection.name, sa.spi_local)
        _discard(self._of_peer, (sa.local_id, sa.remote_id), sa.spi_local)
        self._deadlines.set(sa.spi_local, None)
        if entry.init_key is not None:
            self._by_init.pop(entry.init_key, None)
        self.counters.add("ike_closed")
        detail = f" ({effect.detail})" if effect.detail else ""
        self.say(f"IKE_SA {sa.connection.name}[{sa.unique_id}] closed: {effect.reason.value}{detail}", entry)
        if self.listener:
            self.listener.ike_closed(entry, effect)
        for child_id in list(entry.owners):
            self._release(entry, child_id)
        if not self._by_spi:
            self._idle.set()

    def _not_half_open(self, entry: Entry) -> None:
        if entry.half_open is not None:
            self._half_open_total -= 1
            self._half_open[entry.half_open] -= 1
            if not self._half_open[entry.half_open]:
                del self._half_open[entry.half_open]
            entry.half_open = None

    def _release(self, entry: Entry, child_id: int) -> None:
        self._installed(entry, child_id)
        entry.owners.discard(child_id)
        owner = ("child", child_id)
        if self.kernel.has_claims(owner):
            self._background.start(self.kernel.release(owner))


def _discard(index: dict[K, dict[int, Entry]], key: K, spi: int) -> None:
    group = index.get(key)
    if group is not None:
        group.pop(spi, None)
        if not group:
            del index[key]
