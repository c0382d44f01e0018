"""Key exchange methods: published vectors, agreement of both ends, and refusal of bad public values."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
from ml_kem_vectors import ML_KEM_768, ML_KEM_1024

from vpnd.ike.crypto.exchange import InvalidPublicValue
from vpnd.ike.crypto.groups import group, implemented_groups
from vpnd.ike.crypto.primes import MODP_PRIMES
from vpnd.ike.iana import Group, NotifyType

EXTRA = 8  # octets that an ECP method draws beyond the size of its order
GROUPS = sorted(implemented_groups())
CIPHERTEXT = {Group.ML_KEM_768: 1088, Group.ML_KEM_1024: 1568}  # octets
KEMS = tuple(CIPHERTEXT)
DIFFIE_HELLMAN = [number for number in GROUPS if number not in KEMS]


def entropy_of(value: bytes) -> Callable[[int], bytes]:
    def entropy(octets: int) -> bytes:
        assert octets == len(value)
        return value

    return entropy


def scalar(text: str) -> Callable[[int], bytes]:
    """Entropy from which an ECP method makes exactly this private key."""
    return entropy_of((int(text, 16) - 1).to_bytes(len(text) // 2 + EXTRA, "big"))


def seeded(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def test_x25519_agrees_with_rfc_7748_section_6_1():
    alice_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    bob_private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    bob_public, secret = group(Group.CURVE_25519).respond(alice_public, entropy_of(bob_private))
    assert bob_public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert secret.reveal().hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


RFC_5903 = {  # section 8: i, gix, giy, r, grx, gry, girx
    Group.ECP_256: (
        "c88f01f510d9ac3f70a292daa2316de544e9aab8afe84049c62a9c57862d1433",
        "dad0b65394221cf9b051e1feca5787d098dfe637fc90b9ef945d0c3772581180",
        "5271a0461cdb8252d61f1c456fa3e59ab1f45b33accf5f58389e0577b8990bb3",
        "c6ef9c5d78ae012a011164acb397ce2088685d8f06bf9be0b283ab46476bee53",
        "d12dfb5289c8d4f81208b70270398c342296970a0bccb74c736fc7554494bf63",
        "56fbf3ca366cc23e8157854c13c58d6aac23f046ada30f8353e74f33039872ab",
        "d6840f6b42f6edafd13116e0e12565202fef8e9ece7dce03812464d04b9442de",
    ),
    Group.ECP_384: (
        "099f3c7034d4a2c699884d73a375a67f7624ef7c6b3c0f160647b67414dce655e35b538041e649ee3faef896783ab194",
        "667842d7d180ac2cde6f74f37551f55755c7645c20ef73e31634fe72b4c55ee6de3ac808acb4bdb4c88732aee95f41aa",
        "9482ed1fc0eeb9cafc4984625ccfc23f65032149e0e144ada024181535a0f38eeb9fcff3c2c947dae69b4c634573a81c",
        "41cb0779b4bdb85d47846725fbec3c9430fab46cc8dc5060855cc9bda0aa2942e0308312916b8ed2960e4bd55a7448fc",
        "e558dbef53eecde3d3fccfc1aea08a89a987475d12fd950d83cfa41732bc509d0d1ac43a0336def96fda41d0774a3571",
        "dcfbec7aacf3196472169e838430367f66eebe3c6e70c416dd5f0c68759dd1fff83fa40142209dff5eaad96db9e6386c",
        "11187331c279962d93d604243fd592cb9d0a926f422e47187521287e7156c5c4d603135569b9e9d09cf5d4a270f59746",
    ),
}


@pytest.mark.parametrize("number", RFC_5903)
def test_ecp_agrees_with_rfc_5903_section_8(number):
    i, gix, giy, r, grx, gry, girx = RFC_5903[number]
    ours = group(number).initiate(scalar(i))
    public, secret = group(number).respond(ours.public, scalar(r))
    assert ours.public.hex() == gix + giy
    assert public.hex() == grx + gry
    assert secret.reveal().hex() == ours.complete(public).reveal().hex() == girx


EXPONENT = {  # octets
    Group.MODP_2048: 40,
    Group.MODP_3072: 48,
    Group.MODP_4096: 56,
    Group.MODP_6144: 64,
    Group.MODP_8192: 72,
}


@pytest.mark.parametrize("number", MODP_PRIMES)
def test_modp_agrees_with_plain_exponentiation(number):
    prime, octets = MODP_PRIMES[number], EXPONENT[number]
    drawn = [seeded(1)(octets), seeded(2)(octets)]
    i, r = (int.from_bytes(value, "big") | 1 << (octets * 8 - 1) for value in drawn)
    ours = group(number).initiate(entropy_of(drawn[0]))
    public, secret = group(number).respond(ours.public, entropy_of(drawn[1]))
    assert int.from_bytes(ours.public, "big") == pow(2, i, prime)
    assert int.from_bytes(public, "big") == pow(2, r, prime)
    assert secret.reveal() == pow(2, i * r, prime).to_bytes(prime.bit_length() // 8, "big")


PI_CONSTANT = {
    Group.MODP_2048: 124476,
    Group.MODP_3072: 1690314,
    Group.MODP_4096: 240904,
    Group.MODP_6144: 929484,
    Group.MODP_8192: 4743158,
}


@pytest.mark.parametrize(("number", "constant"), PI_CONSTANT.items())
def test_modp_primes_are_those_of_rfc_3526(number, constant):
    bits = MODP_PRIMES[number].bit_length()
    # RFC 3526: 2^n - 2^(n-64) - 1 + 2^64 * ([2^(n-130) pi] + constant)
    assert MODP_PRIMES[number] == 2**bits - 2 ** (bits - 64) - 1 + 2**64 * (scaled_pi(bits - 130) + constant)


def scaled_pi(bits: int) -> int:
    """[2^bits pi], by Machin's formula."""
    guard = 64

    def arctan(inverse: int) -> int:
        term = (1 << (bits + guard)) // inverse
        total, divisor, sign = term, 3, -1
        while term:
            term //= inverse * inverse
            total += sign * (term // divisor)
            divisor, sign = divisor + 2, -sign
        return total

    return 4 * (4 * arctan(5) - arctan(239)) >> guard


@pytest.mark.parametrize("number", GROUPS)
def test_both_ends_agree(number):
    ours = group(number).initiate(seeded(3))
    public, secret = group(number).respond(ours.public, seeded(4))
    assert ours.group == group(number).id == number
    assert len(ours.public) == group(number).public_length
    assert len(public) == (CIPHERTEXT[number] if number in KEMS else len(ours.public))
    assert ours.complete(public) == secret
    assert ours.public != public


@pytest.mark.parametrize("number", GROUPS)
def test_the_same_entropy_gives_the_same_exchange(number):
    assert group(number).initiate(seeded(5)).public == group(number).initiate(seeded(5)).public


@pytest.mark.parametrize("number", DIFFIE_HELLMAN)
def test_a_public_value_of_another_length_is_refused(number):
    ours = group(number).initiate(seeded(6))
    good = group(number).initiate(seeded(7)).public
    for bad in (b"", good[:-1], good + b"\0", b"\0" + good):
        with pytest.raises(InvalidPublicValue) as refusal:
            ours.complete(bad)
        assert refusal.value.notify == NotifyType.INVALID_SYNTAX


@pytest.mark.parametrize("number", MODP_PRIMES)
def test_modp_values_out_of_range_are_refused(number):
    prime, octets = MODP_PRIMES[number], group(number).public_length
    for bad in (0, 1, prime - 1, prime, prime + 2, 2 ** (octets * 8) - 1):
        with pytest.raises(InvalidPublicValue):
            group(number).respond(bad.to_bytes(octets, "big"), seeded(8))


@pytest.mark.parametrize("number", [Group.ECP_256, Group.ECP_384, Group.ECP_521])
def test_a_point_off_the_curve_is_refused(number):
    good = group(number).initiate(seeded(9)).public
    for bad in (bytes(len(good)), good[:-1] + bytes([good[-1] ^ 1]), b"\xff" * len(good)):
        with pytest.raises(InvalidPublicValue):
            group(number).respond(bad, seeded(10))


@pytest.mark.parametrize(("number", "octets"), [(Group.CURVE_25519, 32), (Group.CURVE_448, 56)])
def test_a_point_of_small_order_is_refused(number, octets):
    for bad in (bytes(octets), (1).to_bytes(octets, "little")):
        with pytest.raises(InvalidPublicValue):
            group(number).respond(bad, seeded(11))


@pytest.mark.parametrize(("number", "answer"), [(Group.ML_KEM_768, ML_KEM_768), (Group.ML_KEM_1024, ML_KEM_1024)])
def test_ml_kem_agrees_with_the_known_answers(number, answer):
    ours = group(number).initiate(entropy_of(bytes.fromhex(answer.seed)))
    assert hashlib.sha256(ours.public).hexdigest() == answer.encapsulation_key_sha256
    assert ours.complete(bytes.fromhex(answer.ciphertext)).reveal().hex() == answer.shared


@pytest.mark.parametrize("number", KEMS)
def test_ml_kem_checks_what_can_be_checked(number):
    method = group(number)
    ours = method.initiate(seeded(12))
    ciphertext, secret = method.respond(ours.public, seeded(13))
    for bad in (b"", ciphertext[:-1], ciphertext + b"\0"):
        with pytest.raises(InvalidPublicValue):
            ours.complete(bad)
    # FIPS 203 section 7.2: a coefficient of 4095 is not reduced
    for bad in (b"", ours.public[:-1], ours.public + b"\0", b"\xff" * len(ours.public)):
        with pytest.raises(InvalidPublicValue) as refusal:
            method.respond(bad, seeded(14))
        assert refusal.value.notify == NotifyType.INVALID_SYNTAX
    # FIPS 203 section 6.3: implicit rejection, the same each time
    changed = bytes((ciphertext[0] ^ 1,)) + ciphertext[1:]
    assert ours.complete(changed) == ours.complete(changed) != secret


def test_a_method_that_is_not_implemented_is_a_key_error():
    with pytest.raises(KeyError):
        group(Group.MODP_1024)


def test_an_exchange_shows_no_secret():
    ours = group(Group.CURVE_25519).initiate(entropy_of(b"\x42" * 32))
    assert "agree" not in repr(ours)
    assert "BBBB" not in repr(ours.complete(group(Group.CURVE_25519).initiate(seeded(1)).public))
