"""Flow keys: against keys made field by field, through every kind of header, and never an exception."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.model import Action, AddressRange, Direction, Flow, Mark, Mode, Policy, PortRange, ReqId, Selector, Template, TrafficSelector
from kernel_shim.policy.flowkey import (
    FieldMask,
    FieldUsage,
    FlowKeys,
    fields_of_policy,
    fields_of_selector,
    fields_of_traffic_selectors,
    flow_of_key,
    flow_of_masked_key,
    key_of_flow,
)
from kernel_shim.policy.fragments import FRAGMENT_SECONDS, FragmentMemory
from kernel_shim.policy.headers import MAX_EXTENSION_HEADERS
from kernel_shim.reasons import DropReason

SINGLE = (FieldMask.SOURCE, FieldMask.DESTINATION, FieldMask.PROTOCOL, FieldMask.SOURCE_PORT, FieldMask.DESTINATION_PORT)
ALL_MASKS = [sum(chosen, FieldMask.NONE) for count in range(6) for chosen in combinations(SINGLE, count)]

V4 = (IPv4Address("10.1.2.3"), IPv4Address("192.0.2.200"))
V6 = (IPv6Address("2001:db8::1"), IPv6Address("2001:db8:ffff::2"))


def v4(
    protocol: int,
    payload: bytes,
    *,
    source: IPv4Address = V4[0],
    destination: IPv4Address = V4[1],
    options: bytes = b"",
    flags: int = 0,
    ident: int = 7,
) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), ident, flags, 64, protocol, 0)
    return header + source.packed + destination.packed + options + payload


def v6(next_header: int, payload: bytes, *, source: IPv6Address = V6[0], destination: IPv6Address = V6[1]) -> bytes:
    return struct.pack("!IHBB", 0x60012345, len(payload), next_header, 64) + source.packed + destination.packed + payload


def upper(flow: Flow) -> bytes:
    """The beginning of the upper header of a flow."""
    if flow.protocol in (1, 58):
        return struct.pack("!H", flow.source_port) + bytes(6)
    if flow.protocol in (6, 17, 132):
        return struct.pack("!HH", flow.source_port, flow.destination_port) + bytes(16)
    return bytes(8)


VERSIONED = st.builds(lambda first, rest: bytes((first,)) + rest, st.sampled_from((0x45, 0x46, 0x4F, 0x60)), st.binary(max_size=120))


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    protocol = draw(st.sampled_from((1, 6, 17, 47, 50, 58, 132)))
    make, bits = draw(st.sampled_from(((IPv4Address, 32), (IPv6Address, 128))))
    source, destination = (make(draw(st.integers(0, (1 << bits) - 1))) for _ in range(2))
    if protocol in (6, 17, 132):
        return Flow(source, destination, protocol, draw(st.integers(0, 65535)), draw(st.integers(0, 65535)))
    port = draw(st.integers(0, 65535)) if protocol in (1, 58) else 0
    return Flow(source, destination, protocol, port, port)


def packet_of(flow: Flow) -> bytes:
    if isinstance(flow.source, IPv4Address) and isinstance(flow.destination, IPv4Address):
        return v4(flow.protocol, upper(flow), source=flow.source, destination=flow.destination)
    assert isinstance(flow.source, IPv6Address)
    assert isinstance(flow.destination, IPv6Address)
    return v6(flow.protocol, upper(flow), source=flow.source, destination=flow.destination)


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(flows(), st.sampled_from(ALL_MASKS), st.integers(0, 30), st.integers(0, 30), st.sampled_from((bytes, bytearray, memoryview)))
def test_every_mask_cuts_what_it_says(flow: Flow, mask: FieldMask, before: int, behind: int, kind: type) -> None:
    packet = kind(bytes(before) + packet_of(flow) + bytes(behind))
    full = key_of_flow(flow)
    assert flow_of_key(full) == flow
    keys = FlowKeys(mask)
    key = keys.cut(packet, before)
    assert type(key) is bytes
    told = flow_of_masked_key(key, mask)
    fields = (flow.source, flow.destination, flow.protocol, flow.source_port, flow.destination_port)
    assert told == (flow.source.version, *(field if mask & flag else None for field, flag in zip(fields, SINGLE, strict=True)))
    assert keys.full_key(packet, before) == full
    assert keys.flow(packet, before) == flow
    assert FlowKeys().cut(packet, before) == full


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(flows(), flows(), st.sampled_from(ALL_MASKS))
def test_keys_differ_exactly_when_a_field_that_is_read_differs(one: Flow, other: Flow, mask: FieldMask) -> None:
    def read(flow: Flow) -> tuple[object, ...]:
        fields = (flow.source, flow.destination, flow.protocol, flow.source_port, flow.destination_port)
        return (flow.source.version, *(field for field, flag in zip(fields, SINGLE, strict=True) if mask & flag))

    keys = FlowKeys(mask)
    assert (keys.cut(packet_of(one), 0) == keys.cut(packet_of(other), 0)) == (read(one) == read(other))


@pytest.mark.property
@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=120), VERSIONED))
def test_garbage_gives_a_key_or_a_reason(garbage: bytes) -> None:
    for mask in (FieldMask.FLOW, FieldMask.ADDRESSES, FieldMask.ADDRESSES | FieldMask.PROTOCOL, FieldMask.DESTINATION):
        keys = FlowKeys(mask)
        for offset in (0, 3, len(garbage), len(garbage) + 1):
            key = keys.cut(garbage, offset)
            assert key is None or isinstance(key, bytes)
            if key is None:
                assert isinstance(keys.reason, DropReason)
            keys.flow(garbage, offset)


@pytest.mark.property
@settings(max_examples=100, deadline=None)
@given(flows(), st.data())
def test_a_packet_cut_short_has_no_key(flow: Flow, data: st.DataObject) -> None:
    packet = packet_of(flow)
    short = packet[: data.draw(st.integers(0, len(packet) - 1))]
    keys = FlowKeys()
    assert keys.cut(short, 0) is None
    assert keys.reason is DropReason.HEADER_TRUNCATED


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", DropReason.HEADER_TRUNCATED),
        (b"\x15" + bytes(60), DropReason.NOT_IP),
        (b"\x44" + v4(6, bytes(20))[1:], DropReason.HEADER_INVALID),  # header of 16 octets
        (struct.pack("!BBH", 0x45, 0, 19) + v4(6, bytes(20))[4:], DropReason.HEADER_INVALID),  # total length below the header's
        (v4(6, bytes(3)), DropReason.HEADER_TRUNCATED),  # a packet that ends within its ports, though the buffer goes on
        (v4(6, b"", flags=0x2000), DropReason.HEADER_TRUNCATED),  # a first fragment without its ports (RFC 1858)
        (v6(0, b"\x06\x05" + bytes(6)), DropReason.HEADER_TRUNCATED),  # an extension header longer than the packet
        (v6(60, b"\x3c\x00" + bytes(6)), DropReason.HEADER_TRUNCATED),
        (v6(60, (b"\x3c\x00" + bytes(6)) * 40), DropReason.EXTENSION_HEADERS_TOO_MANY),
    ],
)
def test_malformed(packet: bytes, reason: DropReason) -> None:
    keys = FlowKeys()
    assert keys.cut(packet + (b"" if packet[:1] == b"" else bytes(20) if reason is not DropReason.NOT_IP else b""), 0) is None
    assert keys.reason is reason


def test_ipv4_options_are_stepped_over() -> None:
    packet = v4(17, struct.pack("!HH", 5000, 53) + bytes(8), options=b"\x94\x04\0\0")
    assert FlowKeys().flow(packet) == Flow(*V4, 17, 5000, 53)


def test_icmp_type_and_code_stand_for_both_ports() -> None:
    assert FlowKeys().flow(v4(1, b"\x03\x04" + bytes(6))) == Flow(*V4, 1, 0x0304, 0x0304)
    assert FlowKeys().flow(v6(58, b"\x80\x00" + bytes(6))) == Flow(*V6, 58, 0x8000, 0x8000)


def test_ipv6_extension_headers_are_stepped_over() -> None:
    chain = b"\x2b\x00" + bytes(6) + b"\x3c\x01" + bytes(14) + b"\x06\x00" + bytes(6)  # hop-by-hop, routing, destination options
    packet = v6(0, chain + struct.pack("!HH", 1, 2) + bytes(16))
    assert FlowKeys().flow(packet) == Flow(*V6, 6, 1, 2)
    assert FlowKeys(FieldMask.ADDRESSES | FieldMask.PROTOCOL).cut(packet, 0) == V6[0].packed + V6[1].packed + b"\x06"


def test_as_many_extension_headers_as_allowed() -> None:
    chain = (b"\x3c\x00" + bytes(6)) * (MAX_EXTENSION_HEADERS - 1) + b"\x11\x00" + bytes(6)
    assert FlowKeys().flow(v6(60, chain + struct.pack("!HHHH", 7, 9, 8, 0))) == Flow(*V6, 17, 7, 9)


def test_ipv4_fragments_take_the_ports_of_the_first() -> None:
    keys = FlowKeys()
    first = v4(17, struct.pack("!HHHH", 1000, 2000, 1408, 0) + bytes(1392), flags=0x2000)
    later = v4(17, bytes(8), flags=175)
    assert keys.cut(later, 0) is None
    assert keys.reason is DropReason.FRAGMENT_WITHOUT_FIRST
    key = keys.cut(first, 0)
    assert key == key_of_flow(Flow(*V4, 17, 1000, 2000))
    assert keys.cut(later, 0) == key
    assert keys.cut(v4(17, bytes(8), flags=175, ident=8), 0) is None
    assert keys.cut(v4(6, bytes(8), flags=175), 0) is None


def test_fragments_need_no_memory_while_no_port_is_read() -> None:
    keys = FlowKeys(FieldMask.ADDRESSES | FieldMask.PROTOCOL)
    later = v4(17, bytes(8), flags=175)
    assert keys.cut(later, 0) == V4[0].packed + V4[1].packed + b"\x11"
    assert keys.cut(v4(17, struct.pack("!HH", 1, 2) + bytes(4), flags=0x2000), 0) == keys.cut(later, 0)
    assert keys.flow(later) == Flow(*V4, 17)
    assert len(keys.fragments) == 0


def test_a_fragment_of_a_protocol_without_ports_needs_no_first() -> None:
    assert FlowKeys().flow(v4(50, bytes(8), flags=175)) == Flow(*V4, 50)


def test_ipv6_fragments() -> None:
    keys = FlowKeys()
    udp = struct.pack("!HHHH", 1000, 2000, 1408, 0)
    # The first fragment carries destination options before UDP, so that a later one does not show its protocol.
    first = v6(44, struct.pack("!BBHI", 60, 0, 1, 99) + b"\x11\x00" + bytes(6) + udp)
    later = v6(44, struct.pack("!BBHI", 60, 0, 16, 99) + bytes(8))
    assert keys.cut(later, 0) is None
    assert keys.cut(first, 0) == key_of_flow(Flow(*V6, 17, 1000, 2000))
    assert keys.cut(later, 0) == key_of_flow(Flow(*V6, 17, 1000, 2000))
    by_protocol = FlowKeys(FieldMask.ADDRESSES | FieldMask.PROTOCOL, keys.fragments)
    assert by_protocol.cut(later, 0) == V6[0].packed + V6[1].packed + b"\x11"
    assert FlowKeys(FieldMask.ADDRESSES | FieldMask.PROTOCOL).cut(later, 0) is None
    assert FlowKeys(FieldMask.ADDRESSES).cut(later, 0) == V6[0].packed + V6[1].packed


def test_an_atomic_ipv6_fragment_is_a_whole_packet() -> None:
    keys = FlowKeys()
    assert keys.flow(v6(44, struct.pack("!BBHI", 17, 0, 0, 1) + struct.pack("!HHHH", 5, 6, 8, 0))) == Flow(*V6, 17, 5, 6)
    assert len(keys.fragments) == 0


def test_fragment_memory_is_bounded_and_ages() -> None:
    memory = FragmentMemory(limit=8)
    for number in range(100):
        memory.remember(b"%d" % number, b"x")
    assert len(memory) <= 8
    assert memory.recall(b"99") == b"x"
    assert memory.recall(b"0") is None
    memory.age(FRAGMENT_SECONDS)
    assert memory.recall(b"99") == b"x"
    memory.age(2 * FRAGMENT_SECONDS)
    assert memory.recall(b"99") is None
    assert len(memory) == 0


def test_set_mask_says_whether_anything_changed() -> None:
    keys = FlowKeys(FieldMask.ADDRESSES)
    assert not keys.set_mask(FieldMask.ADDRESSES | FieldMask.MARK)
    assert keys.set_mask(FieldMask.FLOW)
    assert keys.cut(v4(6, bytes(20)), 0) == key_of_flow(Flow(*V4, 6))


ANY4, NET = AddressRange.everything(4), AddressRange(IPv4Address("10.0.0.0"), IPv4Address("10.0.0.255"))


def test_fields_that_selectors_read() -> None:
    assert fields_of_selector(Selector(ANY4, ANY4)) == FieldMask.NONE
    assert fields_of_selector(Selector(NET, ANY4)) == FieldMask.SOURCE
    assert fields_of_selector(Selector(ANY4, NET, 6)) == FieldMask.DESTINATION | FieldMask.PROTOCOL
    assert fields_of_selector(Selector(ANY4, ANY4, 6, PortRange(1, 2))) == FieldMask.PROTOCOL | FieldMask.SOURCE_PORT
    assert fields_of_selector(Selector(ANY4, ANY4, 0, PortRange(), PortRange(), 5, Mark(1, 1))) == FieldMask.IF_ID | FieldMask.MARK
    sa = ((TrafficSelector(ANY4), TrafficSelector(NET)), (TrafficSelector(ANY4, 17, PortRange(53, 53)),))
    assert fields_of_traffic_selectors(*sa) == FieldMask.SOURCE | FieldMask.PROTOCOL | FieldMask.DESTINATION_PORT


def test_a_policy_whose_peer_is_the_flows_own_reads_its_addresses() -> None:
    open_template = Template(Mode.TRANSPORT, ReqId(1))
    fixed = Template(Mode.TUNNEL, ReqId(1), ip_address("192.0.2.1"), ip_address("192.0.2.2"))
    selector = Selector(ANY4, ANY4)
    assert fields_of_policy(Policy(selector, Direction.OUT, Action.PROTECT, 0, (open_template,))) == FieldMask.ADDRESSES
    assert fields_of_policy(Policy(selector, Direction.OUT, Action.PROTECT, 0, (fixed,))) == FieldMask.NONE


@pytest.mark.property
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(ALL_MASKS)), max_size=30))
def test_field_usage_is_the_union(steps: list[tuple[bool, FieldMask]]) -> None:
    usage, held = FieldUsage(), list[FieldMask]()
    for adding, mask in steps:
        if adding or mask not in held:
            usage.add(mask)
            held.append(mask)
        else:
            usage.remove(mask)
            held.remove(mask)
        union = FieldMask.NONE
        for one in held:
            union |= one
        assert usage.mask == union
