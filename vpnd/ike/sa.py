"""An IKE SA (RFC 7296), initiator or responder, without I/O.

Every input returns the effects that it has, in the order in which they must happen. `now` is monotonic seconds and
never goes back. No input raises, except for programming errors: what a peer sends wrong costs it an answer or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kernel_shim.model import AcquireSequence, Direction, Endpoint, Flow, Spi
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.ike.context import IkeContext
from vpnd.ike.effects import NO_ACQUIRE, ChildSa, Effect, Reason
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal


class IkeSaState(Enum):
    """strongSwan's names; the values are those of `vpnd.control.backend.IkeState`."""

    CREATED = "CREATED"
    CONNECTING = "CONNECTING"
    ESTABLISHED = "ESTABLISHED"
    REKEYING = "REKEYING"
    DELETING = "DELETING"
    DESTROYING = "DESTROYING"


class ChildSaState(Enum):
    """The values are those of `vpnd.control.backend.ChildState`."""

    INSTALLED = "INSTALLED"
    REKEYED = "REKEYED"
    DELETING = "DELETING"


@dataclass(slots=True)
class Child:
    """A CHILD_SA of an IKE SA and what a listing says of it."""

    sa: ChildSa
    config: ChildConfig
    proposal: Proposal
    installed_at: float
    state: ChildSaState = ChildSaState.INSTALLED


class IkeSa:
    """Read the attributes; change them only through the methods."""

    unique_id: int
    initiator: bool
    state: IkeSaState
    connection: ConnectionConfig  # of a responder before IKE_AUTH: the best candidate
    local: Endpoint
    remote: Endpoint
    spi_local: int
    spi_remote: int  # 0 until the peer said it
    local_id: Identity | None
    remote_id: Identity | None
    proposal: Proposal | None
    nat_local: bool  # we are behind a NAT
    nat_remote: bool
    nat_fake: bool  # UDP encapsulation is forced
    created_at: float
    established_at: float | None
    children: Mapping[int, Child]  # by ChildSa.id
    close_reason: Reason | None  # once closed

    # Creation

    @classmethod
    def initiator_of(cls, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, now: float) -> IkeSa:
        """An IKE SA that has sent nothing yet: call `create_child` for what IKE_AUTH is to carry, then `initiate`."""
        raise NotImplementedError

    @classmethod
    def respond(cls, context: IkeContext, datagram: bytes, local: Endpoint, remote: Endpoint, now: float) -> tuple[IkeSa | None, list[Effect]]:
        """Answer an IKE_SA_INIT request that passed the gate. Without an IKE SA the effects are a stateless refusal, or nothing."""
        raise NotImplementedError

    # Inputs

    def initiate(self, now: float) -> list[Effect]:
        """Send IKE_SA_INIT. IKE_AUTH carries the first CHILD_SA asked for, or else the connection's first child."""
        raise NotImplementedError

    def receive(self, datagram: bytes, local: Endpoint, remote: Endpoint, now: float) -> list[Effect]:
        """A datagram whose SPI is ours, without non-ESP marker, that came from `remote` to `local`."""
        raise NotImplementedError

    def timer(self, now: float) -> list[Effect]:
        """What is due at `now`."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When to call `timer`; may be in the past (call at once). None once closed. Ask again after every input."""
        raise NotImplementedError

    def create_child(self, child: ChildConfig, now: float, *, flow: Flow | None = None, acquire: AcquireSequence = NO_ACQUIRE, reqid: int = 0) -> list[Effect]:
        """Bring up a CHILD_SA: ends in ChildEstablished (`child.inbound.acquire` is `acquire`) or ChildFailed (`acquire`)."""
        raise NotImplementedError

    def delete_child(self, child_id: int, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete on the wire; ChildClosed comes with the peer's answer or when it stays away."""
        raise NotImplementedError

    def child_expired(self, child_id: int, now: float) -> list[Effect]:
        """The kernel dropped an SA of it at its hard lifetime: ChildClosed(EXPIRED) at once, and a delete on the wire."""
        raise NotImplementedError

    def delete(self, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete the IKE SA on the wire; IkeClosed comes with the answer or the last retransmission."""
        raise NotImplementedError

    def abort(self, now: float, reason: Reason) -> list[Effect]:
        """Close without another word to the peer, children included."""
        raise NotImplementedError

    def probe(self, now: float) -> list[Effect]:
        """Ask the peer for a sign of life now."""
        raise NotImplementedError

    def spi_allocated(self, token: int, spi: Spi | None, now: float) -> list[Effect]:
        """The answer to AllocateSpi; None: the kernel gave none. After IkeClosed the effects give the SPI back."""
        raise NotImplementedError

    def install_failed(self, child_id: int, direction: Direction, now: float) -> list[Effect]:
        """The kernel refused that InstallSa (`sa.direction`); the effects that followed it in its step were not carried out.

        A step that installs SAs holds nothing that must not be lost this way: further work of it is left to `timer`.
        """
        raise NotImplementedError

    # Status

    @property
    def spi_initiator(self) -> int:
        return self.spi_local if self.initiator else self.spi_remote

    @property
    def spi_responder(self) -> int:
        return self.spi_remote if self.initiator else self.spi_local

    @property
    def half_open(self) -> bool:
        """A responder that has not authenticated its peer."""
        return not self.initiator and self.established_at is None

    @property
    def closed(self) -> bool:
        return self.close_reason is not None

    @property
    def tasks_queued(self) -> Sequence[str]:
        """Names as strongSwan's: IKE_SA_INIT ..., CHILD_CREATE, CHILD_DELETE, IKE_DELETE, IKE_DPD."""
        raise NotImplementedError

    @property
    def tasks_active(self) -> Sequence[str]:
        raise NotImplementedError
