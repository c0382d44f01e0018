"""IKE_INTERMEDIATE (RFC 9242) for additional key exchanges (RFC 9370): before IKE_AUTH, and each changes all keys of the IKE SA."""

from __future__ import annotations

from kernel_shim.secret import Secret
from vpnd.ike.crypto.groups import group
from vpnd.ike.effects import AuthenticationRejected, IkeClosed, Reason
from vpnd.ike.iana import Exchange, NotifyType, name_of
from vpnd.ike.keymat import ike_keys, rekey_skeyseed
from vpnd.ike.session import Session
from vpnd.ike.steps import Ask, IkeCrypto, Response, Steps, ask, error_name, first_error, reason_of
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NotifyPayload

# Initiator


def initiate(session: Session) -> Steps[bool]:
    """All additional key exchanges that were agreed on; False when one failed and the IKE SA is closed."""
    pending = session.intermediate.pending
    while pending:
        exchange = group(pending.popleft()).initiate(session.context.entropy)
        # HDR, SK {KEi(n)} -->   <-- HDR, SK {KEr(n)}
        response = yield from ask(Ask(Exchange.IKE_INTERMEDIATE, (KePayload(exchange.group, exchange.public),)))
        error = first_error(response)
        if error is not None:
            session.close(reason_of(error), f"{session.describe()} answered IKE_INTERMEDIATE with {error_name(error)}")
            return False
        ke = response.first(KePayload)
        try:
            if ke is None or ke.group != exchange.group:
                raise MalformedMessage("KE", f"none of the method {exchange.group}")
            shared = exchange.complete(ke.data)
        except MalformedMessage as invalid:
            session.close(Reason.INVALID_SYNTAX, f"{session.describe()} answered IKE_INTERMEDIATE with {invalid}")
            return False
        _cover(session, response)
        session.crypto = _renewed(session, shared)
    return True


# Responder


def respond(session: Session, request: Message) -> Steps[Response]:
    """The next additional key exchange; it needs nothing from the kernel."""
    yield from ()
    pending = session.intermediate.pending
    # RFC 9242 section 3.2 leaves it to other documents what is in it, and we agreed on nothing but key exchanges
    if not pending:
        return refuse(session, "an IKE_INTERMEDIATE exchange that nothing asks for")
    ke = request.first(KePayload)
    if ke is None or ke.group != pending[0]:
        return refuse(session, f"IKE_INTERMEDIATE without a key exchange of the method {pending[0]}")
    try:
        public, shared = group(pending.popleft()).respond(ke.data, session.context.entropy)
    except MalformedMessage as invalid:
        return refuse(session, str(invalid), invalid.notify)
    _cover(session, request)
    # RFC 9370 section 2.2.2: the answer still goes out under the old keys
    return Response((KePayload(ke.group, public),), keys=_renewed(session, shared))


def refuse(session: Session, why: str, notify: int = NotifyType.INVALID_SYNTAX) -> Response:
    """RFC 9242 section 3.4: an error ends the IKE SA, as in IKE_AUTH."""
    session.emit(AuthenticationRejected(None, None, f"peer {session.remote}: {why}; answered with {name_of(NotifyType, notify)}"))
    return Response((NotifyPayload(notify),), close=IkeClosed(Reason.INVALID_SYNTAX, f"{session.describe()}: {why}"))


# Both


def _cover(session: Session, message: Message) -> None:
    session.intermediate.cover(session.keys.suite.prf, session.keys.keys, message.plain, response=message.header.response)


def _renewed(session: Session, shared: Secret) -> IkeCrypto:
    # RFC 9370 section 2.2.2: SKEYSEED(n) = prf(SK_d(n-1), SK(n) | Ni | Nr), and from it all keys
    suite, keys = session.keys.suite, session.keys.keys
    seed = rekey_skeyseed(suite.prf, keys.d, (shared,), session.nonce_i, session.nonce_r)
    fresh = ike_keys(suite, seed, session.nonce_i, session.nonce_r, session.wire_spi_i, session.wire_spi_r)
    return IkeCrypto.of(suite, fresh, session.initiator)
