"""Key material: NIST's IKEv2 vector, both ends of an exchange, and what AUTH covers."""

from __future__ import annotations

import hashlib
import hmac
import random

import pytest
from sk_messages import open_message, seal_message

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.secret import NO_SECRET, Secret
from vpnd.ike.crypto.groups import group
from vpnd.ike.crypto.prf import prf
from vpnd.ike.iana import AuthenticationMethod, Exchange, PrfId, ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.keymat import (
    ChildKeys,
    IkeKeys,
    IkeSuite,
    child_keys,
    ike_keys,
    rekey_skeyseed,
    resumed_skeyseed,
    shared_key_auth,
    signed_octets,
    skeyseed,
    with_ppk,
)
from vpnd.ike.proposal import default_proposals, parse_proposals, select
from vpnd.ike.wire.header import Header, IkeSpi, MessageId
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import AuthPayload, IdiPayload, KePayload, NoncePayload, SaPayload

# NIST CAVP, SP 800-135 IKEv2 KDF, SHA-1, nonces of 64 and g^ir of 256 bits.
NI, NR = bytes.fromhex("32b50d5f4a3763f3"), bytes.fromhex("9206a04b26564cb1")
SPI_I, SPI_R = IkeSpi(bytes.fromhex("34c9e7c188868785")), IkeSpi(bytes.fromhex("3ff77d760d2b2199"))
GIR = Secret(bytes.fromhex("4b2c1f971981a8ad8d0abeafabf38cf75fc8349c148142465ed9c8b516b8be52"))
GIR_NEW = Secret(bytes.fromhex("863f3c9d06efd39d2b907b97f8699e5dd5251ef64a2a176f36ee40c87d4f9330"))
SKEYSEED = "a9a7b222b59f8f48645f28a1db5b5f5d7479cba7"
SKEYSEED_REKEY = "63e81194946ebd05df7df5ebf5d8750056bf1f1d"
DKM = (
    "a14293677cc80ff8f9cc0eee30d895da9d8f405666e30ef0dfcb63c634a46002a2a63080e514a062768b76606f9fa5e9"
    "92204fc5a670bde3f10d6b027113936a5c55b648a194ae587b0088d52204b702c979fa280870d2ed41efa9c549fd1119"
    "8af1670b143d384bd275c5f594cf266b05ebadca855e4249520a441a81157435a7a56cc4"
)
DKM_CHILD = (
    "8059e3ee8810e6c3a91bc8bcd2a7a41151b8d0e6ae239c7b38093ad85ef4c5811a8e7b5d1cdabd9560b2d5e092d1f24e"
    "2d4b85eccdf0ad0dc9abd94b51ee71814ca6dbc8bb51b6309f5b9545c7eb35cf5580b1e521a8fe20754a2d883ba0c2cf"
    "285f524aea6545b33106bc03e614296d319d41d4b50b3f510b1c0a22f3e664994d234cb4"
)
DKM_CHILD_DH = (
    "bb43244c1860ad65ee1e211ffe8bb3661750c8f89cb9f547df7f4fa61d37301628190e38c66232eab4b3ab14c400a519"
    "7dd3730ed4820a8a10394d51e1c0400052f63ebd36b0e7ef53aaed31eba4a5080d7d4b5666023a8bbb5ffb7857240f9a"
    "05884d1b7d2f933708450b7b3288f1fc863ab49fa901227cffc06e27899c7054d56fd74c"
)
SHA1 = prf(PrfId.HMAC_SHA1)


def suite_of(text: str) -> IkeSuite:
    (proposal,) = parse_proposals(ProtocolId.IKE, text)
    return IkeSuite.of(proposal)


def in_order(keys: IkeKeys) -> list[Secret]:
    return [keys.d, keys.ai, keys.ar, keys.ei, keys.er, keys.pi, keys.pr]


def child_in_order(keys: ChildKeys) -> list[Secret]:
    return [keys.initiator_encryption, keys.initiator_integrity, keys.responder_encryption, keys.responder_integrity]


def test_the_keys_of_an_ike_sa_are_those_of_nist():
    seed = skeyseed(SHA1, NI, NR, GIR)
    keys = ike_keys(suite_of("aes128-sha1-x25519"), seed, NI, NR, SPI_I, SPI_R)
    assert seed.reveal().hex() == SKEYSEED
    assert [len(key) for key in in_order(keys)] == [20, 20, 20, 16, 16, 20, 20]
    assert b"".join(key.reveal() for key in in_order(keys)).hex() == DKM


@pytest.mark.parametrize(("shared", "expected"), [((), DKM_CHILD), ((GIR_NEW,), DKM_CHILD_DH)])
def test_the_keys_of_a_child_sa_are_those_of_nist(shared, expected):
    d = Secret(bytes.fromhex(DKM)[:20])
    algorithm = EspAlgorithm(EncryptionId.AES_CBC, 256, IntegrityId.HMAC_SHA2_256_128)
    keys = child_keys(SHA1, d, algorithm, NI, NR, shared)
    assert [len(key) for key in child_in_order(keys)] == [32, 32, 32, 32]
    assert expected.startswith(b"".join(key.reveal() for key in child_in_order(keys)).hex())


def test_the_seed_of_a_rekeyed_ike_sa_is_that_of_nist():
    assert rekey_skeyseed(SHA1, Secret(bytes.fromhex(DKM)[:20]), (GIR_NEW,), NI, NR).reveal().hex() == SKEYSEED_REKEY


# What NIST has no vectors for, by hand


def by_hand(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha1).digest()


D = bytes.fromhex(DKM)[:20]
FIRST, SECOND, THIRD = b"g^ir", b"of ML-KEM", b"of another one"


def test_further_secrets_come_after_the_nonces() -> None:
    """RFC 9370 section 2.2.4: SK(0) | Ni | Nr | SK(1) ... SK(n), of an IKE SA and of a CHILD_SA."""
    shared = tuple(map(Secret, (FIRST, SECOND, THIRD)))
    seed = FIRST + NI + NR + SECOND + THIRD
    assert rekey_skeyseed(SHA1, Secret(D), shared, NI, NR).reveal() == by_hand(D, seed)
    keys = child_keys(SHA1, Secret(D), EspAlgorithm(EncryptionId.AES_GCM_16, 128, IntegrityId.NONE), NI, NR, shared)
    block = by_hand(D, seed, b"\x01")
    assert keys.initiator_encryption.reveal() == block
    assert keys.responder_encryption.reveal() == by_hand(D, block, seed, b"\x02")


def test_a_resumed_ike_sa_begins_with_the_old_sk_d() -> None:
    """RFC 5723 section 5.1."""
    assert resumed_skeyseed(SHA1, Secret(D), NI, NR).reveal() == by_hand(D, b"Resumption", NI, NR)


def test_a_ppk_changes_what_children_and_proofs_rest_upon_and_nothing_else() -> None:
    """RFC 8784 section 3: SK_d, SK_pi and SK_pr = prf+(PPK, SK_x)."""
    before = ike_keys(suite_of("aes128-sha1-x25519"), skeyseed(SHA1, NI, NR, GIR), NI, NR, SPI_I, SPI_R)
    after = with_ppk(SHA1, before, Secret(b"the PPK"))
    assert (after.ai, after.ar, after.ei, after.er) == (before.ai, before.ar, before.ei, before.er)
    for old, new in ((before.d, after.d), (before.pi, after.pi), (before.pr, after.pr)):
        assert new.reveal() == by_hand(b"the PPK", old.reveal(), b"\x01")


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("aes128gcm16-prfsha256-x25519", [32, 0, 0, 20, 20, 32, 32]),
        ("aes256gcm16-prfsha384-x25519", [48, 0, 0, 36, 36, 48, 48]),
        ("chacha20poly1305-prfsha512-x25519", [64, 0, 0, 36, 36, 64, 64]),
        ("aes256-sha512-x25519", [64, 64, 64, 32, 32, 64, 64]),
    ],
)
def test_key_lengths_follow_the_suite(text, lengths):
    suite = suite_of(text)
    keys = ike_keys(suite, skeyseed(suite.prf, NI, NR, GIR), NI, NR, SPI_I, SPI_R)
    assert [len(key) for key in in_order(keys)] == lengths


@pytest.mark.parametrize(
    ("algorithm", "lengths"),
    [
        (EspAlgorithm(EncryptionId.AES_GCM_16, 128), [20, 0, 20, 0]),
        (EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256), [36, 0, 36, 0]),
        (EspAlgorithm(EncryptionId.AES_CCM_16, 256), [35, 0, 35, 0]),
        (EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_512_256), [16, 64, 16, 64]),
        (EspAlgorithm(EncryptionId.AES_CTR, 128, IntegrityId.HMAC_SHA2_256_128), [20, 32, 20, 32]),
    ],
)
def test_child_key_lengths_follow_the_algorithm(algorithm, lengths):
    keys = child_keys(prf(PrfId.HMAC_SHA2_256), Secret(b"d" * 32), algorithm, NI, NR)
    assert [len(key) for key in child_in_order(keys)] == lengths


def test_auth_covers_message_nonce_and_identity():
    function, identity = prf(PrfId.HMAC_SHA2_256), Identity.parse("moon.example.org")
    octets = signed_octets(function, Secret(b"p" * 32), b"first message", NR, identity)
    mac = hmac.digest(b"p" * 32, b"\x02\0\0\0moon.example.org", "sha256")
    assert octets == b"first message" + NR + mac
    padded = hmac.new(b"secret", b"Key Pad for IKEv2", hashlib.sha256).digest()
    assert shared_key_auth(function, b"secret", octets) == hmac.new(padded, octets, hashlib.sha256).digest()


def test_two_ends_set_an_ike_sa_up_and_open_each_others_messages():
    alice_draw, bob_draw = random.Random(1).randbytes, random.Random(2).randbytes
    spi_i, ni, nr, spi_r = IkeSpi(alice_draw(8)), alice_draw(32), bob_draw(32), IkeSpi(bob_draw(8))
    offer = default_proposals(ProtocolId.IKE)

    # IKE_SA_INIT { SA, KE, Ni } -->
    ours = group(offer[0].groups[0]).initiate(alice_draw)
    header = Header(spi_i, IkeSpi(bytes(8)), Exchange.IKE_SA_INIT, MessageId(0), initiator=True, response=False)
    request = encode_message(Message(header, (SaPayload(offer), KePayload(ours.group, ours.public), NoncePayload(ni))))
    received = decode_message(request)
    ke = received.first(KePayload)
    chosen = select(parse_proposals(ProtocolId.IKE, "aes128gcm16-prfsha384-x25519"), received.first(SaPayload).proposals, group=ke.group)
    suite = IkeSuite.of(chosen)

    # <-- IKE_SA_INIT { SA, KE, Nr }
    public, bob_secret = group(ke.group).respond(ke.data, bob_draw)
    bob_keys = ike_keys(suite, skeyseed(suite.prf, received.first(NoncePayload).data, nr, bob_secret), ni, nr, spi_i, spi_r)
    alice_secret = ours.complete(public)
    alice_keys = ike_keys(suite, skeyseed(suite.prf, ni, nr, alice_secret), ni, nr, spi_i, spi_r)
    assert alice_keys == bob_keys

    # IKE_AUTH { IDi, AUTH } -->
    alice_sends, alice_receives = alice_keys.ciphers(suite, initiator=True)
    bob_sends, bob_receives = bob_keys.ciphers(suite, initiator=False)
    identity = Identity.parse("alice@example.org")
    auth = shared_key_auth(suite.prf, b"psk", signed_octets(suite.prf, alice_keys.pi, request, nr, identity))
    header = Header(spi_i, spi_r, Exchange.IKE_AUTH, MessageId(1), initiator=True, response=False)
    payloads = (IdiPayload(identity), AuthPayload(AuthenticationMethod.SHARED_KEY, auth))
    data = seal_message(header, payloads, alice_sends, alice_draw)
    opened = open_message(data, decode_message(data), bob_receives)
    expected = shared_key_auth(suite.prf, b"psk", signed_octets(suite.prf, bob_keys.pi, request, nr, opened.first(IdiPayload).identity))
    assert hmac.compare_digest(opened.first(AuthPayload).data, expected)

    # <-- IKE_AUTH {}
    header = Header(spi_i, spi_r, Exchange.IKE_AUTH, MessageId(1), initiator=False, response=True)
    answer = seal_message(header, (), bob_sends, bob_draw)
    assert open_message(answer, decode_message(answer), alice_receives).payloads == ()


def test_a_suite_that_is_incomplete_or_not_implemented_is_refused():
    (good,) = parse_proposals(ProtocolId.IKE, "aes128-sha256-x25519")
    for kind in (1, 2, 4):
        with pytest.raises(ValueError, match="not the choice"):
            IkeSuite.of(good.__class__(good.protocol, tuple(t for t in good.transforms if t.type != kind)))
    with pytest.raises(ValueError, match="not the choice"):
        IkeSuite.of(default_proposals(ProtocolId.IKE)[0])


def test_keys_do_not_show_in_repr():
    keys = child_keys(SHA1, Secret(b"d" * 20), EspAlgorithm(EncryptionId.AES_GCM_16, 128), NI, NR)
    assert "20 bytes" in repr(keys)
    assert keys.initiator_integrity == NO_SECRET
    assert keys.initiator_encryption.reveal().hex() not in repr(keys)
