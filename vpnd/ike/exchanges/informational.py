"""INFORMATIONAL (RFC 7296 section 1.4): liveness, deletion of CHILD_SAs and of the IKE SA, late errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kernel_shim.model import Spi
from vpnd.ike import handover, reauthentication, succession
from vpnd.ike.effects import IkeClosed, Reason
from vpnd.ike.exchanges import crash_detection, ike_session_resume, mobike, redirect, rekey_ike
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.session import MAX_EARLY_DELETES, Session
from vpnd.ike.state import MAX_TASKS, Child, ChildSaState, IkeSaState
from vpnd.ike.steps import CONFIRM, Ask, KeepWaiting, Response, Steps, Task, ask
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import AuthPayload, DeletePayload, Payload

SPI_LENGTH: Final = 4
DELETE_TRIES: Final = 2  # copies of a DELETE: our side is torn down anyway, so an unreachable peer is not waited for long

# Initiator


def probe(session: Session, _task: Task) -> Steps[None]:
    """RFC 7296 section 2.4: an empty request; any answer is a sign of life, and no answer closes the IKE SA."""
    response = yield from ask(Ask(Exchange.INFORMATIONAL, mobike.probe(session)))
    mobike.notice_mapping(session, response)


def confirm(child_id: int = 0) -> Task:
    """Hear that the peer has our answer, which made that CHILD_SA; 0: those which made any."""

    def steps(session: Session, task: Task) -> Steps[None]:
        if task.target:
            child = session.children.get(task.target)
            asked = [child] if child is not None and (not child.taken or succession.waits_for_peer(session, child)) else []
        else:
            asked = [child for child in session.children.values() if not child.taken]
        if asked:
            yield from probe(session, task)
        for child in asked:
            if child.sa.id in session.children:
                succession.taken(session, child)

    return Task(CONFIRM, steps, target=child_id)


def delete_child(spi: Spi, child_id: int, reason: Reason) -> Task:
    """RFC 7296 section 1.4.1: delete by the SPI of our inbound SA; the peer's answer deletes the other direction. `child_id` 0: we have none."""

    def steps(session: Session, task: Task) -> Steps[None]:
        payload = DeletePayload(ProtocolId.ESP, (spi.to_bytes(SPI_LENGTH, "big"),))
        child = session.children.get(task.target)
        if child is not None:
            succession.cease(session, child)
        yield from ask(Ask(Exchange.INFORMATIONAL, (payload,)))
        child = session.children.get(task.target)
        if child is not None:
            succession.close(session, child, reason)

    return Task("CHILD_DELETE", steps, target=child_id)


def delete_spi(session: Session, spi: Spi) -> None:
    """Queue the deletion of a CHILD_SA that stands only at the peer."""
    if len(session.queue) < MAX_TASKS:
        session.queue.append(delete_child(spi, 0, Reason.DELETED))


def delete_ike(reason: Reason) -> Task:
    """RFC 7296 section 1.4.1: the IKE SA takes its CHILD_SAs along; one that was rekeyed has none, and its peer waits to hear of it.

    To the peer it stands with its answer to our IKE_AUTH, even if by then we no longer want it.
    """

    def steps(session: Session, _task: Task) -> Steps[None]:
        if session.established_at is None and (yield from ask(KeepWaiting())).first(AuthPayload) is None:
            session.close(reason, session.describe())  # to the peer it does not stand, either
            return
        children = list(session.children.values())
        for child in children:
            succession.cease(session, child)
        # one that a peer keeps unheard would take what is meant for its twin, or for what replaced it; what it should have deleted itself it may never have had
        patient = any(session.has_twin(child) for child in children) or reason is Reason.REPLACED or (reason is Reason.REKEYED and session.ends_at is None)
        tries = None if patient else DELETE_TRIES
        yield from ask(Ask(Exchange.INFORMATIONAL, (DeletePayload(ProtocolId.IKE),), tries=tries))
        session.close(reason, session.describe())

    return Task("IKE_DELETE", steps)


# Responder


def respond(session: Session, request: Message) -> Steps[Response]:
    """Answer the peer's INFORMATIONAL; it needs nothing from the kernel first."""
    yield from ()
    # RFC 7296 section 2.21.2: the initiator refused our authentication after we had finished
    if request.notify(NotifyType.AUTHENTICATION_FAILED) is not None:
        return Response(close=IkeClosed(Reason.PEER_AUTHENTICATION_FAILED, session.describe()))
    reauthentication.heed(session, request)
    crash_detection.keep_token(session, request)
    gateway = redirect.protected(session, request)
    if gateway is not None:
        redirect.leave(session, gateway)
        return Response()
    deletes = request.all(DeletePayload)
    # RFC 7296 section 1.4.1: the IKE SA; the answer is empty
    if any(payload.protocol == ProtocolId.IKE for payload in deletes):
        theirs = handover.rival_ike(session)
        # RFC 7296 sections 2.8.2 and 2.25.2: the peer rekeyed it as well and is done; our own request is forgotten
        if theirs is not None and session.heir is None:
            handover.hand_over(session, theirs)
            rekey_ike.introduce(theirs)
        reason = Reason.REKEYED if session.heir or session.state is IkeSaState.REKEYED else Reason.PEER_DELETED
        session.state = IkeSaState.DELETING
        # with our answer the peer forgets its SAs in: what has a twin goes by that before
        for child in list(session.children.values()):
            succession.cease(session, child)
        return Response(close=IkeClosed(reason, session.describe()))
    answer = list(_delete(session, (spi for payload in deletes if payload.protocol == ProtocolId.ESP for spi in payload.spis)))
    payloads: tuple[Payload, ...] = (DeletePayload(ProtocolId.ESP, tuple(answer)),) if answer else ()
    # RFC 7296 section 1.4: what is not known is ignored, and the answer may be empty
    return Response((*payloads, *mobike.answer(session, request), *ike_session_resume.give_ticket(session, request)))


def _delete(session: Session, spis: Iterable[bytes]) -> Iterable[bytes]:
    """Close the peer's CHILD_SAs; the SPIs of our inbound SAs go into the answer."""
    # a message may name thousands, and an IKE SA may have thousands
    for spi in spis:
        child = session.child_by_outbound(spi)
        if child is None:
            # its answer to our CREATE_CHILD_SA may still be on its way, or lost
            making = session.active is not None and (session.active.child is not None or session.active.name == "CHILD_REKEY")
            if making and len(session.early_deletes) < MAX_EARLY_DELETES:
                session.early_deletes.add(spi)
            continue
        state = child.state
        succession.close(session, child, Reason.REKEYED if _rekeyed(session, child) else Reason.PEER_DELETED)
        # RFC 7296 section 1.4.1: when both delete at once, our own request has said it already
        if state is not ChildSaState.DELETING:
            yield child.sa.inbound.spi.to_bytes(SPI_LENGTH, "big")


def _rekeyed(session: Session, child: Child) -> bool:
    """Whether a better one stands in its place, or is about to: the peer judged its own redundant before it told us so (RFC 7296 section 2.8.1)."""
    rival = session.active.rival if session.active is not None else None
    return child.state is ChildSaState.REKEYED or succession.outlived(session, child) or (rival is not None and rival.child_id == child.sa.id)
