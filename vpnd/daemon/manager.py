"""The IKE SAs of the daemon: which datagram is for which, and when each must act.

An IKE SA is a pure core (`vpnd.ike.sa`); what its effects do is `vpnd.daemon.carrier`, why CHILD_SAs come up, and what
follows when one goes, `vpnd.daemon.demands`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol
from weakref import WeakValueDictionary

from kernel_shim.model import Capabilities, Endpoint, IPAddress, SaId
from vpnd.auth.credentials import CredentialStore
from vpnd.config.model import ChildConfig, ConnectionConfig, UniquePolicy
from vpnd.daemon import uniqueness
from vpnd.daemon.carrier import Carrier, Sockets
from vpnd.daemon.entry import Entry, Listener
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.markings import Markings
from vpnd.daemon.news import News
from vpnd.daemon.redirects import Redirection, Redirects
from vpnd.daemon.registry import InitKey, Registry
from vpnd.daemon.reqids import ReqIds
from vpnd.gate import Admitted, Gate, GateSettings, Refused, Reply, origin_of
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import AuthenticationRejected, Effect, Send
from vpnd.ike.exchanges.crash_detection import TokenMaker
from vpnd.ike.fragments import ReassemblyBudget
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import Exchange
from vpnd.ike.identity import Identity
from vpnd.ike.marking import Marking, SharedIfIds
from vpnd.ike.resumption import Resumption
from vpnd.ike.sa import IkeSa
from vpnd.ike.session import Session
from vpnd.ike.twins import Twins
from vpnd.ike.wire.header import FLAG_INITIATOR, FLAG_RESPONSE, HEADER_LENGTH
from vpnd.peers import Connections
from vpnd.schedule import Deadlines
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.exchanges import ExchangeCounters
from vpnd.telemetry.throttle import Throttle

OPENING: Final = (Exchange.IKE_SA_INIT, Exchange.IKE_SESSION_RESUME)

MAXIMUM_IKE_SAS: Final = 100_000  # with peers that ask; some 25 kB each
MAX_STEPS: Final = 1024  # of one IKE SA that wait for the kernel, beyond which its peer is not heard
TIMERS_AT_ONCE: Final = 64  # IKE SAs whose deadline has come, before datagrams get their turn
REFUSALS_AT_ONCE: Final = 20  # log lines about IKE_SA_INITs that were refused; anybody can cause them
REFUSALS_A_SECOND: Final = 1.0
LOST_AT_ONCE: Final = 1000  # answers that we lost an IKE SA: after a restart every peer wants one, and anybody can cause them
LOST_A_SECOND: Final = 200.0


class Host(Protocol):
    """What IKE SAs want to know of addresses and routes."""

    def addresses(self) -> Sequence[IPAddress]: ...
    def source_towards(self, remote: IPAddress) -> IPAddress | None: ...
    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int: ...


class Nowhere:
    """A host of which nothing is known."""

    def addresses(self) -> Sequence[IPAddress]:
        return ()

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return None

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return 0


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
        host: Host | None = None,
        tokens: TokenMaker | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.kernel: Final = kernel
        self.counters: Final = counters
        self.credentials: CredentialStore = credentials
        self._settings = settings
        self._sockets = sockets
        self._host: Host = host or Nowhere()
        self._tokens = tokens
        self.redirects: Final = Redirects()
        self.stranded: Callable[[], None] = lambda: None  # looks for IKE SAs that cannot move
        self._lost = Throttle(LOST_AT_ONCE, LOST_A_SECOND)
        self._reassembly = ReassemblyBudget()
        self._entropy = entropy
        self._resumption = Resumption(entropy)
        self._gate = Gate(gate, entropy)
        self.twins: Final = Twins()
        self.connections: Final = Connections()
        self.resolved: Final[dict[str, IPAddress]] = {}  # host names of remote_addrs
        self.registry: Final = Registry()
        self.reqids: Final = ReqIds(kernel)
        self.exchanges: Final = ExchangeCounters()
        self.markings: Final = Markings()
        kernel.found = self.markings.standing
        self.news: Final = News()
        self.say: Final = self.news.say
        self._carrier = Carrier(kernel, sockets, self.registry, self.reqids, self.news, counters)
        self._carrier.advanced = self._advanced
        self._carrier.redirected = self._redirected
        self._deadlines: Deadlines[int] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._next_ike_id = 0
        self._holders: WeakValueDictionary[int, Session] = WeakValueDictionary()  # of IKE SPIs, from before an IKE SA is entered
        self._next_child_id = 0
        self._draining = False
        self._refusals = Throttle(REFUSALS_AT_ONCE, REFUSALS_A_SECOND)

    @property
    def listener(self) -> Listener | None:
        """Who hears what becomes of IKE and CHILD_SAs."""
        return self._carrier.listener

    @listener.setter
    def listener(self, listener: Listener) -> None:
        self._carrier.listener = listener

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

    @property
    def resumption(self) -> Resumption:
        return self._resumption

    def addresses(self) -> Sequence[IPAddress]:
        return self._host.addresses()

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return self._host.source_towards(remote)

    def admits_redirect(self, connection: ConnectionConfig) -> bool:
        return self.redirects.admits(connection.name, self._now())

    def crash_token(self, spi_i: bytes, spi_r: bytes) -> bytes:
        return self._tokens.make(spi_i, spi_r) if self._tokens else b""

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return self._host.path_mtu(local, remote)

    def entropy(self, octets: int) -> bytes:
        return self._entropy(octets)

    def utc(self, now: float) -> datetime:
        return datetime.fromtimestamp(time.time() - (asyncio.get_running_loop().time() - now), UTC)

    def exchanged(self, connection: str, exchange: int, *, incoming: bool, response: bool) -> None:
        self.exchanges.message(connection, exchange, incoming=incoming, response=response)

    def new_ike_spi(self, holder: Session) -> int:
        while True:
            spi = int.from_bytes(self._entropy(8))
            if spi and spi not in self.registry and spi not in self._holders:
                self._holders[spi] = holder
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
        return self.reqids.of(connection, child)

    def marking(self, connection: ConnectionConfig, child: ChildConfig, shared: SharedIfIds) -> Marking:
        return self.markings.of(connection, child, shared)

    def first_contact(self, connection: ConnectionConfig) -> bool:
        return connection.unique is not UniquePolicy.NEVER and not self.registry.in_contact(connection.name)

    def admits(self, connection: ConnectionConfig, local: Identity, remote: Identity, address: IPAddress) -> bool:
        return uniqueness.admits(self.registry, connection, local, remote, address)

    # Looking

    def configured(self, connection: str, child: str) -> tuple[ConnectionConfig, ChildConfig] | None:
        """As it is configured now; it may have been unloaded."""
        known = self.connections.get(connection)
        config = known.children.get(child) if known else None
        return (known, config) if known and config else None

    def entries(self) -> Iterator[Entry]:
        """Every IKE SA, in order of creation."""
        return self.registry.entries()

    def established(self, connection: str) -> Entry | None:
        """The youngest usable IKE SA of a connection: one that stands, or else one that we are bringing up."""
        return self.registry.usable(connection)

    def peers_of(self, entry: Entry) -> list[Entry]:
        """The established IKE SAs between the same two identities, `entry` included."""
        return self.registry.of_peer((entry.sa.local_id, entry.sa.remote_id))

    def installing(self, reqid: int) -> bool:
        """Whether a CHILD_SA of that reqid is half installed: its SA out is about to come."""
        return self._carrier.installing(reqid)

    def child_with(self, sa: SaId) -> tuple[Entry, int] | None:
        """The IKE SA that has the child of that SA now, and the child's id."""
        return self.registry.child_with(sa)

    def __len__(self) -> int:
        return len(self.registry)

    # Inputs

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def datagram(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        """An IKE message without non-ESP marker."""
        if len(data) < HEADER_LENGTH:
            self.counters.add("ike_malformed")
            self.exchanges.add("invalid")
            return
        from_initiator = data[19] & FLAG_INITIATOR
        spi = int.from_bytes(data[8:16] if from_initiator else data[0:8])
        entry = self.registry.by_spi(spi)
        if entry is not None:
            self._deliver(entry, local, remote, data)
        elif spi == 0 and from_initiator and data[18] in OPENING and not data[19] & FLAG_RESPONSE:
            self._initial(local, remote, data)
        else:
            self.counters.add("ike_unknown_spi")
            self.exchanges.add("invalid-spi")
            self._unknown(local, remote, data)

    def _deliver(self, entry: Entry, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        # a peer that does not wait for our answers, while these wait for the kernel; one that does sends it again
        if len(entry.steps) >= MAX_STEPS:
            self.counters.add("ike_overloaded")
            return
        self.run(entry, entry.sa.receive(data, local, remote, self._now()))

    def _unknown(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        """RFC 6290 section 4.2, but not for an IKE SA that stands: with one of its SPIs in the wrong place a stranger would get its token.

        Nor for one that is about to stand: who answered our rekeying may use it before we have the answer.
        """
        known = any(self._stands(int.from_bytes(data[at : at + 8])) for at in (0, 8))
        if self._tokens is None or known or self._draining or (answer := self._tokens.answer(data)) is None:
            return
        if self._lost.admit(self._now()) is None:
            self.counters.add("ike_lost_not_answered")
            return
        self.counters.add("ike_lost_answered")
        self._sockets.send(local, remote, answer)

    def _stands(self, spi: int) -> bool:
        holder = self._holders.get(spi)
        return spi in self.registry or (holder is not None and not holder.closed)

    def _redirected(self, entry: Entry, gateway: GatewayId) -> None:
        name = entry.sa.connection.name
        self.counters.add("ike_redirected")
        self.say(f"IKE_SA {name}[{entry.sa.unique_id}] is redirected to {gateway}", entry)
        self.redirects.sent(name, Redirection(gateway, GatewayId(entry.sa.remote.address)), self._now())

    def addresses_changed(self) -> None:
        """The host's addresses or routes changed."""
        for entry in self.entries():
            if entry.sa.mobike:
                self.run(entry, entry.sa.addresses_changed(self._now()))
        self.stranded()

    def _initial(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        now = self._now()
        key = (int.from_bytes(data[0:8]), remote)
        entry = self.registry.by_init(key)
        if entry is not None:
            self._deliver(entry, local, remote, data)
            return
        # a request of our own that was sent back to us: whoever shares its secret with us would be us
        if key[0] in self.registry:
            self.counters.add("ike_reflected")
            return
        if self._draining:
            self.counters.add("ike_refused_draining")
            return
        match self._gate.judge(data, remote, self.registry.half_open_total, self.registry.half_open[origin_of(remote.address)], now):
            case Reply(answer, counter):
                self.counters.add(counter)
                self._sockets.send(local, remote, answer)
            case Refused(counter):
                self.counters.add(counter)
            case Admitted():
                self._respond(key, local, remote, data, now)

    def _respond(self, key: InitKey, local: Endpoint, remote: Endpoint, data: bytes, now: float) -> None:
        """Answer an IKE_SA_INIT request that the gate let in."""
        if len(self.registry) >= MAXIMUM_IKE_SAS:
            self.counters.add("ike_sa_limit")
            return
        if not self.kernel.connected:
            self.counters.add("ike_refused_no_kernel")
            return
        sa, effects = IkeSa.respond(self, data, local, remote, now)
        if sa is not None:
            self.run(self.registry.enter_half_open(sa, key), effects)
            return
        for effect in effects:
            if isinstance(effect, Send):
                self._sockets.send(effect.local, effect.remote, effect.data)
            elif isinstance(effect, AuthenticationRejected):
                self.counters.add("ike_init_refused")
                if (unsaid := self._refusals.admit(now)) is not None:
                    also = f" ({unsaid} more like it were not logged)" if unsaid else ""
                    self.say(f"IKE_SA_INIT from {remote} refused: {effect.why}{also}", warning=True)

    def drain(self) -> None:
        """Take no new IKE SA of a peer from now on: it would be left without us."""
        self._draining = True

    def add_initiator(self, connection: ConnectionConfig, local: Endpoint, remote: Endpoint) -> Entry:
        """A new IKE SA that has sent nothing yet."""
        return self.registry.enter_initiator(IkeSa.initiator_of(self, connection, local, remote, self._now()))

    def run(self, entry: Entry, effects: Sequence[Effect]) -> None:
        """Carry out one step, after the steps of this IKE SA that are still under way."""
        self._carrier.run(entry, effects)

    # Timers

    def _advanced(self, entry: Entry) -> None:
        spi = entry.sa.spi_local
        self._deadlines.set(spi, entry.sa.next_deadline() if spi in self.registry else None)
        self._arm()

    def _tick(self) -> None:
        self._timer = None
        now = self._now()
        for _ in range(TIMERS_AT_ONCE):
            if (spi := self._deadlines.due(now)) is None:
                break
            entry = self.registry.by_spi(spi)
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
