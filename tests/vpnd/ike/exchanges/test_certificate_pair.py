"""IKE_AUTH with certificates: every kind of key, RFC 7427 and before, and what must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from lab.ike_pair import Pair, Peer, agree, child, connection, mirrored, psk
from vpnd_certificates import Authority, key, source

from vpnd.auth.signature import SUPPORTED_HASHES
from vpnd.config.model import AuthMethod, AuthRound
from vpnd.ike.effects import AuthenticationRejected, Reason
from vpnd.ike.identity import Identity

CA = Authority()
KINDS = ["rsa", "ecdsa256", "ecdsa384", "ecdsa521", "ed25519"]


def pubkey(identity: str | None, **options: object) -> AuthRound:
    return AuthRound(AuthMethod.PUBKEY, Identity.parse(identity) if identity else None, **options)  # type: ignore[arg-type]


def certificate_pair(
    kind: str = "ecdsa256",
    *,
    a: AuthRound | None = None,
    b: AuthRound | None = None,
    at_a: AuthRound | None = None,
    at_b: AuthRound | None = None,
    certificate_a: bytes | None = None,
    authorities: Sequence[Authority] = (CA,),
    **options: object,
) -> Pair:
    """`a` and `b` are their local sections, `at_a` is what `a` asks of `b`."""
    pair = Pair(
        connection("to-b", a or pubkey("a.example"), at_a or pubkey("b.example"), [child()], **options),
        connection("to-a", b or pubkey("b.example"), at_b or pubkey("a.example"), [mirrored(child())], **options),
    )
    for number, peer in enumerate(pair.peers):
        private = key(kind, number)
        peer.credentials.load_key(source(private))
        own = CA.issue(f"{peer.name} gateway", private, [f"{peer.name}.example", peer.address, f"{peer.name}@example.org"])
        peer.credentials.load_certificate(certificate_a if certificate_a and peer is pair.a else own, authority=False)
        for authority in authorities:
            peer.credentials.load_certificate(authority.der, authority=True)
    return pair


def refused(peer: Peer) -> str:
    (event,) = [event for event in peer.events if isinstance(event, AuthenticationRejected)]
    assert event.connection
    return event.why


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_key(kind: str) -> None:
    pair = certificate_pair(kind)
    pair.connect()
    # IKE_AUTH { IDi, CERT, CERTREQ, IDr, AUTH(14), ... } -->  <-- IKE_AUTH { IDr, CERT, AUTH(14), ... }
    agree(pair, 1)
    assert str(pair.b.sa.remote_id) == "a.example"


@pytest.mark.parametrize("identity", ["C=CH, CN=a gateway", "192.0.2.1", "a@example.org", None])
def test_each_kind_of_identity(identity: str | None) -> None:
    pair = certificate_pair(a=pubkey(identity), at_b=pubkey("C=CH, CN=*" if identity is None else identity))
    pair.connect()
    agree(pair, 1)
    assert str(pair.b.sa.remote_id) == (identity or "C=CH, CN=a gateway")


@pytest.mark.parametrize("scheme", ["ike:rsa/pss-sha256", "rsa/pss-sha512", "rsa-sha384", "pubkey-sha512"])
def test_schemes_by_name(scheme: str) -> None:
    pair = certificate_pair("rsa", a=pubkey("a.example", signature_schemes=(scheme,)), at_b=pubkey("a.example", signature_schemes=(scheme,)))
    pair.connect()
    agree(pair, 1)


def test_a_scheme_that_the_peer_does_not_allow() -> None:
    pair = certificate_pair("rsa", at_b=pubkey("a.example", signature_schemes=("ike:rsa/pss-sha512",)))
    pair.connect()
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    assert "not allowed" in refused(pair.b)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa256", "ecdsa384", "ecdsa521"])
def test_a_peer_without_rfc_7427_gets_the_classic_methods(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpnd.ike.exchanges.opening.SUPPORTED_HASHES", ())
    pair = certificate_pair(kind)
    pair.connect()
    # IKE_AUTH { ..., AUTH(1 or 9 to 11), ... } -->
    agree(pair, 1)


def test_ed25519_needs_rfc_7427(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpnd.ike.exchanges.opening.SUPPORTED_HASHES", tuple(SUPPORTED_HASHES[:3]))
    pair = certificate_pair("ed25519")
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS


def test_each_side_its_own_method() -> None:
    pair = certificate_pair("ecdsa256", b=psk("b.example"), at_a=psk("b.example"))
    pair.connect()
    agree(pair, 1)


@pytest.mark.parametrize(("sent", "requested", "stands"), [("always", False, True), ("ifasked", False, False), ("never", True, False)])
def test_send_cert(sent: str, requested: bool, stands: bool) -> None:
    pair = certificate_pair(send_cert=sent, send_certreq=requested)
    pair.connect()
    agree(pair, int(stands))
    if not stands:
        assert "no certificate" in refused(pair.b)


def test_certificates_that_are_not_sent_are_found_among_the_loaded() -> None:
    pair = certificate_pair(send_cert="never")
    for peer, other in (pair.peers, pair.peers[::-1]):
        for certificate in list(other.credentials.certificates):
            peer.credentials.load_certificate(certificate.der, authority=False)
    pair.connect()
    agree(pair, 1)


def test_a_pinned_certificate_needs_no_authority() -> None:
    pair = certificate_pair(authorities=(), send_cert="always")
    for peer, other in (pair.peers, pair.peers[::-1]):
        (certificate,) = other.credentials.certificates
        peer.connections[0] = replace(peer.connections[0], remote=(replace(peer.connections[0].remote[0], certs=(certificate.der,)),))
    pair.connect()
    agree(pair, 1)


def test_another_certificate_than_the_pinned_one_is_refused() -> None:
    pinned = CA.issue("a gateway", key("ecdsa256", 7), ["a.example"])
    pair = certificate_pair(at_b=pubkey("a.example", certs=(pinned,)))
    pair.connect()
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    agree(pair, 0)


def test_only_the_authorities_that_the_connection_names_count() -> None:
    other = Authority("Other CA", number=98)
    pair = certificate_pair(at_b=pubkey("a.example", cacerts=(other.der,)), authorities=(CA, other))
    pair.connect()
    assert "unknown CA" in refused(pair.b)
    pair = certificate_pair(at_b=pubkey("a.example", cacerts=(CA.der,)), authorities=(CA, other))
    pair.connect()
    agree(pair, 1)


@pytest.mark.parametrize(
    ("certificate", "why"),
    [
        (Authority("Rogue CA", number=97).issue("a", key("ecdsa256", 0), ["a.example"]), "unknown CA"),
        (Authority(number=97).issue("a", key("ecdsa256", 0), ["a.example"]), "does not verify"),  # the same name, another key
        (CA.issue("a", key("ecdsa256", 0), ["a.example"], end=datetime(2025, 6, 1, tzinfo=UTC)), "expired"),
        (CA.issue("a", key("ecdsa256", 0), ["a.example"], begin=datetime(2030, 6, 1, tzinfo=UTC)), "not valid yet"),
    ],
)
def test_a_wrong_certificate_ends_in_authentication_failed(certificate: bytes, why: str) -> None:
    pair = certificate_pair(certificate_a=certificate)
    pair.connect()
    # <-- IKE_AUTH { N(AUTHENTICATION_FAILED) }
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    assert why in refused(pair.b)
    agree(pair, 0)


def test_an_identity_that_the_certificate_does_not_assert_is_not_claimed_nor_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    liar = CA.issue("a gateway", key("ecdsa256", 0), ["c.example"])
    pair = certificate_pair(certificate_a=liar)
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS
    monkeypatch.setattr("vpnd.auth.x509.Certificate.asserts", lambda self, identity: self.der == liar or identity.data == b"b.example")
    pair = certificate_pair(certificate_a=liar)
    pair.a.start(pair.b.endpoint, pair.now)
    for _ in range(2):
        pair.step()
    request = pair.take()
    monkeypatch.undo()
    pair.deliver(request)
    pair.settle()
    assert "does not assert" in refused(pair.b)
    agree(pair, 0)


def test_a_certificate_with_the_key_of_another_is_worth_nothing() -> None:
    pair = certificate_pair(certificate_a=CA.issue("a gateway", key("ecdsa256", 5), ["a.example"]))
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS


def test_psk_where_a_certificate_is_required_fits_no_connection() -> None:
    pair = certificate_pair(a=psk("a.example"))
    pair.connect()
    assert pair.b.closed is Reason.NO_MATCHING_CONNECTION


@pytest.mark.parametrize("change", ["none", "authority", "expired"])
def test_a_ticket_is_worth_as_much_as_the_certificate_behind_it(change: str) -> None:
    private = key("ecdsa256", 0)
    pair = certificate_pair(resumption=True)
    short = CA.issue("a gateway", private, ["a.example"], end=pair.b.utc(pair.now) + timedelta(hours=2))
    pair = certificate_pair(certificate_a=short, resumption=True)
    pair.connect()
    agree(pair, 1)
    pair.wait(3600.0 if change == "none" else 1.0)
    if change == "authority":
        pair.b.credentials.load_certificate(Authority("another CA").der, authority=True)
    elif change == "expired":
        pair.wait(2.5 * 3600.0)
    for peer in pair.peers:
        for sa in peer.standing:
            peer.run(sa, sa.abort(pair.now, Reason.PEER_SILENT), pair.now)
    pair.log.clear()
    pair.connect()
    assert any("IKE_SA_INIT" in line for line in pair.log) is (change != "none")
