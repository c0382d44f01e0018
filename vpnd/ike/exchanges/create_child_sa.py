"""CREATE_CHILD_SA (RFC 7296 section 1.3): further CHILD_SAs, with and without a key exchange of their own, and their rekeying."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final

from kernel_shim.model import SaId
from kernel_shim.secret import Secret
from vpnd.ike import succession
from vpnd.ike.child import SPI_LENGTH, Agreed, Asked, ChildRefused, Keying, Offer, allocation, answer_payloads, build, choose, make_offer, read_answer
from vpnd.ike.context import ChildRequest
from vpnd.ike.crypto.groups import group, implemented_groups
from vpnd.ike.effects import ChildDenied, Reason, RekeyFailed
from vpnd.ike.exchanges import rekey_ike
from vpnd.ike.exchanges.ike_followup_ke import PASSING, KeyExchangeFailed, follow_up, room, wait_for
from vpnd.ike.exchanges.informational import delete_spi
from vpnd.ike.followup import Followup
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.session import Session
from vpnd.ike.state import MAX_CHILDREN, Child, ChildSaState, IkeSaState
from vpnd.ike.steps import NONCE_LENGTH, Ask, Response, Steps, Task, allocate, ask, error_name, first_error, reason_of
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NoncePayload, NotifyPayload, Payload, SaPayload

CREATE_RETRIES: Final = 3  # about 5 s, while packets wait

# Initiator


def create_child(session: Session, task: Task) -> Steps[None]:
    """Bring up the CHILD_SA of `task`."""
    assert task.child is not None
    offer: Offer | None = None
    try:
        offer = yield from make_offer(session, task.child, key_exchange=True)
        agreed, keying = yield from _negotiate(session, offer)
    except ChildRefused as refused:
        session.give_back(offer.spi if offer else None)
        # RFC 7296 section 2.25: the peer is about something that will be done soon, unless it made the CHILD_SA and deleted it again
        if refused.answer in PASSING and not session.early_deletes and session.postpone(task, CREATE_RETRIES):
            return
        session.fail_child(task, refused.reason, refused.detail)
        return
    finish(session, task, agreed, offer, keying)


def rekey_child(session: Session, task: Task) -> Steps[None]:
    """Replace the CHILD_SA `task.target`, which is REKEYING."""
    old = session.children.get(task.target)
    if old is None or old.state is not ChildSaState.REKEYING:
        return
    task.rival, task.asked = None, False
    request = ChildRequest(old.config, reqid=old.sa.reqid)
    rekey = NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, old.sa.inbound.spi.to_bytes(SPI_LENGTH, "big"))
    offer: Offer | None = None
    try:
        offer = yield from make_offer(session, request, key_exchange=True, like=old)
        # the peer deleted or rekeyed it while the kernel thought
        if session.children.get(task.target) is not old or old.state is not ChildSaState.REKEYING:
            session.give_back(offer.spi)
            return
        try:
            agreed, keying = yield from _negotiate(session, offer, rekey)
        except ChildRefused as refused:
            # RFC 7296 section 2.25: the peer has it no more, so a new one is made from scratch
            if refused.answer != NotifyType.CHILD_SA_NOT_FOUND or not _still_ours(session, task, old):
                raise
            agreed, keying = yield from _negotiate(session, offer)
            if not _still_ours(session, task, old):
                # the deletion that explains the answer came meanwhile
                session.give_back(offer.spi)
                delete_spi(session, offer.spi.spi)
                return
            # for the peer it came of no other, so it is judged like any new one
            succession.install(session, build(session, agreed, offer.spi, keying))
            succession.close(session, old, Reason.PEER_DELETED)
            return
    except ChildRefused as refused:
        session.give_back(offer.spi if offer else None)
        _not_rekeyed(session, task, old, refused)
        return
    _rekeyed_by_us(session, task, old, agreed, offer, keying)


def _still_ours(session: Session, task: Task, old: Child) -> bool:
    return session.children.get(task.target) is old and old.state is ChildSaState.REKEYING and task.rival is None


def _not_rekeyed(session: Session, task: Task, old: Child, refused: ChildRefused) -> None:
    if session.children.get(task.target) is not old or old.state is not ChildSaState.REKEYING:
        return
    # RFC 7296 section 2.8.1: the peer refused ours because its own was done already
    if task.rival is not None and task.rival.child_id in session.children:
        succession.give_way(session, task, old)
        return
    if refused.answer in PASSING:
        if session.postpone(task):
            session.emit(RekeyFailed(old.sa.id, refused.reason, refused.detail))
            return
        # RFC 7296 section 2.25: after several minutes the two sides are out of step
        session.wind_up(Reason.TEMPORARY_FAILURE)
        return
    old.state = ChildSaState.INSTALLED
    session.rekey_later(old)
    session.emit(RekeyFailed(old.sa.id, refused.reason, refused.detail))


def _rekeyed_by_us(session: Session, task: Task, old: Child, agreed: Agreed, offer: Offer, keying: Keying) -> None:
    if succession.in_vain(session, task, old, min(keying.nonce_i, keying.nonce_r)):
        session.give_back(offer.spi)
        delete_spi(session, offer.spi.spi)
        succession.give_way(session, task, old)
        return
    succession.install(session, build(session, agreed, offer.spi, keying, old), old)
    succession.take_place(session, task, old)


def _negotiate(session: Session, offer: Offer, *first: Payload) -> Steps[tuple[Agreed, Keying]]:
    """Ask until the peer agrees. `first` goes before everything else. Raises ChildRefused; what stands only at the peer is deleted there."""
    groups = [number for proposal in offer.proposals for number in proposal.groups if number in implemented_groups()]
    exchange = group(groups[0]).initiate(session.context.entropy) if groups else None
    tried = {exchange.group} if exchange else set()
    nonce = session.context.entropy(NONCE_LENGTH)
    session.early_deletes.clear()
    while True:
        # HDR, SK {[N(REKEY_SA),] SA, Ni, [KEi,] TSi, TSr} -->   <-- HDR, SK {SA, Nr, [KEr,] TSi, TSr}
        sa, *rest = offer.payloads()
        key_exchange: list[Payload] = [KePayload(exchange.group, exchange.public)] if exchange else []
        response = yield from ask(Ask(Exchange.CREATE_CHILD_SA, (*first, sa, NoncePayload(nonce), *key_exchange, *rest)))
        other = response.notify(NotifyType.INVALID_KE_PAYLOAD)
        wanted = int.from_bytes(other.data, "big") if other is not None else 0
        # RFC 7296 section 1.3: try again with the group that the peer wants, if it is one of ours
        if wanted not in groups or wanted in tried:
            break
        exchange = group(wanted).initiate(session.context.entropy)
        tried.add(wanted)
    error = first_error(response)
    if error is not None:
        raise ChildRefused(reason_of(error), 0, detail=f"peer answered with {error_name(error)}", answer=error.type)
    _check_early_delete(session, response)
    try:
        agreed = read_answer(session, offer, response)
        nonce_r, ke = response.first(NoncePayload), response.first(KePayload)
        if nonce_r is None:
            raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="no nonce")
        shared: tuple[Secret, ...] = ()
        if agreed.proposal.groups:
            if exchange is None or ke is None or ke.group != exchange.group or ke.group not in agreed.proposal.groups:
                raise ChildRefused(Reason.INVALID_KE_PAYLOAD, NotifyType.INVALID_SYNTAX, detail="the peer's key exchange is not that of the proposal")
            try:
                shared = (exchange.complete(ke.data),)
            except MalformedMessage as invalid:
                raise ChildRefused(Reason.INVALID_SYNTAX, invalid.notify, detail="invalid public value") from invalid
        try:
            shared += yield from follow_up(session, agreed.proposal.additional, response)
        except KeyExchangeFailed as failed:
            raise ChildRefused(failed.reason, 0, detail=failed.detail, answer=failed.answer) from failed
    except ChildRefused as refused:
        # RFC 7296 section 2.9: the peer thinks that it stands, so it is deleted on the wire
        if not refused.answer:
            delete_spi(session, offer.spi.spi)
        raise
    _check_early_delete(session, response)
    return agreed, Keying(nonce, nonce_r.data, True, shared)


def _check_early_delete(session: Session, response: Message) -> None:
    if any(proposal.spi in session.early_deletes for payload in response.all(SaPayload) for proposal in payload.proposals):
        raise ChildRefused(Reason.PEER_DELETED, 0, detail="the peer deleted it before its answer came")


def finish(session: Session, task: Task, agreed: Agreed, offer: Offer, keying: Keying) -> None:
    """Install what an answer of the peer agreed to."""
    succession.install(session, build(session, agreed, offer.spi, keying))
    task.child = None


# Responder


def respond(session: Session, request: Message) -> Steps[Response]:
    """A new CHILD_SA, or a rekeyed one, for the peer."""
    sa = request.first(SaPayload)
    if sa is not None and any(proposal.protocol == ProtocolId.IKE for proposal in sa.proposals):
        return rekey_ike.respond(session, request)
    try:
        _check_room(session)
        return (yield from _respond(session, request))
    except ChildRefused as refused:
        session.emit(ChildDenied(refused.reason, refused.detail))
        return Response((refused.payload,))
    except MalformedMessage as error:
        return Response((NotifyPayload(error.notify, error.data),))


def _respond(session: Session, request: Message) -> Steps[Response]:
    replaced = _rekeyed(session, request)
    nonce_i, ke = request.first(NoncePayload), request.first(KePayload)
    if nonce_i is None:
        raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="no nonce")
    asked = choose(session, request, key_exchange=True, ke_group=ke.group if ke else None, like=replaced)
    groups, additional = asked.agreed.proposal.groups, asked.agreed.proposal.additional
    if additional and not groups:
        raise ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail="additional key exchanges without a first one")
    if additional and not room(session):
        raise ChildRefused(Reason.TEMPORARY_FAILURE, NotifyType.TEMPORARY_FAILURE, detail="too many requests wait for key exchanges")
    shared: tuple[Secret, ...] = ()
    key_exchange = []
    if groups:
        # RFC 7296 section 1.3: the group that we chose, in two octets
        if ke is None or ke.group != groups[0]:
            raise ChildRefused(Reason.INVALID_KE_PAYLOAD, NotifyType.INVALID_KE_PAYLOAD, groups[0].to_bytes(2, "big"))
        public, secret = group(groups[0]).respond(ke.data, session.context.entropy)
        shared, key_exchange = (secret,), [KePayload(groups[0], public)]
    nonce_r = session.context.entropy(NONCE_LENGTH)
    spi = yield from _reserve(session, asked.agreed)
    sa, *rest = answer_payloads(asked, spi)
    answer: list[Payload] = [sa, NoncePayload(nonce_r), *key_exchange, *rest]

    def complete(secrets: tuple[Secret, ...]) -> Response:
        try:
            # while the kernel thought, or the peer, it may have gone, or our own rekeying of it may have come to its end
            if replaced is not None:
                _rekeyed(session, request)
            if additional:
                _check_room(session)
        except ChildRefused:
            session.give_back(spi)
            raise
        child = build(session, asked.agreed, spi, Keying(nonce_i.data, nonce_r, False, secrets), replaced)
        if replaced is not None:
            succession.replaced_by_peer(session, replaced, child)
        return Response((), child, (NotifyPayload(NotifyType.TEMPORARY_FAILURE),))

    if not additional:
        return replace(complete(shared), payloads=tuple(answer))

    def finish(secrets: tuple[Secret, ...]) -> Steps[Response]:
        yield from ()
        try:
            return complete(secrets)
        except ChildRefused as refused:
            session.emit(ChildDenied(refused.reason, refused.detail))
            return Response((refused.payload,))

    followup = Followup(deque(additional), list(shared), finish, lambda: session.give_back(spi))
    return Response((*answer, wait_for(session, followup)))


def _check_room(session: Session) -> None:
    # RFC 7296 section 2.25.2: no new SAs while the IKE SA is being rekeyed or deleted
    if session.state is not IkeSaState.ESTABLISHED:
        raise ChildRefused(Reason.TEMPORARY_FAILURE, NotifyType.TEMPORARY_FAILURE)
    if len(session.children) >= MAX_CHILDREN:
        raise ChildRefused(Reason.NO_ADDITIONAL_SAS, NotifyType.NO_ADDITIONAL_SAS)


def bring_up(session: Session, asked: Asked, keying: Keying) -> Steps[tuple[Child, list[Payload]]]:
    """Reserve our SPI and build the SAs; with the payloads of the answer. Raises ChildRefused."""
    spi = yield from _reserve(session, asked.agreed)
    return build(session, asked.agreed, spi, keying), answer_payloads(asked, spi)


def _reserve(session: Session, agreed: Agreed) -> Steps[SaId]:
    spi = yield from allocate(session, allocation(session, agreed.config, agreed.reqid))
    if spi is None:
        raise ChildRefused(Reason.KERNEL_REFUSED, NotifyType.TEMPORARY_FAILURE, detail="no SPI")
    return spi


def _rekeyed(session: Session, request: Message) -> Child | None:
    rekey = request.notify(NotifyType.REKEY_SA)
    if rekey is None:
        return None
    child = session.child_by_outbound(rekey.spi) if rekey.protocol == ProtocolId.ESP else None
    making = session.active is not None and session.active.asked and session.active.name in ("CHILD_CREATE", "CHILD_REKEY")
    # it may be the one that we asked for: the peer has made it, and its answer is on its way
    if child is None and making:
        raise ChildRefused(Reason.TEMPORARY_FAILURE, NotifyType.TEMPORARY_FAILURE)
    # RFC 7296 section 2.25: no such CHILD_SA (any more)
    if child is None:
        notify = NotifyPayload(NotifyType.CHILD_SA_NOT_FOUND, b"", rekey.protocol, rekey.spi)
        raise _NotFound(notify)
    # RFC 7296 section 2.25.1: we are deleting it; unless that is because we rekeyed it, and then this is the late half of section 2.8.1
    # (strongSwan 5.9 would be left without an SA out if it were refused)
    if child.state is ChildSaState.DELETING and succession.ours_in_place_of(session, child) is None:
        raise ChildRefused(Reason.TEMPORARY_FAILURE, NotifyType.TEMPORARY_FAILURE)
    return child


class _NotFound(ChildRefused):
    def __init__(self, notify: NotifyPayload) -> None:
        super().__init__(Reason.PEER_ERROR, notify.type)
        self._notify = notify

    @property
    def payload(self) -> NotifyPayload:
        return self._notify
