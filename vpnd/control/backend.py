"""What the control server asks of the daemon. `vpnd.daemon.manager.Manager` implements it; `vpnd.control` turns it into VICI.

Statuses are plain values: the server only prints them. Ages and times to come are seconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kernel_shim.model import Endpoint, IPAddress, Mode, TrafficSelector
from kernel_shim.mpls.labels import Label
from vpnd.auth.credentials import LoadedCertificate
from vpnd.config.model import ConnectionConfig, PrivateKeySource, SharedSecret
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.identity import Identity
from vpnd.ike.marking import NO_MARKING, Marking
from vpnd.ike.proposal import Proposal
from vpnd.mpls.trace import Step
from vpnd.telemetry.exchanges import ExchangeCounters


class ControlError(Exception):
    """The request cannot be carried out; the text goes to the user."""


class ChildState(Enum):
    """strongSwan's names (src/libcharon/sa/child_sa.c)."""

    CREATED = "CREATED"
    ROUTED = "ROUTED"
    INSTALLING = "INSTALLING"
    INSTALLED = "INSTALLED"
    REKEYING = "REKEYING"
    REKEYED = "REKEYED"
    DELETING = "DELETING"
    DELETED = "DELETED"


class IkeState(Enum):
    """strongSwan's names (src/libcharon/sa/ike_sa.c)."""

    CREATED = "CREATED"
    CONNECTING = "CONNECTING"
    ESTABLISHED = "ESTABLISHED"
    REKEYING = "REKEYING"
    REKEYED = "REKEYED"
    DELETING = "DELETING"
    DESTROYING = "DESTROYING"


@dataclass(frozen=True, slots=True)
class ChildStatus:
    name: str
    unique_id: int
    reqid: int
    state: ChildState
    mode: Mode
    encapsulated: bool
    spi_in: int
    spi_out: int
    proposal: Proposal | None
    local_ts: Sequence[TrafficSelector]
    remote_ts: Sequence[TrafficSelector]
    bytes_in: int = 0
    packets_in: int = 0
    used_in: float | None = None  # seconds since the last packet
    bytes_out: int = 0
    packets_out: int = 0
    used_out: float | None = None
    rekey_in: float | None = None
    life_in: float | None = None
    installed: float = 0.0  # seconds ago
    marking: Marking = NO_MARKING


@dataclass(frozen=True, slots=True)
class IkeStatus:
    name: str
    unique_id: int
    state: IkeState
    local: Endpoint
    local_id: Identity | None
    remote: Endpoint
    remote_id: Identity | None
    initiator: bool
    spi_initiator: int
    spi_responder: int
    proposal: Proposal | None
    nat_local: bool = False
    nat_remote: bool = False
    nat_fake: bool = False  # UDP encapsulation forced
    nat_any: bool = False
    established: float | None = None  # seconds ago
    rekey_in: float | None = None
    reauth_in: float | None = None
    ppk: bool = False  # a post-quantum pre-shared key is mixed into its keys
    tasks_queued: Sequence[str] = ()
    tasks_active: Sequence[str] = ()
    children: Sequence[ChildStatus] = ()


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """A trap or shunt that is installed."""

    child: str
    connection: str
    mode: str  # strongSwan's: TUNNEL | TRANSPORT | PASS | DROP
    local_ts: Sequence[TrafficSelector]
    remote_ts: Sequence[TrafficSelector]
    reqid: int = 0


@dataclass(frozen=True, slots=True)
class LogLine:
    group: str  # strongSwan's debug group: IKE, CFG, KNL, NET, ENC, CHD, MGR ...
    level: int
    ike_name: str | None
    ike_id: int | None
    text: str


@dataclass(frozen=True, slots=True)
class IkeUpDown:
    up: bool
    ike: IkeStatus


@dataclass(frozen=True, slots=True)
class ChildUpDown:
    up: bool
    ike: IkeStatus  # with that one child


@dataclass(frozen=True, slots=True)
class IkeRekeyed:
    old: IkeStatus
    new: IkeStatus


@dataclass(frozen=True, slots=True)
class ChildRekeyed:
    ike: IkeStatus
    old: ChildStatus
    new: ChildStatus


@dataclass(frozen=True, slots=True)
class IkeUpdated:
    """`ike` has the addresses from before, `local` and `remote` are the new ones."""

    ike: IkeStatus
    local: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class Alert:
    """`kind`: one of `vpnd.daemon.alerts`."""

    kind: str
    ike: IkeStatus | None = None


DaemonEvent = LogLine | IkeUpdated | Alert | IkeUpDown | ChildUpDown | IkeRekeyed | ChildRekeyed


@dataclass(frozen=True, slots=True)
class DaemonStats:
    uptime: float  # seconds
    since: float  # seconds of the Unix epoch
    ike_total: int
    ike_half_open: int
    policies: int
    counters: Mapping[str, int]
    kernel: str = ""
    kernel_reasons: Sequence[str] = ()  # why it was chosen, and others not


class ControlBackend(Protocol):
    def subscribe(self, listener: Callable[[DaemonEvent], None]) -> Callable[[], None]:
        """`listener` gets every event until the returned function is called. It must not block."""

    def stats(self) -> DaemonStats: ...
    def exchange_counters(self) -> ExchangeCounters: ...
    async def list_sas(
        self, *, ike: str | None = None, ike_id: int | None = None, child: str | None = None, child_id: int | None = None
    ) -> Sequence[IkeStatus]:
        """The matching IKE SAs, with traffic counters as the kernel has them now."""

    def list_policies(self, *, trap: bool, shunt: bool, child: str | None = None, ike: str | None = None) -> Sequence[PolicyStatus]: ...

    def connections(self) -> Mapping[str, ConnectionConfig]: ...
    async def load_connection(self, connection: ConnectionConfig) -> None:
        """Add or replace; carries out start_action of what is new or changed. ControlError when the kernel cannot do what it asks."""

    async def unload_connection(self, name: str) -> None: ...
    async def reload(self) -> Sequence[str]:
        """Read the configuration file again; what was done, in lines. ConfigErrors or ControlError when nothing was."""

    def mpls_rows(self, table: str, vrf: str | None = None) -> Iterator[Mapping[str, str | list[str]]]:
        """Rows of `lfib` (of one VRF, or all), `vrfs` or `labels`, as `vpnd.mpls.listing` says. ControlError for another table."""

    def trace_from_vrf(self, vrf: str, destination: IPAddress) -> Sequence[Step]:
        """What would become of a customer's packet. ControlError without such a VRF."""

    def trace_from_peer(self, peer: str, labels: Sequence[Label], destination: IPAddress | None) -> Sequence[Step]:
        """What would become of a peer's packet under `labels`, outermost first. ControlError without such a peer."""

    def load_shared(self, secret: SharedSecret) -> None: ...
    def unload_shared(self, name: str) -> None: ...
    def shared_names(self) -> Sequence[str]: ...
    def load_key(self, key: PrivateKeySource) -> str:
        """The key's identifier: hex of SHA-1 over subjectPublicKey, as strongSwan's."""

    def unload_key(self, identifier: str) -> None: ...
    def key_ids(self) -> Sequence[str]: ...
    def load_certificate(self, der: bytes, *, authority: bool) -> None: ...
    def loaded_certificates(self) -> Sequence[LoadedCertificate]: ...
    def clear_credentials(self) -> None: ...

    def initiate(self, *, child: str | None, ike: str | None, timeout: float) -> AsyncIterator[LogLine]:
        """Lines of progress until the CHILD_SA stands, or without `child` the IKE SA; ends with ControlError when it fails or `timeout` (s, 0 none) passes."""

    def terminate(
        self,
        *,
        child: str | None = None,
        ike: str | None = None,
        child_id: int | None = None,
        ike_id: int | None = None,
        force: bool = False,
        timeout: float = 0.0,
    ) -> AsyncIterator[LogLine]:
        """Lines of progress until all that matched is gone. The last step raises ControlError when nothing matched or time ran out."""

    def rekey(self, *, child: str | None = None, ike: str | None = None, child_id: int | None = None, ike_id: int | None = None, reauth: bool = False) -> int:
        """Begin to rekey the CHILD_SAs that match, or without `child` and `child_id` the IKE SAs (`reauth`: to reauthenticate them); how many those are."""

    def redirect(
        self, gateway: GatewayId, *, ike: str | None = None, ike_id: int | None = None, peer_ip: str | None = None, peer_id: Identity | None = None
    ) -> int:
        """Send the clients of the IKE SAs that match, and that follow, to another gateway; how many those are. `peer_ip`: an address, network or range."""

    async def install(self, child: str, ike: str | None) -> None: ...
    async def uninstall(self, child: str, ike: str | None) -> None: ...
    async def wait(self, child: str, timeout: float) -> None:
        """Returns once the CHILD_SA stands; ControlError on failure or time-out. Starts nothing."""
