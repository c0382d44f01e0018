"""Identities: swanctl text, printing, wildcards, distinguished names."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.ike.dn import decode_dn, dn_text, match_dn, parse_dn
from vpnd.ike.iana import IdType
from vpnd.ike.identity import ANY_MATCH, NO_MATCH, ONE_WILDCARD, PERFECT_MATCH, Identity


@pytest.mark.parametrize(
    ("text", "kind", "data", "printed"),
    [
        ("%any", IdType.ANY, b"", "%any"),
        ("*", IdType.ANY, b"", "%any"),
        ("0.0.0.0", IdType.ANY, b"", "%any"),
        ("::", IdType.ANY, b"", "%any"),
        ("192.0.2.1", IdType.IPV4_ADDR, b"\xc0\0\x02\x01", "192.0.2.1"),
        ("ipv4:192.0.2.1", IdType.IPV4_ADDR, b"\xc0\0\x02\x01", "192.0.2.1"),
        ("ipv4:#c0000201", IdType.IPV4_ADDR, b"\xc0\0\x02\x01", "192.0.2.1"),
        ("2001:db8::1", IdType.IPV6_ADDR, ip_address("2001:db8::1").packed, "2001:db8::1"),
        ("moon.strongswan.org", IdType.FQDN, b"moon.strongswan.org", "moon.strongswan.org"),
        ("@moon.strongswan.org", IdType.FQDN, b"moon.strongswan.org", "moon.strongswan.org"),
        ("fqdn:moon", IdType.FQDN, b"moon", "moon"),
        ("DNS:moon", IdType.FQDN, b"moon", "moon"),
        ("carol@strongswan.org", IdType.RFC822_ADDR, b"carol@strongswan.org", "carol@strongswan.org"),
        ("@@carol@strongswan.org", IdType.RFC822_ADDR, b"carol@strongswan.org", "carol@strongswan.org"),
        ("email:carol", IdType.RFC822_ADDR, b"carol", "carol"),
        ("@#0a0b0c", IdType.KEY_ID, b"\n\x0b\x0c", "0a:0b:0c"),
        ("@#0a:0b", IdType.KEY_ID, b"\n\x0b", "0a:0b"),
        ("keyid:my key", IdType.KEY_ID, b"my key", "my key"),
        ("keyid:#6d", IdType.KEY_ID, b"m", "m"),
        ("vendor:thing", IdType.KEY_ID, b"vendor:thing", "vendor:thing"),
    ],
)
def test_text_becomes_an_identity(text, kind, data, printed):
    identity = Identity.parse(text)
    assert (identity.type, identity.data) == (kind, data)
    assert str(identity) == printed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("192.0.2.300", "character 1"),
        ("2001:db8::g:1:", None),
        ("2001:db8::1::2", "character 1"),
        ("ipv4:::1", "character 6"),
        ("ipv4:#c00002", "character 7"),
        ("@", "character 2"),
        ("fqdn:", "character 6"),
        ("keyid:", "character 7"),
        ("two words", "character 4"),
        ("10.0.0.0/8", "character 9"),
        ("@#0g", "character 4"),
        ("@#012", "character 3"),
        ("XX=1", "character 1"),
        ("C=CH,", "character 6"),
        ("C=CH, moon", "character 6"),
        ('CN="moon', "character 9"),
        ("asn1dn:#3000ff", "character 9"),
        ("ipv4net:10.0.0.0/8", "not supported"),
        ("münchen", "character 2"),
    ],
)
def test_bad_text_is_refused_with_its_place(text, complaint):
    if complaint is None:
        assert Identity.parse(text).type == IdType.KEY_ID
        return
    with pytest.raises(ValueError, match=complaint):
        Identity.parse(text)


def test_a_dn_is_the_one_that_certificates_carry():
    text = "C=CH, O=Linux strongSwan, OU=Research, CN=moon.strongswan.org, E=moon@strongswan.org"
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "CH", x509.name._ASN1Type.PrintableString),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Linux strongSwan", x509.name._ASN1Type.PrintableString),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Research", x509.name._ASN1Type.PrintableString),
            x509.NameAttribute(NameOID.COMMON_NAME, "moon.strongswan.org", x509.name._ASN1Type.PrintableString),
            x509.NameAttribute(NameOID.EMAIL_ADDRESS, "moon@strongswan.org"),
        ]
    )
    identity = Identity.parse(text)
    assert identity == Identity.of_dn(name.public_bytes())
    assert str(identity) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("/C=CH/O=A, B/CN=moon", 'C=CH, O="A, B", CN=moon'),
        ('C=CH,O="A, B",CN=moon', 'C=CH, O="A, B", CN=moon'),
        ("C=CH, O=A\\, B, CN=moon", 'C=CH, O="A, B", CN=moon'),
        ("cn= moon ", "CN=moon"),
        ("CN=Zürich", "CN=Zürich"),
        ("DC=org, UID=moon, SN=12, serialNumber=34", "DC=org, UID=moon, SN=12, SN=34"),
        ("1.2.840.113549.1.9.8=x, 2.999.1=y", "unstructuredAddress=x, 2.999.1=y"),
        ("asn1dn:CN=moon", "CN=moon"),
        ("CN=", "CN="),
    ],
)
def test_dn_text_in_its_many_forms(text, printed):
    assert str(Identity.parse(text)) == printed


def test_utf8_strings_and_printable_strings_of_the_same_letters_are_the_same_name():
    name = x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "CH"), x509.NameAttribute(NameOID.COMMON_NAME, "Moon  Base")])
    assert Identity.of_dn(name.public_bytes()).match_quality(Identity.parse("C=CH, CN=moon base")) == PERFECT_MATCH


@pytest.mark.parametrize(
    ("text", "pattern", "quality"),
    [
        ("moon.org", "%any", ANY_MATCH),
        ("moon.org", "moon.org", PERFECT_MATCH),
        ("Moon.ORG", "moon.org", PERFECT_MATCH),
        ("a.moon.org", "*.moon.org", ONE_WILDCARD),
        ("moon.org", "*.moon.org", NO_MATCH),
        ("amoon.org", "*.moon.org", NO_MATCH),
        ("carol@moon.org", "*@moon.org", ONE_WILDCARD),
        ("carol@moon.org", "*@sun.org", NO_MATCH),
        ("fqdn:carol@moon.org", "*@moon.org", NO_MATCH),
        ("*.moon.org", "a.moon.org", NO_MATCH),
        ("192.0.2.1", "192.0.2.1", PERFECT_MATCH),
        ("192.0.2.1", "192.0.2.2", NO_MATCH),
        ("192.0.2.1", "fqdn:192.0.2.1", NO_MATCH),
        ("keyid:Moon", "keyid:moon", NO_MATCH),
        ("keyid:moon", "keyid:*", NO_MATCH),
        ("C=CH, O=x, CN=moon", "C=ch, O=X, CN=moon", PERFECT_MATCH),
        ("C=CH, O=x, CN=moon", "C=CH, O=x, CN=*", PERFECT_MATCH - 1),
        ("C=CH, O=x, CN=moon", "C=CH, O=*, CN=*", PERFECT_MATCH - 2),
        ("C=CH, O=x, CN=moon", "C=CH, CN=moon", NO_MATCH),
        ("C=CH, O=x, CN=moon", "O=x, C=CH, CN=moon", NO_MATCH),
        ("C=CH, O=x, CN=moon", "C=CH, O=x, CN=sun", NO_MATCH),
        ("C=CH, O=x, CN=*", "C=CH, O=x, CN=moon", NO_MATCH),
    ],
)
def test_matching(text, pattern, quality):
    assert Identity.parse(text).match_quality(Identity.parse(pattern)) == quality
    assert Identity.parse(text).matches(Identity.parse(pattern)) is (quality != NO_MATCH)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("%any", True), ("*.moon.org", True), ("moon.org", False), ("C=CH, CN=*", True), ("C=CH, CN=a*", False), ("192.0.2.1", False), ("keyid:*", False)],
)
def test_patterns_are_known_as_such(text, pattern):
    assert Identity.parse(text).has_wildcards is pattern


def test_addresses():
    assert Identity.of_address(ip_address("192.0.2.1")).address == ip_address("192.0.2.1")
    assert Identity.of_address(ip_address("2001:db8::1")) == Identity.parse("2001:db8::1")
    assert Identity.parse("moon").address is None
    assert Identity.parse("moon").body() == b"\x02\0\0\0moon"
    assert Identity(IdType.ANY, b"").any


def test_what_a_peer_sends_prints_whatever_it_is():
    assert str(Identity(IdType.FQDN, b"moon\n\x1b[31m")) == "moon??[31m"
    assert str(Identity(99, b"\xff")) == "(99 ff)"
    assert str(Identity(IdType.IPV4_ADDR, b"abc")) == "(IPV4_ADDR 616263)"
    assert str(Identity(IdType.DER_ASN1_DN, b"\x30\x05")) == "(invalid DN 3005)"
    name = Identity.of_dn(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a\nb")]).public_bytes())
    assert str(name) == "CN=a?b"


@settings(max_examples=200)
@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda data: b"\x30" + bytes([len(data)]) + data))
def test_any_octets_are_a_name_or_a_value_error(data):
    try:
        attributes = decode_dn(data)
    except ValueError:
        with pytest.raises(ValueError):
            dn_text(data)
        assert match_dn(data, parse_dn("CN=*")) is None
    else:
        assert isinstance(dn_text(data), str)
        assert all(attribute.oid for attribute in attributes)


@settings(max_examples=200)
@given(st.text(max_size=40) | st.text(alphabet='CNO=,/*\\" @#:%.ax19', max_size=30))
def test_any_text_is_an_identity_or_a_value_error(text):
    try:
        identity = Identity.parse(text)
    except ValueError:
        return
    assert isinstance(str(identity), str)
    assert identity.matches(Identity(IdType.ANY, b""))
    assert identity.matches(identity)


LETTERS = st.characters(codec="utf-8", categories=("L", "N", "P", "Zs"))
VALUES = st.text(alphabet=LETTERS, min_size=1, max_size=20).map(str.strip).filter(lambda text: text.isprintable() and text != "")


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["C", "O", "OU", "CN", "L", "DC", "E"]), VALUES), min_size=1, max_size=5))
def test_a_printed_dn_reads_as_the_same_name(pairs):
    quoted = ", ".join(f"{kind}=" + '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for kind, value in pairs)
    der = parse_dn(quoted)
    assert [(attribute.text) for attribute in decode_dn(der)] == [value for _, value in pairs]
    assert Identity.of_dn(parse_dn(dn_text(der))).match_quality(Identity.of_dn(der)) >= PERFECT_MATCH - sum(value == "*" for _, value in pairs)
