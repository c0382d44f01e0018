"""ESP ciphers: published packets, scapy as an oracle, rows against single packets."""

from __future__ import annotations

import hashlib
import hmac
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.packet import Raw

from kernel_shim.algorithms import USERSPACE, EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.esp.cipher import EspCipher, make_cipher
from kernel_shim.esp.rows import MAX_LAYOUTS, Workspace
from kernel_shim.esp.wire import Shape, padded, strip, trailer
from kernel_shim.secret import NO_SECRET, Secret

SPI = 0x01020304
ALGORITHMS = sorted(USERSPACE, key=repr)
HASHES = {
    IntegrityId.HMAC_SHA1_96: "sha1",
    IntegrityId.HMAC_SHA2_256_128: "sha256",
    IntegrityId.HMAC_SHA2_384_192: "sha384",
    IntegrityId.HMAC_SHA2_512_256: "sha512",
}


def name(algorithm: EspAlgorithm) -> str:
    return f"{algorithm.encryption.name}-{algorithm.key_bits}-{algorithm.integrity.name}"


def keys(algorithm: EspAlgorithm, seed: int = 1) -> tuple[bytes, bytes]:
    rand = random.Random(seed)
    return rand.randbytes(algorithm.encryption_key_length), rand.randbytes(algorithm.integrity_key_length)


def cipher_of(algorithm: EspAlgorithm, *, esn: bool = False, seed: int = 1) -> EspCipher:
    encryption, integrity = keys(algorithm, seed)
    return make_cipher(algorithm, Secret(encryption), Secret(integrity), SPI, esn, random.Random(seed).randbytes)


def opened(cipher: EspCipher, sequence: int, packet: bytes) -> bytes | None:
    plaintext = memoryview(bytearray(len(packet) - cipher.shape.overhead))
    return bytes(plaintext) if cipher.open(sequence, memoryview(packet), plaintext) else None


def sealed(cipher: EspCipher, sequence: int, plaintext: bytes) -> bytes:
    packet = memoryview(bytearray(len(plaintext) + cipher.shape.overhead))
    cipher.seal(sequence, plaintext, packet)
    return bytes(packet)


# (algorithm, key and salt, SPI, sequence number, ESN, IV, plaintext, ciphertext and ICV)
@pytest.mark.parametrize(
    ("algorithm", "material", "spi", "sequence", "esn", "iv", "plaintext", "protected"),
    [
        pytest.param(
            EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256),
            "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3",
            0x01020304,
            5,
            False,
            "1011121314151617",
            "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
            "202122232425262728292a2b2c2d2e2f303132333435363701020204",
            "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f72aa71e7c4c4f64c9befe2fac"
            "c638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e076aaa8266b7fb0f7b11b369907e1ad43",
            id="RFC 7634 appendix A",
        ),
        pytest.param(
            EspAlgorithm(EncryptionId.AES_GCM_16, 128),
            "4c80cdefbb5d10da906ac73c3613a6342e443b68",
            0x00004321,
            0x8765432100000000,
            True,
            "4956ed7e3b244cfe",
            "45000048699a000080114db7c0a80102c0a801010a9bf15638d301000001000000000000045f736970045f756470037369700963796265726369747902646b000021000101020201",
            "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34cfa2436f14a3f3cf65925bf1f4a13c5d"
            "15b21e1884f5ff6247aeabb786b93bce61bc17d768fd9732459018148f6cbe722fd04796562dfdb4",
            id="draft-mcgrew-gcm-test-01 case 1",
        ),
        pytest.param(
            EspAlgorithm(EncryptionId.AES_GCM_16, 192),
            "feffe9928665731c6d6a8f9467308308feffe9928665731ccafebabe",
            0x0000A5F8,
            0x0A,
            False,
            "facedbaddecaf888",
            "45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d075680001",
            "a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0315b27452144cc7795457b9652037f5318027b5b4cd7a636",
            id="draft-mcgrew-gcm-test-01, 192 bits",
        ),
        pytest.param(
            EspAlgorithm(EncryptionId.AES_GCM_16, 256),
            "abbccddef00112233445566778899aababbccddef00112233445566778899aab11223344",
            0x4A2CBFE3,
            2,
            False,
            "0102030405060708",
            "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee0000000007002400020bf0000020405b40101040201020201",
            "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763748a637985771d347f0545659f14e99def842d8eb335f4eecfdbf831824b4c4915956c96",
            id="draft-mcgrew-gcm-test-01, 256 bits",
        ),
    ],
)
def test_published_packets_open(algorithm, material, spi, sequence, esn, iv, plaintext, protected) -> None:
    cipher = make_cipher(algorithm, Secret(bytes.fromhex(material)), NO_SECRET, spi, esn, random.Random(1).randbytes)
    packet = spi.to_bytes(4, "big") + (sequence & 0xFFFFFFFF).to_bytes(4, "big") + bytes.fromhex(iv + protected)
    assert opened(cipher, sequence, packet) == bytes.fromhex(plaintext)
    assert opened(cipher, sequence, packet[:-1] + bytes([packet[-1] ^ 1])) is None
    if esn:
        assert opened(cipher, sequence + (1 << 32), packet) is None


@pytest.mark.parametrize(
    ("key", "nonce", "iv", "plaintext", "ciphertext"),
    [
        ("ae6852f8121067cc4bf7a5765577f39e", "00000030", "0000000000000000", b"Single block msg".hex(), "e4095d4fb7a7b3792d6175a3261311b8"),
        (
            *("7e24067817fae0d743d6ce1f32539163", "006cb6db", "c0543b59da48d90b"),
            *(bytes(range(32)).hex(), "5104a106168a72d9790d41ee8edad388eb2e1efc46da57c8fce630df9141be28"),
        ),
        ("16af5b145fc9f579c175f93e3bfb0eed863d06ccfdb78515", "00000048", "36733c147d6d93cb", b"Single block msg".hex(), "4b55384fe259c9c84e7935a003cbe928"),
        (
            *("776beff2851db06f4c8a0542c8696f6c6a81af1eec96b4d37fc1d689e6c1c104", "00000060", "db5672c97aa8f0b2"),
            *(b"Single block msg".hex(), "145ad01dbf824ec7560863dc71e3e0c0"),
        ),
    ],
)
def test_counter_mode_is_that_of_rfc_3686(key: str, nonce: str, iv: str, plaintext: str, ciphertext: str) -> None:
    """RFC 3686 section 6, test vectors 1, 2, 4 and 7: a packet made by hand around the ciphertext opens."""
    algorithm = EspAlgorithm(EncryptionId.AES_CTR, 4 * len(key), IntegrityId.HMAC_SHA2_256_128)
    cipher = make_cipher(algorithm, Secret(bytes.fromhex(key + nonce)), Secret(bytes(32)), SPI, False, random.Random(1).randbytes)
    covered = SPI.to_bytes(4, "big") + (9).to_bytes(4, "big") + bytes.fromhex(iv + ciphertext)
    packet = covered + hmac.new(bytes(32), covered, "sha256").digest()[:16]
    assert opened(cipher, 9, packet) == bytes.fromhex(plaintext)


@pytest.mark.parametrize(("encryption", "tag"), [(EncryptionId.AES_GCM_8, 8), (EncryptionId.AES_GCM_12, 12)])
def test_a_short_gcm_tag_is_the_front_of_the_whole_one(encryption: EncryptionId, tag: int) -> None:
    """RFC 4106 section 6; the packet is that of draft-mcgrew-gcm-test-01, 192 bits."""
    material = bytes.fromhex("feffe9928665731c6d6a8f9467308308feffe9928665731ccafebabe")
    cipher = make_cipher(EspAlgorithm(encryption, 192), Secret(material), NO_SECRET, 0xA5F8, False, random.Random(1).randbytes)
    whole = bytes.fromhex(
        "0000a5f80000000afacedbaddecaf888a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0315b27452144cc7795457b9652037f5318027b5b4cd7a636"
    )
    packet = whole[: len(whole) - 16 + tag]
    expected = bytes.fromhex("45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d075680001")
    assert opened(cipher, 10, packet) == expected
    assert opened(cipher, 10, packet[:-1] + bytes([packet[-1] ^ 1])) is None


SCAPY_CRYPT = {
    EncryptionId.AES_GCM_16: "AES-GCM",
    **dict.fromkeys((EncryptionId.AES_CCM_8, EncryptionId.AES_CCM_12, EncryptionId.AES_CCM_16), "AES-CCM"),
    EncryptionId.CHACHA20_POLY1305: "CHACHA20-POLY1305",
    EncryptionId.AES_CBC: "AES-CBC",
    EncryptionId.AES_CTR: "AES-CTR",
    EncryptionId.NULL: "NULL",
}
SCAPY_AUTH = {
    IntegrityId.NONE: "NULL",
    IntegrityId.HMAC_SHA1_96: "HMAC-SHA1-96",
    IntegrityId.HMAC_SHA2_256_128: "SHA2-256-128",
    IntegrityId.HMAC_SHA2_384_192: "SHA2-384-192",
    IntegrityId.HMAC_SHA2_512_256: "SHA2-512-256",
}


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.encryption in SCAPY_CRYPT], ids=name)
@pytest.mark.parametrize("esn", [False, True])
def test_scapy_agrees(algorithm: EspAlgorithm, esn: bool) -> None:
    encryption, integrity = keys(algorithm)
    try:
        oracle = SecurityAssociation(
            ESP,
            spi=SPI,
            crypt_algo=SCAPY_CRYPT[algorithm.encryption],
            crypt_key=encryption,
            crypt_icv_size=algorithm.icv_length if algorithm.aead else None,
            auth_algo=SCAPY_AUTH[algorithm.integrity],
            auth_key=integrity or None,
            tunnel_header=IP(src="192.0.2.1", dst="192.0.2.2"),
            esn_en=esn,
            esn=3 if esn else 0,
        )
    except TypeError:
        pytest.skip("scapy cannot do that cipher")
    inner = IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=5, dport=6) / Raw(b"payload of some length")
    sequence = (3 << 32 if esn else 0) | 77
    theirs = bytes(oracle.encrypt(inner, seq_num=77, **({"esn_en": True, "esn": 3} if esn else {}))[ESP])
    cipher = cipher_of(algorithm, esn=esn)
    plaintext = opened(cipher, sequence, theirs)
    assert plaintext is not None
    length, next_header = strip(plaintext) or (0, 0)
    assert (plaintext[:length], next_header) == (bytes(inner), 4)
    mine = sealed(cipher, sequence, bytes(inner) + trailer(len(bytes(inner)), cipher.shape.alignment, 4))
    wrapped = IP(bytes(IP(src="192.0.2.1", dst="192.0.2.2", proto=50) / Raw(mine)))
    assert bytes(oracle.decrypt(wrapped, **({"esn_en": True, "esn": 3} if esn else {}))) == bytes(inner)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.aead], ids=name)
@pytest.mark.parametrize("esn", [False, True])
def test_the_icv_is_the_truncated_hmac(algorithm: EspAlgorithm, esn: bool) -> None:
    """RFC 4868 section 2.1 and RFC 4303 section 2.8, against the standard library."""
    sequence = (9 << 32) + 5 if esn else 5
    packet = sealed(cipher_of(algorithm, esn=esn), sequence, bytes(30) + b"\0\4")
    size = algorithm.icv_length
    covered = packet[:-size] + ((9).to_bytes(4, "big") if esn else b"")
    assert packet[-size:] == hmac.new(keys(algorithm)[1], covered, getattr(hashlib, HASHES[algorithm.integrity])).digest()[:size]


@pytest.mark.property
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALGORITHMS), st.booleans(), st.integers(0, 1600), st.integers(1, 64), st.integers(1, 1 << 40), st.integers(0, 1 << 30))
def test_rows_are_what_single_packets_are(algorithm: EspAlgorithm, esn: bool, payload: int, count: int, first: int, seed: int) -> None:
    if not esn:
        first &= 0x0FFFFFFF
        first += 1
    cipher = cipher_of(algorithm, esn=esn)
    outbound = Workspace()
    rows = outbound.rows(cipher.shape.sealed(payload), cipher.shape)
    count = min(count, rows.capacity)
    contents = [random.Random(seed + row).randbytes(rows.plaintext_length) for row in range(count)]
    for row, content in enumerate(contents):
        rows.plaintext_views[row][:] = content
    cipher.seal_rows(rows, count, first)
    for row, content in enumerate(contents):
        packet = bytes(rows.packets[row])
        assert opened(cipher, first + row, packet) == content
        if algorithm.counts_its_ivs:
            assert sealed(cipher, first + row, content) == packet
            assert int.from_bytes(packet[8:16], "big") == first + row
    inbound = Workspace(outbound.wire)
    back = inbound.rows(rows.wire_length, cipher.shape)
    sequences = np.arange(count, dtype=np.uint64) + np.uint64(first)
    assert cipher.open_rows(back, count, sequences)
    assert [bytes(view) for view in back.plaintext_views[:count]] == contents
    rows.wire[seed % count, seed % rows.wire_length] ^= 1
    spi_or_sequence = seed % rows.wire_length < 8
    assert not cipher.open_rows(back, count, sequences) or (esn and algorithm.aead and spi_or_sequence)


def test_two_keys_share_one_workspace() -> None:
    first, second = (cipher_of(EspAlgorithm(EncryptionId.AES_GCM_16, 128), seed=seed) for seed in (1, 2))
    work = Workspace()
    rows = work.rows(first.shape.sealed(100), first.shape)
    for cipher in (first, second, first):
        cipher.seal_rows(rows, 3, 7)
        assert opened(cipher, 8, bytes(rows.packets[1])) is not None


def test_layouts_are_bounded() -> None:
    work = Workspace()
    shape = Shape(EspAlgorithm(EncryptionId.AES_GCM_16, 128))
    for payload in range(2, 4000, 4):
        work.rows(shape.sealed(payload), shape)
    assert len(work) <= MAX_LAYOUTS


@given(st.integers(0, 3000), st.sampled_from([4, 16]))
def test_padding(length: int, alignment: int) -> None:
    tail = trailer(length, alignment, 41)
    assert (length + len(tail)) % alignment == 0
    assert len(tail) < alignment + 2
    assert length + len(tail) == padded(length, alignment)
    assert tail[:-2] == bytes(range(1, len(tail) - 1))  # RFC 4303 section 2.4
    assert strip(bytes(length) + tail) == (length, 41)


@given(st.integers(60, 9000), st.sampled_from(ALGORITHMS))
def test_the_largest_payload_fits_and_one_more_does_not(room: int, algorithm: EspAlgorithm) -> None:
    shape = Shape(algorithm)
    largest = shape.largest_payload(room)
    if largest >= 0:
        assert shape.sealed(largest) <= room < shape.sealed(largest + 1)
        assert shape.plausible(shape.sealed(largest))


def test_unsupported_algorithms_and_short_keys_are_refused() -> None:
    gcm = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
    with pytest.raises(ValueError):
        make_cipher(gcm, Secret(bytes(16)), NO_SECRET, SPI, False, random.randbytes)
    with pytest.raises(ValueError):
        make_cipher(EspAlgorithm(EncryptionId.NULL, 0), NO_SECRET, NO_SECRET, SPI, False, random.randbytes)
