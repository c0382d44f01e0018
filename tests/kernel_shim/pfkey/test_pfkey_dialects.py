"""The numbers and layouts of FreeBSD, NetBSD and OpenBSD, against octets written down from their headers (sys/net/pfkeyv2.h)."""

from __future__ import annotations

import errno
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import A, B

from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import AuthAlgorithm, EncryptAlgorithm, MessageType, SaType
from kernel_shim.pfkey.constants import ExtensionType as X
from kernel_shim.pfkey.dialects import DIALECTS, FREEBSD, LINUX, NETBSD, OPENBSD, Numbering

SIX = ip_address("2001:db8::1")
KAME = (FREEBSD, NETBSD)


def host(layout: str, *values: int) -> bytes:
    return struct.pack("=" + layout, *values)


def body(dialect, *extensions, kind=MessageType.ADD, sa_type=SaType.ESP) -> bytes:
    message = m.Message(kind, sa_type, extensions=extensions)
    data = Codec(dialect).encode(message)
    assert Codec(dialect).decode(data) == message
    return data[16:]


def number(dialect, extension) -> int:
    return struct.unpack_from("=H", body(dialect, extension), 2)[0]


# Each dialect's number of an extension, or None: what the header says.
EXTENSIONS = {
    m.Sa(1): (1, 1, 1, 1),
    m.PolicyExtension(0, 1): (18, 18, 18, None),
    m.Sa2(): (19, 19, 19, None),
    m.NatTType(2): (20, 20, 20, None),
    m.NatTPort(X.X_NAT_T_SPORT, 9): (21, 21, 21, None),
    m.NatTPort(X.X_NAT_T_DPORT, 9): (22, 22, 22, None),
    m.Address(X.X_NAT_T_OA, A, 0, 32): (23, 23, 23, None),
    m.Address(X.X_NAT_T_OAR, A, 0, 32): (None, 24, 24, None),
    m.NatTFragment(1400): (None, 25, 25, None),
    m.SaReplay(128): (None, 26, None, None),
    m.Address(X.X_NEW_ADDRESS_SRC, A, 0, 32): (None, 27, None, None),
    m.Address(X.X_NEW_ADDRESS_DST, A, 0, 32): (None, 28, None, None),
    m.NatTPort(X.X_UDPENCAP, 4500): (None, None, None, 31),
    m.SecurityContextExtension(m.SecurityContext(1, 1, b"x")): (24, None, None, None),
    m.KmAddress(A, B): (25, None, None, None),
    m.Filter(0, bytes(16), bytes(16)): (26, None, None, None),
}


@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda it: it.type.name)
def test_numbers_of_extensions(extension):
    for dialect, expected in zip((LINUX, FREEBSD, NETBSD, OPENBSD), EXTENSIONS[extension], strict=True):
        if expected is not None:
            assert number(dialect, extension) == expected, dialect.name
            continue
        with pytest.raises(m.PfKeyError) as error:
            body(dialect, extension)
        assert error.value.errno == errno.EOPNOTSUPP, dialect.name


@pytest.mark.parametrize(("dialect", "family"), [(LINUX, None), (FREEBSD, 28), (NETBSD, 24), (OPENBSD, 24)])
def test_socket_addresses(dialect, family):
    """4.4BSD: length, then family, an octet each; Linux: a family of two octets."""
    four = host("H", 2) if family is None else bytes((16, 2))
    six = host("H", 10) if family is None else bytes((28, family))
    protocol, bits = (0, 0) if dialect is OPENBSD else (17, 32)
    address = m.Address(X.ADDRESS_SRC, A, 4500, 32, 0 if dialect is OPENBSD else 17)
    assert body(dialect, address) == host("HHBBH", 3, 5, protocol, bits, 0) + four + b"\x11\x94" + A.packed + bytes(8)
    assert six + bytes(6) + SIX.packed in body(dialect, m.Address(X.ADDRESS_DST, SIX, 0, 128))


@pytest.mark.parametrize("dialect", KAME, ids=lambda it: it.name)
def test_a_request_of_kame_has_a_head_of_8_octets(dialect):
    policy = m.PolicyExtension(2, 2, 7, 0, (m.IpsecRequest(50, 2, 3, 5, A, B), m.IpsecRequest(50, 1, 2, 0)))
    sockaddr = lambda address: bytes((16, 2, 0, 0)) + address.packed + bytes(8)  # noqa: E731
    expected = host("HHHBBII", 7 + 1, 18, 2, 2, 0, 7, 0) + host("HHBBH", 40, 50, 2, 3, 5) + sockaddr(A) + sockaddr(B) + host("HHBBH", 8, 50, 1, 2, 0)
    assert body(dialect, policy, kind=MessageType.X_SPDADD) == expected


def test_a_reqid_beyond_16_bits_is_refused_where_there_are_no_more():
    with pytest.raises(m.PfKeyError):
        body(FREEBSD, m.PolicyExtension(2, 2, 7, 0, (m.IpsecRequest(50, 2, 3, 0x10000, A, B),)))


@pytest.mark.parametrize(
    ("algorithm", "numbers"),
    [
        (EncryptAlgorithm.X_AESCBC, (12, 12, 12, 12)),
        (EncryptAlgorithm.X_AESCTR, (13, 13, 13, 13)),
        (EncryptAlgorithm.X_AES_CCM_ICV16, (16, None, None, None)),
        (EncryptAlgorithm.X_AES_GCM_ICV16, (20, 20, 20, 20)),
        (EncryptAlgorithm.X_NULL_AES_GMAC, (23, 23, 23, 21)),
        (EncryptAlgorithm.X_CHACHA20_POLY1305, (28, None, None, 22)),
        (EncryptAlgorithm.X_CAMELLIACBC, (22, 22, 22, None)),
    ],
)
def test_ciphers(algorithm, numbers):
    for dialect, expected in zip((LINUX, FREEBSD, NETBSD, OPENBSD), numbers, strict=True):
        if expected is None:
            with pytest.raises(m.PfKeyError):
                body(dialect, m.Sa(1, encrypt=algorithm))
        else:
            assert body(dialect, m.Sa(1, encrypt=algorithm))[11] == expected
            supported = m.Supported(X.SUPPORTED_ENCRYPT, (m.Algorithm(algorithm),))
            assert body(dialect, supported)[8] == expected
            assert body(dialect, m.Proposal(0, (m.Combination(encrypt=algorithm),)))[9] == expected


def test_what_means_something_else_there_is_not_taken_for_ours():
    """OpenBSD: authentication 9 is AES-128-GMAC, message 12 is ADDFLOW, cipher 22 is ChaCha20-Poly1305 and not Camellia."""
    data = bytearray(Codec(OPENBSD).encode(m.Message(MessageType.ADD, SaType.ESP, extensions=(m.Sa(1),))))
    data[1], data[16 + 10], data[16 + 11] = 12, 9, 22
    message = Codec(OPENBSD).decode(bytes(data))
    sa = message.require(m.Sa)
    assert message.type not in tuple(MessageType)
    assert sa.auth not in tuple(AuthAlgorithm)
    assert sa.encrypt == EncryptAlgorithm.X_CHACHA20_POLY1305
    assert Codec(OPENBSD).encode(message) == bytes(data)


def test_sa_types_and_proposals_of_openbsd():
    data = Codec(OPENBSD).encode(m.Message(MessageType.REGISTER, SaType.ESP, extensions=(m.Proposal(32),)))
    assert data[3] == 2
    assert data[16 + 4 : 16 + 8] == bytes((0, 32, 0, 0))
    assert Codec(OPENBSD).decode(data).sa_type == SaType.ESP


@pytest.mark.parametrize(
    ("dialect", "kinds"),
    [
        (FREEBSD, (MessageType.X_NAT_T_NEW_MAPPING, MessageType.X_MIGRATE, MessageType.X_BIND)),
        (NETBSD, (MessageType.X_MIGRATE, MessageType.X_BIND)),
        (OPENBSD, (MessageType.X_SPDADD, MessageType.X_SPDDUMP, MessageType.X_NAT_T_NEW_MAPPING)),
    ],
)
def test_messages_that_are_not_there(dialect, kinds):
    for kind in kinds:
        with pytest.raises(m.PfKeyError):
            Codec(dialect).encode(m.Message(kind))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 255), st.none() | st.integers(0, 255), max_size=12), st.integers(0, 255))
def test_every_number_of_the_wire_comes_back_as_it_was(differing, theirs):
    taken = {other for other in differing.values() if other is not None}
    one_to_one = {ours: other for ours, other in differing.items() if other is None or (other in differing and list(differing.values()).count(other) == 1)}
    numbers = Numbering(one_to_one)
    assert numbers.to(numbers.of(theirs), "x") == theirs or theirs in taken


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda it: it.name)
def test_garbage_raises_only_our_error(dialect):
    codec = Codec(dialect)

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=160))
    def check(data):
        framed = host("BBBBHHII", 2, 14, 0, 3, 2 + len(data) // 8, 0, 1, 1) + data[: len(data) // 8 * 8]
        try:
            message = codec.decode(framed)
        except m.PfKeyError:
            return
        assert codec.decode(codec.encode(message)) == message

    check()
