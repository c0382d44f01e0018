"""An IKE SA (RFC 7296), initiator or responder, without I/O.

Every input returns the effects that it has, in the order in which they must happen. `now` is monotonic seconds and
never goes back. No input raises, except for programming errors: what a peer sends wrong costs it an answer or nothing.

A datagram's way: 1 decode and sort out -> 2 response or request -> 3 open -> 4 the exchange -> 5 answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import AcquireSequence, Direction, Endpoint, Flow, IPAddress, SaId, Spi
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.ike.context import ChildRequest, IkeContext
from vpnd.ike.crypto.sk import open_message, seal_message
from vpnd.ike.effects import NO_ACQUIRE, AllocateSpi, ChildDenied, ChildEstablished, ChildFailed, Effect, InstallSa, Reason, RemoveSa, Send, SendKeepalive
from vpnd.ike.exchanges import create_child_sa, ike_auth, ike_sa_init, informational
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.session import Ask, KeepWaiting, Response, Session, Steps, Task, Tell
from vpnd.ike.state import MAX_TASKS, Child, ChildSaState, IkeSaState
from vpnd.ike.window import Inbox, Outstanding, Serving
from vpnd.ike.wire.errors import IntegrityFailure, MalformedMessage
from vpnd.ike.wire.header import Header, MessageId
from vpnd.ike.wire.message import Message, decode_message
from vpnd.ike.wire.payloads import NotifyPayload, Payload, SkPayload, UnknownPayload

__all__ = ["Child", "ChildSaState", "IkeSa", "IkeSaState"]

UNPROTECTED_ERROR_GRACE: Final = 2.0  # s that an unprotected error gives the true answer to arrive
SPI_TIMEOUT: Final = 30.0  # s that a kernel has for an SPI

Responder = Callable[[Session, Message], Steps[Response]]

# RFC 7296 sections 1.2 to 1.4: which requests a peer may make, by whether it is authenticated
RESPONDERS: Final[dict[tuple[bool, int], Responder]] = {
    (False, Exchange.IKE_AUTH): ike_auth.respond,
    (True, Exchange.CREATE_CHILD_SA): create_child_sa.respond,
    (True, Exchange.INFORMATIONAL): informational.respond,
}


@dataclass(slots=True)
class _SpiWait:
    """Who waits for an SPI: a task of ours, or (None) the peer's request."""

    task: Task | None
    address: IPAddress
    deadline: float


@dataclass(frozen=True, slots=True)
class _Fallback:
    """The answer that went out with a CHILD_SA, should the kernel refuse the inbound SA."""

    child_id: int
    serving: Serving
    payloads: tuple[Payload, ...]


def nothing() -> Steps[None]:
    """The steps of a task before it has its own."""
    yield from ()


class IkeSa(Session):
    """Read the attributes of `Session`; change them only through the methods here."""

    def __init__(self, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, *, initiator: bool, now: float) -> None:
        super().__init__(context, connection, local, remote, initiator=initiator, now=now)
        self._next_id = 0
        self._outstanding: Outstanding | None = None
        self._inbox = Inbox()
        self._serving: Serving | None = None
        self._answering: Steps[Response] | None = None
        self._fallback: _Fallback | None = None
        self._waits: dict[int, _SpiWait] = {}
        self._heard_at = now
        self._sent_at = now
        self._deleting_for = Reason.DELETED

    # Creation

    @classmethod
    def initiator_of(cls, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, now: float) -> IkeSa:
        """An IKE SA that has sent nothing yet: call `create_child` for what IKE_AUTH is to carry, then `initiate`."""
        return cls(context, connection, local, remote, initiator=True, now=now)

    @classmethod
    def respond(cls, context: IkeContext, datagram: bytes, local: Endpoint, remote: Endpoint, now: float) -> tuple[IkeSa | None, list[Effect]]:
        """Answer an IKE_SA_INIT request that passed the gate. Without an IKE SA the effects are a stateless refusal, or nothing."""

        def make(connection: ConnectionConfig) -> IkeSa:
            return cls(context, connection, local, remote, initiator=False, now=now)

        sa, effects = ike_sa_init.respond(make, context, datagram, local, remote, now)
        if sa is not None:
            sa._inbox.answered(datagram, sa.init_response)
        return sa, effects

    # Inputs

    def initiate(self, now: float) -> list[Effect]:
        """Send IKE_SA_INIT. IKE_AUTH carries the first CHILD_SA asked for, or else the connection's first child."""
        self.now = now
        task = Task("IKE_INIT", nothing())
        task.steps = self._connect(task)
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
        if header.response:
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
            self._check_outstanding,
            self._check_lifetime,
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
        deadlines += [deadline for deadline in (self._lifetime_end, self._probe_at, self._keepalive_at) if deadline is not None]
        return min(deadlines, default=None)

    def heard(self, now: float) -> None:
        """The peer showed a sign of life outside IKE: authenticated ESP. It puts the next liveness check off."""
        self._heard_at = max(self._heard_at, now)

    def create_child(self, child: ChildConfig, now: float, *, flow: Flow | None = None, acquire: AcquireSequence = NO_ACQUIRE, reqid: int = 0) -> list[Effect]:
        """Bring up a CHILD_SA: ends in ChildEstablished (`child.inbound.acquire` is `acquire`) or ChildFailed (`acquire`)."""
        self.now = now
        if self.closed or self.state is IkeSaState.DELETING:
            return [ChildFailed(child.name, self.close_reason or Reason.DELETED, "the IKE SA is going away", acquire)]
        if len(self.queue) >= MAX_TASKS:
            return [ChildFailed(child.name, Reason.TEMPORARY_FAILURE, "too many exchanges are waiting", acquire)]
        task = Task("CHILD_CREATE", nothing(), ChildRequest(child, flow, acquire, reqid))
        task.steps = create_child_sa.create_child(self, task)
        self.queue.append(task)
        self._start_next()
        return self._done()

    def delete_child(self, child_id: int, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete on the wire; ChildClosed comes with the peer's answer or when it stays away."""
        self.now = now
        child = self.children.get(child_id)
        if child is None or child.state is ChildSaState.DELETING:
            return []
        child.state = ChildSaState.DELETING
        self._enqueue(Task("CHILD_DELETE", informational.delete_child(self, child.sa.inbound.spi, child_id, reason)))
        return self._done()

    def child_expired(self, child_id: int, now: float) -> list[Effect]:
        """The kernel dropped an SA of it at its hard lifetime: ChildClosed(EXPIRED) at once, and a delete on the wire."""
        self.now = now
        child = self.children.get(child_id)
        if child is None:
            return []
        self.close_child(child, Reason.EXPIRED)
        if child.state is not ChildSaState.DELETING:
            informational.delete_spi(self, child.sa.inbound.spi)
        self._start_next()
        return self._done()

    def delete(self, now: float, reason: Reason = Reason.DELETED) -> list[Effect]:
        """Delete the IKE SA on the wire; IkeClosed comes with the answer or the last retransmission."""
        self.now = now
        self._delete(reason)
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
            self._enqueue(Task("IKE_DPD", informational.probe(self)))
        return self._done()

    def spi_allocated(self, token: int, spi: Spi | None, now: float) -> list[Effect]:
        """The answer to AllocateSpi; None: the kernel gave none. After IkeClosed the effects give the SPI back."""
        self.now = now
        wait = self._waits.pop(token, None)
        if wait is None or self.closed:
            return [RemoveSa(SaId(wait.address if wait else self.local.address, spi))] if spi is not None else []
        self._resume(wait, spi)
        return self._done()

    def install_failed(self, child_id: int, direction: Direction, now: float) -> list[Effect]:
        """The kernel refused that InstallSa (`sa.direction`); the effects that followed it in its step were not carried out.

        A step that installs SAs holds nothing that must not be lost this way: further work of it is left to `timer`.
        """
        self.now = now
        child = self.children.pop(child_id, None)
        if child is None:
            return []
        self.emit(RemoveSa(child.sa.outbound.id))
        self.emit(RemoveSa(child.sa.inbound.id))
        fallback = self._fallback
        if direction is Direction.IN and fallback is not None and fallback.child_id == child_id:
            # the answer has not left: the peer gets another one
            self._fallback = None
            for other in self.children.values():
                if other.sa.reqid == child.sa.reqid and other.state is ChildSaState.REKEYED:
                    other.state = ChildSaState.INSTALLED
            self._inbox.response = self._seal(fallback.serving.exchange, fallback.serving.message_id, fallback.payloads, response=True)
            self._send(self._inbox.response, fallback.serving.local, fallback.serving.remote)
        else:
            informational.delete_spi(self, child.sa.inbound.spi)
        if child.initiator:
            self.emit(ChildFailed(child.sa.name, Reason.KERNEL_REFUSED, acquire=child.sa.inbound.acquire))
        else:
            self.emit(ChildDenied(Reason.KERNEL_REFUSED, child.sa.name))
        self._start_next()
        return self._done()

    # Status

    @property
    def tasks_queued(self) -> Sequence[str]:
        return tuple(task.name for task in self.queue)

    @property
    def tasks_active(self) -> Sequence[str]:
        return (self.active.name,) if self.active else ()

    # Our exchanges

    def _connect(self, task: Task) -> Steps[None]:
        if (yield from ike_sa_init.initiate(self)):
            yield from ike_auth.initiate(self, task)

    def _enqueue(self, task: Task) -> None:
        if len(self.queue) < MAX_TASKS:
            self.queue.append(task)
        self._start_next()

    def _may_start(self) -> bool:
        return self.active is None and bool(self.queue) and self.state in (IkeSaState.ESTABLISHED, IkeSaState.DELETING)

    def _start_next(self) -> None:
        # a step that installs SAs may be cut short by the kernel, so nothing else hangs on it
        if self._may_start() and not any(isinstance(effect, InstallSa) for effect in self.effects):
            self.active = self.queue.pop(0)
            self._run(self.active, None)

    def _run(self, task: Task, answer: object) -> None:
        """Go on with an exchange of ours until it waits again."""
        previous, self._outstanding = self._outstanding, None
        while True:
            try:
                wait = task.steps.send(answer)
            except StopIteration:
                break
            if isinstance(wait, Tell):
                self._send(self._seal(wait.exchange, self._next_id, wait.payloads, response=False), self.local, self.remote)
                self._next_id += 1
                answer = None
                continue
            if isinstance(wait, KeepWaiting):
                self._outstanding = previous
                if previous is not None and wait.reason is not None:
                    previous.question(wait.reason, wait.detail, UNPROTECTED_ERROR_GRACE, self.now)
            elif isinstance(wait, AllocateSpi):
                self._wait_for_spi(wait, task)
            else:
                self._ask(wait)
            return
        self.active = None
        self._start_next()

    def _ask(self, request: Ask) -> None:
        if request.plain is not None:
            datagram, message_id = request.plain, 0
            self._next_id = 1
        else:
            message_id = self._next_id
            datagram = self._seal(request.exchange, message_id, request.payloads, response=False)
            self._next_id += 1
        schedule = self.context.settings.retransmission
        plain = request.plain is not None
        self._outstanding = Outstanding.sent(
            message_id, request.exchange, datagram, plain=plain, tries=request.tries, schedule=schedule, now=self.now, random=self.random()
        )
        self._send(datagram, self.local, self.remote)

    def _wait_for_spi(self, request: AllocateSpi, task: Task | None) -> None:
        self._waits[request.token] = _SpiWait(task, request.local.address, self.now + SPI_TIMEOUT)
        self.emit(request)

    def _resume(self, wait: _SpiWait, spi: Spi | None) -> None:
        if wait.task is None:
            self._answer(spi)
        elif wait.task is self.active:
            self._run(wait.task, spi)
        elif spi is not None:
            self.emit(RemoveSa(SaId(wait.address, spi)))

    def _delete(self, reason: Reason) -> None:
        if self.closed or self.state is IkeSaState.DELETING:
            return
        if self.established_at is None:
            self.close(reason, self.describe())
            return
        self.state = IkeSaState.DELETING
        self._deleting_for = reason
        for task in self.queue:
            self.fail_child(task, reason)
        self.queue[:] = [Task("IKE_DELETE", informational.delete_ike(self, reason))]
        if self.active is not None and self._outstanding is None:
            # it waits for an SPI only: nothing of it is on the wire
            self.fail_child(self.active, reason)
            self.active = None
        self._start_next()

    # 1, 2: responses

    def _addressed(self, header: Header) -> bool:
        if header.initiator_spi != self.wire_spi_i:
            return False
        # RFC 7296 section 2.6: the responder's SPI is 0 in the first request and in stateless answers to it
        return header.responder_spi == self.wire_spi_r or header.exchange == Exchange.IKE_SA_INIT

    def _response(self, datagram: bytes, message: Message, local: Endpoint, remote: Endpoint) -> None:
        outstanding, task = self._outstanding, self.active
        header = message.header
        if outstanding is None or task is None or header.message_id != outstanding.message_id or header.exchange != outstanding.exchange:
            return
        self.received = datagram
        if outstanding.plain:
            if message.encrypted is None:
                self._run(task, message)
            return
        try:
            opened = self._open(datagram, message)
        except MalformedMessage as error:
            self.close(Reason.INVALID_SYNTAX, f"{self.describe()}: {error}")
            return
        if opened is not None:
            self._heard(local, remote)
            self._run(task, opened)

    # 1, 2: requests

    def _request(self, datagram: bytes, message: Message, local: Endpoint, remote: Endpoint) -> None:
        header = message.header
        # RFC 7296 section 2.1: a retransmitted request gets the same answer
        if self._inbox.repeats(header.message_id, datagram):
            self._send(self._inbox.response, local, remote)
            return
        # RFC 7296 section 2.3: a window of one; what is being worked at is not begun again
        if header.message_id != self._inbox.expected or self._serving is not None:
            return
        responder = RESPONDERS.get((self.established_at is not None, header.exchange))
        # RFC 7296 section 2.2: an initiator has no requests to answer before IKE_AUTH is done
        if self.established_at is None and (self.initiator or responder is None):
            return
        serving = Serving(datagram, header.message_id, header.exchange, local, remote)
        try:
            opened = self._open(datagram, message)
        except MalformedMessage as error:
            self._refuse(serving, NotifyPayload(error.notify, error.data), str(error))
            return
        if opened is None:
            return
        self._heard(local, remote)
        self._fallback = None
        # RFC 7296 section 2.5
        unknown = next((payload for payload in opened.payloads if isinstance(payload, UnknownPayload) and payload.critical), None)
        if unknown is not None:
            self._refuse(serving, NotifyPayload(NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes([unknown.type])), f"critical payload {unknown.type}")
        elif responder is None:
            self._refuse(serving, NotifyPayload(NotifyType.INVALID_SYNTAX), f"exchange {header.exchange}")
        else:
            self._serving = serving
            self._answering = responder(self, opened)
            self._answer(None)

    def _refuse(self, serving: Serving, notify: NotifyPayload, why: str) -> None:
        self._finish(serving, Response((notify,)))
        # RFC 7296 section 2.21.2: in IKE_AUTH such an error is fatal
        if self.established_at is None:
            self.close(Reason.INVALID_SYNTAX, f"{self.describe()}: {why}")

    # 3

    def _open(self, datagram: bytes, message: Message) -> Message | None:
        """None for what is not protected by our keys. Raises MalformedMessage for what the peer itself got wrong."""
        if self.crypto is None or not isinstance(message.encrypted, SkPayload):
            return None
        try:
            return open_message(datagram, message, self.crypto.receive)
        except IntegrityFailure:
            return None

    def _heard(self, local: Endpoint, remote: Endpoint) -> None:
        self._heard_at = self.now
        # RFC 7296 section 2.23: a peer behind a NAT is where its last message came from; IKE_AUTH may move to port 4500
        if self.established_at is None or (self.nat_remote and not self.nat_local):
            self.local, self.remote = local, remote

    # 4, 5

    def _answer(self, spi: Spi | None) -> None:
        """Go on with the peer's request until it waits again."""
        steps, serving = self._answering, self._serving
        assert steps is not None
        assert serving is not None
        try:
            wait = steps.send(spi)
        except StopIteration as stop:
            response: Response = stop.value
            self._finish(serving, response)
        else:
            assert isinstance(wait, AllocateSpi)
            self._wait_for_spi(wait, None)

    def _finish(self, serving: Serving, response: Response) -> None:
        self._serving = self._answering = None
        datagram = self._seal(serving.exchange, serving.message_id, response.payloads, response=True)
        self._inbox.answered(serving.datagram, datagram)
        child = response.install
        if child is None:
            self._send(datagram, serving.local, serving.remote)
        else:
            self.enter(child)
            self._fallback = _Fallback(child.sa.id, serving, response.fallback)
            self.emit(InstallSa(child.sa.id, child.sa.inbound))
            self._send(datagram, serving.local, serving.remote)
            self.emit(InstallSa(child.sa.id, child.sa.outbound))
            self.emit(ChildEstablished(child.sa))
        if response.close is not None:
            self.close(response.close.reason, response.close.detail)
        self._start_next()

    def _seal(self, exchange: int, message_id: int, payloads: Sequence[Payload], *, response: bool) -> bytes:
        header = Header(self.wire_spi_i, self.wire_spi_r, exchange, MessageId(message_id), initiator=self.initiator, response=response)
        return seal_message(header, payloads, self.keys.send, self.context.entropy)

    def _send(self, datagram: bytes, local: Endpoint, remote: Endpoint) -> None:
        self._sent_at = self.now
        self.emit(Send(local, remote, datagram))

    def _done(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        if self.closed:
            self.active = self._outstanding = self._serving = self._answering = self._fallback = None
        return effects

    # Timers

    @property
    def _half_open_until(self) -> float:
        return self.created_at + self.context.settings.half_open_timeout

    @property
    def _lifetime_end(self) -> float | None:
        if self.established_at is None or self.state is IkeSaState.DELETING or not self.connection.rekey_time:
            return None
        return self.established_at + self.connection.rekey_time + self.connection.over_time

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

    def _check_outstanding(self) -> None:
        outstanding = self._outstanding
        if outstanding is None or self.now < outstanding.next_at:
            return
        if outstanding.doubt is not None:
            self.close(*outstanding.doubt)
        elif outstanding.copy(self.now, self.random()):
            self._send(outstanding.datagram, self.local, self.remote)
        elif self.active is not None and self.active.name == "IKE_DELETE":
            self.active.steps.close()
            self.close(self._deleting_for, f"{self.describe()}: no answer to the delete")
        else:
            self.close(Reason.PEER_SILENT, f"{self.describe()}: no answer to message {outstanding.message_id} after {outstanding.copies} retransmissions")

    def _check_lifetime(self) -> None:
        end = self._lifetime_end
        if end is not None and self.now >= end:
            self._delete(Reason.EXPIRED)

    def _check_peer(self) -> None:
        at = self._probe_at
        if at is not None and self.now >= at:
            self._enqueue(Task("IKE_DPD", informational.probe(self)))

    def _keep_mapping(self) -> None:
        at = self._keepalive_at
        if at is not None and self.now >= at:
            self._sent_at = self.now
            self.emit(SendKeepalive(self.local, self.remote))
