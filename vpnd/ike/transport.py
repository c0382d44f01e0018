"""How an IKE SA talks: message ids, retransmission, and the exchanges that are under way in both directions.

A datagram's way: 1 sort out -> 2 response or request -> 3 open -> 4 the exchange -> 5 answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import Direction, Endpoint, IPAddress, SaId, Spi
from vpnd.config.model import ConnectionConfig
from vpnd.ike import succession
from vpnd.ike.context import IkeContext
from vpnd.ike.crypto.sk import open_chain
from vpnd.ike.effects import AllocateSpi, ChildClosed, ChildEstablished, Effect, InstallSa, Reason, RemoveSa
from vpnd.ike.exchanges import create_child_sa, ike_auth, ike_followup_ke, ike_intermediate, informational, mobike
from vpnd.ike.fragments import Outgoing, Reassembly, refit
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.protection import Protection
from vpnd.ike.session import Session
from vpnd.ike.state import MAX_TASKS, IkeSaState
from vpnd.ike.steps import CONFIRM, Ask, IkeCrypto, KeepWaiting, Response, Steps, Task, Tell
from vpnd.ike.window import Inbox, Outstanding, Serving
from vpnd.ike.wire.errors import IntegrityFailure, MalformedMessage
from vpnd.ike.wire.header import Header
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import DeletePayload, NotifyPayload, Payload, SkfPayload

UNPROTECTED_ERROR_GRACE: Final = 2.0  # s that an unprotected error gives the true answer to arrive
NARROW_COPY: Final = 2  # from this copy on a request is taken to have been too long for its path, of which nobody told us
MAX_REPEATS: Final = 256  # of one request that are answered; with MOBIKE each copy comes over many paths
MAX_REPEATS_OF_STRANGERS: Final = 32  # while the peer is not authenticated: our answers may be longer than what asks for them, and go where the copy says
ANSWER_ARRIVES: Final = 40.0  # s without a copy of a request, after which our answer is taken to have arrived
SPI_TIMEOUT: Final = 30.0  # s that a kernel has for an SPI

Responder = Callable[[Session, Message], Steps[Response]]

# RFC 7296 sections 1.2 to 1.4: which requests a peer may make, by whether it is authenticated
RESPONDERS: Final[dict[tuple[bool, int], Responder]] = {
    (False, Exchange.IKE_INTERMEDIATE): ike_intermediate.respond,
    (False, Exchange.IKE_AUTH): ike_auth.respond,
    (True, Exchange.CREATE_CHILD_SA): create_child_sa.respond,
    (True, Exchange.IKE_FOLLOWUP_KE): ike_followup_ke.respond,
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


class Transport(Protection):
    """The part of an IKE SA between its exchanges and its messages."""

    def __init__(self, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, *, initiator: bool, now: float) -> None:
        super().__init__(context, connection, local, remote, initiator=initiator, now=now)
        self._next_id = 0
        self._outstanding: Outstanding | None = None
        self._inbox = Inbox()
        self._answered_with: IkeCrypto | None = None  # the keys of the request that the inbox holds and of its answer; an answer may change ours
        self._fragments_of_request = Reassembly(context.reassembly)
        self._fragments_of_response = Reassembly(context.reassembly)
        self._serving: Serving | None = None
        self._answering: Steps[Response] | None = None
        self._fallback: _Fallback | None = None
        self._waits: dict[int, _SpiWait] = {}
        self._heard_at = now

    # Our exchanges

    def _enqueue(self, task: Task) -> None:
        if len(self.queue) + len(self.postponed) < MAX_TASKS:
            self.queue.append(task)
        self._start_next()

    def _may_start(self) -> bool:
        if self.active is not None or not self.queue or self.state not in (IkeSaState.ESTABLISHED, IkeSaState.DELETING):
            return False
        # RFC 7296 section 2.25.2: while the peer makes a CHILD_SA, the IKE SA is not rekeyed; while it rekeys the IKE SA, nothing is made on it
        if any(followup.of_ike for followup in self.followups.values()):
            return self.queue[0].name in ("IKE_DELETE", "IKE_DPD", CONFIRM)
        name = self.queue[0].name
        # what is being worked at may rekey that CHILD_SA: strongSwan 5.9 judges by which one comes first, our answer or the delete
        if self._serving is not None and name in ("IKE_REKEY", "CHILD_DELETE"):
            return False
        return not self.followups or name != "IKE_REKEY"

    def _start_next(self) -> None:
        # a step that installs SAs may be cut short by the kernel, so nothing else hangs on it
        while self._may_start() and not any(isinstance(effect, InstallSa) for effect in self.effects):
            self.active = self.queue.popleft()
            self.active.steps = self.active.begin(self, self.active)
            self._run(self.active, None)

    def _run(self, task: Task, answer: object) -> None:
        """Go on with an exchange of ours until it waits again."""
        previous, self._outstanding = self._outstanding, None
        steps = task.steps
        assert steps is not None
        while True:
            try:
                wait = steps.send(answer)
            except StopIteration:
                break
            if isinstance(wait, Tell):
                self._count(wait.exchange, incoming=False, response=False)
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
                task.asked = True
                self._ask(wait)
            return
        self.active = None

    def _ask(self, request: Ask) -> None:
        if request.plain is not None:
            message, message_id = Outgoing((request.plain,)), 0
            self._next_id = 1
        else:
            message_id = self._next_id
            message = self._seal(request.exchange, message_id, request.payloads, response=False)
            self._next_id += 1
        self._count(request.exchange, incoming=False, response=False)
        schedule = self.context.settings.retransmission
        plain = request.plain is not None
        self._outstanding = Outstanding.sent(
            message_id, request.exchange, message, plain=plain, tries=request.tries, schedule=schedule, now=self.now, random=self.random()
        )
        self._send(message, self.local, self.remote)

    def repeat_request(self) -> None:
        if self._outstanding is not None:
            self._repeat(self._outstanding)

    def _repeat(self, outstanding: Outstanding) -> None:
        """Send a request again, in smaller fragments should the path have turned out narrower (RFC 7383 section 2.5.2), and over every path in the end."""
        if not outstanding.plain:
            limit = self._limit(self.local, self.remote, narrow=outstanding.copies >= NARROW_COPY)
            outstanding.message = refit(outstanding.message, self.keys.send, self.context.entropy, limit)
        self._send(outstanding.message, self.local, self.remote)
        # RFC 4555 section 3.10: the path that the answer comes by works
        if self.mobike and self.original_initiator and outstanding.copies >= mobike.PROBE_COPY:
            for local, remote in mobike.candidates(self):
                self._send(outstanding.message, local, remote)

    def _wait_for_spi(self, request: AllocateSpi, task: Task | None) -> None:
        self._waits[request.token] = _SpiWait(task, request.local.address, self.now + SPI_TIMEOUT)
        self.emit(request)

    def _resume(self, wait: _SpiWait, spi: Spi | None) -> None:
        if wait.task is None:
            self._answer(spi)
        elif wait.task is self.active:
            self._run(wait.task, spi)
            self._start_next()
        elif spi is not None:
            self.emit(RemoveSa(SaId(wait.address, spi)))

    # 1, 2: responses

    def _addressed(self, header: Header) -> bool:
        if header.initiator_spi != self.wire_spi_i:
            return False
        # RFC 7296 section 2.6: the responder's SPI is 0 in the first request and in stateless answers to it
        return header.responder_spi == self.wire_spi_r or header.exchange in (Exchange.IKE_SA_INIT, Exchange.IKE_SESSION_RESUME)

    def _response(self, datagram: bytes, message: Message, local: Endpoint, remote: Endpoint) -> None:
        outstanding, task = self._outstanding, self.active
        header = message.header
        if outstanding is None or task is None or header.message_id != outstanding.message_id or header.exchange != outstanding.exchange:
            return
        self.received = datagram
        if outstanding.plain:
            if message.encrypted is None:
                self._count(header.exchange, incoming=True, response=True)
                self._run(task, message)
                self._start_next()
            return
        try:
            opened = self._open(datagram, message, self._fragments_of_response)
        except MalformedMessage as error:
            self.close(Reason.INVALID_SYNTAX, f"{self.describe()}: {error}")
            return
        if opened is not None:
            self._count(header.exchange, incoming=True, response=True)
            self._heard(local, remote)
            probed = self.mobike and self.original_initiator and outstanding.copies >= mobike.PROBE_COPY
            if probed and (local, remote) != (self.local, self.remote) and mobike.is_candidate(self, local, remote):
                mobike.move_to(self, local, remote)
            self._run(task, opened)
            self._start_next()

    # 1, 2: requests

    def _request(self, datagram: bytes, message: Message, local: Endpoint, remote: Endpoint) -> None:
        header = message.header
        # RFC 7296 section 2.1: a retransmitted request gets the same answer
        inbox = self._inbox
        if inbox.is_repeated(header.message_id, datagram) or self._repeats_in_other_fragments(datagram, message):
            inbox.repeats += 1
            if inbox.repeats > (MAX_REPEATS_OF_STRANGERS if self.established_at is None else MAX_REPEATS):
                return
            if self._answered_with is not None:
                limit = self._limit(local, remote, narrow=inbox.repeats >= NARROW_COPY, piece=_piece(message, datagram))
                inbox.response = refit(inbox.response, self._answered_with.send, self.context.entropy, limit)
            self._send(inbox.response, local, remote)
            self._await_peer()
            return
        # RFC 7296 section 2.3: a window of one; what is being worked at is not begun again
        if header.message_id != inbox.expected or self._serving is not None:
            return
        responder = RESPONDERS.get((self.established_at is not None, header.exchange))
        # RFC 7296 section 2.2: an initiator has no requests to answer before IKE_AUTH is done
        if self.established_at is None and (self.initiator or responder is None):
            return
        fragments = self._fragments_of_request
        serving = Serving(datagram, header.message_id, header.exchange, local, remote)
        try:
            opened = self._open(datagram, message, fragments)
        except MalformedMessage as error:
            self._refuse(serving, NotifyPayload(error.notify, error.data), str(error))
            return
        if opened is None:
            return
        serving.piece = len(fragments.first_datagram)
        serving.datagram = fragments.first_datagram or datagram
        # RFC 7296 section 2.8.2: the peer uses it already, so it will ask again once our own rekeying has come to its end
        if self.undecided is not None and not any(payload.protocol == ProtocolId.IKE for payload in opened.all(DeletePayload)):
            self.undecided.overtaken = True
            return
        self._count(header.exchange, incoming=True, response=False)
        self._heard(local, remote)
        self._go_on()
        if responder is None:
            self._refuse(serving, NotifyPayload(NotifyType.INVALID_SYNTAX), f"exchange {header.exchange}")
        else:
            self._serving = serving
            self._answering = responder(self, opened)
            self._answer(None)

    def _await_peer(self) -> None:
        """The peer lacks our last answer still."""
        for task in self.postponed:
            if task.answered:
                self.later.set(task, self.now + ANSWER_ARRIVES)

    def _go_on(self) -> None:
        """RFC 7296 section 2.3: with a window of one a new request says that the peer has our last answer."""
        answered = self.children.get(self._fallback.child_id) if self._fallback is not None else None
        if answered is not None:
            answered.taken = True
        self._fallback = None
        for task in [task for task in self.postponed if task.answered]:
            self.call_off(task)
            self.queue.append(task)

    def _refuse(self, serving: Serving, notify: NotifyPayload, why: str) -> None:
        self._finish(serving, Response((notify,)))
        # RFC 7296 section 2.21.2: in IKE_AUTH such an error is fatal
        if self.established_at is None:
            self.close(Reason.INVALID_SYNTAX, f"{self.describe()}: {why}")

    # 3 (the rest is `Protection`)

    def _repeats_in_other_fragments(self, datagram: bytes, message: Message) -> bool:
        """RFC 7383 section 2.5.2: the first fragment of an answered request that the peer cut anew."""
        sealed, inbox = message.encrypted, self._inbox
        if not isinstance(sealed, SkfPayload) or sealed.number != 1 or message.header.message_id != inbox.expected - 1 or not inbox.response:
            return False
        if self._answered_with is None or not self.fragmentation:
            return False
        try:
            open_chain(datagram, sealed, self._answered_with.receive)
        except (IntegrityFailure, MalformedMessage):
            return False
        inbox.request = datagram
        return True

    def _heard(self, local: Endpoint, remote: Endpoint) -> None:
        self._heard_at = self.now
        self.arrived = local, remote
        # RFC 7296 section 2.23: IKE_AUTH may move to port 4500
        if self.established_at is None:
            self.local, self.remote = local, remote
        elif (local, remote) != (self.local, self.remote) and self._follows_mappings:
            self.local, self.remote = local, remote
            mobike.move_children(self)

    @property
    def _follows_mappings(self) -> bool:
        """RFC 7296 section 2.23: a peer behind a NAT is where its last message came from; with MOBIKE it says so itself (RFC 4555 section 3.8)."""
        return self.nat_remote and not self.nat_local and not self.mobike and self.connection.follow_nat

    def _revoke(self, child_id: int) -> Serving | None:
        """A CHILD_SA that our last answer gave goes: a peer that missed the answer gets a refusal instead of an SA without a twin."""
        fallback = self._fallback
        if fallback is None or fallback.child_id != child_id:
            return None
        self._fallback = None
        self._inbox.response = self._seal_answer(fallback.serving, fallback.payloads)
        return fallback.serving

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
        self._count(serving.exchange, incoming=False, response=True)
        message = self._seal_answer(serving, response.payloads)
        self._inbox.answered(serving.datagram, message)
        self._answered_with, self.crypto = self.crypto, response.keys or self.crypto
        child = response.install
        if child is None:
            self._send(message, serving.local, serving.remote)
        else:
            succession.enter(self, child)
            self._fallback = _Fallback(child.sa.id, serving, response.fallback)
            self.emit(InstallSa(child.sa.id, child.sa.inbound))
            self._send(message, serving.local, serving.remote)
            if child.sends:
                self.emit(InstallSa(child.sa.id, child.sa.outbound))
            elif succession.waits_for_peer(self, child):
                self.queue.appendleft(informational.confirm(child.sa.id))
            old = self.children.get(child.replaces)
            self.emit(ChildEstablished(child.sa, old.sa if old else None))
        if response.close is not None:
            self.close(response.close.reason, response.close.detail)
        self._start_next()

    def _seal_answer(self, serving: Serving, payloads: Sequence[Payload]) -> Outgoing:
        return self._seal(serving.exchange, serving.message_id, payloads, response=True, serving=serving)

    def _done(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        for at, effect in enumerate(effects):
            if isinstance(effect, InstallSa) and (child := self.children.get(effect.child_id)) is not None:
                child.at_risk = tuple(later for later in effects[at + 1 :] if isinstance(later, RemoveSa | ChildClosed))
                if effect.sa.direction is Direction.IN and effect.sa.destination != self.path.local.address:
                    mobike.move_child(self, child)
        effects += self.effects
        self.effects = []
        if self.closed:
            self.active = self._outstanding = self._serving = self._answering = self._fallback = None
            self._fragments_of_request.clear()
            self._fragments_of_response.clear()
        return effects


def _piece(message: Message, datagram: bytes) -> int:
    return len(datagram) if isinstance(message.encrypted, SkfPayload) else 0
