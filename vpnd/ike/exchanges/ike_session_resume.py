"""IKE_SESSION_RESUME (RFC 5723): an IKE SA made of the keys of an earlier one, without a key exchange, and the tickets for it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Final, TypeVar

from kernel_shim.model import Endpoint
from kernel_shim.secret import Secret
from vpnd.config.model import AuthMethod, ConnectionConfig
from vpnd.ike.context import IkeContext
from vpnd.ike.cookie import COOKIE_MAXIMUM, stateless_reply
from vpnd.ike.effects import Effect, Reason, Send
from vpnd.ike.exchanges.opening import answer, capabilities, first_request, read_request, take_answer, take_request
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.identity import Identity
from vpnd.ike.keymat import IkeSuite, ike_keys, resumed_skeyseed
from vpnd.ike.nat import HASH_LENGTH
from vpnd.ike.resumption import LIFETIME, MAX_AGE, Resumable, Ticket
from vpnd.ike.session import Session
from vpnd.ike.state import IkeSaState
from vpnd.ike.steps import NONCE_LENGTH, Ask, IkeCrypto, KeepWaiting, Steps, ask
from vpnd.ike.wire.header import NO_SPI
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NoncePayload, NotifyPayload, Payload

LIFETIME_LENGTH: Final = 4  # octets before the ticket in TICKET_LT_OPAQUE, RFC 5723 section 7.2

S = TypeVar("S", bound=Session)


# Initiator


def ticket_of(session: Session) -> Ticket | None:
    """The ticket to begin with, if we have one that the configuration still allows."""
    if not session.connection.resumption:
        return None
    ticket = session.context.resumption.wallet.take(session.connection.name, session.now)
    return ticket if ticket is not None and _still_fits(session.context, session.connection, ticket.state) else None


def initiate(session: Session, ticket: Ticket) -> Steps[bool]:
    """Until keys stand; False when the responder does not take the ticket, and a full exchange is to follow."""
    context, state = session.context, ticket.state
    session.state = IkeSaState.CONNECTING
    session.nonce_i = context.entropy(NONCE_LENGTH)
    fake = context.entropy(HASH_LENGTH) if session.force_encapsulation else None
    cookie: bytes | None = None
    waiting: Ask | KeepWaiting = _request(session, ticket, fake, cookie)
    while True:
        # HDR, [N(COOKIE),] Ni, N(TICKET_OPAQUE), ... -->   <-- HDR, Nr, ...
        response = yield from ask(waiting)
        wanted, nonce = response.notify(NotifyType.COOKIE), response.first(NoncePayload)
        if response.notify(NotifyType.TICKET_NACK) is not None:
            return False
        if wanted is not None and nonce is None and cookie is None and 1 <= len(wanted.data) <= COOKIE_MAXIMUM:
            cookie = wanted.data
            waiting = _request(session, ticket, fake, cookie)
        elif nonce is None or response.header.responder_spi == NO_SPI:
            waiting = KeepWaiting(Reason.INVALID_SYNTAX, f"{session.connection.name}: peer {session.remote} answered IKE_SESSION_RESUME incompletely")
        else:
            break
    session.spi_remote = int.from_bytes(response.header.responder_spi, "big")
    session.nonce_r = nonce.data
    _derive(session, state)
    take_answer(session, response)
    return True


def _request(session: Session, ticket: Ticket, fake: bytes | None, cookie: bytes | None) -> Ask:
    payloads: list[Payload] = [NotifyPayload(NotifyType.COOKIE, cookie)] if cookie is not None else []
    payloads += [NoncePayload(session.nonce_i), NotifyPayload(NotifyType.TICKET_OPAQUE, ticket.data)]
    payloads += capabilities(session, NO_SPI, session.local, session.remote, fake)
    return Ask(Exchange.IKE_SESSION_RESUME, plain=first_request(session, Exchange.IKE_SESSION_RESUME, payloads))


def ask_for_ticket(session: Session) -> tuple[NotifyPayload, ...]:
    """For IKE_AUTH, and for an INFORMATIONAL exchange once the IKE SA has been rekeyed."""
    return (NotifyPayload(NotifyType.TICKET_REQUEST),) if session.connection.resumption else ()


def keep_ticket(session: Session, response: Message) -> None:
    """Of the answer to that, once the responder is authenticated."""
    notify = response.notify(NotifyType.TICKET_LT_OPAQUE)
    if notify is None or len(notify.data) <= LIFETIME_LENGTH or not session.connection.resumption:
        return
    lifetime = int.from_bytes(notify.data[:LIFETIME_LENGTH], "big")
    state = _resumable(session, float(lifetime))
    if state is not None:
        session.context.resumption.wallet.keep(Ticket(notify.data[LIFETIME_LENGTH:], state))


# Responder


def respond(
    make: Callable[[ConnectionConfig], S], context: IkeContext, datagram: bytes, local: Endpoint, remote: Endpoint, now: float
) -> tuple[S | None, list[Effect]]:
    """The IKE SA, opened by `make`, with its answer; or a refusal that leaves no state."""
    request = read_request(datagram, Exchange.IKE_SESSION_RESUME)
    nonce = request.first(NoncePayload) if request is not None else None
    if request is None or nonce is None:
        return None, []
    ticket = request.notify(NotifyType.TICKET_OPAQUE)
    state = context.resumption.office.open(ticket.data, now) if ticket is not None else None
    connection = next((each for each in context.candidates(local, remote) if state is not None and _still_fits(context, each, state)), None)
    # RFC 5723 section 4.3.2: then the initiator comes with a full exchange
    if state is None or connection is None:
        return None, [Send(local, remote, stateless_reply(request.header, NotifyType.TICKET_NACK))]
    session = make(connection)
    take_request(session, datagram, request, nonce.data, local, remote)
    _derive(session, state)
    fake = context.entropy(HASH_LENGTH) if session.nat_fake else None
    payloads: list[Payload] = [NoncePayload(session.nonce_r), *capabilities(session, session.wire_spi_r, local, remote, fake)]
    payloads.append(NotifyPayload(NotifyType.CHILDLESS_IKEV2_SUPPORTED))
    return session, answer(session, Exchange.IKE_SESSION_RESUME, payloads, local, remote)


def give_ticket(session: Session, request: Message) -> tuple[NotifyPayload, ...]:
    """For the answer to IKE_AUTH, and to later exchanges (RFC 5723 section 4.1): what the initiator's TICKET_REQUEST gets."""
    if request.notify(NotifyType.TICKET_REQUEST) is None or session.asked_first:
        return ()
    state = _resumable(session, LIFETIME) if session.connection.resumption else None
    if state is None:
        return (NotifyPayload(NotifyType.TICKET_NACK),)
    session.ticket_id, ticket = session.context.resumption.office.seal(state, session.now, session.ticket_id)
    lifetime = max(0, int(state.expires - session.now)).to_bytes(LIFETIME_LENGTH, "big")
    return (NotifyPayload(NotifyType.TICKET_LT_OPAQUE, lifetime + ticket),)


# Both


def _still_fits(context: IkeContext, connection: ConnectionConfig, state: Resumable) -> bool:
    """Whether the configuration would allow today what it allowed then."""
    if not connection.resumption or connection.name != state.connection or not connection.local or not connection.remote:
        return False
    remote = connection.remote[0]
    if not hmac.compare_digest(state.basis, basis_of(context, connection, state.local_id, state.remote_id, state.d)):
        return False
    chosen = set(state.proposal.transforms)
    same = any(chosen <= set(each.transforms) for each in connection.proposals)
    return same and (remote.id is None or state.remote_id.matches(remote.id)) and (state.ppk or not connection.ppk_required)


def basis_of(context: IkeContext, connection: ConnectionConfig, local: Identity, remote: Identity, d: Secret) -> bytes:
    """A digest of the identities, methods, keys and authorities by which the peers proved themselves. Keyed, so that it tells nothing of a shared key."""
    digest = hmac.new(d.reveal(), digestmod=hashlib.sha256)

    def add(value: bytes) -> None:
        digest.update(len(value).to_bytes(4, "big") + value)

    for each in connection.local:
        add(each.id.body() if each.id is not None else b"")
    for each in connection.remote:
        for value in (each.auth.value.encode(), each.id.body() if each.id is not None else b"", *(scheme.encode() for scheme in each.signature_schemes)):
            add(value)
        if each.auth is AuthMethod.PSK:
            secret = context.credentials.shared_secret(local, remote)
            add(secret.reveal() if secret is not None else b"")
        elif each.certs or each.cacerts:
            add(b"".join(each.certs))
            add(b"".join(each.cacerts))
        else:
            for certificates in (context.credentials.certificates, context.credentials.authorities):
                add(b"".join(sorted(certificate.der for certificate in certificates)))
    return digest.digest()


def _resumable(session: Session, lifetime: float) -> Resumable | None:
    if session.local_id is None or session.remote_id is None or session.proposal is None:
        return None
    authenticated_at = session.authenticated_at
    # no longer than the peers may go on without proving anew who they are
    expires = min(session.now + lifetime, authenticated_at + (session.connection.reauth_time or MAX_AGE), session.proof_ends)
    names, d = (session.local_id, session.remote_id), session.keys.keys.d
    basis = basis_of(session.context, session.connection, *names, d)
    return Resumable(session.connection.name, *names, session.proposal, d, session.ppk, authenticated_at, expires, basis, session.proof_ends)


def _derive(session: Session, state: Resumable) -> None:
    suite = IkeSuite.of(state.proposal)
    seed: Secret = resumed_skeyseed(suite.prf, state.d, session.nonce_i, session.nonce_r)
    keys = ike_keys(suite, seed, session.nonce_i, session.nonce_r, session.wire_spi_i, session.wire_spi_r)
    session.crypto = IkeCrypto.of(suite, keys, session.initiator)
    session.proposal, session.ppk, session.resumed = state.proposal, state.ppk, state
    session.authenticated_at, session.proof_ends = state.authenticated_at, state.proof_ends
    session.local_id, session.remote_id = state.local_id, state.remote_id
