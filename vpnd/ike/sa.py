"""An IKE SA (RFC 7296), initiator or responder, without I/O.

Every input returns the effects that it has, in the order in which they must happen. `now` is monotonic seconds and
never goes back. No input raises, except for programming errors: what a peer sends wrong costs it an answer or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kernel_shim.model import AcquireSequence, Direction, Endpoint, Flow, SaId, Spi
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.ike import reauthentication, succession
from vpnd.ike.context import ChildRequest, IkeContext
from vpnd.ike.effects import (
    NO_ACQUIRE,
    ChildClosed,
    ChildDenied,
    ChildFailed,
    ChildSa,
    Effect,
    Reason,
    RekeyFailed,
    RemoveSa,
)
from vpnd.ike.exchanges import (
    crash_detection,
    create_child_sa,
    ike_auth,
    ike_intermediate,
    ike_sa_init,
    ike_session_resume,
    informational,
    mobike,
    redirect,
)
from vpnd.ike.fragments import Outgoing
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import Exchange
from vpnd.ike.lifecycle import Lifecycle
from vpnd.ike.session import Session
from vpnd.ike.state import MAX_TASKS, Child, ChildSaState, IkeSaState
from vpnd.ike.steps import CONFIRM, Steps, Task
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import decode_message

REKEY_SPACING: Final = 1.0  # s, between rekeyings that volume asks for: at line rate a small volume would be nothing but rekeying

__all__ = ["Child", "ChildSaState", "IkeSa", "IkeSaState"]


class IkeSa(Lifecycle):
    """Read the attributes of `Session`; change them only through the methods here."""

    # Creation

    @classmethod
    def initiator_of(cls, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, now: float) -> IkeSa:
        """An IKE SA that has sent nothing yet: call `create_child` for what IKE_AUTH is to carry, then `initiate`."""
        return cls(context, connection, local, remote, initiator=True, now=now)

    @classmethod
    def respond(cls, context: IkeContext, datagram: bytes, local: Endpoint, remote: Endpoint, now: float) -> tuple[IkeSa | None, list[Effect]]:
        """Answer an IKE_SA_INIT or IKE_SESSION_RESUME request that passed the gate. Without an IKE SA the effects are a stateless refusal, or nothing."""

        def make(connection: ConnectionConfig) -> IkeSa:
            return cls(context, connection, local, remote, initiator=False, now=now)

        resumes = datagram[18:19] == bytes((Exchange.IKE_SESSION_RESUME,))
        sa, effects = (ike_session_resume if resumes else ike_sa_init).respond(make, context, datagram, local, remote, now)
        if sa is not None:
            sa._inbox.answered(datagram, Outgoing((sa.init_response,)))
            for incoming in (True, False):
                sa._count(datagram[18], incoming=incoming, response=not incoming)
        return sa, effects

    # Inputs

    def initiate(self, now: float, *, resume: bool = True, childless: bool = False) -> list[Effect]:
        """Send IKE_SA_INIT. IKE_AUTH carries the first CHILD_SA asked for, or else the connection's first child, or none if it is to be `childless`.

        `resume`: a ticket of an earlier IKE SA will do (RFC 5723); not where the peers are to prove anew who they are.
        """
        self.now = now
        self.childless = childless
        task = Task("IKE_INIT", _resume if resume else _connect)
        task.steps = task.begin(self, task)
        self.active = task
        self._run(task, None)
        return self._done()

    def receive(self, datagram: bytes, local: Endpoint, remote: Endpoint, now: float) -> list[Effect]:
        """A datagram whose SPI is ours, without non-ESP marker, that came from `remote` to `local`."""
        self.now = now
        if self.closed:
            return []
        try:
            message = decode_message(datagram)
        except MalformedMessage:
            # RFC 7296 section 2.21: what is not protected and not right is dropped
            return []
        header = message.header
        # RFC 7296 section 2.6: the other side's flag, and SPIs that are ours
        if header.initiator is self.initiator or not self._addressed(header):
            return []
        if crash_detection.proves_loss(self, message):
            # a peer that heard our DELETE, and whose answer was lost, has it no more either
            self.close(self.deleting_for if self.state is IkeSaState.DELETING else Reason.PEER_RESTARTED, self.describe())
        elif header.response:
            self._response(datagram, message, local, remote)
        else:
            self._request(datagram, message, local, remote)
        return self._done()

    def heard(self, now: float) -> None:
        """The peer showed a sign of life outside IKE: authenticated ESP. It puts the next liveness check off."""
        self._heard_at = max(self._heard_at, now)

    def create_child(
        self,
        child: ChildConfig,
        now: float,
        *,
        flow: Flow | None = None,
        acquire: AcquireSequence = NO_ACQUIRE,
        reqid: int = 0,
        like: ChildSa | None = None,
    ) -> list[Effect]:
        """Bring up a CHILD_SA: ends in ChildEstablished (`child.inbound.acquire` is `acquire`) or ChildFailed (`acquire`).

        `like`: with the selectors of that one, instead of all that the configuration allows.
        """
        self.now = now
        if self.closed or self.state is IkeSaState.DELETING:
            return [ChildFailed(child.name, self.close_reason or Reason.DELETED, "the IKE SA is going away", acquire)]
        if len(self.queue) + len(self.postponed) >= MAX_TASKS:
            return [ChildFailed(child.name, Reason.TEMPORARY_FAILURE, "too many exchanges are waiting", acquire)]
        self.queue.append(Task("CHILD_CREATE", create_child_sa.create_child, ChildRequest(child, flow, acquire, reqid, like)))
        self._start_next()
        return self._done()

    def rekey_child(self, child_id: int, now: float) -> list[Effect]:
        """Replace a CHILD_SA by one with fresh keys: ends in ChildEstablished (`replaces`) and, when the old one is gone, ChildClosed(REKEYED)."""
        self.now = now
        self._rekey_child(child_id)
        return self._done()

    def child_worn(self, child_id: int, now: float) -> list[Effect]:
        """An SA of it reached its soft lifetime: it is rekeyed, though one whose volume is used up at once not at once."""
        self.now = now
        child = self.children.get(child_id)
        if child is not None and now < child.installed_at + REKEY_SPACING:
            self.later.set(child_id, child.installed_at + REKEY_SPACING)
        else:
            self._rekey_child(child_id)
        return self._done()

    def rekey(self, now: float) -> list[Effect]:
        """Replace the IKE SA by one with fresh keys: ends in IkeOpened and IkeHandedOver, and, when the old one is gone, IkeClosed(REKEYED)."""
        self.now = now
        self._rekey()
        return self._done()

    def reauthenticate_later(self, now: float) -> list[Effect]:
        """The reauthentication that was due came to nothing."""
        self.now = now
        reauthentication.again(self)
        return self._done()

    def delete_child(self, child_id: int, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete on the wire; ChildClosed comes with the peer's answer or when it stays away."""
        self.now = now
        child = self.children.get(child_id)
        if child is None or child.state is ChildSaState.DELETING:
            return []
        self._revoke(child_id)
        self.retire(child, reason)
        self._start_next()
        return self._done()

    def child_expired(self, child_id: int, now: float) -> list[Effect]:
        """The kernel dropped an SA of it at its hard lifetime: ChildClosed(EXPIRED) at once, and a delete on the wire."""
        self.now = now
        child = self.children.get(child_id)
        if child is None:
            return []
        succession.close(self, child, Reason.EXPIRED)
        self._revoke(child_id)
        if child.state is not ChildSaState.DELETING:
            informational.delete_spi(self, child.sa.inbound.spi)
        self._start_next()
        return self._done()

    def delete(self, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete the IKE SA on the wire; IkeClosed comes with the answer or the last retransmission."""
        self.now = now
        self._delete(reason)
        self._start_next()
        return self._done()

    def abort(self, now: float, reason: Reason) -> list[Effect]:
        """Close without another word to the peer, children included."""
        self.now = now
        self.close(reason, self.describe())
        return self._done()

    def confirm(self, now: float) -> list[Effect]:
        """Hear that the peer has what it asked us for: all of its CHILD_SAs are `taken` then."""
        self.now = now
        if self.state is IkeSaState.ESTABLISHED and not any(task is not None and task.name == CONFIRM for task in (self.active, *self.queue)):
            self._enqueue(informational.confirm())
        return self._done()

    def probe(self, now: float) -> list[Effect]:
        """Ask the peer for a sign of life now; an exchange that is under way will tell as well."""
        self.now = now
        if self.state is IkeSaState.ESTABLISHED and self.active is None and not self.queue:
            self._enqueue(Task("IKE_DPD", informational.probe))
        return self._done()

    def addresses_changed(self, now: float) -> list[Effect]:
        """The host's addresses or routes changed. With MOBIKE the IKE SA may move, or tell its peer."""
        self.now = now
        if not self.closed:
            mobike.look_around(self)
            self._start_next()
        return self._done()

    def mapping_changed(self, remote: Endpoint, now: float) -> list[Effect]:
        """Authenticated ESP of a CHILD_SA came from another UDP address of the peer than before (RFC 3948 section 4)."""
        self.now = now
        if not self.closed and self._follows_mappings and remote != self.remote:
            self.remote = remote
            mobike.move_children(self)
        return self._done()

    def migrate_failed(self, child_id: int, now: float) -> list[Effect]:
        """The kernel could not move an SA of that CHILD_SA: a new one takes its place."""
        self.now = now
        if child_id not in self.children and self.heir is not None:
            return self.heir.migrate_failed(child_id, now)
        self._rekey_child(child_id)
        return self._done()

    @property
    def may_be_redirected(self) -> bool:
        """The peer is a client of ours that follows redirections."""
        return self.redirectable and not self.original_initiator and self.state in (IkeSaState.ESTABLISHED, IkeSaState.REKEYING)

    def redirect(self, gateway: GatewayId, now: float) -> list[Effect]:
        """Send the peer to another gateway (RFC 5685 section 5)."""
        self.now = now
        if self.may_be_redirected:
            self._enqueue(redirect.send_away(gateway))
        return self._done()

    def spi_allocated(self, token: int, spi: Spi | None, now: float) -> list[Effect]:
        """The answer to AllocateSpi; None: the kernel gave none. After IkeClosed the effects give the SPI back."""
        self.now = now
        wait = self._waits.pop(token, None)
        if wait is None and self.heir is not None:
            return self.heir.spi_allocated(token, spi, now)
        if wait is None or self.closed:
            return [RemoveSa(SaId(wait.address if wait else self.local.address, spi))] if spi is not None else []
        self._resume(wait, spi)
        return self._done()

    def install_failed(self, child_id: int, direction: Direction, now: float) -> list[Effect]:
        """The kernel refused that InstallSa (`sa.direction`); the effects that followed it in its step were not carried out.

        A step that installs SAs holds nothing that must not be lost this way: further work of it is left to `timer`.
        """
        self.now = now
        if child_id not in self.children and self.heir is not None:
            return self.heir.install_failed(child_id, direction, now)
        child = self.children.get(child_id)
        if child is None:
            return []
        succession.leave(self, child)
        self.effects += child.at_risk
        self.emit(RemoveSa(child.sa.outbound.id))
        self.emit(RemoveSa(child.sa.inbound.id))
        succession.refused_by_kernel(self, child)
        serving = self._revoke(child_id)
        if direction is Direction.IN and serving is not None:
            # the answer has not left: the peer gets another one
            self._send(self._inbox.response, serving.local, serving.remote)
        else:
            informational.delete_spi(self, child.sa.inbound.spi)
        if child.replaces and child.initiator:
            self.emit(RekeyFailed(child.replaces, Reason.KERNEL_REFUSED))
        elif child.initiator:
            self.emit(ChildFailed(child.sa.name, Reason.KERNEL_REFUSED, acquire=child.sa.inbound.acquire))
        elif child.waited and direction is Direction.OUT:
            # it was announced long ago
            self.emit(ChildClosed(child.sa, Reason.KERNEL_REFUSED))
        else:
            self.emit(ChildDenied(Reason.KERNEL_REFUSED, child.sa.name))
        self._start_next()
        return self._done()

    def child_unwanted(self, name: str, now: float) -> list[Effect]:
        """What `create_child` was to bring up of that configuration came up otherwise: unless the peer was asked already, it is not asked."""
        self.now = now
        for task in [task for task in self.queue if _creates(task, name)]:
            self.queue.remove(task)
        for task in [task for task in self.postponed if _creates(task, name)]:
            self.call_off(task)
        return self._done()

    def stirred(self, now: float) -> list[Effect]:
        """What another IKE SA left it to do."""
        self.now = now
        return self._done()

    # Status

    def holds(self, child_id: int) -> bool:
        """Whether that CHILD_SA stands, of this IKE SA or of what it was rekeyed to."""
        return child_id in self.children or (self.heir is not None and self.heir.holds(child_id))

    def asks_for(self, name: str) -> bool:
        """Whether a CHILD_SA of that configuration that we asked for, or are to ask for, is neither up nor refused."""
        return any(task is not None and task.child is not None and task.child.child.name == name for task in (self.active, *self.queue, *self.postponed))

    @property
    def tasks_queued(self) -> Sequence[str]:
        return tuple(task.name for task in self.queue)

    @property
    def asks_for_children(self) -> bool:
        """Whether CHILD_SAs that we asked for are neither up nor refused."""
        return any(task is not None and task.child is not None for task in (self.active, *self.queue, *self.postponed))

    @property
    def tasks_active(self) -> Sequence[str]:
        return (self.active.name,) if self.active else ()


def _creates(task: Task, name: str) -> bool:
    """Whether somebody asked for it who takes any; not one that is to be like another."""
    return task.child is not None and task.child.child.name == name and task.child.like is None


def _resume(session: Session, task: Task) -> Steps[None]:
    ticket = ike_session_resume.ticket_of(session)
    if ticket is not None and (yield from ike_session_resume.initiate(session, ticket)):
        yield from ike_auth.initiate(session, task)
    else:
        yield from _connect(session, task)


def _connect(session: Session, task: Task) -> Steps[None]:
    if (yield from ike_sa_init.initiate(session)) and (yield from ike_intermediate.initiate(session)):
        yield from ike_auth.initiate(session, task)
