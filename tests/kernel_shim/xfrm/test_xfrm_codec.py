"""NETLINK_XFRM messages: what is written is read back, sizes are those of linux/xfrm.h, and nothing but our own error escapes a decoder."""

from __future__ import annotations

import contextlib
import errno
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xfrm_support import HERE, PEER, carried, make_sa

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.linux import XFRM
from kernel_shim.model import (
    ANY_PORT,
    TFC_TO_MTU,
    Acquire,
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    Endpoint,
    Expire,
    HeaderCopies,
    KernelError,
    Lifetime,
    Mark,
    Mode,
    NewMapping,
    Policy,
    PolicyIndex,
    PortRange,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    Template,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from kernel_shim.xfrm import structs, wire
from kernel_shim.xfrm.constants import OURS, Attribute, MessageType, NetlinkType, StateFlag
from kernel_shim.xfrm.events import notice_from
from kernel_shim.xfrm.information import sad_information_from, spd_information_from
from kernel_shim.xfrm.policies import policy_from, policy_id_message, policy_message, socket_bypass
from kernel_shim.xfrm.sa_replies import sa_from
from kernel_shim.xfrm.sas import Larval, claim_message, sa_message, spi_message
from kernel_shim.xfrm.selectors import if_id_from, mark_from, selector_from, selector_struct
from kernel_shim.xfrm.structs import MalformedMessage, SaStruct
from kernel_shim.xfrm.wire import Message, decode, encode

pytestmark = pytest.mark.property


def network(text: str) -> AddressRange:
    return AddressRange.of(IPv4Network(text) if "." in text else IPv6Network(text))


# Values


def networks(version: int) -> st.SearchStrategy[AddressRange]:
    bits = 32 if version == 4 else 128
    make: Any = IPv4Network if version == 4 else IPv6Network
    return st.builds(lambda number, length: AddressRange.of(make((number, length), strict=False)), st.integers(0, 2**bits - 1), st.integers(0, bits))


def aligned_ports() -> st.SearchStrategy[PortRange]:
    def make(port: int, bits: int) -> PortRange:
        low = port >> bits << bits
        return PortRange(low, low + (1 << bits) - 1)

    return st.builds(make, st.integers(0, 65535), st.integers(0, 16))


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    version = draw(st.sampled_from((4, 6)))
    source, destination = draw(networks(version)), draw(networks(version))
    protocol = draw(st.sampled_from((0, 1, 6, 17, 58, 132)))
    if protocol in (1, 58):
        kind, code = draw(st.integers(0, 255)), draw(st.integers(0, 255))
        ports = draw(st.sampled_from((ANY_PORT, PortRange(kind << 8, kind << 8 | 255), PortRange(kind << 8 | code, kind << 8 | code))))
        sides = (ports, ports)
    else:
        sides = (draw(aligned_ports()), draw(aligned_ports()))
    mark = draw(st.one_of(st.just(Mark()), st.builds(Mark, st.integers(0, 2**32 - 1), st.integers(1, 2**32 - 1))))
    return Selector(source, destination, protocol, *sides, draw(st.sampled_from((0, 1, 2**32 - 1))), mark)


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
lifetimes = st.builds(Lifetime, st.integers(0, 2**40), st.integers(0, 2**60), st.integers(0, 2**60))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    action = draw(st.sampled_from(Action))
    outer = draw(st.sampled_from((st.ip_addresses(v=4), st.ip_addresses(v=6)))).filter(lambda address: not address.is_unspecified)
    template = st.builds(Template, st.sampled_from(Mode), st.integers(1, OURS - 1).map(ReqId), outer, st.one_of(st.none(), outer))
    templates = tuple(draw(st.lists(template, min_size=1, max_size=6))) if action is Action.PROTECT else ()
    direction = draw(st.sampled_from(Direction))
    return Policy(draw(selectors()), direction, action, draw(st.integers(0, 2**32 - 1)), templates)


@st.composite
def associations(draw: st.DrawFn) -> SecurityAssociation:
    algorithm = draw(st.sampled_from(sorted(XFRM.algorithms, key=repr)))
    version = draw(st.sampled_from((4, 6)))
    address = st.ip_addresses(v=version)
    direction = draw(st.sampled_from((Direction.IN, Direction.OUT)))
    pair = draw(st.one_of(st.none(), selectors().filter(lambda s: s.source != AddressRange.everything(s.version) and not s.if_id and s.mark == Mark())))
    mode = draw(st.sampled_from(Mode))
    booleans = st.booleans()
    copies = draw(st.builds(HeaderCopies, booleans, booleans, booleans, booleans)) if mode is Mode.TUNNEL else HeaderCopies()
    padding = draw(st.sampled_from((0, 1000, TFC_TO_MTU))) if mode is Mode.TUNNEL and direction is Direction.OUT else 0
    return SecurityAssociation(
        spi=Spi(draw(st.integers(0x100, 2**32 - 1))),
        source=draw(address),
        destination=draw(address),
        direction=direction,
        mode=mode,
        copies=copies,
        tfc_padding=padding,
        reqid=ReqId(draw(st.integers(0, OURS - 1))),
        algorithm=algorithm,
        encryption_key=Secret(draw(st.binary(min_size=algorithm.encryption_key_length, max_size=algorithm.encryption_key_length))),
        integrity_key=Secret(draw(st.binary(min_size=algorithm.integrity_key_length, max_size=algorithm.integrity_key_length))),
        encapsulation=draw(st.one_of(st.none(), st.builds(UdpEncapsulation, st.integers(1, 65535), st.integers(1, 65535)))),
        replay_window=draw(st.integers(1, 4096)),
        esn=draw(st.booleans()),
        soft=draw(lifetimes),
        hard=draw(lifetimes),
        if_id=draw(st.sampled_from((0, 1, 2**32 - 1))),
        mark=draw(st.sampled_from((Mark(), Mark(7, 0xFF)))),
        set_mark=draw(st.sampled_from((Mark(), Mark(7, 0xFF), Mark(0, 1)))),
        source_selectors=() if pair is None else (TrafficSelector(pair.source, pair.protocol, pair.source_ports),),
        destination_selectors=() if pair is None else (TrafficSelector(pair.destination, pair.protocol, pair.destination_ports),),
    )


# What is written is read back


def test_structures_have_the_sizes_of_the_c_ones() -> None:
    assert structs.SELECTOR.size == 56
    assert structs.SA_SIZE == 224
    assert structs.POLICY_SIZE == 168
    assert structs.POLICY_ID_SIZE == 64
    assert structs.TEMPLATE.size == 64
    assert structs.ACQUIRE_SIZE == 280
    assert structs.MAPPING_SIZE == 64
    assert structs.ENCAPSULATION.size == 24
    assert len(socket_bypass(6, Direction.OUT)) == 168


@given(selectors())
def test_selectors(selector: Selector) -> None:
    message = carried(policy_id_message(MessageType.GETPOLICY, Direction.IN, selector))
    assert selector_from(structs.SelectorStruct.unpack(message.body), message.attributes) == selector


@given(policies(), st.booleans(), st.integers(0, 2**28).map(lambda number: OURS | number << 3))
def test_policies(policy: Policy, update: bool, index: int) -> None:
    told = policy_from(carried(policy_message(policy, replace=update, index=index)))
    assert told is not None
    assert told.ours
    assert told.policy.index & ~7 == index
    assert told.policy == Policy(policy.selector, policy.direction, policy.action, policy.priority, policy.templates, index=told.policy.index)


@given(associations(), st.booleans())
def test_security_associations(sa: SecurityAssociation, update: bool) -> None:
    message = carried(sa_message(sa, update=update))
    status = sa_from(message.body, message.attributes).status(sa.direction)
    assert status.state is SaState.MATURE
    assert status.sa == sa


def test_an_outbound_sa_answers_its_acquire_and_an_inbound_one_does_not() -> None:
    sa = make_sa(acquire=AcquireSequence(77))
    assert SaStruct.unpack(sa_message(sa, update=False).body).seq == 77
    inbound = make_sa(direction=Direction.IN, acquire=AcquireSequence(77))
    assert SaStruct.unpack(sa_message(inbound, update=True).body).seq == 0


def test_small_windows_stand_in_the_old_field_and_esn_never_does() -> None:
    small = sa_message(make_sa(replay_window=32), update=False)
    assert SaStruct.unpack(small.body).replay_window == 32
    assert Attribute.REPLAY_ESN_VAL not in small.attributes
    esn = sa_message(make_sa(replay_window=32, esn=True), update=False)
    assert SaStruct.unpack(esn.body).replay_window == 0
    assert SaStruct.unpack(esn.body).flags & StateFlag.ESN
    assert structs.REPLAY_ESN.unpack_from(esn.attributes[Attribute.REPLAY_ESN_VAL])[0] == 1


def test_a_tunnel_without_selector_takes_both_families() -> None:
    assert SaStruct.unpack(sa_message(make_sa(), update=False).body).flags & StateFlag.AF_UNSPEC
    assert not SaStruct.unpack(sa_message(make_sa(mode=Mode.TRANSPORT), update=False).body).flags & StateFlag.AF_UNSPEC


def test_icmp_type_and_code_stand_where_the_kernel_looks_for_ports() -> None:
    ports = PortRange(0x0800, 0x08FF)
    echo = selector_struct(Selector(network("10.0.0.0/8"), network("10.0.0.0/8"), 1, ports, ports))
    assert (echo.sport, echo.sport_mask, echo.dport, echo.dport_mask) == (8, 0xFFFF, 0, 0)
    both = selector_struct(Selector(network("10.0.0.0/8"), network("10.0.0.0/8"), 1, ANY_PORT, PortRange(0x0304, 0x0304)))
    assert (both.sport, both.sport_mask, both.dport, both.dport_mask) == (3, 0xFFFF, 4, 0xFFFF)


# What Linux cannot do is refused by name

EVERYTHING = network("0.0.0.0/0")


@pytest.mark.parametrize(
    ("selector", "field"),
    [
        (Selector(AddressRange(HERE, IPv4Address("192.0.2.3")), EVERYTHING), "source address"),
        (Selector(EVERYTHING, AddressRange(IPv4Address("10.0.0.0"), IPv4Address("10.0.0.2"))), "destination address"),
        (Selector(EVERYTHING, EVERYTHING, 6, PortRange(1, 2)), "source port"),
        (Selector(EVERYTHING, EVERYTHING, 6, ANY_PORT, PortRange(1024, 65535)), "destination port"),
        (Selector(EVERYTHING, EVERYTHING, 1, PortRange(0x0800, 0x09FF)), "ICMP type and code"),
        (Selector(EVERYTHING, EVERYTHING, 1, PortRange(1, 1), PortRange(2, 2)), "ICMP type and code"),
    ],
)
def test_selectors_beyond_linux(selector: Selector, field: str) -> None:
    with pytest.raises(KernelError, match=field) as refused:
        policy_id_message(MessageType.GETPOLICY, Direction.OUT, selector)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replay_window": 4097}, "replay window of 4097"),
        ({"reqid": ReqId(OURS)}, "reqid"),
        ({"encryption_key": Secret(bytes(16))}, "key length of AES_GCM_16"),
        ({"direction": Direction.IN, "esn": True, "replay_window": 0}, "without a replay window"),
    ],
)
def test_associations_beyond_linux(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        sa_message(make_sa(**changes), update=False)


def test_a_protecting_policy_needs_templates() -> None:
    with pytest.raises(KernelError, match="0 templates"):
        policy_message(Policy(Selector(EVERYTHING, EVERYTHING), Direction.OUT, Action.PROTECT), replace=False)


# Events


def test_acquire() -> None:
    selector = Selector(network("10.1.0.0/16"), network("10.2.0.0/16"))
    policy = Policy(selector, Direction.OUT, Action.PROTECT, 9, (Template(Mode.TUNNEL, ReqId(7), HERE, PEER),))
    asked = policy_message(policy, replace=False, index=OURS | 8)
    flow = selector_struct(Selector(network("10.1.0.9/32"), network("10.2.0.9/32"), 6, PortRange(1234, 1234), PortRange(80, 80)))
    body = structs.AcquireStruct(PEER.packed.ljust(16, b"\0"), 50, HERE.packed.ljust(16, b"\0"), flow, structs.PolicyStruct.unpack(asked.body), 5)
    notice = notice_from(carried(Message(MessageType.ACQUIRE, body.pack(), asked.attributes)))
    assert notice is not None
    assert notice.ours
    event = notice.event
    assert isinstance(event, Acquire)
    assert (event.sequence, event.reqid, event.mode, event.source, event.destination) == (5, 7, Mode.TUNNEL, HERE, PEER)
    assert event.policy == PolicyIndex(OURS | 8 | 1)
    assert event.selector == selector
    assert str(event.flow) == "10.1.0.9[1234] => 10.2.0.9[80] proto 6"


@pytest.mark.parametrize("hard", [False, True])
def test_expire(hard: bool) -> None:
    body = sa_message(make_sa(), update=False).body + bytes((hard,)) + bytes(7)
    notice = notice_from(carried(Message(MessageType.EXPIRE, body)))
    assert notice is not None
    assert notice.ours
    assert notice.event == Expire(SaId(PEER, Spi(0xC0DE)), ReqId(7), hard)


def test_the_end_of_a_larval_sa_without_spi_is_no_event() -> None:
    body = SaStruct.unpack(sa_message(make_sa(), update=False).body)._replace(spi=0).pack() + bytes(8)
    assert notice_from(carried(Message(MessageType.EXPIRE, body))) is None


def test_mapping() -> None:
    there = IPv6Address("2001:db8::9")
    identity = structs.SaIdStruct(there.packed, 0xC0DE, 10, 50)
    body = structs.MappingStruct(identity, OURS | 3, IPv6Address("::1").packed, IPv6Address("::2").packed, 4500, 61000).pack()
    notice = notice_from(carried(Message(MessageType.MAPPING, body)))
    assert notice is not None
    assert notice.event == NewMapping(SaId(there, Spi(0xC0DE)), ReqId(3), Endpoint(ip_address("::1"), 4500), Endpoint(ip_address("::2"), 61000))


def test_what_belongs_to_others_is_not_ours() -> None:
    info = SaStruct.unpack(sa_message(make_sa(), update=False).body)._replace(reqid=7)
    notice = notice_from(Message(MessageType.EXPIRE, info.pack() + bytes(8)))
    assert notice is not None
    assert not notice.ours


def test_keys_are_not_shown() -> None:
    key = bytes(range(0x41, 0x55))
    message = sa_message(make_sa(encryption_key=Secret(key)), update=False)
    assert key in encode(message)
    assert "ABCDEF" not in repr(message)


# Bad input

HEADERS = st.sampled_from(sorted(wire.CLASSES))
BYTES = st.binary(max_size=400)


def interpret(message: Message) -> None:
    """Everything that the channel does with a message of the kernel."""
    notice_from(message)
    if message.type == MessageType.NEWSA:
        sa_from(message.body, message.attributes)
    elif message.type == MessageType.NEWPOLICY:
        policy_from(message)
    elif message.type == MessageType.DELSA and Attribute.SA in message.attributes:
        sa_from(message.attributes[Attribute.SA], message.attributes)
    elif message.type == MessageType.NEWSPDINFO:
        spd_information_from(message)
    elif message.type == MessageType.NEWSADINFO:
        sad_information_from(message)
    elif message.type in (NetlinkType.ERROR, NetlinkType.DONE):
        wire.error_of(message)
        wire.error_text(message)


def swallowed(datagram: bytes) -> None:
    try:
        for message in decode(datagram):
            interpret(message)
    except MalformedMessage:
        pass


@given(BYTES)
def test_any_octets(datagram: bytes) -> None:
    swallowed(datagram)


@given(st.one_of(HEADERS, st.sampled_from((1, 2, 3, 4))), st.integers(0, 0xFFFF), BYTES)
def test_any_octets_behind_a_right_header(kind: int, flags: int, body: bytes) -> None:
    swallowed(wire.HEADER.pack(wire.HEADER.size + len(body), kind, flags, 1, 0) + body)


@given(associations(), policies(), st.data())
def test_right_messages_with_some_octets_changed(sa: SecurityAssociation, policy: Policy, data: st.DataObject) -> None:
    kind = data.draw(HEADERS)
    for whole in (encode(sa_message(sa, update=False)), encode(policy_message(policy, replace=False, index=OURS))):
        octets = bytearray(whole)
        for at, value in data.draw(st.lists(st.tuples(st.integers(16, len(octets) - 1), st.integers(0, 255)), max_size=8)):
            octets[at] = value
        octets[4:6] = struct.pack("=H", data.draw(st.sampled_from((kind, MessageType.NEWSA, MessageType.NEWPOLICY))))
        swallowed(bytes(octets))
        swallowed(bytes(octets[: data.draw(st.integers(0, len(octets)))]))


@given(st.sampled_from(sorted(wire.CLASSES)), st.dictionaries(st.sampled_from(Attribute), st.binary(max_size=160), max_size=6), st.data())
def test_any_attributes(kind: int, attributes: dict[int, bytes], data: st.DataObject) -> None:
    """With a structure of the right size, so that the attributes are reached."""
    size = wire.CLASSES[kind](bytes(wire.HEADER.size)).fields
    for body in (sa_message(make_sa(), update=False).body, data.draw(BYTES), bytes(int(size[0][1][:-1]) if size else 0)):
        with contextlib.suppress(MalformedMessage):
            interpret(Message(kind, body, attributes))


def test_a_short_attribute_is_named() -> None:
    message = sa_message(make_sa(), update=False)
    with pytest.raises(MalformedMessage, match="xfrm_algo_aead"):
        sa_from(message.body, {Attribute.ALG_AEAD: b"rfc4106"})


def test_requests_that_reserve_spis() -> None:
    message = carried(spi_message(SpiRequest(PEER, HERE, Mode.TUNNEL, ReqId(0), 0x100, 0x1FF)))
    info = SaStruct.unpack(message.body)
    assert (info.spi, info.seq, info.reqid) == (0, 0, OURS)
    assert structs.SPI_RANGE.unpack_from(message.body, structs.SA_SIZE) == (0x100, 0x1FF)
    claim = carried(claim_message(Larval(AcquireSequence(9), HERE, PEER, Mode.TUNNEL, ReqId(7), Mark(1, 3), 42), Spi(0x1234)))
    assert SaStruct.unpack(claim.body).seq == 9
    assert (mark_from(claim.attributes), if_id_from(claim.attributes)) == (Mark(1, 3), 42)
    assert structs.SPI_RANGE.unpack_from(claim.body, structs.SA_SIZE) == (0x1234, 0x1234)


def test_integrity_algorithms_carry_the_full_tag() -> None:
    algorithm = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_256_128)
    message = sa_message(make_sa(algorithm=algorithm, encryption_key=Secret(bytes(16)), integrity_key=Secret(bytes(32))), update=False)
    name, key_bits, tag_bits = structs.ALGORITHM_SIZED.unpack_from(message.attributes[Attribute.ALG_AUTH_TRUNC])
    assert (name.rstrip(b"\0"), key_bits, tag_bits) == (b"hmac(sha256)", 256, 128)
