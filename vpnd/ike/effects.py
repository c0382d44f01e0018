"""What the IKE core asks of the world. A step of an IKE SA returns these in the order in which they must happen.

The manager carries them out one after another for one IKE SA: `Send` after `InstallSa` means that the packet leaves
once the kernel has confirmed the SA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from kernel_shim.model import AcquireSequence, Endpoint, Mode, SaId, SecurityAssociation, TrafficSelector
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.identity import Identity
from vpnd.ike.marking import NO_MARKING, Marking

NO_ACQUIRE: Final = AcquireSequence(0)  # no packet asked


class Reason(Enum):
    """Why an IKE SA or a CHILD_SA did not come up or went away; the closed list that logs, metrics and the control socket share."""

    AUTHENTICATION_FAILED = "authentication failed"
    PEER_AUTHENTICATION_FAILED = "peer refused our authentication"
    NO_PROPOSAL_CHOSEN = "no proposal chosen"
    TS_UNACCEPTABLE = "traffic selectors unacceptable"
    NO_MATCHING_CONNECTION = "no matching connection"
    CHILDLESS_REFUSED = "IKE SA with or without a CHILD_SA refused"
    NO_CREDENTIALS = "no credentials"
    INVALID_KE_PAYLOAD = "key exchange group refused"
    INVALID_SYNTAX = "invalid syntax"
    UNSUPPORTED_CRITICAL_PAYLOAD = "unsupported critical payload"
    PEER_ERROR = "peer sent an error"
    NO_ADDITIONAL_SAS = "peer accepts no additional SAs"
    TEMPORARY_FAILURE = "peer is temporarily unable"
    KERNEL_REFUSED = "kernel refused the SA"
    PEER_SILENT = "peer does not answer"
    HALF_OPEN_TIMEOUT = "peer did not complete the exchange"
    PEER_DELETED = "deleted by the peer"
    DELETED = "deleted"
    EXPIRED = "lifetime expired"
    REPLACED = "replaced"
    REKEYED = "rekeyed"
    REAUTHENTICATION = "reauthentication"
    INACTIVE = "inactivity"
    NOT_UNIQUE = "another IKE SA of this peer stands"
    REDIRECTED = "redirected to another gateway"
    RESUMPTION_FAILED = "resumed IKE SA not authenticated"
    REDIRECTION_REFUSED = "redirected once more than is followed, or to nowhere"
    PEER_RESTARTED = "peer has lost the IKE SA"
    ADDRESS_CHANGED = "its address changed"
    ADDRESS_GONE = "our address is gone"
    ADDRESS_REFUSED = "peer refuses our addresses"
    KERNEL_LOST = "kernel side lost the SA"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class ChildSa:
    """A CHILD_SA as negotiated. `id` is unique in its daemon. Both SAs carry keys; the reprs hide them."""

    id: int
    name: str  # of the child configuration
    reqid: int
    mode: Mode
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    inbound: SecurityAssociation
    outbound: SecurityAssociation
    encapsulated: bool
    marking: Marking = NO_MARKING


@dataclass(frozen=True, slots=True)
class Send:
    """A datagram from `local` to `remote`, without non-ESP marker: the socket of port 4500 adds it (RFC 7296 section 2.23)."""

    local: Endpoint
    remote: Endpoint
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendKeepalive:
    """The one octet 0xFF that keeps a NAT mapping (RFC 3948 section 2.3)."""

    local: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class AllocateSpi:
    """An inbound SPI is needed; the answer goes to `IkeSa.spi_allocated(token, spi or None, now)`."""

    token: int
    child: str
    local: Endpoint
    remote: Endpoint
    mode: Mode
    reqid: int = 0
    acquire: AcquireSequence = NO_ACQUIRE


@dataclass(frozen=True, slots=True)
class InstallSa:
    """Give an SA to the kernel. After a refusal the manager drops the rest of the step and calls `IkeSa.install_failed(child_id, sa.direction, now)`."""

    child_id: int
    sa: SecurityAssociation


@dataclass(frozen=True, slots=True)
class MigrateSa:
    """Give an installed SA other addresses or UDP encapsulation, with all its state. Whoever cannot calls `IkeSa.migrate_failed(child_id, now)`."""

    child_id: int
    old: SecurityAssociation
    new: SecurityAssociation


@dataclass(frozen=True, slots=True)
class RemoveSa:
    """Take an SA out of the kernel; that it is gone already is no error. `sa` may be larval (an SPI that was never used).

    `delay`: so many seconds later, whatever becomes of the IKE SA: packets that are under way are still taken.
    """

    sa: SaId
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class IkeEstablished:
    pass


@dataclass(frozen=True, slots=True)
class IkeClosed:
    """The IKE SA is over; no effect follows. `detail` names peer and identity, never a secret."""

    reason: Reason
    detail: str = ""


class MadeIkeSa(Protocol):
    """An IKE SA that another one made: always a `vpnd.ike.sa.IkeSa`, of which the effects know no more than its name."""

    @property
    def spi_local(self) -> int: ...


@dataclass(frozen=True, slots=True)
class IkeOpened:
    """A rekeying made this IKE SA, which needs no introduction: datagrams for it may come right away. Carry it out before the rest of its step.

    Ask its `next_deadline` at once. Whether it takes over anything, IkeHandedOver tells.
    """

    sa: MadeIkeSa


@dataclass(frozen=True, slots=True)
class IkeHandedOver:
    """The CHILD_SAs and the waiting exchanges of this IKE SA are those of `sa` now. Carry it out before the rest of its step."""

    sa: MadeIkeSa


@dataclass(frozen=True, slots=True)
class Stirred:
    """This other IKE SA has something to do now: call its `stirred` before the effects that follow are carried out, and ask for its `next_deadline` anew."""

    sa: MadeIkeSa


@dataclass(frozen=True, slots=True)
class ReauthenticationDue:
    """It has stood long enough: the peers are to prove anew who they are, on an IKE SA of its own (RFC 7296 section 2.8.3)."""


@dataclass(frozen=True, slots=True)
class Redirected:
    """RFC 5685: the gateway sends us to another one; this IKE SA closes (REDIRECTED)."""

    gateway: GatewayId


@dataclass(frozen=True, slots=True)
class IkeMoved:
    """The IKE SA and its CHILD_SAs have these addresses now (RFC 4555, or a NAT's new mapping)."""

    local: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class ChildEstablished:
    """`replaces`: it rekeys that CHILD_SA, which is closed (REKEYED) later."""

    child: ChildSa
    replaces: ChildSa | None = None


@dataclass(frozen=True, slots=True)
class ChildClosed:
    child: ChildSa
    reason: Reason


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """A CHILD_SA that we asked for did not come about; its SPI was given back by a RemoveSa before. `acquire` is that of `create_child`."""

    name: str
    reason: Reason
    detail: str = ""
    acquire: AcquireSequence = NO_ACQUIRE


@dataclass(frozen=True, slots=True)
class RekeyFailed:
    """A rekeying of ours came to nothing; it is tried again while the SA lasts. `child_id` 0: that of the IKE SA."""

    child_id: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChildDenied:
    """For the log: the peer asked for a CHILD_SA and does not get it; the IKE SA stands."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AuthenticationRejected:
    """For the log: we refused the peer (or could not authenticate ourselves). `why` is safe to print."""

    connection: str | None
    peer: Identity | None
    why: str


@dataclass(frozen=True, slots=True)
class InitialContact:
    """The peer says it has no other IKE SA with us (RFC 7296 section 2.4): close those of the same identities."""

    local: Identity
    remote: Identity


Effect = (
    Send
    | SendKeepalive
    | AllocateSpi
    | InstallSa
    | MigrateSa
    | IkeMoved
    | Redirected
    | RemoveSa
    | IkeEstablished
    | IkeClosed
    | IkeOpened
    | IkeHandedOver
    | Stirred
    | ReauthenticationDue
    | ChildEstablished
    | ChildClosed
    | ChildFailed
    | RekeyFailed
    | ChildDenied
    | AuthenticationRejected
    | InitialContact
)
