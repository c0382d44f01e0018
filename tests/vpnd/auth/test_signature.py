"""Signature schemes: AlgorithmIdentifiers of RFC 7427, choice, policy, refusal."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vpnd_certificates import key

from vpnd.auth.signature import (
    SUPPORTED_HASHES,
    Family,
    HashAlgorithm,
    NoCommonScheme,
    Scheme,
    SignaturePolicy,
    SignatureRefused,
    algorithm_identifier,
    parse_algorithm_identifier,
    sign,
    verify,
)
from vpnd.ike.iana import AuthenticationMethod

ANY = SignaturePolicy()
OCTETS = b"what AUTH signs"

# RFC 7427 appendix A
VECTORS = {
    Scheme(Family.RSA, HashAlgorithm.SHA1): "300d06092a864886f70d0101050500",
    Scheme(Family.RSA, HashAlgorithm.SHA2_256): "300d06092a864886f70d01010b0500",
    Scheme(Family.RSA, HashAlgorithm.SHA2_384): "300d06092a864886f70d01010c0500",
    Scheme(Family.RSA, HashAlgorithm.SHA2_512): "300d06092a864886f70d01010d0500",
    Scheme(Family.ECDSA, HashAlgorithm.SHA1): "300906072a8648ce3d0401",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_256): "300a06082a8648ce3d040302",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_384): "300a06082a8648ce3d040303",
    Scheme(Family.ECDSA, HashAlgorithm.SHA2_512): "300a06082a8648ce3d040304",
    Scheme(Family.ED25519, HashAlgorithm.IDENTITY): "300506032b6570",  # RFC 8420 appendix A
}


@pytest.mark.parametrize("scheme", VECTORS, ids=str)
def test_algorithm_identifiers_are_those_of_the_appendix(scheme: Scheme) -> None:
    assert algorithm_identifier(scheme).hex() == VECTORS[scheme]
    assert parse_algorithm_identifier(algorithm_identifier(scheme)).scheme == scheme


def test_rsassa_pss_with_and_without_the_default_trailer() -> None:
    # strongSwan and libreswan leave the default away, as DER demands, and libreswan compares octets; RFC 7427 appendix A.4.3 writes it out
    parameters = "a00f300d06096086480165030402010500a11c301a06092a864886f70d010108300d06096086480165030402010500a203020120"
    short, long = "304106092a864886f70d01010a3034" + parameters, "304606092a864886f70d01010a3039" + parameters + "a303020101"
    scheme = Scheme(Family.RSA_PSS, HashAlgorithm.SHA2_256)
    assert algorithm_identifier(scheme).hex() == short
    for text in (short, long):
        assert parse_algorithm_identifier(bytes.fromhex(text)).scheme == scheme


def test_rsa_without_null_parameters_is_accepted() -> None:
    assert parse_algorithm_identifier(bytes.fromhex("300b06092a864886f70d01010b")).scheme == Scheme(Family.RSA, HashAlgorithm.SHA2_256)


def test_pss_without_parameters_means_sha1() -> None:
    assert parse_algorithm_identifier(bytes.fromhex("300d06092a864886f70d01010a3000")).scheme == Scheme(Family.RSA_PSS, HashAlgorithm.SHA1)


@given(st.one_of(st.binary(max_size=80), st.sampled_from(list(VECTORS.values())).map(bytes.fromhex)), st.integers(0, 70), st.integers(0, 255))
@settings(max_examples=200)
def test_only_a_refusal_escapes_the_parser(data: bytes, at: int, value: int) -> None:
    damaged = data[:at] + bytes([value]) + data[at + 1 :]
    with suppress(SignatureRefused):
        parse_algorithm_identifier(damaged)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("rsa", "rsa-sha256"),
        ("ecdsa256", "ecdsa-sha256"),
        ("ecdsa384", "ecdsa-sha384"),
        ("ecdsa521", "ecdsa-sha512"),
        ("ed25519", "ed25519"),
    ],
)
def test_the_scheme_that_fits_the_key_is_chosen(kind: str, scheme: str) -> None:
    signature = sign(key(kind), OCTETS, ANY, SUPPORTED_HASHES)
    assert (signature.method, str(signature.scheme)) == (AuthenticationMethod.DIGITAL_SIGNATURE, scheme)
    assert verify(key(kind).public_key(), OCTETS, signature.method, signature.data, ANY) == signature.scheme
    for octets, data in ((b"other octets", signature.data), (OCTETS, signature.data[:-1] + bytes([signature.data[-1] ^ 1])), (OCTETS, b"")):
        with pytest.raises(SignatureRefused):
            verify(key(kind).public_key(), octets, signature.method, data, ANY)
    with pytest.raises(SignatureRefused):
        verify(key(kind, 1).public_key(), OCTETS, signature.method, signature.data, ANY)


def test_the_peer_s_hashes_bound_the_choice() -> None:
    assert str(sign(key("ecdsa256"), OCTETS, ANY, [HashAlgorithm.SHA2_512]).scheme) == "ecdsa-sha512"
    with pytest.raises(NoCommonScheme):
        sign(key("ecdsa256"), OCTETS, ANY, [HashAlgorithm.SHA1])
    with pytest.raises(NoCommonScheme):
        sign(key("ed25519"), OCTETS, ANY, [HashAlgorithm.SHA2_256])


def test_classic_methods() -> None:
    ecdsa = sign(key("ecdsa256"), OCTETS, ANY, [])
    assert ecdsa.method == AuthenticationMethod.ECDSA_SHA256_P256
    assert len(ecdsa.data) == 64
    assert verify(key("ecdsa256").public_key(), OCTETS, ecdsa.method, ecdsa.data, ANY)
    rsa = sign(key("rsa"), OCTETS, ANY, [])
    assert (rsa.method, str(rsa.scheme)) == (AuthenticationMethod.RSA_SIGNATURE, "rsa-sha256")
    assert verify(key("rsa").public_key(), OCTETS, rsa.method, rsa.data, ANY)
    for method, data in ((rsa.method, ecdsa.data), (10, ecdsa.data), (ecdsa.method, ecdsa.data[1:]), (3, b"")):
        with pytest.raises(SignatureRefused):
            verify(key("ecdsa256").public_key(), OCTETS, method, data, ANY)


def test_sha1_only_where_it_is_named() -> None:
    named = SignaturePolicy.of(["rsa-sha1-sha256"])
    signature = sign(key("rsa"), OCTETS, named, [])
    assert str(signature.scheme) == "rsa-sha1"
    verify(key("rsa").public_key(), OCTETS, signature.method, signature.data, named)
    with pytest.raises(SignatureRefused):
        verify(key("rsa").public_key(), OCTETS, signature.method, signature.data, ANY)


@pytest.mark.parametrize(
    ("constraints", "kind", "allowed"),
    [
        ((), "rsa", True),
        (("pubkey",), "ed25519", True),
        (("rsa",), "rsa", True),
        (("rsa",), "ecdsa256", False),
        (("ed25519",), "ed25519", True),
        (("ecdsa-sha256", "ed25519"), "ed25519", True),
        (("rsa-2048-sha256",), "rsa", True),
        (("rsa-4096",), "rsa", False),
        (("ecdsa-384-sha384",), "ecdsa256", False),
        (("rsa-sha256", "ecdsa-384-sha256-sha384"), "ecdsa384", True),
        (("pubkey-sha512",), "ecdsa256", True),
        (("ike:rsa/pss-sha256",), "rsa", True),
    ],
)
def test_constraints(constraints: tuple[str, ...], kind: str, allowed: bool) -> None:
    policy = SignaturePolicy.of(constraints)
    own = key(kind)
    try:
        signature = sign(own, OCTETS, policy, SUPPORTED_HASHES)
        verify(own.public_key(), OCTETS, signature.method, signature.data, policy)
    except (NoCommonScheme, SignatureRefused):
        assert not allowed
    else:
        assert allowed


def test_unknown_constraints_are_named() -> None:
    with pytest.raises(ValueError, match="blowfish"):
        SignaturePolicy.of(["rsa-blowfish"])


def test_small_keys_are_refused() -> None:
    signature = sign(key("rsa1024"), OCTETS, ANY, SUPPORTED_HASHES)
    with pytest.raises(SignatureRefused, match="too small"):
        verify(key("rsa1024").public_key(), OCTETS, signature.method, signature.data, ANY)
