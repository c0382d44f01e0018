"""IKE_FOLLOWUP_KE (RFC 9370 section 2.2.4): the additional key exchanges of a CREATE_CHILD_SA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kernel_shim.secret import Secret
from vpnd.ike.crypto.groups import group
from vpnd.ike.effects import Reason
from vpnd.ike.followup import FOLLOWUP_SECONDS, LINK_LENGTH, MAX_FOLLOWUPS, Followup
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.session import Session
from vpnd.ike.steps import Ask, Response, Steps, ask, error_name, first_error, reason_of
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NotifyPayload

# RFC 9370 section 2.2.4: STATE_NOT_FOUND means that the peer waited no longer; a new attempt from the start may go well
PASSING: frozenset[int] = frozenset({NotifyType.TEMPORARY_FAILURE, NotifyType.STATE_NOT_FOUND})


class KeyExchangeFailed(Exception):
    """The additional key exchanges came to nothing. `answer`: the type of the peer's error, 0 when what it sent was wrong."""

    def __init__(self, reason: Reason, detail: str, answer: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.answer = reason, detail, answer


# Initiator


def follow_up(session: Session, methods: Sequence[int], response: Message) -> Steps[tuple[Secret, ...]]:
    """The secrets of the additional key exchanges that `response`, of CREATE_CHILD_SA, agreed on. Raises KeyExchangeFailed."""
    shared: list[Secret] = []
    for number in methods:
        link = response.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
        if link is None:
            raise KeyExchangeFailed(Reason.INVALID_SYNTAX, "the peer ended the key exchanges too early")
        exchange = group(number).initiate(session.context.entropy)
        # HDR, SK {KEi(n), N(ADDITIONAL_KEY_EXCHANGE)} -->   <-- HDR, SK {KEr(n) [, N(ADDITIONAL_KEY_EXCHANGE)]}
        payloads = KePayload(exchange.group, exchange.public), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, link.data)
        response = yield from ask(Ask(Exchange.IKE_FOLLOWUP_KE, payloads))
        error = first_error(response)
        if error is not None:
            raise KeyExchangeFailed(reason_of(error), f"peer answered with {error_name(error)}", error.type)
        ke = response.first(KePayload)
        if ke is None or ke.group != exchange.group:
            raise KeyExchangeFailed(Reason.INVALID_KE_PAYLOAD, "the peer's key exchange is not that of the proposal")
        try:
            shared.append(exchange.complete(ke.data))
        except MalformedMessage as invalid:
            raise KeyExchangeFailed(Reason.INVALID_SYNTAX, "invalid public value") from invalid
    if response.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE) is not None:
        raise KeyExchangeFailed(Reason.INVALID_SYNTAX, "the peer waits for key exchanges that were not agreed on")
    return tuple(shared)


# Responder


def room(session: Session) -> bool:
    """Whether another request of the peer's may wait for its key exchanges."""
    return len(session.followups) < MAX_FOLLOWUPS


def wait_for(session: Session, followup: Followup) -> NotifyPayload:
    """Keep it, a bounded time, until its next request comes; the notification that links the two."""
    followup.link = session.context.entropy(LINK_LENGTH)
    session.followups[followup.link] = followup
    session.later.set(followup, session.now + FOLLOWUP_SECONDS)
    return NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, followup.link)


def respond(session: Session, request: Message) -> Steps[Response]:
    """The next key exchange of a CREATE_CHILD_SA; after the last one the SA comes up."""
    link, ke = request.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE), request.first(KePayload)
    followup = session.followups.pop(link.data, None) if link is not None else None
    if followup is None:
        return Response((NotifyPayload(NotifyType.STATE_NOT_FOUND),))
    session.later.set(followup, None)
    try:
        if ke is None or ke.group != followup.pending[0]:
            raise MalformedMessage("KE", f"none of the method {followup.pending[0]}")
        public, shared = group(followup.pending.popleft()).respond(ke.data, session.context.entropy)
    except MalformedMessage as invalid:
        followup.give_up()
        return Response((NotifyPayload(invalid.notify, invalid.data),))
    followup.shared.append(shared)
    answer = KePayload(ke.group, public)
    if followup.pending:
        return Response((answer, wait_for(session, followup)))
    response = yield from followup.finish(tuple(followup.shared))
    failed = any(isinstance(payload, NotifyPayload) for payload in response.payloads)
    return response if failed else replace(response, payloads=(answer, *response.payloads))
