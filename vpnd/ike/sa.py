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
    ReauthenticationDue,
    RekeyFailed,
    RemoveSa,
    SendKeepalive,
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
    rekey_ike,
)
from vpnd.ike.followup import Followup
from vpnd.ike.fragments import Outgoing
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import Exchange
from vpnd.ike.session import Session
from vpnd.ike.state import MAX_TASKS, Child, ChildSaState, IkeSaState
from vpnd.ike.steps import Steps, Task
from vpnd.ike.transport import ANSWER_ARRIVES, Transport
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import decode_message

REKEY_SPACING: Final = 1.0  # s, between rekeyings that volume asks for: at line rate a small volume would be nothing but rekeying

__all__ = ["Child", "ChildSaState", "IkeSa", "IkeSaState"]


class IkeSa(Transport):
    """Read the attributes of `Session`; change them only through the methods here."""

    def __init__(self, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, *, initiator: bool, now: float) -> None:
        super().__init__(context, connection, local, remote, initiator=initiator, now=now)
        self._deleting_for = Reason.DELETED

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
            self.close(self._deleting_for if self.state is IkeSaState.DELETING else Reason.PEER_RESTARTED, self.describe())
        elif header.response:
            self._response(datagram, message, local, remote)
        else:
            self._request(datagram, message, local, remote)
        return self._done()

    def timer(self, now: float) -> list[Effect]:
        """What is due at `now`."""
        self.now = now
        for due in (
            self._check_half_open,
            self._check_spis,
            self._check_fragments,
            self._check_outstanding,
            self._check_lifetime,
            self._check_later,
            self._start_next,
            self._check_peer,
            self._keep_mapping,
        ):
            if not self.closed:
                due()
        return self._done()

    def next_deadline(self) -> float | None:
        """When to call `timer`; may be in the past (call at once). None once closed. Ask again after every input."""
        if self.closed:
            return None
        deadlines = [wait.deadline for wait in self._waits.values()]
        if self._outstanding is not None:
            deadlines.append(self._outstanding.next_at)
        if self.half_open:
            deadlines.append(self._half_open_until)
        if self._may_start():
            deadlines.append(self.now)
        fragments = self._fragments_of_request.deadline, self._fragments_of_response.deadline
        timers = *fragments, self._lifetime_end, self._rekey_due, self._reauth_due, self._probe_at, self._keepalive_at, self.later.next()
        deadlines += [deadline for deadline in timers if deadline is not None]
        return min(deadlines, default=None)

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
        child = self.children.pop(child_id, None)
        if child is None:
            return []
        self.later.set(child_id, None)
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
        elif child.replaces and direction is Direction.OUT:
            # its SA out came late: it was announced long ago
            self.emit(ChildClosed(child.sa, Reason.KERNEL_REFUSED))
        else:
            self.emit(ChildDenied(Reason.KERNEL_REFUSED, child.sa.name))
        self._start_next()
        return self._done()

    # Status

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

    # Steps of inputs

    def wind_up(self, reason: Reason) -> None:
        if self.closed or self.state is IkeSaState.DELETING:
            return
        if self.established_at is None:
            self.close(reason, self.describe())
            return
        self.state = IkeSaState.DELETING
        self._deleting_for = reason
        for task in (*self.queue, *self.postponed):
            self.fail_child(task, reason)
        self.queue.clear()
        self.postponed.clear()
        self.queue.append(informational.delete_ike(reason))

    def retire(self, child: Child, reason: Reason, *, answered: bool = False) -> None:
        child.state = ChildSaState.DELETING
        deletion = informational.delete_child(child.sa.inbound.spi, child.sa.id, reason)
        if answered:
            deletion.answered = True
            self.put_off(deletion, ANSWER_ARRIVES)
        else:
            self.queue.append(deletion)

    def probe_peer(self) -> None:
        if not self.queue:
            self.queue.append(Task("IKE_DPD", informational.probe))

    def _delete(self, reason: Reason) -> None:
        self.wind_up(reason)
        if self.active is not None and self._outstanding is None:
            # it waits for an SPI only: nothing of it is on the wire
            self.fail_child(self.active, reason)
            self.active = None

    def _rekey_child(self, child_id: int) -> None:
        child = self.children.get(child_id)
        if child is None or child.state is not ChildSaState.INSTALLED or self.closed or self.state is IkeSaState.DELETING:
            return
        self.later.set(child_id, None)
        if len(self.queue) + len(self.postponed) >= MAX_TASKS:
            self.rekey_later(child)
            return
        child.state = ChildSaState.REKEYING
        self._enqueue(Task("CHILD_REKEY", create_child_sa.rekey_child, target=child_id))

    def _rekey(self) -> None:
        if self.state is not IkeSaState.ESTABLISHED or any(task.name == "IKE_REKEY" for task in (self.active, *self.queue, *self.postponed) if task):
            return
        self.rekey_at = None
        # before what waits, which then goes on under the new keys
        self.queue.appendleft(Task("IKE_REKEY", rekey_ike.rekey))
        self._start_next()

    # Timers

    @property
    def _half_open_until(self) -> float:
        return self.created_at + self.context.settings.half_open_timeout

    @property
    def _lifetime_end(self) -> float | None:
        if self.established_at is None or self.state is IkeSaState.DELETING:
            return None
        if self.ends_at is not None or self.departs_at is not None:
            return min(end for end in (self.ends_at, self.departs_at) if end is not None)
        ends = [] if self.reauth_end is None else [self.reauth_end]
        if self.connection.rekey_time:
            ends.append(self.established_at + self.connection.rekey_time + self.connection.over_time)
        return min(ends, default=None)

    @property
    def _rekey_due(self) -> float | None:
        return self.rekey_at if self.state is IkeSaState.ESTABLISHED else None

    @property
    def _reauth_due(self) -> float | None:
        return self.reauth_at if self.state is IkeSaState.ESTABLISHED else None

    @property
    def _probe_at(self) -> float | None:
        idle = self.state is IkeSaState.ESTABLISHED and self.active is None and not self.queue
        return self._heard_at + self.connection.dpd_delay if idle and self.connection.dpd_delay else None

    @property
    def _keepalive_at(self) -> float | None:
        interval = self.context.settings.keepalive
        return self._sent_at + interval if interval and self.nat_local and self.established_at is not None else None

    def _check_half_open(self) -> None:
        if self.half_open and self.now >= self._half_open_until:
            self.close(Reason.HALF_OPEN_TIMEOUT, self.describe())

    def _check_spis(self) -> None:
        for token, wait in list(self._waits.items()):
            if self.now >= wait.deadline and not self.closed:
                self._waits.pop(token)
                self._resume(wait, None)

    def _check_fragments(self) -> None:
        self._fragments_of_request.expire(self.now)
        self._fragments_of_response.expire(self.now)

    def _check_outstanding(self) -> None:
        outstanding = self._outstanding
        if outstanding is None or self.now < outstanding.next_at:
            return
        theirs = self.rival_ike
        if self.overtaken and theirs is not None:
            self.active = self._outstanding = None
            rekey_ike.await_deletion(self, theirs)
        elif outstanding.doubt is not None:
            self.close(*outstanding.doubt)
        elif outstanding.copy(self.now, self.random()):
            self._repeat(outstanding)
        elif self.active is not None and self.active.name == "IKE_DELETE":
            self.close(self._deleting_for, f"{self.describe()}: no answer to the delete")
        else:
            self.close(Reason.PEER_SILENT, f"{self.describe()}: no answer to message {outstanding.message_id} after {outstanding.copies} retransmissions")

    def _check_lifetime(self) -> None:
        end = self._lifetime_end
        if end is not None and self.now >= end:
            self._delete(Reason.REKEYED if self.ends_at is not None else Reason.EXPIRED if self.departs_at is None else Reason.REDIRECTED)
        again = self._reauth_due
        if again is not None and self.now >= again:
            self.reauth_at = None
            self.emit(ReauthenticationDue())
        due = self._rekey_due
        if due is not None and self.now >= due:
            self._rekey()

    def _check_later(self) -> None:
        while (key := self.later.due(self.now)) is not None:
            if isinstance(key, Task):
                if key in self.postponed:
                    del self.postponed[key]
                    self.queue.append(key)
            elif isinstance(key, Followup):
                self.forget_followup(key)
            else:
                self._rekey_child(key)

    def _check_peer(self) -> None:
        at = self._probe_at
        if at is not None and self.now >= at:
            self._enqueue(Task("IKE_DPD", informational.probe))

    def _keep_mapping(self) -> None:
        at = self._keepalive_at
        if at is not None and self.now >= at:
            self._sent_at = self.now
            self.emit(SendKeepalive(self.local, self.remote))


def _resume(session: Session, task: Task) -> Steps[None]:
    ticket = ike_session_resume.ticket_of(session)
    if ticket is not None and (yield from ike_session_resume.initiate(session, ticket)):
        yield from ike_auth.initiate(session, task)
    else:
        yield from _connect(session, task)


def _connect(session: Session, task: Task) -> Steps[None]:
    if (yield from ike_sa_init.initiate(session)) and (yield from ike_intermediate.initiate(session)):
        yield from ike_auth.initiate(session, task)
