"""The codec: octets that RFC 2367 and Linux define, round trips of everything, and what must be refused."""

from __future__ import annotations

import errno
import struct
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import A, B, make_sa, without_keys

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.userspace import USERSPACE
from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Capabilities,
    Direction,
    Endpoint,
    Expire,
    Flow,
    HeaderCopies,
    Identity,
    KernelError,
    Level,
    Lifetime,
    Mark,
    Mode,
    NewMapping,
    Policy,
    PortRange,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    SecurityContext,
    Selector,
    Sensitivity,
    Spi,
    Template,
    TrafficSelector,
    UdpEncapsulation,
    Unresolved,
)
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, Tunnel, Vrf, VrfRoute
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey import private as p
from kernel_shim.pfkey.codec import Codec, header_of
from kernel_shim.pfkey.constants import AUTH_OF_INTEGRITY, ENCRYPT_OF_ENCRYPTION, MAX_EXTENSIONS, MAX_REQUESTS, MessageType, SaType
from kernel_shim.pfkey.constants import ExtensionType as X
from kernel_shim.pfkey.dialects import Dialect
from kernel_shim.pfkey.event_messages import event_from, event_message, proposal_of
from kernel_shim.pfkey.policy_messages import migration_from, policy_extensions, policy_from, require_policy_expressible
from kernel_shim.pfkey.sa_messages import require_expressible, sa_extensions, sa_from, status_extensions, status_from
from kernel_shim.secret import Secret

CODEC = Codec()
BSD_LIKE = Dialect("bsd-like", af_inet6=28, sockaddr_length_octet=True, extensions={X.X_SA2: 19, X.X_POLICY: 18, X.X_NAT_T_OA: None})

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
ipv4, ipv6 = st.integers(0, (1 << 32) - 1).map(IPv4Address), st.integers(0, (1 << 128) - 1).map(IPv6Address)
addresses = ipv4 | ipv6
words = st.integers(0, 3).flatmap(lambda count: st.binary(min_size=8 * count, max_size=8 * count))
pairs = st.tuples(ipv4, ipv4) | st.tuples(ipv6, ipv6)
ranges = pairs.map(lambda pair: AddressRange(*sorted(pair, key=int)))
two_ranges = st.tuples(ipv4, ipv4, ipv4, ipv4) | st.tuples(ipv6, ipv6, ipv6, ipv6)
port_ranges = st.tuples(u16, u16).map(lambda pair: PortRange(*sorted(pair)))
algorithms = st.builds(EspAlgorithm, st.sampled_from(EncryptionId), u16, st.sampled_from(IntegrityId))
traffic_selectors = st.builds(TrafficSelector, ranges, u8, port_ranges)


def _selector(four, protocol, source_ports, destination_ports, if_id, mark):
    first, second = sorted(four[:2], key=int), sorted(four[2:], key=int)
    return Selector(AddressRange(*first), AddressRange(*second), protocol, source_ports, destination_ports, if_id, mark)


full_selectors = st.builds(_selector, two_ranges, u8, port_ranges, port_ranges, u32, st.builds(Mark, u32, u32))
flows = st.builds(lambda pair, *rest: Flow(*pair, *rest), pairs, u8, u16, u16)
capabilities = st.builds(
    Capabilities,
    name=st.text(max_size=40),
    algorithms=st.frozensets(algorithms, max_size=6),
    modes=st.frozensets(st.sampled_from(Mode)),
    encapsulation_required=st.booleans(),
    encapsulation_preferred=st.booleans(),
    tfc_padding=st.booleans(),
    esn=st.booleans(),
    maximum_replay_window=u32,
    port_ranges=st.booleans(),
    address_ranges=st.booleans(),
    sa_selectors=st.booleans(),
    acquire_flow=st.booleans(),
    unresolved_modes=st.frozensets(st.sampled_from(Unresolved)),
    binds_ike_sockets=st.booleans(),
)


def _address(kind, address, port, prefix, protocol):
    return m.Address(kind, address, port, min(prefix, address.max_prefixlen), protocol)


def _request(protocol, mode, level, reqid, ends):
    return m.IpsecRequest(protocol, mode, level, reqid, *(ends or (None, None)))


def _pending(pair, has_source, has_destination, policy, *rest):
    return p.PendingExtension(PendingQueue(policy, pair[0] if has_source else None, pair[1] if has_destination else None, *rest))


names = st.text(st.sampled_from("abcdefgh-0123456789"), min_size=1, max_size=12)
labels = st.integers(16, (1 << 20) - 1).map(Label)
nhlfes = st.one_of(
    st.builds(
        Nhlfe,
        names.map(ToPeer),
        st.lists(labels, min_size=1, max_size=4).map(tuple),
        st.sampled_from(TtlModel),
        st.one_of(st.none(), st.integers(0, 7)),
        st.booleans(),
    ),
    st.builds(Nhlfe, st.one_of(names.map(ToInterface), names.map(ToVrf), names.map(ToStack)), st.just(()), st.sampled_from(TtlModel)),
)
paths = st.lists(nhlfes, min_size=1, max_size=3).map(tuple)
label_sets = st.lists(st.tuples(labels, labels).map(sorted).map(lambda pair: LabelRange(*pair)), max_size=4).map(LabelSet)
prefixes = st.one_of(st.integers(0, 32).map(lambda length: ip_network((0, length))), st.ip_addresses(v=6).map(ip_network))
node_entries = st.one_of(
    st.builds(Vrf, names, names, u32, st.lists(names, max_size=3).map(tuple)),
    pairs.flatmap(lambda pair: st.builds(Tunnel, names, st.just(pair[0]), st.just(pair[1]), st.sampled_from(Encapsulation), st.booleans())),
    st.builds(Peer, names, label_sets, names),
    st.builds(LabelBinding, labels, paths, names),
    st.builds(VrfRoute, names, prefixes, paths),
)

STRATEGIES = {
    X.SA: st.builds(m.Sa, u32, u8, u8, u8, u8, u32),
    X.SPIRANGE: st.builds(m.SpiRange, u32, u32),
    X.X_LABELS: st.builds(p.LabelEntries, st.lists(node_entries, min_size=1, max_size=4).map(tuple)),
    X.PROPOSAL: st.builds(
        m.Proposal,
        u8,
        st.lists(st.builds(m.Combination, u8, u8, u16, u16, u16, u16, u16, u32, u32, u64, u64, u64, u64, u64, u64), max_size=3).map(tuple),
    ),
    X.X_SA2: st.builds(m.Sa2, u8, u32, u32),
    X.X_POLICY: st.builds(
        m.PolicyExtension,
        u16,
        u8,
        u32,
        u32,
        st.lists(st.builds(_request, u16, u8, u8, u32, st.none() | pairs), max_size=MAX_REQUESTS).map(tuple),
    ),
    X.X_NAT_T_TYPE: st.builds(m.NatTType, u8),
    X.X_HELLO: st.builds(p.Hello, u16),
    X.X_CAPABILITIES: st.builds(p.CapabilitiesExtension, capabilities),
    X.X_SA: st.builds(
        p.SaExtension,
        st.sampled_from([Direction.IN, Direction.OUT]),
        algorithms,
        st.booleans(),
        u32,
        u64,
        u64,
        st.builds(HeaderCopies, *[st.booleans()] * 4),
        u32,
    ),
    X.X_SA_STATUS: st.builds(p.SaStatusExtension, u64, u64, u64, u64),
    X.X_SELECTOR: st.builds(p.SelectorExtension, full_selectors),
    X.X_UNRESOLVED: st.builds(p.UnresolvedExtension, st.sampled_from(Unresolved)),
    X.X_FLOW: st.builds(p.FlowExtension, flows),
    X.X_STATISTICS: st.builds(p.Statistics, st.lists(st.tuples(st.text(max_size=30), u64), max_size=8).map(tuple)),
    X.X_DUMP: st.builds(p.DumpPosition, u32, u32, u32),
    X.X_ERROR: st.builds(p.ErrorText, st.text(max_size=60)),
    X.X_ACQUIRE: st.builds(p.AcquireReference, u32),
    X.X_PENDING: st.builds(_pending, pairs, st.booleans(), st.booleans(), u32, st.sampled_from(Unresolved), u32, u32, u32, u32, u64),
    X.X_BUNDLE: st.builds(
        lambda pair, *rest: p.BundleExtension(CachedBundle(pair[0].version, *pair, *rest)),
        pairs,
        *(st.none() | u8, st.none() | u16, st.none() | u16, st.sampled_from(Action), u32, st.none() | st.tuples(addresses, u32).map(lambda it: SaId(*it)), u32),
        *(st.text(max_size=15), st.text(max_size=15), st.lists(u32, max_size=16).map(tuple)),
    ),
    X.X_LOST: st.builds(p.Lost, u32),
    X.SENSITIVITY: st.builds(m.SensitivityExtension, st.builds(Sensitivity, u32, u8, words, u8, words)),
    X.X_SEC_CTX: st.builds(m.SecurityContextExtension, st.builds(SecurityContext, u8, u8, st.binary(max_size=40))),
    X.X_KMADDRESS: pairs.map(lambda pair: m.KmAddress(*pair)),
    X.X_FILTER: st.builds(m.Filter, u16, *[st.binary(min_size=16, max_size=16)] * 2, st.integers(0, 128), st.integers(0, 128)),
}
for kind in (X.IDENTITY_SRC, X.IDENTITY_DST):
    STRATEGIES[kind] = st.builds(
        m.IdentityExtension, st.just(kind), st.builds(Identity, u16, st.binary(max_size=40).filter(lambda it: not it.endswith(b"\0")), u64)
    )
for kind in (X.LIFETIME_CURRENT, X.LIFETIME_HARD, X.LIFETIME_SOFT):
    STRATEGIES[kind] = st.builds(m.LifetimeExtension, st.just(kind), u32, u64, u64, u64)
for kind in (X.ADDRESS_SRC, X.ADDRESS_DST, X.ADDRESS_PROXY, X.X_NAT_T_OA, X.X_SA_DESTINATION):
    STRATEGIES[kind] = st.builds(_address, st.just(kind), addresses, u16, u8, u8)
for kind in (X.KEY_AUTH, X.KEY_ENCRYPT):
    STRATEGIES[kind] = st.builds(lambda k, key: m.Key(k, Secret(key), len(key) * 8), st.just(kind), st.binary(min_size=1, max_size=70))
for kind in (X.SUPPORTED_AUTH, X.SUPPORTED_ENCRYPT):
    STRATEGIES[kind] = st.builds(m.Supported, st.just(kind), st.lists(st.builds(m.Algorithm, u8, u8, u16, u16), max_size=5).map(tuple))
for kind in (X.X_NAT_T_SPORT, X.X_NAT_T_DPORT):
    STRATEGIES[kind] = st.builds(m.NatTPort, st.just(kind), u16)
for kind in (X.X_SA_SOURCES, X.X_SA_DESTINATIONS):
    STRATEGIES[kind] = st.builds(p.SaSelectors, st.just(kind), st.lists(traffic_selectors, max_size=4).map(tuple))

unknown = st.builds(m.UnknownExtension, st.sampled_from([X.X_KMPRIVATE, 99, 999, 0x8FFF]).map(int), st.sampled_from([4, 12, 20]).map(bytes))


@st.composite
def any_message(draw):
    kinds = draw(st.lists(st.sampled_from(sorted(STRATEGIES)), unique=True, max_size=6))
    extensions = [draw(STRATEGIES[kind]) for kind in kinds] + draw(st.lists(unknown, max_size=2))
    return m.Message(draw(u8), draw(u8), draw(u8), draw(u32), draw(u32), tuple(extensions))


@settings(max_examples=200, deadline=None)
@given(any_message())
def test_what_is_written_is_read_back(message):
    data = CODEC.encode(message)
    assert len(data) % 8 == 0
    assert CODEC.decode(data) == message
    assert CODEC.encode(CODEC.decode(data)) == data


@pytest.mark.parametrize("kind", sorted(STRATEGIES), ids=lambda kind: kind.name)
def test_each_extension_alone(kind):
    @settings(max_examples=15, deadline=None)
    @given(STRATEGIES[kind])
    def check(extension):
        message = m.Message(MessageType.ADD, SaType.ESP, extensions=(extension,))
        assert CODEC.decode(CODEC.encode(message)) == message

    check()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([X.ADDRESS_SRC, X.X_POLICY, X.X_SA2]).flatmap(lambda kind: STRATEGIES[kind]))
def test_another_dialect_round_trips(extension):
    codec = Codec(BSD_LIKE)
    message = m.Message(MessageType.ADD, extensions=(extension,))
    assert codec.decode(codec.encode(message)) == message


def test_a_dialect_refuses_what_it_has_no_number_for():
    with pytest.raises(m.PfKeyError) as error:
        Codec(BSD_LIKE).encode(m.Message(MessageType.ADD, extensions=(m.Address(X.X_NAT_T_OA, A),)))
    assert error.value.errno == errno.EOPNOTSUPP


# Fuzz


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_raises_only_our_error(data):
    for octets in (data, struct.pack("=BBBBHHII", 2, 3, 0, 3, (16 + len(data)) // 8, 0, 1, 1) + data[: len(data) // 8 * 8]):
        try:
            message = CODEC.decode(octets)
        except m.PfKeyError:
            continue
        assert CODEC.decode(CODEC.encode(message)) == message
    assert header_of(data).extensions == ()


@settings(max_examples=200, deadline=None)
@given(any_message(), st.lists(st.tuples(st.integers(0, 10_000), u8), min_size=1, max_size=4), st.booleans())
def test_a_changed_message_raises_only_our_error(message, changes, readable):
    data = bytearray(CODEC.encode(message))
    for at, value in changes:
        data[at % len(data)] = value
    if readable:
        data[0], data[6:8] = 2, b"\0\0"
    try:
        decoded = CODEC.decode(bytes(data))
    except m.PfKeyError:
        return
    for read in (
        lambda: sa_from(decoded, Direction.IN, keys=True),
        lambda: status_from(decoded),
        lambda: policy_from(decoded),
        lambda: event_from(replace(decoded, pid=0, errno=0, type=MessageType.ACQUIRE)),
        lambda: event_from(replace(decoded, pid=0, errno=0, type=MessageType.EXPIRE)),
        lambda: event_from(replace(decoded, pid=0, errno=0, type=MessageType.X_NAT_T_NEW_MAPPING)),
        lambda: event_from(replace(decoded, pid=0, errno=0, type=MessageType.X_SPDEXPIRE)),
        lambda: migration_from(decoded),
    ):
        with suppress(m.PfKeyError):
            read()


# Exact octets


def host(layout: str, *values: int) -> bytes:
    return struct.pack("=" + layout, *values)


def test_octets_of_an_add():
    """The layout of RFC 2367 section 2, word by word."""
    message = m.Message(
        MessageType.ADD,
        SaType.ESP,
        sequence=9,
        pid=4711,
        extensions=(
            m.Sa(0x12345678, 32, SaState.MATURE, 3, 12, 0x40000000),
            m.LifetimeExtension(X.LIFETIME_HARD, 1, 2, 3, 4),
            m.Address(X.ADDRESS_SRC, ip_address("192.0.2.1"), 4500, 32, 17),
            m.Address(X.ADDRESS_DST, ip_address("2001:db8::1"), 0, 128),
            m.Key(X.KEY_AUTH, Secret(bytes(range(20))), 160),
            m.Sa2(2, 0, 77),
        ),
    )
    body = (
        host("HH", 2, 1) + bytes.fromhex("12345678") + host("BBBBI", 32, 1, 3, 12, 0x40000000),
        host("HHIQQQ", 4, 3, 1, 2, 3, 4),
        host("HHBBH", 3, 5, 17, 32, 0) + host("H", 2) + bytes.fromhex("1194 c0000201") + bytes(8),
        host("HHBBH", 5, 6, 0, 128, 0) + host("H", 10) + bytes(2) + bytes(4) + ip_address("2001:db8::1").packed + bytes(4) + bytes(4),
        host("HHHH", 4, 8, 160, 0) + bytes(range(20)) + bytes(4),
        host("HHBBHII", 2, 19, 2, 0, 0, 0, 77),
    )
    header = host("BBBBHHII", 2, 3, 0, 3, (16 + sum(map(len, body))) // 8, 0, 9, 4711)
    assert CODEC.encode(message) == header + b"".join(body)


def test_a_template_counts_its_length_in_octets():
    requests = (m.IpsecRequest(50, 2, 3, 5, A, B), m.IpsecRequest(50, 1, 2, 0))
    data = CODEC.encode(m.Message(MessageType.X_SPDADD, extensions=(m.PolicyExtension(2, 2, 17, 1000, requests),)))
    sockaddr = lambda address: host("H", 2) + bytes(2) + address.packed + bytes(8)  # noqa: E731
    policy = host("HHHBBII", (16 + 48 + 16) // 8, 18, 2, 2, 0, 17, 1000)
    first = host("HHBBHII", 48, 50, 2, 3, 0, 5, 0) + sockaddr(A) + sockaddr(B)
    second = host("HHBBHII", 16, 50, 1, 2, 0, 0, 0)
    assert data[16:] == policy + first + second


def test_private_octets():
    """What docs/pfkey-extensions.md draws."""
    algorithm = EspAlgorithm(EncryptionId.AES_GCM_16, 256)
    extensions = (p.Hello(1), p.SaExtension(Direction.IN, algorithm, True, 4096, 5, 6), p.FlowExtension(Flow(A, B, 6, 1000, 443)))
    data = CODEC.encode(m.Message(MessageType.ADD, extensions=extensions))
    assert data[16:] == (
        host("HHHH", 1, 0x8000, 1, 0)
        + host("HHBBHHHHHIIQQ", 5, 0x8002, 1, 1, 0, 20, 256, 0, 16, 4096, 0, 5, 6)
        + host("HHBBHHHI", 3, 0x8008, 4, 6, 0, 1000, 443, 0)
        + A.packed
        + B.packed
    )


# What must be refused

SA = host("HH", 2, 1) + bytes.fromhex("00001000") + host("BBBBI", 0, 1, 0, 12, 0)
SOURCE = host("HHBBH", 3, 5, 0, 32, 0) + host("H", 2) + bytes(2) + A.packed + bytes(8)


def framed(*body: bytes, **header: int) -> bytes:
    data = b"".join(body)
    words = header.get("words", (16 + len(data)) // 8)
    return host("BBBBHHII", header.get("version", 2), header.get("type", 3), 0, 3, words, header.get("reserved", 0), 1, 1) + data


REFUSED = {
    "empty": (b"", errno.EMSGSIZE),
    "short header": (bytes(15), errno.EMSGSIZE),
    "version": (framed(version=3), errno.EINVAL),
    "reserved": (framed(reserved=1), errno.EINVAL),
    "too long": (framed(SA, words=3), errno.EMSGSIZE),
    "too short": (framed(SA, words=9), errno.EMSGSIZE),
    "extension of no length": (framed(host("HHI", 0, 1, 0)), errno.EINVAL),
    "extension beyond the message": (framed(host("HHI", 2, 1, 0)), errno.EINVAL),
    "extension reserved": (framed(host("HHI", 1, 0, 0)), errno.EINVAL),
    "extension too short for its type": (framed(host("HHI", 1, 1, 0)), errno.EINVAL),
    "extension too long for its type": (framed(host("HH", 3, 1) + SA[4:] + bytes(8)), errno.EINVAL),
    "extension twice": (framed(SA, SA), errno.EINVAL),
    "too many extensions": (framed(*[host("HHI", 1, 999, 0)] * (MAX_EXTENSIONS + 1)), errno.EINVAL),
    "address family": (framed(SOURCE[:8] + host("H", 9) + SOURCE[10:]), errno.EINVAL),
    "prefix": (framed(SOURCE[:5] + b"\x21" + SOURCE[6:]), errno.EINVAL),
    "key of no bits": (framed(host("HHHH", 2, 9, 0, 0) + bytes(8)), errno.EINVAL),
    "key longer than its extension": (framed(host("HHHH", 2, 9, 65, 0) + bytes(8)), errno.EINVAL),
    "key shorter than its extension": (framed(host("HHHH", 3, 9, 64, 0) + bytes(16)), errno.EINVAL),
    "template of no length": (framed(host("HHHBBII", 4, 18, 2, 2, 0, 0, 0) + bytes(16)), errno.EINVAL),
    "template beyond the policy": (framed(host("HHHBBII", 4, 18, 2, 2, 0, 0, 0) + host("HHBBHII", 24, 50, 1, 0, 0, 0, 0)), errno.EINVAL),
    "template with half an address": (framed(host("HHHBBII", 5, 18, 2, 2, 0, 0, 0) + host("HHBBHIIQ", 24, 50, 2, 0, 0, 0, 0, 2)), errno.EINVAL),
    "too many templates": (framed(host("HHHBBII", 28, 18, 2, 2, 0, 0, 0) + host("HHBBHII", 16, 50, 1, 0, 0, 0, 0) * 13), errno.EINVAL),
    "filter of too many bits": (framed(host("HH", 5, 26) + bytes(32) + host("HBB", 2, 129, 0)), errno.EINVAL),
    "security context beyond its extension": (framed(host("HHBBH", 2, 24, 1, 1, 9) + bytes(8)), errno.EINVAL),
    "sensitivity beyond its extension": (framed(host("HHIBBBBI", 2, 12, 1, 1, 1, 0, 0, 0)), errno.EINVAL),
    "identity beyond our bound": (framed(host("HHHHQ", 2 + 513, 10, 2, 0, 0) + b"x" * 8 * 513), errno.EINVAL),
    "unknown cipher": (framed(host("HHBBHHHHHIIQQ", 5, 0x8002, 1, 0, 0, 99, 256, 0, 16, 64, 0, 0, 0)), errno.ENOSYS),
    "wrong ICV": (framed(host("HHBBHHHHHIIQQ", 5, 0x8002, 1, 0, 0, 20, 256, 0, 12, 64, 0, 0, 0)), errno.EINVAL),
    "direction": (framed(host("HHBBHHHHHIIQQ", 5, 0x8002, 3, 0, 0, 20, 256, 0, 16, 64, 0, 0, 0)), errno.EINVAL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, number = REFUSED[name]
    with pytest.raises(m.PfKeyError) as error:
        CODEC.decode(data)
    assert error.value.errno == number
    assert error.value.field


def test_unknown_extensions_do_not_matter():
    body = host("HHI", 1, 999, 7)
    message = CODEC.decode(framed(body, SA, body))
    assert message.require(m.Sa).spi == 0x1000
    assert CODEC.encode(message) == framed(body, SA, body)


def test_a_key_never_shows():
    assert "Secret(3 bytes)" in repr(m.Message(3, extensions=(m.Key(X.KEY_AUTH, Secret(b"abc"), 24),)))


# Model values


sas = st.builds(
    SecurityAssociation,
    spi=u32.map(Spi),
    source=ipv4,
    destination=ipv4,
    direction=st.sampled_from([Direction.IN, Direction.OUT]),
    mode=st.sampled_from(Mode),
    reqid=u32,
    algorithm=st.builds(EspAlgorithm, st.sampled_from(EncryptionId), st.sampled_from([128, 192, 256]), st.sampled_from(IntegrityId)),
    encapsulation=st.none() | st.builds(UdpEncapsulation, u16, u16),
    replay_window=u32,
    esn=st.booleans(),
    soft=st.builds(Lifetime, u32, u64, u64),
    hard=st.builds(Lifetime, u32, u64, u64),
    source_selectors=st.lists(traffic_selectors, max_size=3).map(tuple),
    destination_selectors=st.lists(traffic_selectors, max_size=3).map(tuple),
    acquire=u32,
).map(
    lambda sa: replace(
        sa,
        encryption_key=Secret(bytes(sa.algorithm.encryption_key_length)),
        integrity_key=Secret(bytes(sa.algorithm.integrity_key_length)),
    )
)


def through_the_wire(extensions, kind=MessageType.ADD, sequence=0):
    return CODEC.decode(CODEC.encode(m.Message(kind, SaType.ESP, sequence=sequence, extensions=tuple(extensions))))


@settings(max_examples=100, deadline=None)
@given(sas)
def test_an_sa_arrives_whole(sa):
    assert sa_from(through_the_wire(sa_extensions(sa, private=True, keys=True)), Direction.OUT, keys=True) == sa


@settings(max_examples=60, deadline=None)
@given(sas, st.sampled_from(SaState), u64, u64, st.none() | st.integers(1, 1 << 32).map(float), u64)
def test_a_status_arrives_whole_but_for_keys(sa, state, octets, packets, used, sequence):
    status = SaStatus(sa, state, octets, packets, 1_700_000_000.5, used, sequence)
    assert status_from(through_the_wire(status_extensions(status, private=True))) == replace(status, sa=without_keys(sa))


@settings(max_examples=60, deadline=None)
@given(sas)
def test_what_plain_pf_key_can_say_arrives_whole(sa):
    try:
        require_expressible(sa)
    except KernelError:
        sa = replace(sa, esn=False, replay_window=32, source_selectors=(), destination_selectors=(), algorithm=make_sa().algorithm)
        sa = replace(sa, encryption_key=Secret(bytes(20)), integrity_key=Secret(b""), soft=Lifetime(1, 2, 3), hard=Lifetime())
        require_expressible(sa)
    read = sa_from(through_the_wire(sa_extensions(sa, private=False, keys=True), sequence=sa.acquire), sa.direction, keys=True)
    if not sa.encryption_key:  # the length of a key is said by the key alone
        read = replace(read, algorithm=sa.algorithm)
    assert read == sa


policies = st.builds(
    Policy,
    full_selectors,
    st.sampled_from(Direction),
    st.sampled_from(["protect", "bypass", "discard"]).map(lambda name: {"protect": 2, "bypass": 1, "discard": 0}[name]),
    u32,
    st.lists(
        st.builds(
            lambda mode, reqid, ends, level: Template(mode, reqid, *ends, level=level),
            st.sampled_from(Mode),
            u32,
            st.tuples(st.none() | ipv4.filter(int), st.none() | ipv4.filter(int)),
            st.sampled_from(Level),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    st.sampled_from(Unresolved),
    u32,
).map(lambda policy: policy if policy.action == 2 else replace(policy, templates=()))


@settings(max_examples=100, deadline=None)
@given(policies)
def test_a_policy_arrives_whole(policy):
    assert policy_from(through_the_wire(policy_extensions(policy, private=True), MessageType.X_SPDADD)) == policy


@settings(max_examples=100, deadline=None)
@given(policies)
def test_a_plain_policy_arrives_whole_or_is_refused_beforehand(policy):
    try:
        require_policy_expressible(policy)
    except KernelError:
        return
    assert policy_from(through_the_wire(policy_extensions(policy, private=False), MessageType.X_SPDADD)) == policy


@pytest.mark.parametrize(
    "selector",
    [
        Selector(AddressRange(A, A), AddressRange(B, B)),
        Selector(AddressRange.everything(6), AddressRange.everything(6), 6, PortRange(), PortRange(443, 443)),
        Selector(AddressRange(A, A), AddressRange(B, B), 1, PortRange(0x0800, 0x08FF), PortRange(0x0800, 0x08FF)),
        Selector(AddressRange(A, A), AddressRange(B, B), 58, PortRange(0x0103, 0x0103), PortRange(0x0103, 0x0103)),
    ],
    ids=str,
)
def test_plain_pf_key_says_prefixes_ports_and_icmp(selector):
    policy = Policy(selector, Direction.OUT, 1)
    require_policy_expressible(policy)
    assert policy_from(through_the_wire(policy_extensions(policy, private=False))) == policy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": AddressRange(A, B)}, "selector"),
        ({"destination_ports": PortRange(1, 2)}, "selector"),
        ({"if_id": 1}, "if_id"),
        ({"mark": Mark(1, 1)}, "mark"),
    ],
)
def test_plain_pf_key_refuses_by_name(change, named):
    selector = replace(Selector(AddressRange(A, A), AddressRange(B, B), 6), **change)
    with pytest.raises(KernelError, match=named):
        require_policy_expressible(Policy(selector, Direction.OUT, 1))


PROPOSAL = proposal_of(Capabilities("k", frozenset({make_sa().algorithm})))
events = (
    st.builds(
        Acquire,
        u32,
        u32,
        u32,
        st.sampled_from(Mode),
        st.none() | ipv4.filter(int),
        st.none() | ipv4.filter(int),
        st.none() | full_selectors,
        st.none() | flows,
    )
    | st.builds(Expire, st.tuples(addresses, u32).map(lambda pair: SaId(*pair)), u32, st.booleans())
    | st.builds(
        lambda sa, reqid, ends, one, two: NewMapping(sa, reqid, Endpoint(ends[0], one), Endpoint(ends[1], two)),
        st.tuples(addresses, u32).map(lambda pair: SaId(*pair)),
        u32,
        pairs,
        u16,
        u16,
    )
)


@settings(max_examples=100, deadline=None)
@given(events)
def test_an_event_arrives_whole(event):
    message = CODEC.decode(CODEC.encode(event_message(event, PROPOSAL, private=True)))
    assert event_from(message) == event


@settings(max_examples=50, deadline=None)
@given(events)
def test_a_foreign_client_sees_no_private_extension(event):
    message = CODEC.decode(CODEC.encode(event_message(event, PROPOSAL, private=False)))
    assert not [extension for extension in message.extensions if getattr(extension, "type", 0) >= X.X_HELLO]


def test_a_policy_that_protects_with_nothing_is_refused():
    policy = Policy(Selector(AddressRange(A, A), AddressRange(B, B)), Direction.OUT, 2)
    with pytest.raises(m.PfKeyError, match="no template"):
        policy_from(through_the_wire(policy_extensions(policy, private=True)))


def test_a_policy_with_a_lifetime_in_octets_is_refused():
    policy = Policy(Selector(AddressRange(A, A), AddressRange(B, B)), Direction.OUT, 1)
    lifetime = m.LifetimeExtension(X.LIFETIME_HARD, octets=60)
    with pytest.raises(m.PfKeyError) as error:
        policy_from(through_the_wire((*policy_extensions(policy, private=True), lifetime)))
    assert error.value.errno == errno.EOPNOTSUPP


def test_a_key_of_the_wrong_length_is_refused():
    sa = make_sa(encryption_key=Secret(bytes(19)))
    with pytest.raises(m.PfKeyError, match="KEY_ENCRYPT"):
        sa_from(through_the_wire(sa_extensions(sa, private=True, keys=True)), Direction.OUT, keys=True)


def test_an_acquire_proposes_the_strongest_first_and_nothing_that_keeps_no_secret() -> None:
    offered = [(it.encrypt, it.auth, it.encrypt_minimum_bits) for it in proposal_of(USERSPACE).combinations]
    assert offered[0][2] == 256
    assert len(offered) == len(set(offered)) == len([one for one in USERSPACE.algorithms if one.encryption is not EncryptionId.NULL])
    sha1 = AUTH_OF_INTEGRITY[IntegrityId.HMAC_SHA1_96]
    old = [auth == sha1 for _, auth, _ in offered]
    assert old == sorted(old)
    assert ENCRYPT_OF_ENCRYPTION[EncryptionId.NULL] not in {encrypt for encrypt, _, _ in offered}
