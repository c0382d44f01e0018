"""The credential store: shared keys by best match, private keys in every wrapping, certificates of our own."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from vpnd_certificates import Authority, key, source

from vpnd.auth.credentials import CredentialError, CredentialStore, parse_private_key
from vpnd.config.model import AuthMethod, AuthRound, Configuration, PrivateKeySource, SharedSecret
from vpnd.ike.identity import Identity

KINDS = ["rsa", "ecdsa256", "ecdsa384", "ed25519"]


def store(**secrets: tuple[str, ...]) -> CredentialStore:
    result = CredentialStore()
    for name, owners in secrets.items():
        result.load_shared(SharedSecret(name, name.encode(), tuple(Identity.parse(owner) for owner in owners)))
    return result


@pytest.mark.parametrize(
    ("peer", "chosen"),
    [("a.example", b"exact"), ("b.example", b"domain"), ("elsewhere", b"everybody")],
)
def test_the_closest_owner_wins(peer: str, chosen: bytes) -> None:
    credentials = store(everybody=(), domain=("*.example",), exact=("a.example",))
    secret = credentials.shared_secret(Identity.parse("us"), Identity.parse(peer))
    assert secret is not None
    assert secret.reveal() == chosen


def test_the_peer_counts_more_than_we_do() -> None:
    secret = store(ours=("us",), theirs=("them",)).shared_secret(Identity.parse("us"), Identity.parse("them"))
    assert secret is not None
    assert secret.reveal() == b"theirs"


def test_a_key_shared_with_another_peer_is_not_given_out() -> None:
    credentials = store(other=("us", "them"))
    assert credentials.shared_secret(Identity.parse("us"), Identity.parse("somebody.else")) is None
    assert credentials.shared_secret(Identity.parse("us"), Identity.parse("them")) is not None


def test_a_key_of_ours_alone_serves_all_peers() -> None:
    assert store(ours=("us",)).shared_secret(Identity.parse("us"), Identity.parse("anybody")) is not None
    assert store(ours=("them",)).shared_secret(Identity.parse("us"), Identity.parse("anybody")) is None


def test_load_and_unload_by_name() -> None:
    credentials = store(one=(), two=())
    assert list(credentials.shared_names()) == ["one", "two"]
    credentials.unload_shared("one")
    credentials.unload_shared("one")
    assert list(credentials.shared_names()) == ["two"]
    credentials.clear()
    assert list(credentials.shared_names()) == []
    assert "one" not in repr(store(one=()).shared_secret(Identity.parse("a"), Identity.parse("b")))


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("kind", KINDS)
def test_private_keys_in_every_wrapping(kind: str, form: serialization.PrivateFormat, encoding: serialization.Encoding) -> None:
    if kind == "ed25519" and form is serialization.PrivateFormat.TraditionalOpenSSL:
        return  # there is no such thing
    private = key(kind)
    credentials = CredentialStore()
    identifier = credentials.load_key(PrivateKeySource(private.private_bytes(encoding, form, serialization.NoEncryption())))
    assert list(credentials.key_ids()) == [identifier]
    # strongSwan's KEYID_PUBKEY_SHA1: SHA-1 over the subjectPublicKey bits
    info = private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    bits = {"rsa": 24, "ecdsa256": 26, "ecdsa384": 23, "ed25519": 12}[kind]
    assert identifier == hashlib.sha1(info[bits:]).hexdigest()
    credentials.unload_key(identifier)
    assert not credentials.key_ids()


@pytest.mark.parametrize("kind", KINDS)
def test_encrypted_private_keys(kind: str) -> None:
    data = key(kind).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"open sesame"))
    assert parse_private_key(PrivateKeySource(data, b"open sesame")).identifier
    for wrong in (None, b"", b"open barley"):
        with pytest.raises(CredentialError) as error:
            parse_private_key(PrivateKeySource(data, wrong))
        assert "sesame" not in str(error.value)
    plain = source(key(kind)).data
    assert parse_private_key(PrivateKeySource(plain, b"needless")).identifier


@given(st.binary(max_size=300), st.one_of(st.none(), st.binary(max_size=5)))
@settings(max_examples=100)
def test_only_a_credential_error_escapes(data: bytes, passphrase: bytes | None) -> None:
    for octets in (data, b"-----BEGIN PRIVATE KEY-----\n" + data):
        with suppress(CredentialError):
            parse_private_key(PrivateKeySource(octets, passphrase))
        with suppress(CredentialError):
            CredentialStore().load_certificate(octets, authority=False)


def test_what_is_no_authority_is_not_loaded_as_one() -> None:
    with pytest.raises(CredentialError, match="not that of a CA"):
        CredentialStore().load_certificate(Authority().issue("me", key("ecdsa256"), ["me"]), authority=True)


def test_our_certificate_is_the_one_whose_key_we_have() -> None:
    authority = Authority()
    credentials = CredentialStore()
    first, second = key("ecdsa256", 1), key("rsa", 2)
    for private, name in ((first, "first.example"), (second, "second.example")):
        credentials.load_certificate(authority.issue(name, private, [name]), authority=False)
    assert credentials.own_certificate(AuthRound(AuthMethod.PUBKEY)) is None
    credentials.load_key(source(second))
    own = credentials.own_certificate(AuthRound(AuthMethod.PUBKEY))
    assert own is not None
    assert str(own.identity) == "C=CH, CN=second.example"
    own = credentials.own_certificate(AuthRound(AuthMethod.PUBKEY, Identity.parse("second.example")))
    assert own is not None
    assert str(own.identity) == "second.example"
    assert credentials.own_certificate(AuthRound(AuthMethod.PUBKEY, Identity.parse("first.example"))) is None
    assert "key" not in repr(own).replace("key_", "").split("certificate=")[0]


def test_a_requested_authority_decides_between_two_certificates() -> None:
    one, two = Authority("One", number=81), Authority("Two", number=82)
    private = key("ecdsa256")
    credentials = CredentialStore()
    credentials.load_key(source(private))
    for authority in (one, two):
        credentials.load_certificate(authority.der, authority=True)
        credentials.load_certificate(authority.issue("gw", private, ["gw"]), authority=False)
    for authority in credentials.authorities:
        own = credentials.own_certificate(AuthRound(AuthMethod.PUBKEY), {authority.public_key_hash})
        assert own is not None
        assert own.certificate.parsed.issuer == authority.parsed.subject


def test_a_configuration_loads_whole(tmp_path: Path) -> None:
    authority = Authority()
    private = key("ed25519")
    configuration = Configuration(
        shared={"s": SharedSecret("s", b"x")},
        private_keys=(source(private),),
        certificates=(authority.issue("gw", private, ["gw"]),),
        authorities=(authority.der,),
    )
    credentials = CredentialStore.of(configuration)
    assert (len(credentials.shared_names()), len(credentials.key_ids()), len(credentials.certificates), len(credentials.authorities)) == (1, 1, 1, 1)
