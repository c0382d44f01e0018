"""What the exchanges of an IKE SA share: its state."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from kernel_shim.model import Endpoint, IPAddress, SaId
from vpnd.config.model import ConnectionConfig
from vpnd.ike import handover, succession
from vpnd.ike.context import IkeContext
from vpnd.ike.effects import (
    ChildFailed,
    Effect,
    IkeClosed,
    IkeEstablished,
    Reason,
    RemoveSa,
)
from vpnd.ike.followup import Followup
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import CertEncoding
from vpnd.ike.identity import Identity
from vpnd.ike.intermediate import Intermediate
from vpnd.ike.marking import SharedIfIds
from vpnd.ike.nat import detect
from vpnd.ike.proposal import Proposal
from vpnd.ike.resumption import NEVER, Resumable
from vpnd.ike.state import Child, Children, IkeSaState
from vpnd.ike.steps import IkeCrypto, Task
from vpnd.ike.wire.header import IkeSpi
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import CertReqPayload
from vpnd.schedule import Deadlines

MAX_EARLY_DELETES: Final = 16  # of one exchange; a peer makes one CHILD_SA in it
MAX_AUTHORITIES: Final = 256  # hashes of a CERTREQ that are looked at

# RFC 7296 section 2.25: after TEMPORARY_FAILURE an exchange is tried again, later and later, over several minutes
RETRY_FIRST: Final = 1.0  # s; doubles
RETRY_LAST: Final = 15.0  # s
RETRIES: Final = 24  # about 5 minutes
# ends after which tickets stay good
RESUMABLE: Final = frozenset({Reason.PEER_SILENT, Reason.ADDRESS_GONE, Reason.REKEYED, Reason.REPLACED, Reason.KERNEL_LOST, Reason.SHUTDOWN})

REKEY_AGAIN: Final = 30.0  # s, after a rekeying was refused for good


class Path(NamedTuple):
    """Between which addresses CHILD_SAs are, and whether with UDP encapsulation (RFC 3948)."""

    local: Endpoint
    remote: Endpoint
    encapsulated: bool


class Origin(NamedTuple):
    """Of the first of the IKE SAs that followed each other by rekeying: when it stood, and its initiator's SPI."""

    at: float
    spi: int


class Session:
    """The state of an IKE SA. Only its exchanges and its driver write to it."""

    def __init__(self, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, *, initiator: bool, now: float) -> None:
        self.context: Final = context
        self.unique_id: int = context.new_ike_id()
        self.initiator: Final = initiator
        self.connection = connection
        self.candidates: Sequence[ConnectionConfig] = (connection,)  # of a responder, until the peer's identity is known
        self.local = local
        self.remote = remote
        self.spi_local: int = context.new_ike_spi(self)
        self.spi_remote: int = 0
        self.state = IkeSaState.CREATED
        self.local_id: Identity | None = None
        self.remote_id: Identity | None = None
        self.proposal: Proposal | None = None
        self.nat_local = False
        self.nat_remote = False
        self.nat_fake = False
        self.nat_supported = False  # the peer does NAT traversal
        self.created_at = now
        self.established_at: float | None = None
        self.close_reason: Reason | None = None
        self.deleting_for = Reason.DELETED  # while it is DELETING
        self.children = Children()
        # for the exchanges
        self.now = now
        self.crypto: IkeCrypto | None = None
        self.received = b""  # the datagram that is being dealt with; of a message in fragments the last one that came
        self.init_request = b""
        self.init_response = b""
        self.nonce_i = b""
        self.nonce_r = b""
        self.fragmentation = False  # both sides know IKE fragmentation, and we are to use it
        self.intermediate = Intermediate()
        self.redirected_from: GatewayId | None = None  # who sent us here
        self.redirectable = False  # the peer, who initiated, follows redirections
        self.departs_at: float | None = None  # it was redirected; it is deleted by us if that takes until then
        self.crash_token = b""  # the peer's, of this IKE SA
        self.origin: Origin | None = None  # once it is established
        self.original_initiator = initiator  # of the first of the IKE SAs that followed each other by rekeying
        self.mobike = False  # both sides know MOBIKE
        self.peer_addresses: tuple[IPAddress, ...] = ()  # besides the one that is in use
        self.told_addresses: tuple[IPAddress, ...] = ()  # ours that the peer was told
        self.proven: Path | None = None  # where the peer was, while it is not known that it is at `remote`
        self.claims = 0  # of the peer's, to be elsewhere
        self.mapping_hash = b""  # what the peer last saw as our address, hashed
        self.arrived = (local, remote)  # the way of the datagram that is being dealt with
        self.peer_knows_ppk = False  # it said USE_PPK (RFC 8784), and so did we
        self.ppk = False  # the keys have a post-quantum pre-shared key mixed in
        self.resumed: Resumable | None = None  # what it was made of, without a key exchange (RFC 5723)
        self.authenticated_at = now  # when the peers last proved who they are, itself or an IKE SA before it
        self.proof_ends = NEVER  # when the certificate that the peer proved itself with is no longer valid
        self.ticket_id = b""  # of the ticket that we gave the peer
        self.childless = False  # no CHILD_SA is wanted of IKE_AUTH
        self.peer_childless = False  # it takes an IKE_AUTH without a CHILD_SA (RFC 6023)
        self.peer_hashes: tuple[int, ...] = ()  # the peer's SIGNATURE_HASH_ALGORITHMS
        self.peer_asks_certificate = False
        self.peer_authorities: frozenset[bytes] = frozenset()  # SHA-1 of the public keys that its CERTREQ names
        self.queue: deque[Task] = deque()
        self.active: Task | None = None
        self.held: set[SaId] = set()  # larval SPIs that belong to no CHILD_SA yet
        self.early_deletes: set[bytes] = set()  # SPIs that the peer deleted before its answer that made them arrived
        self.rekey_at: float | None = None
        self.reauth_at: float | None = None  # survives a rekeying, as does its end
        self.reauth_end: float | None = None
        self.asked_first = initiator  # authenticated as the initiator, whoever rekeyed since
        self.ends_at: float | None = None  # the peer is to delete it; it is deleted by us if that takes until then
        self.heir: Self | None = None  # has our CHILD_SAs
        self.predecessor: Session | None = None  # until it is closed
        self.undecided: Session | None = None  # the peer's rekeying of that IKE SA made it, and ours is still on the wire
        self.overtaken = False  # the peer uses the IKE SA that its own rekeying made
        self.postponed: dict[Task, None] = {}
        # CHILD_SAs to rekey, postponed exchanges to begin, requests whose key exchanges do not come
        self.later: Deadlines[int | Task | Followup] = Deadlines()
        self.followups: dict[bytes, Followup] = {}  # by link: requests of the peer's that wait for their key exchanges
        self.if_ids = SharedIfIds()
        self.tokens = 0
        self.effects: list[Effect] = []

    # Names

    @property
    def spi_initiator(self) -> int:
        return self.spi_local if self.initiator else self.spi_remote

    @property
    def spi_responder(self) -> int:
        return self.spi_remote if self.initiator else self.spi_local

    @property
    def wire_spi_i(self) -> IkeSpi:
        return IkeSpi(self.spi_initiator.to_bytes(8, "big"))

    @property
    def wire_spi_r(self) -> IkeSpi:
        return IkeSpi(self.spi_responder.to_bytes(8, "big"))

    @property
    def closed(self) -> bool:
        return self.close_reason is not None

    @property
    def half_open(self) -> bool:
        """A responder that has not authenticated its peer."""
        return not self.initiator and self.established_at is None

    @property
    def force_encapsulation(self) -> bool:
        kernel, wanted = self.context.capabilities, self.connection.encap
        return kernel.encapsulation_required or (kernel.encapsulation_preferred if wanted is None else wanted)

    @property
    def encapsulated(self) -> bool:
        """Whether ESP goes in UDP (RFC 3948)."""
        return self.nat_supported and (self.nat_local or self.nat_remote or self.nat_fake)

    @property
    def path(self) -> Path:
        """Of CHILD_SAs, present and new: no data goes where the peer only claims to be (RFC 4555 section 3.7)."""
        return self.proven or Path(self.local, self.remote, self.encapsulated)

    @property
    def keys(self) -> IkeCrypto:
        assert self.crypto is not None  # every exchange but IKE_SA_INIT has keys
        return self.crypto

    def describe(self) -> str:
        """For a log line: connection, peer, identity."""
        return f"{self.connection.name}: peer {self.remote} ({self.remote_id or 'identity unknown'})"

    # Effects

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def notice_nat(self, message: Message, spi_i: bytes, spi_r: bytes, local: Endpoint, remote: Endpoint) -> None:
        """RFC 7296 section 2.23: read the peer's NAT_DETECTION notifications."""
        found = detect(message, spi_i, spi_r, local, remote)
        self.nat_supported = found is not None
        self.nat_local, self.nat_remote = found or (False, False)
        self.nat_fake = self.nat_supported and self.force_encapsulation

    def notice_certificate_requests(self, message: Message) -> None:
        # RFC 7296 section 3.7: a run of hashes of 20 octets
        for payload in message.all(CertReqPayload):
            if payload.encoding == CertEncoding.X509_SIGNATURE:
                self.peer_asks_certificate = True
                data = payload.data[: 20 * MAX_AUTHORITIES]
                self.peer_authorities |= {data[at : at + 20] for at in range(0, len(data), 20)}

    def stand(self) -> None:
        """From now on it has a lifetime (RFC 7296 section 2.8); a random part comes off, so that IKE SAs made together are not renewed together."""
        self.state = IkeSaState.ESTABLISHED
        self.established_at = self.now
        self.origin = self.origin or Origin(self.now, self.spi_initiator)
        if self.connection.rekey_time:
            self.rekey_at = self.now + max(0.0, self.connection.rekey_time - self.connection.rand_time * self.random())

    def established(self) -> None:
        self.stand()
        if self.resumed is None:
            self.authenticated_at = self.now
        self.init_request = self.init_response = b""  # both AUTH payloads are done with them
        self.emit(IkeEstablished())

    def close(self, reason: Reason, detail: str = "") -> None:
        """The end: everything that hangs on the IKE SA goes, and the peer hears nothing of it."""
        if self.closed:
            return
        theirs = handover.rival_ike(self)
        if theirs is not None and self.heir is None:
            # the peer rekeyed it as well, and what it made has to stand on its own now
            if reason is Reason.PEER_SILENT:
                handover.hand_over(self, theirs)
            else:
                handover.end_by(self, theirs, self.now)
        self.close_reason = reason
        self.predecessor = None
        if self.heir is not None and self.heir.predecessor is self:
            self.heir.predecessor = None
        self.state = IkeSaState.DESTROYING
        self.forget_followups()
        self._void_tickets(reason)
        for sa_id in sorted(self.held):
            self.emit(RemoveSa(sa_id))
        self.held.clear()
        for child in list(self.children.values()):
            succession.close(self, child, reason)
        for task in (self.active, *self.queue, *self.postponed):
            if task is not None and task.child is not None:
                self.fail_child(task, reason, detail)
        self.queue.clear()
        self.postponed.clear()
        self.emit(IkeClosed(reason, detail))

    def _void_tickets(self, reason: Reason) -> None:
        """An IKE SA that ended on purpose, or with a refusal, is not resumed."""
        if self.asked_first and reason not in RESUMABLE:
            self.context.resumption.wallet.drop(self.connection.name)
        if reason not in RESUMABLE or reason is Reason.REKEYED:
            self.spend_ticket()

    def spend_ticket(self) -> None:
        """The one that we gave the peer does not open any more."""
        if self.ticket_id:
            self.context.resumption.office.spend(self.ticket_id, self.now)
            self.ticket_id = b""

    def forget_followups(self) -> None:
        """The requests of the peer's that wait for key exchanges are answered with STATE_NOT_FOUND from now on."""
        for followup in list(self.followups.values()):
            self.forget_followup(followup)

    def forget_followup(self, followup: Followup) -> None:
        self.later.set(followup, None)
        if self.followups.pop(followup.link, None) is not None:
            followup.give_up()

    def wind_up(self, reason: Reason) -> None:
        """Delete the IKE SA on the wire."""
        raise NotImplementedError

    def retire(self, child: Child, reason: Reason, *, answered: bool = False) -> None:
        """Queue the deletion of a CHILD_SA on the wire. `answered`: not before the peer has our last answer, or seems to."""
        raise NotImplementedError

    def probe_peer(self) -> None:
        """Queue a request, whatever it says, unless one waits."""
        raise NotImplementedError

    def repeat_request(self) -> None:
        """Send the request that is under way again, over the path that is the present one."""
        raise NotImplementedError

    def reconfigure(self, old: ConnectionConfig, new: ConnectionConfig) -> None:
        """Its children are others now: whoever was, or is being, authenticated by `old` negotiates by `new` from now on."""
        if self.connection is old:
            self.connection = new
        self.candidates = tuple(new if candidate is old else candidate for candidate in self.candidates)

    # Exchanges that wait

    def postpone(self, task: Task, limit: int = RETRIES) -> bool:
        """Begin the exchange anew after a while; False when it has been tried often enough."""
        if task.attempts >= limit or self.state is IkeSaState.DELETING:
            return False
        delay = min(RETRY_FIRST * 2**task.attempts, RETRY_LAST)
        task.attempts += 1
        self.put_off(task, delay * (0.5 + self.random() / 2))
        return True

    def put_off(self, task: Task, delay: float) -> None:
        """Begin the exchange after so many seconds."""
        self.postponed[task] = None
        self.later.set(task, self.now + delay)

    def call_off(self, task: Task) -> None:
        """An exchange that was put off is not begun."""
        del self.postponed[task]
        self.later.set(task, None)

    # CHILD_SAs

    def hold(self, sa_id: SaId) -> SaId:
        self.held.add(sa_id)
        return sa_id

    def give_back(self, sa_id: SaId | None) -> None:
        if sa_id is not None and sa_id in self.held:
            self.held.discard(sa_id)
            self.emit(RemoveSa(sa_id))

    def has_twin(self, child: Child) -> bool:
        """Whether another CHILD_SA sends the same packets to the same peer, perhaps one of another IKE SA."""
        return self.context.twins.sends(self.local_id, self.remote_id, child.sa)

    def rekey_later(self, child: Child) -> None:
        """After a rekeying that failed: again, while the SA lasts."""
        self.later.set(child.sa.id, self.now + REKEY_AGAIN * (0.5 + self.random() / 2))

    def fail_child(self, task: Task, reason: Reason, detail: str = "") -> None:
        if task.child is not None:
            self.emit(ChildFailed(task.child.child.name, reason, detail, task.child.acquire))
            task.child = None

    def child_by_outbound(self, spi: bytes) -> Child | None:
        """The CHILD_SA whose SPI the peer says: that of its own inbound SA."""
        return self.children.by_spi_out(int.from_bytes(spi, "big"))

    def random(self) -> float:
        """In [0, 1)."""
        return int.from_bytes(self.context.entropy(4), "big") / 2**32
