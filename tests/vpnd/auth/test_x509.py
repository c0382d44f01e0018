"""Certificates of peers: who they say that they are, and whom to believe."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from vpnd_certificates import Authority, key, name, usage

from vpnd.auth.der import MAX_IDENTIFIER_OCTETS, DerError, canonical_name
from vpnd.auth.x509 import Certificate, CertificateRefused, check_peer
from vpnd.ike.identity import Identity

UTC_NOW = datetime(2026, 6, 1, tzinfo=UTC)
CA = Authority()
PRIVATE = key("ecdsa256")


def tlv(tag: int, content: bytes) -> bytes:
    return bytes((tag, 0x82)) + len(content).to_bytes(2, "big") + content


def check(der: bytes, identity: str = "gw.example", authorities: Sequence[Authority] = (CA,), pinned: Sequence[bytes] = ()) -> None:
    check_peer(
        Certificate.parse(der),
        Identity.parse(identity),
        pinned=pinned,
        authorities=[Certificate.parse(authority.der) for authority in authorities],
        utc=UTC_NOW,
    )


@pytest.mark.parametrize(
    ("identity", "asserted"),
    [
        ("gw.example", True),
        ("GW.Example", True),
        ("other.example", False),
        ("*.example", False),
        ("gw@example.org", True),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("2001:db8::7", True),
        ("C=CH, CN=gw", True),
        ("C=ch, CN=GW", True),
        ("C=CH, CN=gw2", False),
        ("C=CH", False),
        ("CN=gw, C=CH", False),
        ("gw", False),  # a common name is no dNSName
        ("@#6777", False),
    ],
)
def test_what_a_certificate_asserts(identity: str, asserted: bool) -> None:
    der = CA.issue("gw", PRIVATE, ["gw.example", "gw@example.org", "192.0.2.7", "2001:db8::7"])
    assert Certificate.parse(der).asserts(Identity.parse(identity)) is asserted
    if asserted:
        check(der, identity)
    else:
        with pytest.raises(CertificateRefused, match="does not assert"):
            check(der, identity)


@pytest.mark.parametrize("octets", [MAX_IDENTIFIER_OCTETS, 3000, 60_000])
def test_a_name_with_a_long_object_identifier_is_nobodys(octets: int) -> None:
    """An arc of 3,000 octets has more digits than Python turns into text."""
    attribute = tlv(0x30, tlv(0x06, b"\x81" * octets + b"\x01") + tlv(0x0C, b"gw"))
    identity = Identity.of_dn(tlv(0x30, tlv(0x31, attribute)))
    assert not Certificate.parse(CA.issue("gw", PRIVATE)).asserts(identity)
    assert str(identity)


def test_wildcards_in_a_certificate_are_not_wildcards() -> None:
    der = CA.issue("*", PRIVATE, ["*.example"])
    assert not Certificate.parse(der).asserts(Identity.parse("gw.example"))
    assert not Certificate.parse(der).asserts(Identity.parse("C=CH, CN=gw"))


def test_a_signature_of_an_unknown_kind_is_refused() -> None:
    der = CA.issue("gw", PRIVATE, ["gw.example"])
    kind = bytes.fromhex("2a8648ce3d040302")  # ecdsa-with-SHA256
    assert der.count(kind) == 2
    with pytest.raises(CertificateRefused, match="does not verify"):
        check(der.replace(kind, kind[:-1] + b"\x7f"))


def test_a_name_of_an_unsupported_kind_is_refused() -> None:
    der = CA.issue("gw", PRIVATE, ["gw.example"])
    name_of_dns = b"\x82\x0agw.example"
    assert der.count(name_of_dns) == 1
    with pytest.raises(CertificateRefused, match="does not parse"):
        check(der.replace(name_of_dns, b"\xa3" + name_of_dns[1:]))  # an x400Address


@pytest.mark.property
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_damaged_certificate_is_refused(edits: list[tuple[int, int]]) -> None:
    der = bytearray(CA.issue("gw", PRIVATE, ["gw.example"]))
    for at, value in edits:
        der[at % len(der)] ^= value
    with contextlib.suppress(CertificateRefused):
        check(bytes(der))


@pytest.mark.parametrize(
    ("authority", "why"),
    [
        (Authority(ca=False), "not that of a CA"),
        (Authority(sign_usage=False), "may not sign"),
        (Authority(number=5), "does not verify"),
        (Authority("Another"), "unknown CA"),
    ],
)
def test_authorities_that_are_none(authority: Authority, why: str) -> None:
    with pytest.raises(CertificateRefused, match=why):
        check(CA.issue("gw", PRIVATE, ["gw.example"]), authorities=[authority])


def test_an_authority_with_a_new_key_beside_the_old_one() -> None:
    check(CA.issue("gw", PRIVATE, ["gw.example"]), authorities=[Authority(number=5), CA])


@pytest.mark.parametrize(
    ("extensions", "why"),
    [
        ([(usage(signature=False), True)], "keyUsage"),
        ([(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)], "critical extension"),
    ],
)
def test_end_entities_that_may_not_sign(extensions: list[tuple[x509.ExtensionType, bool]], why: str) -> None:
    with pytest.raises(CertificateRefused, match=why):
        check(CA.issue("gw", PRIVATE, ["gw.example"], extensions=extensions))


def test_an_unknown_extension_that_is_not_critical_does_not_matter() -> None:
    check(
        CA.issue(
            "gw",
            PRIVATE,
            ["gw.example"],
            extensions=[(usage(), True), (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), False)],
        )
    )


def test_a_pinned_certificate_is_still_checked_for_its_time() -> None:
    der = CA.issue("gw", PRIVATE, ["gw.example"], end=datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(CertificateRefused, match="expired"):
        check(der, pinned=[der])
    der = CA.issue("gw", PRIVATE, ["gw.example"])
    check(der, authorities=[], pinned=[der])


@pytest.mark.parametrize("kind", ["rsa", "ecdsa384", "ed25519"])
def test_authorities_of_each_kind(kind: str) -> None:
    authority = Authority(f"CA {kind}", kind)
    check(authority.issue("gw", PRIVATE, ["gw.example"]), authorities=[authority])


def test_malformed_names() -> None:
    for der in (b"", b"\x30", b"\x30\x02\x31\x00\x00", name("x").public_bytes()[:-1]):
        with pytest.raises(DerError):
            canonical_name(der)
