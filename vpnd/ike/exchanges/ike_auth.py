"""IKE_AUTH (RFC 7296 section 1.2): both sides prove who they are, and the first CHILD_SA comes along."""

from __future__ import annotations

from kernel_shim.model import Action
from vpnd.config.model import Childless
from vpnd.ike import ppk as postquantum
from vpnd.ike import reauthentication
from vpnd.ike.authenticate import NoCredentials, PeerRefused, check, expected_identity, fitting, own_auth, own_certificates, own_credentials
from vpnd.ike.child import ChildRefused, Keying, Offer, choose, make_offer, read_answer
from vpnd.ike.context import ChildRequest
from vpnd.ike.effects import AuthenticationRejected, ChildDenied, IkeClosed, InitialContact, Reason, Redirected
from vpnd.ike.exchanges import crash_detection, ike_session_resume, mobike, redirect
from vpnd.ike.exchanges.create_child_sa import bring_up, create_child, finish
from vpnd.ike.exchanges.ike_sa_init import certificate_requests
from vpnd.ike.exchanges.informational import delete_spi
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId, name_of
from vpnd.ike.identity import Identity
from vpnd.ike.session import Session
from vpnd.ike.steps import Ask, Response, Steps, Task, Tell, ask, error_name, first_error, reason_of
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import AuthPayload, DeletePayload, IdiPayload, IdrPayload, NotifyPayload, Payload, SaPayload, TsiPayload, TsrPayload

# Initiator


def initiate(session: Session, task: Task) -> Steps[None]:
    """After IKE_SA_INIT; `task` carries the first CHILD_SA along."""
    connection = session.connection
    task.name = "IKE_AUTH"
    _choose_child(session, task)
    if not _defer_child(session, task):
        return
    try:
        own = own_credentials(session, None, None)
        ppk = None if session.resumed else postquantum.of_initiator(session)
    except NoCredentials as error:
        return _close_without_credentials(session, error)
    session.local_id = own.identity
    offer: Offer | None = None
    try:
        offer = (yield from make_offer(session, task.child, key_exchange=False)) if task.child else None
        auth = own_auth(session, own, ppk.keys if ppk else session.keys)
        without_ppk = own_auth(session, own, session.keys) if ppk and not connection.ppk_required else None
    except ChildRefused as refused:
        # RFC 7296 section 1.2: IKE_AUTH brings a CHILD_SA up, so without one there is nothing to ask
        session.fail_child(task, refused.reason, refused.detail)
        session.close(refused.reason, f"{connection.name}: {refused.detail}")
        return
    except NoCredentials as error:
        return _close_without_credentials(session, error)

    # HDR, SK {IDi, [CERT,] [CERTREQ,] [IDr,] AUTH, SAi2, TSi, TSr} -->   <-- HDR, SK {IDr, [CERT,] AUTH, SAr2, TSi, TSr}
    expected = expected_identity(connection)
    payloads: list[Payload] = [IdiPayload(own.identity), *own_certificates(session, own)]
    # RFC 7296 section 2.4: only when it is true
    if session.context.settings.initial_contact and session.context.first_contact(connection):
        payloads.append(NotifyPayload(NotifyType.INITIAL_CONTACT))
    payloads += certificate_requests(session.context, (connection,))
    payloads += [IdrPayload(expected)] if expected else []
    payloads += [auth, *(offer.payloads() if offer else ()), *mobike.announcement(session), *crash_detection.token_payloads(session)]
    payloads += ike_session_resume.ask_for_ticket(session)
    payloads += postquantum.request_payloads(ppk, without_ppk) if ppk else []
    response = yield from ask(Ask(Exchange.IKE_AUTH, tuple(payloads)))

    idr, peer_auth, error_notify = response.first(IdrPayload), response.first(AuthPayload), first_error(response)
    if idr is None or peer_auth is None:
        # RFC 7296 section 2.21.2: without AUTH, an error is about the IKE SA
        return _close_refused(session, own.identity, expected, error_notify)
    session.remote_id = idr.identity
    try:
        ppk = None if session.resumed else postquantum.taken(session, ppk, response)
        check(session, connection, idr.identity, own.identity, response, peer_auth, ppk.keys if ppk else session.keys)
    except PeerRefused as error:
        session.emit(AuthenticationRejected(connection.name, idr.identity, f"peer {session.remote}: {error}; told it AUTHENTICATION_FAILED"))
        # RFC 7296 section 2.21.2: the peer thinks that it stands; it is told in an exchange of its own, and not waited for
        yield Tell(Exchange.INFORMATIONAL, (NotifyPayload(NotifyType.AUTHENTICATION_FAILED),))
        session.close(Reason.RESUMPTION_FAILED if session.resumed else Reason.AUTHENTICATION_FAILED, f"{session.describe()}: {error}")
        return
    if (yield from _leave_if_sent_on(session, response)):
        return
    mobike.notice(session, response)
    postquantum.apply(session, ppk)
    crash_detection.keep_token(session, response)
    session.established()
    reauthentication.plan(session)
    reauthentication.heed(session, response)
    ike_session_resume.keep_ticket(session, response)
    if offer is not None:
        _take_child(session, task, offer, response, error_notify)


def _choose_child(session: Session, task: Task) -> None:
    """What is asked for already goes first, then the first child of the configuration."""
    waiting = next((queued for queued in session.queue if queued.child is not None), None)
    if task.child is None and waiting is not None:
        session.queue.remove(waiting)
        task.child = waiting.child
    if task.child is None and not session.childless:
        child = next((child for child in session.connection.children.values() if child.action is Action.PROTECT), None)
        task.child = ChildRequest(child) if child else None


def _close_without_credentials(session: Session, error: NoCredentials) -> None:
    session.emit(AuthenticationRejected(session.connection.name, None, f"cannot authenticate ourselves: {error}"))
    session.close(Reason.NO_CREDENTIALS, f"{session.connection.name}: {error}")


def _close_refused(session: Session, own: Identity, expected: Identity | None, error: NotifyPayload | None) -> None:
    """The answer has no AUTH."""
    reason = reason_of(error) if error else Reason.INVALID_SYNTAX
    if reason is Reason.PEER_AUTHENTICATION_FAILED and session.resumed:
        # it says nothing about our credentials; libreswan 5.2 computes AUTH from less than RFC 5723 section 4.3.3 says
        reason = Reason.RESUMPTION_FAILED
    elif reason is Reason.PEER_AUTHENTICATION_FAILED:
        why = f"peer {session.remote} refused our identity {own}: received AUTHENTICATION_FAILED"
        session.emit(AuthenticationRejected(session.connection.name, expected, why))
    session.close(reason, f"{session.describe()} answered IKE_AUTH of {own} with {error_name(error) if error else 'no AUTH'}")


def _leave_if_sent_on(session: Session, response: Message) -> Steps[bool]:
    """RFC 5685 section 6: an IKE SA whose responder redirects us goes as soon as it is there. Whether that is so."""
    gateway = redirect.protected(session, response)
    if gateway is not None:
        session.emit(Redirected(gateway))
        yield Tell(Exchange.INFORMATIONAL, (DeletePayload(ProtocolId.IKE),))
        session.close(Reason.REDIRECTED, f"{session.describe()}: to {gateway}")
        return True
    if redirect.served_nowhere(session, response):
        yield Tell(Exchange.INFORMATIONAL, (DeletePayload(ProtocolId.IKE),))
        session.close(Reason.REDIRECTION_REFUSED, session.describe())
        return True
    return False


def _defer_child(session: Session, task: Task) -> bool:
    """RFC 6023: whether IKE_AUTH may go on, with the CHILD_SA of `task` in it or, afterwards, in an exchange of its own."""
    policy, child = session.connection.childless, task.child
    if session.peer_childless and (child is None or policy in (Childless.PREFER, Childless.FORCE)):
        if child is not None:
            task.child = None
            session.queue.appendleft(Task("CHILD_CREATE", create_child, child))
        return True
    if child is not None and policy is not Childless.FORCE:
        return True
    why = "the peer takes no IKE SA without a CHILD_SA"
    session.fail_child(task, Reason.CHILDLESS_REFUSED, why)
    session.close(Reason.CHILDLESS_REFUSED, f"{session.describe()}: {why}")
    return False


def _take_child(session: Session, task: Task, offer: Offer, response: Message, error: NotifyPayload | None) -> None:
    try:
        # RFC 7296 section 1.2: the IKE SA stands without its CHILD_SA
        if error is not None:
            raise ChildRefused(reason_of(error), 0, detail=f"peer answered with {error_name(error)}")
        try:
            agreed = read_answer(session, offer, response)
        except ChildRefused:
            # RFC 7296 section 2.9: the peer may think that the CHILD_SA stands
            delete_spi(session, offer.spi.spi)
            raise
    except ChildRefused as refused:
        session.give_back(offer.spi)
        session.fail_child(task, refused.reason, refused.detail)
        return
    finish(session, task, agreed, offer, Keying(session.nonce_i, session.nonce_r, True))


# Responder


def respond(session: Session, request: Message) -> Steps[Response]:
    idi, idr, auth = request.first(IdiPayload), request.first(IdrPayload), request.first(AuthPayload)
    # RFC 9370 section 2.2.2: the keys are not those that were agreed on
    if session.intermediate.pending:
        return _refuse(session, None, None, Reason.INVALID_SYNTAX, "IKE_AUTH before all additional key exchanges are done", NotifyType.INVALID_SYNTAX)
    if idi is None:
        return _refuse(session, None, None, Reason.INVALID_SYNTAX, "no IDi payload", NotifyType.INVALID_SYNTAX)
    session.notice_certificate_requests(request)
    asked = idr.identity if idr else None
    # RFC 7296 section 2.16: without AUTH the initiator wants EAP
    if auth is None:
        return _refuse(session, None, idi.identity, Reason.AUTHENTICATION_FAILED, "the peer wants EAP")
    connection = session.candidates[0] if session.resumed else fitting(session, idi.identity, asked, auth.method)
    if connection is None:
        why = f"no connection for this identity{f' and ours being {asked}' if asked else ''} with authentication method {auth.method}"
        return _refuse(session, None, idi.identity, Reason.NO_MATCHING_CONNECTION, why)
    session.connection = connection
    session.remote_id = idi.identity
    try:
        own = own_credentials(session, asked, idi.identity)
        session.local_id = own.identity
        ppk, peer_auth = (None, auth) if session.resumed else postquantum.of_responder(session, request, auth)
        keys = ppk.keys if ppk else session.keys
        check(session, connection, idi.identity, own.identity, request, peer_auth, keys)
        proof = own_auth(session, own, keys)
        # a ticket is good for one IKE SA; only who has its keys can use it up
        if session.resumed and not session.context.resumption.office.spend(session.resumed.id, session.now):
            raise PeerRefused("the ticket was used before")
    except NoCredentials as error:
        return _refuse(session, connection.name, idi.identity, Reason.NO_CREDENTIALS, f"cannot authenticate ourselves: {error}")
    except PeerRefused as error:
        return _refuse(session, connection.name, idi.identity, Reason.AUTHENTICATION_FAILED, str(error))
    if not session.context.admits(connection, own.identity, idi.identity, session.remote.address):
        return _refuse(session, connection.name, idi.identity, Reason.NOT_UNIQUE, f"unique = {connection.unique.value}: {Reason.NOT_UNIQUE.value}")
    childless = request.first(SaPayload) is None and request.first(TsiPayload) is None and request.first(TsrPayload) is None
    # RFC 6023 section 3: only what we announced
    if connection.childless is (Childless.NEVER if childless else Childless.FORCE):
        why = f"an IKE SA with{'out' if childless else ''} a CHILD_SA, against the connection's childless = {connection.childless.value}"
        return _refuse(session, connection.name, idi.identity, Reason.CHILDLESS_REFUSED, why, NotifyType.INVALID_SYNTAX)
    session.candidates = (connection,)
    postquantum.apply(session, ppk)
    mobike.notice(session, request)
    crash_detection.keep_token(session, request)
    session.established()
    reauthentication.plan(session)
    if request.notify(NotifyType.INITIAL_CONTACT) is not None:
        session.emit(InitialContact(own.identity, idi.identity))
    told = (*crash_detection.token_payloads(session), *(mobike.announcement(session) if session.mobike else ()), *reauthentication.lifetime_payloads(session))
    told = (*told, *ike_session_resume.give_ticket(session, request))
    told = (*told, *((NotifyPayload(NotifyType.PPK_IDENTITY),) if ppk else ()))
    base: tuple[Payload, ...] = (IdrPayload(own.identity), *own_certificates(session, own), proof, *told)
    elsewhere = redirect.in_auth(session)
    if elsewhere is not None:
        redirect.await_departure(session)
        return Response((*base, redirect.payload(elsewhere)))

    # RFC 6023: an IKE SA without a CHILD_SA
    if childless:
        return Response(base)
    try:
        asked_child = choose(session, request, key_exchange=False)
        child, payloads = yield from bring_up(session, asked_child, Keying(session.nonce_i, session.nonce_r, False))
    except ChildRefused as refused:
        # RFC 7296 section 1.2: failing to make the CHILD_SA does not undo the IKE SA
        session.emit(ChildDenied(refused.reason, refused.detail))
        return Response((*base, refused.payload))
    return Response((*base, *payloads), child, (*base, NotifyPayload(NotifyType.TEMPORARY_FAILURE)))


def _refuse(
    session: Session, connection: str | None, peer: Identity | None, reason: Reason, why: str, notify: int = NotifyType.AUTHENTICATION_FAILED
) -> Response:
    # RFC 7296 section 2.21.2: an error in IKE_AUTH ends the IKE SA, and its answer says so
    session.remote_id = peer
    session.emit(AuthenticationRejected(connection, peer, f"peer {session.remote}: {why}; answered with {name_of(NotifyType, notify)}"))
    return Response((NotifyPayload(notify),), close=IkeClosed(reason, f"{session.describe()}: {why}"))
