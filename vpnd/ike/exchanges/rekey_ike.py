"""Rekeying of the IKE SA (RFC 7296 sections 1.3.2, 2.8, 2.8.2, 2.18 and 2.25.2).

A new IKE SA takes the CHILD_SAs over; the old one answers until its rekeyer deletes it. When both sides rekey at once,
two new ones stand for a moment: the one that was made with the lowest of the four nonces is deleted by who asked for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from kernel_shim.secret import Secret
from vpnd.ike import handover
from vpnd.ike.crypto.groups import group, implemented_groups
from vpnd.ike.effects import IkeOpened, Reason, RekeyFailed
from vpnd.ike.exchanges import crash_detection, ike_session_resume
from vpnd.ike.exchanges.ike_followup_ke import PASSING, KeyExchangeFailed, follow_up, room, wait_for
from vpnd.ike.followup import Followup
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.keymat import IkeSuite, ike_keys, rekey_skeyseed
from vpnd.ike.proposal import Proposal, accept, number_proposals, select
from vpnd.ike.session import REKEY_AGAIN, Session
from vpnd.ike.state import MAX_TASKS, IkeSaState
from vpnd.ike.steps import NONCE_LENGTH, Ask, IkeCrypto, Response, Rival, Steps, Task, ask, error_name, first_error, reason_of
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NoncePayload, NotifyPayload, Payload, SaPayload

SPI_LENGTH: Final = 8  # RFC 7296 section 3.3.1: of an IKE SA in a proposal

REPLACED_TIMEOUT: Final = 180.0  # s, after which we delete an IKE SA that the peer should have deleted; longer than it retransmits
OF_CHILDREN: Final = frozenset({"CHILD_CREATE", "CHILD_REKEY", "CHILD_DELETE"})


class _Refused(Exception):
    """No new IKE SA comes of it. `answer`: what the peer said."""

    def __init__(self, reason: Reason, detail: str, *, answer: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.answer = reason, detail, answer


# Initiator


def rekey(session: Session, task: Task) -> Steps[None]:
    """Replace the IKE SA, unless that has become needless."""
    if session.state is not IkeSaState.ESTABLISHED or session.heir is not None:
        return
    task.rival = None
    session.state = IkeSaState.REKEYING
    new = handover.successor(session, initiator=True)
    nonce = session.context.entropy(NONCE_LENGTH)
    try:
        lowest = yield from _negotiate(session, new, nonce)
    except _Refused as refused:
        _not_rekeyed(session, task, refused)
        return
    new.stand()
    session.emit(IkeOpened(new))
    theirs = handover.rival_ike(session)
    if theirs is not None and task.rival is not None and lowest < task.rival.lowest:
        # RFC 7296 section 2.8.2: ours is the redundant one; the peer deletes the old one
        await_deletion(session, theirs)
        new.wind_up(Reason.REKEYED)
        return
    handover.hand_over(session, new)
    introduce(new, ours=True)
    if theirs is not None:
        handover.end_by(session, theirs, session.now + REPLACED_TIMEOUT)
    session.wind_up(Reason.REKEYED)


def _negotiate(session: Session, new: Session, nonce: bytes) -> Steps[bytes]:
    """Gives `new` its keys; the lower one of the two nonces. Raises _Refused."""
    proposals = number_proposals(session.connection.proposals, new.spi_local.to_bytes(SPI_LENGTH, "big"))
    known = implemented_groups()
    groups = [number for proposal in proposals for number in proposal.groups if number in known]
    groups.sort(key=lambda number: number != session.keys.suite.group)  # the peer took that one before
    if not groups:
        raise _Refused(Reason.NO_PROPOSAL_CHOSEN, "no key exchange method of the configuration is implemented")
    exchange = group(groups[0]).initiate(session.context.entropy)
    tried = {exchange.group}
    while True:
        # HDR, SK {SA, Ni, KEi} -->   <-- HDR, SK {SA, Nr, KEr}
        payloads = SaPayload(proposals), NoncePayload(nonce), KePayload(exchange.group, exchange.public)
        response = yield from ask(Ask(Exchange.CREATE_CHILD_SA, payloads))
        other = response.notify(NotifyType.INVALID_KE_PAYLOAD)
        wanted = int.from_bytes(other.data, "big") if other is not None else 0
        # RFC 7296 section 1.3.2: try again with the group that the peer wants, if it is one of ours
        if wanted not in groups or wanted in tried:
            break
        exchange = group(wanted).initiate(session.context.entropy)
        tried.add(wanted)
    error = first_error(response)
    if error is not None:
        raise _Refused(reason_of(error), f"peer answered with {error_name(error)}", answer=error.type)
    sa, ke, nonce_r = response.first(SaPayload), response.first(KePayload), response.first(NoncePayload)
    if sa is None or ke is None or nonce_r is None:
        raise _Refused(Reason.INVALID_SYNTAX, "the peer's answer has no SA, nonce or KE")
    chosen = accept(proposals, sa.proposals)
    if chosen is None or len(chosen.spi) != SPI_LENGTH or not any(chosen.spi) or ke.group != exchange.group or ke.group not in chosen.groups:
        raise _Refused(Reason.NO_PROPOSAL_CHOSEN, "the peer chose what was not proposed")
    try:
        shared, suite = exchange.complete(ke.data), IkeSuite.of(chosen)
    except (MalformedMessage, ValueError) as error:
        raise _Refused(Reason.INVALID_SYNTAX, "invalid public value") from error
    try:
        additional = yield from follow_up(session, chosen.additional, response)
    except KeyExchangeFailed as failed:
        raise _Refused(failed.reason, failed.detail, answer=failed.answer) from failed
    _derive(session, new, chosen, suite, (shared, *additional), nonce, nonce_r.data)
    crash_detection.keep_token(new, response)
    return min(nonce, nonce_r.data)


def _not_rekeyed(session: Session, task: Task, refused: _Refused) -> None:
    theirs = handover.rival_ike(session)
    if theirs is not None:
        # RFC 7296 section 2.8.2: the peer was done before it saw our request
        await_deletion(session, theirs)
        return
    if session.state is not IkeSaState.REKEYING:
        return
    session.state = IkeSaState.ESTABLISHED
    if refused.answer in PASSING:
        # RFC 7296 section 2.25: after several minutes the two sides are out of step
        if not session.postpone(task):
            session.wind_up(Reason.TEMPORARY_FAILURE)
        return
    session.rekey_at = session.now + REKEY_AGAIN * (1 + session.random())
    session.emit(RekeyFailed(0, refused.reason, refused.detail))


# Responder


def respond(session: Session, request: Message) -> Response:
    """The peer's rekeying; it needs nothing from the kernel."""
    # a peer that never deletes what it rekeyed would make us keep any number of IKE SAs
    early = session.predecessor is not None and not session.predecessor.closed
    if early or not _possible(session):
        return Response((NotifyPayload(NotifyType.TEMPORARY_FAILURE),))
    sa, ke, nonce_i = request.first(SaPayload), request.first(KePayload), request.first(NoncePayload)
    if sa is None or ke is None or nonce_i is None:
        return Response((NotifyPayload(NotifyType.INVALID_SYNTAX),))
    offered = tuple(one for one in sa.proposals if one.protocol == ProtocolId.IKE and len(one.spi) == SPI_LENGTH and any(one.spi))
    chosen = select(session.connection.proposals, offered, prefer_configured=True, group=ke.group)
    if chosen is None or not chosen.groups:
        return Response((NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN),))
    # RFC 7296 section 1.3: the group that we chose, in two octets
    if ke.group != chosen.groups[0]:
        return Response((NotifyPayload(NotifyType.INVALID_KE_PAYLOAD, chosen.groups[0].to_bytes(2, "big")),))
    if chosen.additional and not room(session):
        return Response((NotifyPayload(NotifyType.TEMPORARY_FAILURE),))
    try:
        suite = IkeSuite.of(chosen)
        public, first = group(ke.group).respond(ke.data, session.context.entropy)
    except MalformedMessage as error:
        return Response((NotifyPayload(error.notify, error.data),))
    except (KeyError, ValueError):
        return Response((NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN),))
    nonce_r = session.context.entropy(NONCE_LENGTH)
    new = handover.successor(session, initiator=False)
    answer = chosen.with_spi(new.spi_local.to_bytes(SPI_LENGTH, "big"))
    new.spi_remote = int.from_bytes(chosen.spi, "big")
    payloads: tuple[Payload, ...] = SaPayload((answer,)), NoncePayload(nonce_r), KePayload(ke.group, public), *crash_detection.token_payloads(new)

    def complete(shared: Sequence[Secret]) -> None:
        _derive(session, new, chosen, suite, shared, nonce_i.data, nonce_r)
        new.stand()
        session.emit(IkeOpened(new))
        task = session.active
        if session.state is IkeSaState.REKEYING and task is not None:
            # RFC 7296 section 2.8.2: which one takes over is decided when our own request is answered
            task.rival = Rival(min(nonce_i.data, nonce_r), ike=new)
            new.state, new.undecided = IkeSaState.REKEYED, session
        else:
            await_deletion(session, new)

    if not chosen.additional:
        complete((first,))
        return Response((*payloads, *ike_session_resume.give_ticket(new, request)))

    def finish(shared: tuple[Secret, ...]) -> Steps[Response]:
        yield from ()
        # RFC 7296 section 2.8.2: ours came to its end first
        if not _possible(session):
            return Response((NotifyPayload(NotifyType.TEMPORARY_FAILURE),))
        complete(shared)
        return Response()

    # RFC 5723 section 4.1: what a ticket holds is not known yet, so it is to be asked for later
    later = (NotifyPayload(NotifyType.TICKET_ACK),) if request.notify(NotifyType.TICKET_REQUEST) is not None else ()
    return Response((*payloads, *later, wait_for(session, Followup(deque(chosen.additional), [first], finish, lambda: None, of_ike=True))))


def _possible(session: Session) -> bool:
    task = session.active
    # RFC 7296 section 2.25.2: not while a CHILD_SA is being created, rekeyed or closed, nor on an IKE SA that is going away
    busy = task is not None and task.name in OF_CHILDREN
    gone = session.state not in (IkeSaState.ESTABLISHED, IkeSaState.REKEYING) or session.heir is not None
    return not (busy or gone or (task is not None and task.rival is not None))


# Both


def _derive(session: Session, new: Session, chosen: Proposal, suite: IkeSuite, shared: Sequence[Secret], nonce_i: bytes, nonce_r: bytes) -> None:
    new.proposal = chosen.with_spi(b"")
    new.spi_remote = int.from_bytes(chosen.spi, "big")
    # RFC 7296 section 2.18: the old SA's PRF makes the seed, the new one's the keys
    seed = rekey_skeyseed(session.keys.suite.prf, session.keys.keys.d, shared, nonce_i, nonce_r)
    keys = ike_keys(suite, seed, nonce_i, nonce_r, new.wire_spi_i, new.wire_spi_r)
    new.crypto = IkeCrypto.of(suite, keys, new.initiator)


def await_deletion(session: Session, heir: Session) -> None:
    """`heir` takes over; who made it deletes the old one."""
    handover.hand_over(session, heir)
    introduce(heir)
    if session.state is not IkeSaState.DELETING:
        session.state = IkeSaState.REKEYED
        session.ends_at = session.now + REPLACED_TIMEOUT


def introduce(new: Session, *, ours: bool = False) -> None:
    """What is said on an IKE SA that took over. `ours`: when our rekeying began its SPIs, and so its crash token, were not known yet."""
    payloads: tuple[Payload, ...] = crash_detection.token_payloads(new) if ours else ()
    # RFC 5723 sections 4.1 and 6.2: the ticket ended with the old keys, and it is the initiator's to ask for another, whoever rekeyed
    if new.asked_first:
        payloads = (*payloads, *ike_session_resume.ask_for_ticket(new))
    if not payloads or new.state is IkeSaState.DELETING or len(new.queue) >= MAX_TASKS:
        return

    def steps(session: Session, _task: Task) -> Steps[None]:
        response = yield from ask(Ask(Exchange.INFORMATIONAL, payloads))
        ike_session_resume.keep_ticket(session, response)

    new.queue.append(Task("IKE_INTRODUCTION", steps))
