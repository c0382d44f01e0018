"""Redirection (RFC 5685): a gateway sends its clients to another one, in IKE_SA_INIT, in IKE_AUTH, or later."""

from __future__ import annotations

import hmac
from typing import Final

from vpnd.config.model import ConnectionConfig, RedirectIn
from vpnd.ike.effects import Reason, Redirected
from vpnd.ike.gateway_id import GatewayId, decode_gateway
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.session import Session
from vpnd.ike.state import IkeSaState
from vpnd.ike.steps import Ask, Steps, Task, ask
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload, Payload, SaPayload

DEPARTURE: Final = 30.0  # s that a redirected client has to delete the IKE SA; then we do

# The client: who initiated


def support(session: Session) -> list[Payload]:
    """RFC 5685 section 3, for IKE_SA_INIT: that we follow, or whose redirection we are following."""
    if not session.context.settings.follow_redirects:
        return []
    if session.redirected_from is not None:
        return [NotifyPayload(NotifyType.REDIRECTED_FROM, session.redirected_from.encode())]
    return [NotifyPayload(NotifyType.REDIRECT_SUPPORTED)]


def unprotected(session: Session, response: Message) -> GatewayId | None:
    """Where an IKE_SA_INIT response sends us. RFC 5685 section 3: only who saw our request knows its nonce."""
    notify = response.notify(NotifyType.REDIRECT)
    if notify is None:
        return None
    gateway, nonce = _gateway(session, notify.data)
    return gateway if hmac.compare_digest(nonce, session.nonce_i) else None


def protected(session: Session, message: Message) -> GatewayId | None:
    """Where the authenticated gateway sends us."""
    notify = message.notify(NotifyType.REDIRECT)
    return _gateway(session, notify.data)[0] if notify is not None and session.original_initiator else None


def served_nowhere(session: Session, response: Message) -> bool:
    """Whether the answer to IKE_AUTH is a redirection instead of a CHILD_SA: the gateway deletes the IKE SA some time later."""
    asked = session.original_initiator and session.context.settings.follow_redirects
    return asked and response.notify(NotifyType.REDIRECT) is not None and response.first(SaPayload) is None


def _gateway(session: Session, data: bytes) -> tuple[GatewayId | None, bytes]:
    if not session.context.settings.follow_redirects:
        return None, b""
    try:
        gateway, rest = decode_gateway(data)
    except MalformedMessage:
        return None, b""
    # RFC 5685 section 7: a client that is sent round and round stays where it is
    return (gateway if session.context.admits_redirect(session.connection) else None), rest


def leave(session: Session, gateway: GatewayId) -> None:
    """During a session: the gateway's request is answered, then we delete the IKE SA and go (RFC 5685 section 5)."""
    session.emit(Redirected(gateway))
    session.wind_up(Reason.REDIRECTED)


# The gateway


def notice(session: Session, request: Message) -> None:
    session.redirectable = supported(request)


def supported(request: Message) -> bool:
    return any(request.notify(kind) is not None for kind in (NotifyType.REDIRECT_SUPPORTED, NotifyType.REDIRECTED_FROM))


def in_init(connection: ConnectionConfig, request: Message, nonce: bytes) -> bytes | None:
    """The data of the REDIRECT that an IKE_SA_INIT request gets; None: it is served here."""
    if connection.redirect is None or connection.redirect_in is not RedirectIn.INIT or not supported(request):
        return None
    return connection.redirect.encode() + nonce


def in_auth(session: Session) -> GatewayId | None:
    """Where an authenticated client is sent instead of getting a CHILD_SA (RFC 5685 section 6)."""
    return session.connection.redirect if session.redirectable and session.connection.redirect_in is RedirectIn.AUTH else None


def payload(gateway: GatewayId) -> NotifyPayload:
    return NotifyPayload(NotifyType.REDIRECT, gateway.encode())


def await_departure(session: Session) -> None:
    session.departs_at = session.now + DEPARTURE


def send_away(gateway: GatewayId) -> Task:
    """HDR, SK { N(REDIRECT) } -->   <-- HDR, SK {}   and then the client deletes the IKE SA."""

    def steps(session: Session, _task: Task) -> Steps[None]:
        yield from ask(Ask(Exchange.INFORMATIONAL, (payload(gateway),)))
        if session.state is IkeSaState.ESTABLISHED:
            await_departure(session)

    return Task("IKE_REDIRECT", steps)
