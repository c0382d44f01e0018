"""Pseudo-random functions: RFC 4231 and RFC 2202 vectors, and prf+ against its definition."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.ike.crypto.prf import MAX_BLOCKS, prf
from vpnd.ike.iana import PrfId

RFC_4231 = [  # sections 4.2, 4.3 and 4.4: key, data, outputs
    (
        b"\x0b" * 20,
        b"Hi There",
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        "afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59cfaea9ea9076ede7f4af152e8b2fa9cb6",
        "87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cdedaa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854",
    ),
    (
        b"Jefe",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
        "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
    ),
    (
        b"\xaa" * 20,
        b"\xdd" * 50,
        "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
        "88062608d3e6ad8a0aa2ace014c8a86f0aa635d947ac9febe83ef4e55966144b2a5ab39dc13814b94e3ab6e101a34f27",
        "fa73b0089d56a284efb0f0756c890be9b1b5dbdd8ee81a3655f83e33b2279d39bf3e848279a722c806b485a47e67c807b946a337bee8942674278859e13292fb",
    ),
]
DIGESTS = {
    PrfId.HMAC_SHA1: hashlib.sha1,
    PrfId.HMAC_SHA2_256: hashlib.sha256,
    PrfId.HMAC_SHA2_384: hashlib.sha384,
    PrfId.HMAC_SHA2_512: hashlib.sha512,
}


@pytest.mark.parametrize(("key", "data", "sha256", "sha384", "sha512"), RFC_4231)
def test_outputs_are_those_of_rfc_4231(key, data, sha256, sha384, sha512):
    assert prf(PrfId.HMAC_SHA2_256)(key, data).hex() == sha256
    assert prf(PrfId.HMAC_SHA2_384)(key, data).hex() == sha384
    assert prf(PrfId.HMAC_SHA2_512)(key, data).hex() == sha512


def test_output_is_that_of_rfc_2202():
    assert prf(PrfId.HMAC_SHA1)(b"Jefe", b"what do ya want for nothing?").hex() == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"


def plus_by_definition(digest, key: bytes, seed: bytes, length: int) -> bytes:
    # RFC 7296 section 2.13: T1 | T2 | ..., T1 = prf(K, S | 0x01), T2 = prf(K, T1 | S | 0x02), ...
    material, block, number = b"", b"", 0
    while len(material) < length:
        number += 1
        block = hmac.new(key, block + seed + bytes([number]), digest).digest()
        material += block
    return material[:length]


@settings(max_examples=60)
@given(st.sampled_from(list(DIGESTS)), st.binary(min_size=1, max_size=200), st.binary(max_size=200), st.integers(0, 1000))
def test_plus_follows_its_definition(number, key, seed, length):
    assert prf(number).plus(key, seed, length) == plus_by_definition(DIGESTS[number], key, seed, length)


@pytest.mark.parametrize("number", DIGESTS)
def test_plus_ends_where_its_counter_ends(number):
    function = prf(number)
    assert len(function.plus(b"k", b"s", MAX_BLOCKS * function.length)) == MAX_BLOCKS * function.length
    with pytest.raises(ValueError, match="at most"):
        function.plus(b"k", b"s", MAX_BLOCKS * function.length + 1)


def test_an_unknown_function_is_a_key_error():
    with pytest.raises(KeyError):
        prf(PrfId.AES128_XCBC)
