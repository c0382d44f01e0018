"""IKE_SA_INIT (RFC 7296 section 1.2): algorithms, key exchange, nonces, NAT detection. Nothing here is authenticated yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from kernel_shim.model import Endpoint
from kernel_shim.secret import Secret
from vpnd.config.model import AuthMethod, Childless, ConnectionConfig
from vpnd.ike.context import IkeContext
from vpnd.ike.cookie import COOKIE_MAXIMUM, stateless_reply
from vpnd.ike.crypto.exchange import KeyExchange
from vpnd.ike.crypto.groups import group, implemented_groups
from vpnd.ike.effects import AuthenticationRejected, Effect, Reason, Redirected, Send
from vpnd.ike.exchanges import redirect
from vpnd.ike.exchanges.opening import answer, capabilities, first_request, read_request, take_answer, take_request
from vpnd.ike.iana import CertEncoding, Exchange, NotifyType
from vpnd.ike.keymat import IkeSuite, ike_keys, skeyseed
from vpnd.ike.nat import HASH_LENGTH
from vpnd.ike.proposal import Proposal, accept, number_proposals, select
from vpnd.ike.session import Session
from vpnd.ike.state import IkeSaState
from vpnd.ike.steps import NONCE_LENGTH, Ask, IkeCrypto, KeepWaiting, Steps, ask, error_name, first_error, reason_of
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import NO_SPI
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import CertReqPayload, KePayload, NoncePayload, NotifyPayload, Payload, SaPayload

MAX_REQUESTED: Final = 256  # authorities that a CERTREQ names; more would not fit a datagram
MAX_RESTARTS: Final = 4  # cookies and other groups that one attempt answers; they come from anybody


# Initiator


def initiate(session: Session) -> Steps[bool]:
    """Until keys stand; False when there is no common ground and the IKE SA is closed."""
    context, proposals = session.context, number_proposals(session.connection.proposals)
    groups = [number for proposal in proposals for number in proposal.groups if number in implemented_groups()]
    if not groups:
        session.close(Reason.NO_PROPOSAL_CHOSEN, f"{session.connection.name}: no key exchange method of the configuration is implemented")
        return False
    session.state = IkeSaState.CONNECTING
    session.nonce_i = context.entropy(NONCE_LENGTH)
    fake = context.entropy(HASH_LENGTH) if session.force_encapsulation else None
    exchange = group(groups[0]).initiate(context.entropy)
    cookie: bytes | None = None
    tried = {exchange.group}
    restarts = 0

    request = Ask(Exchange.IKE_SA_INIT, plain=_request(session, proposals, exchange, fake, cookie))
    waiting: Ask | KeepWaiting = request
    while True:
        # HDR, SAi1, KEi, Ni, ... -->   <-- HDR, SAr1, KEr, Nr, [CERTREQ]
        response = yield from ask(waiting)
        wanted = response.notify(NotifyType.COOKIE)
        other = response.notify(NotifyType.INVALID_KE_PAYLOAD)
        # RFC 7296 section 2.6: the cookie first, everything else unchanged
        if wanted is not None and response.first(SaPayload) is None:
            if not 1 <= len(wanted.data) <= COOKIE_MAXIMUM or wanted.data == cookie or restarts >= MAX_RESTARTS:
                waiting = KeepWaiting()
                continue
            cookie, restarts = wanted.data, restarts + 1
        # RFC 7296 section 1.2: another group, only one that we proposed and only once; the cookie stays (section 2.6.1)
        elif other is not None:
            number = int.from_bytes(other.data, "big")
            if number not in groups or number in tried or restarts >= MAX_RESTARTS:
                waiting = KeepWaiting(Reason.INVALID_KE_PAYLOAD, f"{session.connection.name}: peer {session.remote} wants group {number}")
                continue
            exchange, restarts = group(number).initiate(context.entropy), restarts + 1
            tried.add(number)
        elif response.notify(NotifyType.REDIRECT) is not None:
            gateway = redirect.unprotected(session, response)
            if gateway is not None:
                session.emit(Redirected(gateway))
                session.close(Reason.REDIRECTED, f"{session.connection.name}: peer {session.remote}: to {gateway}")
                return False
            waiting = KeepWaiting(Reason.PEER_ERROR, f"{session.connection.name}: peer {session.remote} redirects us, which we do not follow")
            continue
        else:
            refusal = _complete(session, proposals, exchange, response)
            if refusal is None:
                return True
            waiting = refusal
            continue
        waiting = Ask(Exchange.IKE_SA_INIT, plain=_request(session, proposals, exchange, fake, cookie))


def _request(session: Session, proposals: Sequence[Proposal], exchange: KeyExchange, fake: bytes | None, cookie: bytes | None) -> bytes:
    payloads: list[Payload] = [NotifyPayload(NotifyType.COOKIE, cookie)] if cookie is not None else []
    payloads += [SaPayload(tuple(proposals)), KePayload(exchange.group, exchange.public), NoncePayload(session.nonce_i)]
    payloads += capabilities(session, NO_SPI, session.local, session.remote, fake)
    # RFC 8784 section 3
    if session.connection.ppk_id is not None:
        payloads.append(NotifyPayload(NotifyType.USE_PPK))
    payloads += redirect.support(session)
    # RFC 9370 section 2.2.2
    if any(proposal.asks_additional for proposal in proposals):
        payloads.append(NotifyPayload(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED))
    return first_request(session, Exchange.IKE_SA_INIT, payloads)


def _complete(session: Session, proposals: Sequence[Proposal], exchange: KeyExchange, response: Message) -> KeepWaiting | None:
    """Take the keys from a response, or say why it is none."""
    who = f"{session.connection.name}: peer {session.remote}"
    error = first_error(response)
    # RFC 7296 section 2.21.1: an unprotected error is a hint, no more
    if error is not None:
        return KeepWaiting(reason_of(error), f"{who} refused IKE_SA_INIT with {error_name(error)}")
    sa, ke, nonce = response.first(SaPayload), response.first(KePayload), response.first(NoncePayload)
    if sa is None or ke is None or nonce is None or response.header.responder_spi == NO_SPI:
        return KeepWaiting(Reason.INVALID_SYNTAX, f"{who} sent an incomplete IKE_SA_INIT response")
    chosen = accept(proposals, sa.proposals)
    if chosen is None or ke.group != exchange.group or ke.group not in chosen.groups:
        return KeepWaiting(Reason.NO_PROPOSAL_CHOSEN, f"{who} chose what was not proposed")
    if chosen.additional and response.notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED) is None:
        return KeepWaiting(Reason.INVALID_SYNTAX, f"{who} chose additional key exchanges and does no IKE_INTERMEDIATE")
    try:
        shared, suite = exchange.complete(ke.data), IkeSuite.of(chosen)
    except (MalformedMessage, ValueError):
        return KeepWaiting(Reason.INVALID_SYNTAX, f"{who} sent an invalid public value")
    session.spi_remote = int.from_bytes(response.header.responder_spi, "big")
    session.nonce_r = nonce.data
    session.proposal = chosen
    _derive(session, suite, shared)
    session.notice_certificate_requests(response)
    session.peer_knows_ppk = session.connection.ppk_id is not None and response.notify(NotifyType.USE_PPK) is not None
    take_answer(session, response)
    return None


def _derive(session: Session, suite: IkeSuite, shared: Secret) -> None:
    seed = skeyseed(suite.prf, session.nonce_i, session.nonce_r, shared)
    keys = ike_keys(suite, seed, session.nonce_i, session.nonce_r, session.wire_spi_i, session.wire_spi_r)
    session.crypto = IkeCrypto.of(suite, keys, session.initiator)
    session.intermediate.pending.extend(session.proposal.additional if session.proposal else ())


# Responder


@dataclass(frozen=True, slots=True)
class _Choice:
    connection: ConnectionConfig
    candidates: tuple[ConnectionConfig, ...]
    proposal: Proposal


S = TypeVar("S", bound=Session)


def respond(
    make: Callable[[ConnectionConfig], S], context: IkeContext, datagram: bytes, local: Endpoint, remote: Endpoint, now: float
) -> tuple[S | None, list[Effect]]:
    """The IKE SA, opened by `make`, with its answer; or a refusal that leaves no state."""
    request = read_request(datagram, Exchange.IKE_SA_INIT)
    if request is None:
        return None, []
    header = request.header

    def refuse(notify: int, data: bytes = b"", why: str = "") -> tuple[None, list[Effect]]:
        reject: list[Effect] = [AuthenticationRejected(None, None, f"{remote}: {why}")] if why else []
        return None, [*reject, Send(local, remote, stateless_reply(header, notify, data))]

    sa, ke, nonce = request.first(SaPayload), request.first(KePayload), request.first(NoncePayload)
    if sa is None or ke is None or nonce is None:
        return refuse(NotifyType.INVALID_SYNTAX)
    candidates = context.candidates(local, remote)
    elsewhere = redirect.in_init(candidates[0], request, nonce.data) if candidates else None
    # RFC 5685 section 3: only who sent the request knows its nonce
    if elsewhere is not None:
        return refuse(NotifyType.REDIRECT, elsewhere)
    if not candidates:
        return refuse(NotifyType.NO_PROPOSAL_CHOSEN, why="no connection for these addresses")
    intermediate = request.notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED) is not None
    choice = _choose(candidates, sa.proposals, intermediate)
    if choice is None:
        return refuse(NotifyType.NO_PROPOSAL_CHOSEN, why="no proposal of the peer is acceptable")
    chosen_group = choice.proposal.groups[0]
    # RFC 7296 section 1.2: the group that we chose, in two octets
    if ke.group != chosen_group:
        return refuse(NotifyType.INVALID_KE_PAYLOAD, chosen_group.to_bytes(2, "big"))
    try:
        public, shared = group(chosen_group).respond(ke.data, context.entropy)
        suite = IkeSuite.of(choice.proposal)
    except MalformedMessage as error:
        return refuse(error.notify, error.data)
    except (KeyError, ValueError):
        return refuse(NotifyType.NO_PROPOSAL_CHOSEN, why="the chosen proposal is not implemented")

    session = make(choice.connection)
    session.candidates = choice.candidates
    session.proposal = choice.proposal
    take_request(session, datagram, request, nonce.data, local, remote)
    redirect.notice(session, request)
    _derive(session, suite, shared)
    fake = context.entropy(HASH_LENGTH) if session.nat_fake else None
    payloads: list[Payload] = [SaPayload((choice.proposal,)), KePayload(chosen_group, public), NoncePayload(session.nonce_r)]
    payloads += capabilities(session, session.wire_spi_r, local, remote, fake)
    payloads += certificate_requests(context, choice.candidates)
    session.peer_knows_ppk = context.credentials.has_ppk and request.notify(NotifyType.USE_PPK) is not None
    if session.peer_knows_ppk:
        payloads.append(NotifyPayload(NotifyType.USE_PPK))
    # RFC 6023 section 3
    if any(candidate.childless is not Childless.NEVER for candidate in choice.candidates):
        payloads.append(NotifyPayload(NotifyType.CHILDLESS_IKEV2_SUPPORTED))
    if choice.proposal.additional:
        payloads.append(NotifyPayload(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED))
    return session, answer(session, Exchange.IKE_SA_INIT, payloads, local, remote)


def _choose(candidates: Sequence[ConnectionConfig], offered: Sequence[Proposal], intermediate: bool) -> _Choice | None:
    """The best connection with an acceptable proposal; the others that could live with that proposal stay candidates.

    `intermediate`: the peer can do additional key exchanges. Which method its KE payload is for counts for nothing, unlike in CREATE_CHILD_SA: somebody
    else may have made it change that with an INVALID_KE_PAYLOAD of his own, down to the weakest of both sides (RFC 7296 section 1.2).
    """
    # many connections have the very same proposals (`vpnd.config.children.read_proposals`), and whoever asks should not make us look at them one by one
    refused: set[int] = set()
    for connection in candidates:
        if id(connection.proposals) in refused:
            continue
        own = connection.proposals if intermediate else [bare for each in connection.proposals if (bare := each.without_additional()) is not None]
        proposal = select(own, offered, prefer_configured=True)
        if proposal is not None and proposal.groups:
            alike = {id(connection.proposals): True}
            for other in candidates:
                if id(other.proposals) not in alike:
                    alike[id(other.proposals)] = select(other.proposals, (proposal,)) is not None
            return _Choice(connection, tuple(other for other in candidates if alike[id(other.proposals)]), proposal)
        refused.add(id(connection.proposals))
    return None


def certificate_requests(context: IkeContext, connections: Sequence[ConnectionConfig]) -> list[Payload]:
    """RFC 7296 section 3.7: a CERTREQ with our authorities, if one of these connections has its peer sign."""
    authorities = [authority.public_key_hash for authority in context.credentials.authorities]
    asks = any(connection.send_certreq and any(round.auth is AuthMethod.PUBKEY for round in connection.remote) for connection in connections)
    return [CertReqPayload(CertEncoding.X509_SIGNATURE, b"".join(authorities[:MAX_REQUESTED]))] if asks and authorities else []
