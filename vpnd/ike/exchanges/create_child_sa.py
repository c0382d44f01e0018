"""CREATE_CHILD_SA (RFC 7296 section 1.3): further CHILD_SAs, with and without a key exchange of their own, and the peer's rekeying."""

from __future__ import annotations

from vpnd.ike.child import Agreed, Asked, ChildRefused, Keying, Offer, allocation, answer_payloads, build, choose, make_offer, read_answer
from vpnd.ike.cookie import NONCE_MAXIMUM, NONCE_MINIMUM
from vpnd.ike.crypto.dh import group, implemented_groups
from vpnd.ike.effects import ChildDenied, Reason
from vpnd.ike.exchanges.informational import delete_spi
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.session import NONCE_LENGTH, Ask, Response, Session, Steps, Task, allocate, ask, error_name, first_error, reason_of
from vpnd.ike.state import MAX_CHILDREN, Child, ChildSaState, IkeSaState
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NoncePayload, NotifyPayload, Payload, SaPayload

# Initiator


def create_child(session: Session, task: Task) -> Steps[None]:
    """Bring up the CHILD_SA of `task`."""
    assert task.child is not None
    offer: Offer | None = None
    try:
        offer = yield from make_offer(session, task.child, key_exchange=True)
        yield from _negotiate(session, task, offer)
    except ChildRefused as refused:
        session.give_back(offer.spi if offer else None)
        session.fail_child(task, refused.reason, refused.detail)


def _negotiate(session: Session, task: Task, offer: Offer) -> Steps[None]:
    groups = [number for proposal in offer.proposals for number in proposal.groups if number in implemented_groups()]
    exchange = group(groups[0]).initiate(session.context.entropy) if groups else None
    tried = {exchange.group} if exchange else set()
    nonce = session.context.entropy(NONCE_LENGTH)
    session.early_deletes.clear()
    while True:
        # HDR, SK {SA, Ni, [KEi,] TSi, TSr} -->   <-- HDR, SK {SA, Nr, [KEr,] TSi, TSr}
        sa, *rest = offer.payloads()
        key_exchange: list[Payload] = [KePayload(exchange.group, exchange.public)] if exchange else []
        response = yield from ask(Ask(Exchange.CREATE_CHILD_SA, (sa, NoncePayload(nonce), *key_exchange, *rest)))
        other = response.notify(NotifyType.INVALID_KE_PAYLOAD)
        wanted = int.from_bytes(other.data, "big") if other is not None else 0
        # RFC 7296 section 1.3: try again with the group that the peer wants, if it is one of ours
        if wanted not in groups or wanted in tried:
            break
        exchange = group(wanted).initiate(session.context.entropy)
        tried.add(wanted)
    error = first_error(response)
    if error is not None:
        raise ChildRefused(reason_of(error), 0, detail=f"peer answered with {error_name(error)}")
    if any(proposal.spi in session.early_deletes for payload in response.all(SaPayload) for proposal in payload.proposals):
        raise ChildRefused(Reason.PEER_DELETED, 0, detail="the peer deleted it before its answer came")
    try:
        agreed = read_answer(session, offer, response)
        nonce_r, ke = response.first(NoncePayload), response.first(KePayload)
        if nonce_r is None or not NONCE_MINIMUM <= len(nonce_r.data) <= NONCE_MAXIMUM:
            raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="no nonce")
        shared = None
        if agreed.proposal.groups:
            if exchange is None or ke is None or ke.group != exchange.group or ke.group not in agreed.proposal.groups:
                raise ChildRefused(Reason.INVALID_KE_PAYLOAD, NotifyType.INVALID_SYNTAX, detail="the peer's key exchange is not that of the proposal")
            try:
                shared = exchange.complete(ke.data)
            except MalformedMessage as invalid:
                raise ChildRefused(Reason.INVALID_SYNTAX, invalid.notify, detail="invalid public value") from invalid
    except ChildRefused:
        # RFC 7296 section 2.9: the peer thinks that it stands, so it is deleted on the wire
        delete_spi(session, offer.spi.spi)
        raise
    finish(session, task, agreed, offer, Keying(nonce, nonce_r.data, True, shared))


def finish(session: Session, task: Task, agreed: Agreed, offer: Offer, keying: Keying) -> None:
    """Install what an answer of the peer agreed to."""
    session.install(build(session, agreed, offer.spi, keying))
    task.child = None


# Responder


def respond(session: Session, request: Message) -> Steps[Response]:
    """A new CHILD_SA, or a rekeyed one, for the peer."""
    sa = request.first(SaPayload)
    # RFC 7296 section 2.25.2: no new SAs while the IKE SA is being deleted
    if session.state is not IkeSaState.ESTABLISHED:
        return Response((NotifyPayload(NotifyType.TEMPORARY_FAILURE),))
    # RFC 7296 section 1.3.2: an IKE SA is not rekeyed in place of the peer's
    if sa is not None and any(proposal.protocol == ProtocolId.IKE for proposal in sa.proposals):
        return Response((NotifyPayload(NotifyType.NO_ADDITIONAL_SAS),))
    if len(session.children) >= MAX_CHILDREN:
        return Response((NotifyPayload(NotifyType.NO_ADDITIONAL_SAS),))
    try:
        return (yield from _respond(session, request))
    except ChildRefused as refused:
        session.emit(ChildDenied(refused.reason, refused.detail))
        return Response((refused.payload,))
    except MalformedMessage as error:
        return Response((NotifyPayload(error.notify, error.data),))


def _respond(session: Session, request: Message) -> Steps[Response]:
    replaced = _rekeyed(session, request)
    nonce_i, ke = request.first(NoncePayload), request.first(KePayload)
    if nonce_i is None or not NONCE_MINIMUM <= len(nonce_i.data) <= NONCE_MAXIMUM:
        raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="no nonce")
    asked = choose(session, request, key_exchange=True, ke_group=ke.group if ke else None, like=replaced)
    groups = asked.agreed.proposal.groups
    shared, key_exchange = None, []
    if groups:
        # RFC 7296 section 1.3: the group that we chose, in two octets
        if ke is None or ke.group != groups[0]:
            raise ChildRefused(Reason.INVALID_KE_PAYLOAD, NotifyType.INVALID_KE_PAYLOAD, groups[0].to_bytes(2, "big"))
        public, shared = group(groups[0]).respond(ke.data, session.context.entropy)
        key_exchange = [KePayload(groups[0], public)]
    nonce_r = session.context.entropy(NONCE_LENGTH)
    child, payloads = yield from bring_up(session, asked, Keying(nonce_i.data, nonce_r, False, shared))
    if replaced is not None:
        replaced.state = ChildSaState.REKEYED
    sa, *rest = payloads
    return Response((sa, NoncePayload(nonce_r), *key_exchange, *rest), child, (NotifyPayload(NotifyType.TEMPORARY_FAILURE),))


def bring_up(session: Session, asked: Asked, keying: Keying) -> Steps[tuple[Child, list[Payload]]]:
    """Reserve our SPI and build the SAs; with the payloads of the answer. Raises ChildRefused."""
    agreed = asked.agreed
    spi = yield from allocate(session, allocation(session, agreed.config, agreed.reqid))
    if spi is None:
        raise ChildRefused(Reason.KERNEL_REFUSED, NotifyType.TEMPORARY_FAILURE, detail="no SPI")
    return build(session, agreed, spi, keying), answer_payloads(asked, spi)


def _rekeyed(session: Session, request: Message) -> Child | None:
    rekey = request.notify(NotifyType.REKEY_SA)
    if rekey is None:
        return None
    child = session.child_by_outbound(rekey.spi) if rekey.protocol == ProtocolId.ESP else None
    # RFC 7296 section 2.25: no such CHILD_SA (any more)
    if child is None:
        notify = NotifyPayload(NotifyType.CHILD_SA_NOT_FOUND, b"", rekey.protocol, rekey.spi)
        raise _NotFound(notify)
    # RFC 7296 section 2.25.1: we are deleting it
    if child.state is ChildSaState.DELETING:
        raise ChildRefused(Reason.TEMPORARY_FAILURE, NotifyType.TEMPORARY_FAILURE)
    return child


class _NotFound(ChildRefused):
    def __init__(self, notify: NotifyPayload) -> None:
        super().__init__(Reason.PEER_ERROR, notify.type)
        self._notify = notify

    @property
    def payload(self) -> NotifyPayload:
        return self._notify
