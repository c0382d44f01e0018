"""Two IKE cores, their kernels and the network between them in one process, on a virtual clock and from a seed.

The network is a list of datagrams in flight; a test delivers, drops, repeats or reorders them. Kernels answer at once and
keep the SAs that they were given. `Pair.settle` lets everything happen that happens without time passing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import Capabilities, Direction, Endpoint, IPAddress, SaId, SecurityAssociation, Spi, TrafficSelector
from kernel_shim.secret import Secret
from vpnd.auth.credentials import CredentialStore
from vpnd.config.addresses import parse_traffic_selector
from vpnd.config.model import AuthMethod, AuthRound, ChildConfig, ConnectionConfig, SharedSecret
from vpnd.daemon.markings import Markings
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import (
    AllocateSpi,
    ChildClosed,
    ChildEstablished,
    ChildFailed,
    Effect,
    IkeClosed,
    IkeEstablished,
    IkeOpened,
    InstallSa,
    MigrateSa,
    Reason,
    RemoveSa,
    Send,
    SendKeepalive,
    Stirred,
)
from vpnd.ike.exchanges.crash_detection import TokenMaker
from vpnd.ike.fragments import ReassemblyBudget
from vpnd.ike.iana import Exchange, ProtocolId, name_of
from vpnd.ike.identity import Identity
from vpnd.ike.marking import Marking, SharedIfIds
from vpnd.ike.proposal import parse_proposals
from vpnd.ike.resumption import Resumption
from vpnd.ike.sa import IkeSa
from vpnd.ike.twins import Twins
from vpnd.telemetry.exchanges import ExchangeCounters

KEY = b"a pre-shared key of the tests"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

EVERYTHING = Capabilities(
    name="test",
    algorithms=frozenset(
        EspAlgorithm(encryption, bits, integrity)
        for encryption, sizes, integrities in (
            (EncryptionId.AES_GCM_16, (128, 256), (IntegrityId.NONE,)),
            (EncryptionId.CHACHA20_POLY1305, (256,), (IntegrityId.NONE,)),
            (EncryptionId.AES_CBC, (128, 256), (IntegrityId.HMAC_SHA2_256_128, IntegrityId.HMAC_SHA2_512_256)),
        )
        for bits in sizes
        for integrity in integrities
    ),
)


def child(name: str = "net", local: str = "10.1.0.0/16", remote: str = "10.2.0.0/16", esp: str = "aes128gcm16", **options: object) -> ChildConfig:
    def side(text: str) -> tuple[object, ...]:
        return tuple(parse_traffic_selector(part.strip()) for part in text.split(","))

    proposals = parse_proposals(ProtocolId.ESP, esp)
    return ChildConfig(name, proposals, side(local), side(remote), **options)  # type: ignore[arg-type]


def mirrored(config: ChildConfig) -> ChildConfig:
    return replace(config, local_ts=config.remote_ts, remote_ts=config.local_ts)


def psk(identity: str | None) -> AuthRound:
    return AuthRound(AuthMethod.PSK, Identity.parse(identity) if identity else None)


def connection(
    name: str, local: AuthRound, remote: AuthRound, children: Sequence[ChildConfig], ike: str = "aes128-sha256-x25519", **options: object
) -> ConnectionConfig:
    proposals = parse_proposals(ProtocolId.IKE, ike)
    return ConnectionConfig(name, proposals, (local,), (remote,), {config.name: config for config in children}, **options)  # type: ignore[arg-type]


@dataclass
class Peer:
    """A daemon of the tests: it implements IkeContext and carries out effects as the manager does."""

    name: str
    address: str
    connections: list[ConnectionConfig]
    network: list[Datagram]
    seed: int = 0
    settings: IkeSettings = field(default_factory=IkeSettings)
    capabilities: Capabilities = EVERYTHING
    credentials: CredentialStore = field(default_factory=CredentialStore)
    sas: dict[int, IkeSa] = field(default_factory=dict)  # by our SPI
    sad: dict[SaId, SecurityAssociation] = field(default_factory=dict)
    larval: set[SaId] = field(default_factory=set)
    outbound_keys: set[Secret] = field(default_factory=set)  # of all that ever were installed
    lingering: dict[SaId, float] = field(default_factory=dict)  # those of `sad` that go later, and when
    events: list[Effect] = field(default_factory=list)
    refuse_spi: bool = False
    hold_spis: bool = False  # keep AllocateSpi in `waiting`
    waiting: list[tuple[IkeSa, AllocateSpi]] = field(default_factory=list)
    refuse_install: Callable[[SecurityAssociation], bool] = lambda sa: False
    local_port: int = 500
    refuse_migration: bool = False
    contacts: bool = True
    admitting: bool = True
    reassembly: ReassemblyBudget = field(default_factory=ReassemblyBudget)
    tokens: TokenMaker | None = None
    follows: bool = True
    resumption: Resumption = field(default_factory=lambda: Resumption(random.Random(0).randbytes))
    further_addresses: list[str] = field(default_factory=list)
    narrowest: int = 0  # path MTU that is known
    exchanges: ExchangeCounters = field(default_factory=ExchangeCounters)
    markings: Markings = field(default_factory=Markings)
    twins: Twins = field(default_factory=Twins)
    _init: dict[tuple[bytes, Endpoint], IkeSa] = field(default_factory=dict)
    _ids: int = 0
    _spis: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.name}{self.seed}")

    # IkeContext

    def addresses(self) -> Sequence[IPAddress]:
        return [ip_address(address) for address in (self.address, *self.further_addresses)]

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        return next((address for address in self.addresses() if address.version == remote.version), None)

    def admits_redirect(self, connection: ConnectionConfig) -> bool:
        return self.follows

    def crash_token(self, spi_i: bytes, spi_r: bytes) -> bytes:
        return self.tokens.make(spi_i, spi_r) if self.tokens else b""

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        return self.narrowest

    def entropy(self, octets: int) -> bytes:
        return self.random.randbytes(octets)

    def utc(self, now: float) -> datetime:
        return EPOCH + timedelta(seconds=now)

    def exchanged(self, connection: str, exchange: int, *, incoming: bool, response: bool) -> None:
        self.exchanges.message(connection, exchange, incoming=incoming, response=response)

    def new_ike_spi(self, holder: object) -> int:
        return self.random.getrandbits(63) + 1

    def new_ike_id(self) -> int:
        return len(self.sas) + 1

    def new_child_id(self) -> int:
        self._ids += 1
        return self._ids

    def candidates(self, local: Endpoint, remote: Endpoint) -> Sequence[ConnectionConfig]:
        return self.connections

    def reqid(self, connection: ConnectionConfig, child: ChildConfig) -> int:
        return 1 + list(connection.children).index(child.name)

    def marking(self, connection: ConnectionConfig, child: ChildConfig, shared: SharedIfIds) -> Marking:
        return self.markings.of(connection, child, shared)

    def first_contact(self, connection: ConnectionConfig) -> bool:
        return self.contacts

    def admits(self, connection: ConnectionConfig, local: Identity, remote: Identity, address: IPAddress) -> bool:
        return self.admitting

    # The manager's part

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(ip_address(self.address), self.local_port)

    @property
    def sa(self) -> IkeSa:
        """The only IKE SA that is not closed, or the youngest."""
        return (self.standing or list(self.sas.values()))[-1]

    @property
    def standing(self) -> list[IkeSa]:
        """The IKE SAs that are not closed."""
        return [sa for sa in self.sas.values() if not sa.closed]

    def start(self, remote: Endpoint, now: float, *children: ChildConfig) -> IkeSa:
        sa = IkeSa.initiator_of(self, self.connections[0], self.endpoint, remote, now)
        self.sas[sa.spi_local] = sa
        for config in children:
            self.run(sa, sa.create_child(config, now), now)
        self.run(sa, sa.initiate(now), now)
        return sa

    def arrive(self, datagram: Datagram, now: float) -> None:
        data = datagram.data
        own = int.from_bytes(data[8:16] if data[19] & 0x08 else data[:8], "big")
        key = data[:8], datagram.remote
        sa = self.sas.get(own) or (self._init.get(key) if own == 0 else None)
        if sa is not None:
            self.run(sa, sa.receive(data, datagram.local, datagram.remote, now), now)
        elif own == 0 and data[18] in (Exchange.IKE_SA_INIT, Exchange.IKE_SESSION_RESUME):
            sa, effects = IkeSa.respond(self, data, datagram.local, datagram.remote, now)
            if sa is not None:
                self.sas[sa.spi_local] = self._init[key] = sa
            self.run(sa, effects, now)

    def run(self, sa: IkeSa | None, effects: Sequence[Effect], now: float) -> None:
        for other in [effect.sa for effect in effects if isinstance(effect, Stirred)]:
            assert isinstance(other, IkeSa)
            self.run(other, other.stirred(now), now)
        for effect in effects:
            match effect:
                case Send(local, remote, data):
                    self.network.append(Datagram(self.name, local, remote, data))
                case AllocateSpi():
                    assert sa is not None
                    self.waiting.append((sa, effect))
                    if not self.hold_spis:
                        self.give_spis(now)
                case InstallSa(child_id, association):
                    assert sa is not None
                    if not sa.holds(child_id):
                        continue
                    if self.refuse_install(association):
                        self.run(sa, sa.install_failed(child_id, association.direction, now), now)
                        return
                    assert association.id not in self.sad
                    assert association.direction is Direction.OUT or association.id in self.larval
                    self.larval.discard(association.id)
                    if association.direction is Direction.OUT:
                        # whatever a kernel did with it, its sequence numbers would begin anew
                        assert association.encryption_key not in self.outbound_keys, "an outbound key is never installed twice"
                        self.outbound_keys.add(association.encryption_key)
                    self.sad[association.id] = association
                case MigrateSa(child_id, old, new):
                    assert sa is not None
                    if self.sad.pop(old.id, None) is None or self.refuse_migration:
                        self.run(sa, sa.migrate_failed(child_id, now), now)
                    else:
                        assert new.id not in self.sad
                        self.sad[new.id] = new
                case RemoveSa(sa_id, delay):
                    if delay and sa_id in self.sad:
                        self.lingering[sa_id] = now + delay
                        continue
                    self.sad.pop(sa_id, None)
                    self.larval.discard(sa_id)
                case Stirred():
                    pass  # at once, above; every deadline is asked for after each step
                case IkeOpened(IkeSa() as new):
                    self.sas[new.spi_local] = new
                    self.events.append(effect)
                case _:
                    self.events.append(effect)

    def give_spis(self, now: float) -> None:
        while self.waiting:
            sa, request = self.waiting.pop(0)
            spi = None
            if not self.refuse_spi:
                self._spis += 1
                spi = Spi(0x10000 * (1 + ord(self.name[0])) + self._spis)
                self.larval.add(SaId(request.local.address, spi))
            self.run(sa, sa.spi_allocated(request.token, spi, now), now)

    # Looking

    def happened(self, kind: type[Effect]) -> list[Effect]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def closed(self) -> Reason | None:
        closes = [event for event in self.events if isinstance(event, IkeClosed)]
        return closes[-1].reason if closes else None

    @property
    def failed(self) -> list[Reason]:
        return [event.reason for event in self.events if isinstance(event, ChildFailed)]

    @property
    def up(self) -> list[str]:
        names = []
        for event in self.events:
            if isinstance(event, ChildEstablished):
                names.append(event.child.name)
            elif isinstance(event, ChildClosed):
                names.remove(event.child.name)
        return names

    def established(self) -> bool:
        return any(isinstance(event, IkeEstablished) for event in self.events)


@dataclass(frozen=True)
class Datagram:
    sender: str
    local: Endpoint  # of the receiver once `translated`; of the sender in flight
    remote: Endpoint
    data: bytes

    def __str__(self) -> str:
        exchange, answer = name_of(Exchange, self.data[18]), bool(self.data[19] & 0x20)
        return f"{self.sender}: {exchange} {'response' if answer else 'request'} {int.from_bytes(self.data[20:24], 'big')}"


class Pair:
    """Peers `a` and `b` and what is between them. A NAT before `a` and/or `b` rewrites addresses and ports."""

    def __init__(self, a: ConnectionConfig, b: ConnectionConfig | Sequence[ConnectionConfig], *, nat_a: str | None = None, nat_b: str | None = None) -> None:
        self.now = 1000.0
        self.flight: list[Datagram] = []
        self.log: list[str] = []
        self.a = Peer("a", "192.0.2.1", [a], self.flight)
        self.b = Peer("b", "192.0.2.2", [b] if isinstance(b, ConnectionConfig) else list(b), self.flight)
        self.nat_a, self.nat_b = nat_a, nat_b
        for peer in (self.a, self.b):
            peer.credentials.load_shared(SharedSecret("all", KEY))

    @property
    def peers(self) -> tuple[Peer, Peer]:
        return self.a, self.b

    # The network

    def outside(self, endpoint: Endpoint) -> Endpoint:
        for own, nat in ((self.a.address, self.nat_a), (self.b.address, self.nat_b)):
            if nat and endpoint.address == ip_address(own):
                return Endpoint(ip_address(nat), endpoint.port + 20000 if own == self.a.address else endpoint.port)
        return endpoint

    def _inside(self, endpoint: Endpoint) -> Endpoint:
        for own, nat in ((self.a.address, self.nat_a), (self.b.address, self.nat_b)):
            if nat and endpoint.address == ip_address(nat):
                return Endpoint(ip_address(own), endpoint.port - 20000 if own == self.a.address else endpoint.port)
        return endpoint

    def deliver(self, datagram: Datagram) -> None:
        self.log.append(str(datagram))
        arrived = Datagram(datagram.sender, self._inside(datagram.remote), self.outside(datagram.local), datagram.data)
        (self.b if datagram.sender == "a" else self.a).arrive(arrived, self.now)

    def take(self) -> Datagram:
        """The oldest datagram in flight, off the network."""
        return self.flight.pop(0)

    def step(self) -> None:
        self.deliver(self.take())

    def settle(self, drop: Callable[[Datagram], bool] = lambda datagram: False) -> None:
        """Deliver until nothing is in flight and nobody is due."""
        for _ in range(10_000):
            if self.flight:
                datagram = self.take()
                if not drop(datagram):
                    self.deliver(datagram)
            elif not self.tick():
                return
        raise AssertionError("the pair does not settle")

    def tick(self) -> bool:
        """Let one IKE SA whose time has come act; False when none has to."""
        for peer in self.peers:
            for sa_id in [sa_id for sa_id, end in peer.lingering.items() if end <= self.now]:
                del peer.lingering[sa_id], peer.sad[sa_id]
            for sa in list(peer.sas.values()):
                deadline = sa.next_deadline()
                if deadline is not None and deadline <= self.now:
                    peer.run(sa, sa.timer(self.now), self.now)
                    return True
        return False

    def wait(self, seconds: float, drop: Callable[[Datagram], bool] = lambda datagram: False) -> None:
        """Let time pass, deadline by deadline."""
        end = self.now + seconds
        while True:
            self.settle(drop)
            deadlines = [deadline for peer in self.peers for sa in peer.sas.values() if (deadline := sa.next_deadline()) is not None]
            deadlines += [end for peer in self.peers for end in peer.lingering.values()]
            self.now = min(end, min(deadlines, default=end))
            if self.now >= end:
                self.settle(drop)
                return

    # The usual beginning

    def connect(self, drop: Callable[[Datagram], bool] = lambda datagram: False) -> None:
        self.a.start(self.outside(self.b.endpoint), self.now, *list(self.a.connections[0].children.values())[:1])
        self.settle(drop)


def agree(pair: Pair, children: int) -> None:
    """Both SADs hold `children` CHILD_SAs: each SA of one side has its twin, with the same keys, on the other, and nothing is left over."""
    a, b = pair.a.sad, pair.b.sad
    assert len(a) == len(b) == 2 * children
    assert not pair.a.larval
    assert not pair.b.larval
    for peer, other in ((a, b), (b, a)):
        inbound = {sa.spi: sa for sa in other.values() if sa.direction is Direction.IN}
        for sa in peer.values():
            if sa.direction is Direction.IN:
                continue
            twin = inbound[sa.spi]
            assert (sa.encryption_key, sa.integrity_key, sa.algorithm, sa.mode, sa.esn) == (
                twin.encryption_key,
                twin.integrity_key,
                twin.algorithm,
                twin.mode,
                twin.esn,
            )
            assert len(sa.encryption_key) == sa.algorithm.encryption_key_length
            assert (sa.encapsulation is None) == (twin.encapsulation is None)


def same_selectors(pair: Pair, local: str, remote: str) -> None:
    """The one CHILD_SA has these selectors, as `a` sees them, on both sides."""
    first, second = selectors(local), selectors(remote)
    for peer, own, other in ((pair.a, first, second), (pair.b, second, first)):
        (entry,) = peer.sa.children.values()
        assert (entry.sa.local_ts, entry.sa.remote_ts) == (own, other)
        assert (entry.sa.outbound.source_selectors, entry.sa.outbound.destination_selectors) == (own, other)
        assert (entry.sa.inbound.source_selectors, entry.sa.inbound.destination_selectors) == (other, own)


def selectors(text: str) -> tuple[TrafficSelector, ...]:
    found = tuple(parse_traffic_selector(part.strip()).addresses for part in text.split(","))
    assert all(found)
    return found  # type: ignore[return-value]


def psk_pair(config: ChildConfig | None = None, *, mobike: bool = True, follow_nat: bool = True, **options: object) -> Pair:
    """Two gateways with one CHILD_SA between 10.1.0.0/16 (`a`) and 10.2.0.0/16 (`b`)."""
    config = config or child()
    a = connection("to-b", psk("a.example"), psk("b.example"), [config], mobike=mobike, follow_nat=follow_nat)
    b = connection("to-a", psk("b.example"), psk("a.example"), [mirrored(config)], mobike=mobike, follow_nat=follow_nat)
    return Pair(a, b, **options)  # type: ignore[arg-type]


__all__ = ["KEY", "Datagram", "Pair", "Peer", "SendKeepalive", "agree", "child", "connection", "mirrored", "psk", "psk_pair", "same_selectors", "selectors"]
