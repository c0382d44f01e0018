"""Who we are and who the peer is: AUTH payloads made and checked (RFC 7296 section 2.15), connections chosen by identity."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field, replace
from typing import Final

from kernel_shim.secret import Secret
from vpnd.auth.credentials import OwnCertificate
from vpnd.auth.psk import psk_auth, psk_verifies
from vpnd.auth.signature import NoCommonScheme, SignaturePolicy, SignatureRefused, sign, verify
from vpnd.auth.x509 import Certificate, CertificateRefused, check_peer
from vpnd.config.model import AuthMethod, AuthRound, ConnectionConfig
from vpnd.ike.iana import AuthenticationMethod, CertEncoding
from vpnd.ike.identity import Identity
from vpnd.ike.keymat import signed_octets
from vpnd.ike.session import Session
from vpnd.ike.steps import IkeCrypto
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import AuthPayload, CertPayload, Payload

MAX_CERTIFICATES: Final = 8  # of one message that are looked at, and candidates that are tried: each costs a signature


class NoCredentials(Exception):
    """We cannot authenticate ourselves; the text is safe to log."""


class PeerRefused(Exception):
    """The peer is not who it says; the text is safe to log."""


@dataclass(frozen=True, slots=True)
class Own:
    """What we authenticate with: `secret` or `signer`, or neither when the IKE SA is resumed."""

    identity: Identity
    secret: Secret | None = None
    signer: OwnCertificate | None = field(default=None)


def own_credentials(session: Session, asked: Identity | None, peer: Identity | None) -> Own:
    """Our identity and key for `session.connection`. `asked` is the IDr of an initiator, `peer` its identity. Raises NoCredentials."""
    if not session.connection.local:
        raise NoCredentials(f"{session.connection.name} has no local section")
    local = session.connection.local[0]
    if session.resumed is not None:
        return Own(session.resumed.local_id)
    configured = local.id if local.id is not None and not local.id.any and not local.id.has_wildcards else None
    identity = configured or asked
    store = session.context.credentials
    if local.auth is AuthMethod.PSK:
        identity = identity or Identity.of_address(session.local.address)
        remote = peer or expected_identity(session.connection) or Identity.of_address(session.remote.address)
        secret = store.shared_secret(identity, remote)
        if secret is None:
            raise NoCredentials(f"no shared key for {identity} and {remote}")
        return Own(identity, secret)
    signer = store.own_certificate(replace(local, id=identity), session.peer_authorities)
    if signer is None and configured is None and asked is not None:
        signer = store.own_certificate(replace(local, id=None), session.peer_authorities)
    if signer is None:
        raise NoCredentials(f"no certificate with a private key for {identity or 'any identity'}")
    return Own(signer.identity, signer=signer)


def own_auth(session: Session, own: Own, keys: IkeCrypto) -> AuthPayload:
    """AUTH with the SK_p of `keys`. Raises NoCredentials when our key has no scheme that the peer takes."""
    octets = _octets(session, keys, own.identity, initiator=session.initiator)
    if session.resumed is not None:
        return AuthPayload(AuthenticationMethod.SHARED_KEY, _resumed_auth(keys, octets, initiator=session.initiator))
    if own.secret is not None:
        return AuthPayload(AuthenticationMethod.SHARED_KEY, psk_auth(keys.suite.prf, own.secret, octets))
    assert own.signer is not None
    try:
        policy = SignaturePolicy.of(session.connection.local[0].signature_schemes)
        signature = sign(own.signer.key, octets, policy, session.peer_hashes)
    except (NoCommonScheme, ValueError) as error:
        raise NoCredentials(str(error)) from error
    return AuthPayload(signature.method, signature.data)


def own_certificates(session: Session, own: Own) -> list[Payload]:
    """The CERT payloads that go with our AUTH."""
    return [CertPayload(CertEncoding.X509_SIGNATURE, own.signer.certificate.der)] if own.signer is not None and sends_certificate(session) else []


def sends_certificate(session: Session) -> bool:
    """swanctl.conf(5), `send_cert`."""
    mode = session.connection.send_cert
    return mode == "always" or (mode != "never" and session.peer_asks_certificate)


def check(session: Session, connection: ConnectionConfig, peer: Identity, own: Identity, message: Message, auth: AuthPayload, keys: IkeCrypto) -> None:
    """Whether `auth`, with the CERT payloads of `message` and the SK_p of `keys`, proves that the peer is `peer`, as `connection` demands it.

    Raises PeerRefused.
    """
    if session.resumed is not None:
        octets = _octets(session, keys, peer, initiator=not session.initiator)
        right = hmac.compare_digest(auth.data, _resumed_auth(keys, octets, initiator=not session.initiator))
        if peer != session.resumed.remote_id or auth.method != AuthenticationMethod.SHARED_KEY or not right:
            raise PeerRefused("the ticket is not this peer's")
        return
    if not connection.remote:
        raise PeerRefused(f"{connection.name} has no remote section")
    remote = connection.remote[0]
    if remote.id is not None and not peer.matches(remote.id):
        raise PeerRefused(f"identity {peer} is not {remote.id}")
    if (auth.method == AuthenticationMethod.SHARED_KEY) is not (remote.auth is AuthMethod.PSK):
        raise PeerRefused(f"authentication method {auth.method} where {remote.auth.value} is required")
    octets = _octets(session, keys, peer, initiator=not session.initiator)
    if remote.auth is AuthMethod.PSK:
        secret = session.context.credentials.shared_secret(own, peer)
        if secret is None:
            raise PeerRefused(f"no shared key for {own} and {peer}")
        if not psk_verifies(keys.suite.prf, secret, octets, auth.data):
            raise PeerRefused("the shared key does not match")
        return
    _check_signature(session, remote, peer, message, auth, octets)


def _check_signature(session: Session, remote: AuthRound, peer: Identity, message: Message, auth: AuthPayload, octets: bytes) -> None:
    store = session.context.credentials
    utc = session.context.utc(session.now)
    try:
        policy = SignaturePolicy.of(remote.signature_schemes)
    except ValueError as error:
        raise PeerRefused(str(error)) from error
    # RFC 7296 section 3.6: the first certificate is the one that AUTH verifies with; without any, one that we hold
    sent = [payload.data for payload in message.all(CertPayload)[:MAX_CERTIFICATES] if payload.encoding == CertEncoding.X509_SIGNATURE]
    refusal: Exception = PeerRefused("no certificate of the peer")
    candidates: list[Certificate] = []
    try:
        if sent:
            candidates = [Certificate.parse(sent[0])]
        else:
            held = [Certificate.parse(der) for der in remote.certs] or list(store.certificates)
            candidates = [certificate for certificate in held if certificate.asserts(peer)]
        # `certs` pins certificates, `cacerts` authorities; else everything that is loaded counts
        pinned = set(remote.certs) if remote.certs else set() if remote.cacerts else {certificate.der for certificate in store.certificates}
        authorities = [] if remote.certs else [Certificate.parse(der) for der in remote.cacerts] or list(store.authorities)
    except CertificateRefused as error:
        raise PeerRefused(str(error)) from error
    for certificate in candidates[:MAX_CERTIFICATES]:
        try:
            check_peer(certificate, peer, pinned=pinned, authorities=authorities, utc=utc)
            verify(certificate.public_key, octets, auth.method, auth.data, policy)
        except (CertificateRefused, SignatureRefused) as error:
            refusal = error
        else:
            session.proof_ends = session.now + (certificate.parsed.not_valid_after_utc - utc).total_seconds()
            return
    raise PeerRefused(str(refusal)) from refusal


def fitting(session: Session, peer: Identity, asked: Identity | None, method: int) -> ConnectionConfig | None:
    """The candidate that fits best: as strongSwan, the better match of both identities wins, and then the order."""
    best: tuple[int, ConnectionConfig] | None = None
    for connection in session.candidates:
        if not connection.local or not connection.remote:
            continue
        local, remote = connection.local[0], connection.remote[0]
        of_peer = peer.match_quality(remote.id) if remote.id is not None else 1
        of_own = 1 if asked is None or local.id is None else asked.match_quality(local.id)
        if not of_peer or not of_own or (method == AuthenticationMethod.SHARED_KEY) is not (remote.auth is AuthMethod.PSK):
            continue
        if best is None or of_peer + of_own > best[0]:
            best = of_peer + of_own, connection
    return best[1] if best else None


def expected_identity(connection: ConnectionConfig) -> Identity | None:
    """The peer's identity, if the configuration names exactly one."""
    identity = connection.remote[0].id if connection.remote else None
    return None if identity is None or identity.any or identity.has_wildcards else identity


def _resumed_auth(keys: IkeCrypto, octets: bytes, *, initiator: bool) -> bytes:
    """RFC 5723 section 4.3.3: AUTH = prf(SK_px, octets)."""
    return keys.suite.prf((keys.keys.pi if initiator else keys.keys.pr).reveal(), octets)


def _octets(session: Session, crypto: IkeCrypto, identity: Identity, *, initiator: bool) -> bytes:
    """RFC 7296 section 2.15: what the initiator's or the responder's AUTH payload signs."""
    intermediate = session.intermediate.octets
    if initiator:
        return signed_octets(crypto.suite.prf, crypto.keys.pi, session.init_request, session.nonce_r, identity, intermediate)
    return signed_octets(crypto.suite.prf, crypto.keys.pr, session.init_response, session.nonce_i, identity, intermediate)
