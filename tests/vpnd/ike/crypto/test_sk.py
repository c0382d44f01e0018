"""SK payloads: RFC 7634's IKE message, every cipher both ways, and any change noticed."""

from __future__ import annotations

import hmac
import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from sk_messages import open_message, seal_message

from kernel_shim.secret import NO_SECRET, Secret
from vpnd.ike.algorithms import parse_proposals
from vpnd.ike.crypto.sk import encryption_key_length, integrity_key_length, sk_cipher
from vpnd.ike.iana import Encryption, Exchange, Integrity, NotifyType, Payload, ProtocolId, TransformType
from vpnd.ike.transform import Transform
from vpnd.ike.wire.errors import IntegrityFailure, MalformedMessage
from vpnd.ike.wire.header import GENERIC_LENGTH, HEADER_LENGTH, Header, IkeSpi, MessageId, encode_header, generic_header
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NoncePayload, NotifyPayload, SkPayload, VendorIdPayload

HEADER = Header(IkeSpi(b"initiato"), IkeSpi(b"responde"), Exchange.INFORMATIONAL, MessageId(7), initiator=True, response=False)
PAYLOADS = (NoncePayload(b"n" * 32), NotifyPayload(NotifyType.INITIAL_CONTACT), VendorIdPayload(b""))
SUITES = [
    "aes128gcm16-prfsha256-x25519",
    "aes256gcm16-prfsha256-x25519",
    "aes192gcm12-prfsha256-x25519",
    "aes128gcm8-prfsha256-x25519",
    "aes128ccm8-prfsha256-x25519",
    "aes256ccm12-prfsha256-x25519",
    "aes256ccm16-prfsha256-x25519",
    "chacha20poly1305-prfsha256-x25519",
    "aes128-sha256-x25519",
    "aes256-sha384-x25519",
    "aes192-sha512-x25519",
    "aes128-sha1-x25519",
    "aes128ctr-sha256-x25519",
    "aes256ctr-sha512-x25519",
]


def entropy(octets: int) -> bytes:
    return random.Random(octets).randbytes(octets)


def cipher_of(suite: str, seed: int = 1):
    (proposal,) = parse_proposals(ProtocolId.IKE, suite)
    draw = random.Random(seed).randbytes
    return sk_cipher(
        proposal.encryption,
        proposal.integrity,
        Secret(draw(encryption_key_length(proposal.encryption))),
        Secret(draw(integrity_key_length(proposal.integrity))),
    )


def test_the_message_of_rfc_7634_appendix_b_opens():
    key = Secret(bytes(range(0x80, 0xA0)) + bytes.fromhex("a0a1a2a3"))
    cipher = sk_cipher(Transform(TransformType.ENCR, Encryption.CHACHA20_POLY1305), None, key, NO_SECRET)
    data = bytes.fromhex(
        "c0c1c2c3c4c5c6c7d0d1d2d3d4d5d6d72e2025000000000900000045290000291011121314151617610394701f8d017f7c129248896b71bfe25236efd7cdc67066906315b2"
    )
    message = open_message(data, decode_message(data), cipher)
    assert message.payloads == (NotifyPayload(NotifyType.SET_WINDOW_SIZE, b"\0\0\0\x0a"),)
    assert (message.header.exchange, message.header.message_id) == (Exchange.INFORMATIONAL, 9)


def test_aes_gcm_follows_rfc_5282():
    """Nonce: salt and IV. Associated data: everything before the IV. No padding, but its length."""
    key, salt = b"k" * 16, b"salt"
    cipher = sk_cipher(Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128), None, Secret(key + salt), NO_SECRET)
    data = seal_message(HEADER, (NoncePayload(b"n" * 16),), cipher, entropy)
    associated, iv, sealed = data[:32], data[32:40], data[40:]
    assert AESGCM(key).decrypt(salt + iv, sealed, associated) == b"\0\0\0\x14" + b"n" * 16 + b"\0"


def test_aes_ctr_agrees_with_rfc_3686_section_6():
    """Test vector 8 with its nonce and IV: the chain begins the key stream at block 1."""
    key, nonce, iv = (
        bytes.fromhex("f6d66d6bd52d59bb0796365879eff886c66dd51a5b6a99744b50590c87a23884"),
        bytes.fromhex("00faac24"),
        bytes.fromhex("c1585ef15a43d875"),
    )
    encryption, integrity = Transform(TransformType.ENCR, Encryption.AES_CTR, 256), Transform(TransformType.INTEG, Integrity.HMAC_SHA2_256_128)
    cipher = sk_cipher(encryption, integrity, Secret(key + nonce), Secret(b"i" * 32))
    plain, sealed = bytes(range(32)), bytes.fromhex("f05e231b3894612c49ee000b804eb2a9b8306b508f839d6a5530831d9344af1c")
    stream = bytes(a ^ b for a, b in zip(plain, sealed, strict=True))
    # a chain and its padding, encrypted with the vector's key stream, open
    inner = b"payload chain" + b"\x05" * 5 + b"\x05"
    body = iv + bytes(a ^ b for a, b in zip(inner, stream, strict=False))
    icv = hmac.digest(b"i" * 32, b"head" + body, "sha256")[:16]
    assert cipher.open(b"head", body + icv) == b"payload chain"


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("payloads", [(), PAYLOADS])
def test_what_is_sealed_opens(suite, payloads):
    data = seal_message(HEADER, payloads, cipher_of(suite), entropy)
    message = decode_message(data)
    assert isinstance(message.encrypted, SkPayload)
    assert encode_message(message) == data
    assert open_message(data, message, cipher_of(suite)) == Message(HEADER, tuple(payloads))


@pytest.mark.parametrize("suite", SUITES)
@settings(max_examples=25)
@given(length=st.integers(0, 300))
def test_the_sealed_length_is_known_beforehand(suite, length):
    cipher = cipher_of(suite)
    assert len(cipher.seal(b"associated", bytes(length), entropy)) == cipher.sealed_length(length)


@pytest.mark.parametrize("suite", SUITES)
def test_every_octet_is_protected(suite):
    cipher = cipher_of(suite)
    data = seal_message(HEADER, PAYLOADS[:1], cipher, entropy)
    body = decode_message(data).encrypted.body
    associated = data[: len(data) - len(body)]
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x40
        with pytest.raises(IntegrityFailure):
            cipher.open(bytes(changed[: len(associated)]), bytes(changed[len(associated) :]))


@pytest.mark.parametrize("suite", SUITES)
def test_truncated_bodies_and_wrong_keys_fail_alike(suite):
    cipher = cipher_of(suite)
    body = cipher.seal(b"associated", b"plaintext" * 10, entropy)
    for length in range(len(body)):
        with pytest.raises(IntegrityFailure):
            cipher.open(b"associated", body[:length])
    with pytest.raises(IntegrityFailure):
        cipher_of(suite, seed=2).open(b"associated", body)


@pytest.mark.parametrize("suite", SUITES)
def test_no_iv_is_used_twice(suite):
    cipher = cipher_of(suite)
    draws = random.Random(1).randbytes
    bodies = [cipher.seal(b"", b"", draws) for _ in range(200)]
    assert len({body[:8] for body in bodies}) == len(bodies)


def sealed_with_padding(padded: bytes) -> tuple[bytes, AESGCM]:
    length = GENERIC_LENGTH + 8 + len(padded) + 16
    associated = encode_header(HEADER, Payload.SK, HEADER_LENGTH + length) + generic_header(Payload.NONCE, length)
    return associated + bytes(8) + AESGCM(b"k" * 16).encrypt(b"salt" + bytes(8), padded, associated)


def test_padding_may_be_anything_but_longer_than_the_payload():
    cipher = sk_cipher(Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128), None, Secret(b"k" * 16 + b"salt"), NO_SECRET)
    nonce = b"\0\0\0\x14" + b"n" * 16
    good = sealed_with_padding(nonce + b"garbage" + b"\x07")
    assert open_message(good, decode_message(good), cipher).payloads == (NoncePayload(b"n" * 16),)
    for padded in (nonce + b"\xff", b"\x01"):
        bad = sealed_with_padding(padded)
        with pytest.raises(MalformedMessage, match=r"SK\.padding"):
            open_message(bad, decode_message(bad), cipher)


def test_an_encrypted_payload_does_not_nest():
    cipher = sk_cipher(Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128), None, Secret(b"k" * 16 + b"salt"), NO_SECRET)
    data = seal_message(HEADER, (SkPayload(0, b"x" * 40),), cipher, entropy)
    with pytest.raises(MalformedMessage, match="SK"):
        open_message(data, decode_message(data), cipher)


def test_ciphers_that_are_not_for_ike_are_refused():
    aes_cbc, gcm = Transform(TransformType.ENCR, Encryption.AES_CBC, 128), Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128)
    for encryption in (Encryption.TRIPLE_DES_CBC, Encryption.NULL, 999):
        with pytest.raises(KeyError):
            encryption_key_length(Transform(TransformType.ENCR, encryption, 128))
    with pytest.raises(KeyError):
        encryption_key_length(Transform(TransformType.ENCR, Encryption.AES_GCM_16, 100))
    with pytest.raises(KeyError):
        integrity_key_length(Transform(TransformType.INTEG, Integrity.HMAC_MD5_96))
    with pytest.raises(ValueError, match="integrity"):
        sk_cipher(aes_cbc, None, Secret(bytes(16)), NO_SECRET)
    with pytest.raises(ValueError, match="encryption key"):
        sk_cipher(gcm, None, Secret(bytes(16)), NO_SECRET)
