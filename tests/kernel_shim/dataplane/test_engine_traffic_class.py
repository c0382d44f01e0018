"""DSCP, ECN and DF between the inner and the outer header (RFC 4301 section 5.1.2, RFC 6040), through two engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dataplane_pair import Pair
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.model import HeaderCopies, Mode
from kernel_shim.packet import virtio
from kernel_shim.packet.checksum import partial_sum
from kernel_shim.packet.traffic_class import CE, decapsulated_ecn, set_traffic_class, traffic_class

FAMILIES = [(4, 4), (4, 6), (6, 4), (6, 6)]
NOT_ECT, ECT_1, ECT_0 = 0, 1, 2


def with_class(packet: bytes, value: int) -> bytes:
    changed = bytearray(packet)
    set_traffic_class(changed, value)
    return bytes(changed)


def arrived(pair: Pair, packet: bytes, outer: int | None = None) -> list[bytes]:
    """What comes out of the right engine when the network made the outer traffic class `outer`."""
    pair.send(packet)
    sent = pair.left.sent()
    pair.right.take(sent if outer is None else [replace(one, traffic_class=outer) for one in sent], pair.now)
    return pair.right.received()


@given(st.sampled_from([4, 6]), st.integers(0, 255), st.integers(0, 255), st.integers(0, 0xFFFF))
def test_the_octet_is_set_and_nothing_else(version: int, before: int, after: int, number: int) -> None:
    header = IP(tos=before, id=number, src="10.0.0.1", dst="10.0.0.2") if version == 4 else IPv6(tc=before, fl=number, src="fd00::1", dst="fd00::2")
    packet = bytearray(bytes(header))
    set_traffic_class(packet, after)
    read = (IP if version == 4 else IPv6)(bytes(packet))
    assert traffic_class(packet) == after
    assert (read.tos, read.id) == (after, number) if version == 4 else (read.tc, read.fl) == (after, number)
    assert version == 6 or partial_sum(packet) == 0


@pytest.mark.parametrize(("inner", "outer"), FAMILIES)
def test_the_outer_header_gets_the_inner_class(inner: int, outer: int) -> None:
    pair = Pair(inner, outer)
    pair.connect()
    for value in (0, 0xB8, 0xBA, CE):
        packet = with_class(pair.packet(value), value)
        pair.send(packet)
        assert pair.left.sink.esp[-1].traffic_class == value
        pair.pass_on()
        assert pair.right.received() == [packet]


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        (HeaderCopies(dscp_out=False), 0x02),
        (HeaderCopies(ecn=False), 0xB8),
        (HeaderCopies(dscp_out=False, ecn=False), 0x00),
    ],
)
def test_what_is_not_to_be_copied_is_not(copies: HeaderCopies, expected: int) -> None:
    pair = Pair()
    pair.connect(copies=copies)
    pair.send(with_class(pair.packet(1), 0xBA))
    assert pair.left.sink.esp[-1].traffic_class == expected


def test_packets_of_two_classes_do_not_share_a_send() -> None:
    pair = Pair()
    pair.connect()
    packets = [with_class(pair.packet(n), value) for n, value in enumerate((0, 0, 0xB8, 0xB8, 0))]
    pair.send(*packets)
    assert [(one.traffic_class, len(one.datagrams())) for one in pair.left.sink.esp] == [(0, 2), (0xB8, 2), (0, 1)]
    pair.pass_on()
    assert pair.right.received() == packets


# RFC 6040 section 4.2, figure 4: the rows are what arrives inside, the columns outside
TABLE = {
    NOT_ECT: {NOT_ECT: NOT_ECT, ECT_0: NOT_ECT, ECT_1: NOT_ECT, CE: None},
    ECT_0: {NOT_ECT: ECT_0, ECT_0: ECT_0, ECT_1: ECT_1, CE: CE},
    ECT_1: {NOT_ECT: ECT_1, ECT_0: ECT_1, ECT_1: ECT_1, CE: CE},
    CE: {NOT_ECT: CE, ECT_0: CE, ECT_1: CE, CE: CE},
}
ALARMS = {(NOT_ECT, ECT_0), (NOT_ECT, ECT_1), (NOT_ECT, CE), (ECT_1, ECT_0), (CE, ECT_1)}
PAIRS = [(inner, outer) for inner in TABLE for outer in TABLE]


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_the_table_of_rfc_6040(inner: int, outer: int) -> None:
    result = decapsulated_ecn(inner, outer)
    assert (result.ecn, result.alarm) == (TABLE[inner][outer], (inner, outer) in ALARMS)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_ecn_out_of_the_tunnel(inner: int, outer: int, version: int) -> None:
    pair = Pair(version)
    pair.connect()
    packet = with_class(pair.packet(1), 0xB8 | inner)
    expected = TABLE[inner][outer]
    assert arrived(pair, packet, outer) == ([] if expected is None else [with_class(packet, 0xB8 | expected)])
    assert pair.right.count("ecn_alarms") == ((inner, outer) in ALARMS)
    assert pair.right.count("drop_ecn_invalid") == (expected is None)


@pytest.mark.parametrize("inner", [NOT_ECT, ECT_0])
def test_congestion_marks_reach_each_segment_of_a_flow(inner: int) -> None:
    pair = Pair()
    pair.connect()
    frame = bytearray(pair.super_frame(bytes(20_000), 1000))
    packet = with_class(bytes(frame[virtio.LENGTH :]), inner)
    pair.left.engine.send(bytes(frame[: virtio.LENGTH]) + packet, pair.now)
    pair.left.engine.flush(pair.now)
    (sent,) = pair.left.sent()
    pair.right.take([replace(sent, traffic_class=CE)], pair.now)
    assert [traffic_class(one) for one in pair.right.received()] == ([] if inner == NOT_ECT else [CE] * 20)
    assert pair.right.count("drop_ecn_invalid") == (20 if inner == NOT_ECT else 0)


def test_without_copy_ecn_the_outer_field_is_not_looked_at() -> None:
    pair = Pair()
    pair.connect(copies=HeaderCopies(ecn=False))
    packet = with_class(pair.packet(1), ECT_0)
    assert arrived(pair, packet, CE) == [packet]


@pytest.mark.parametrize(("dscp_in", "expected"), [(False, 0x28), (True, 0xB8)])
def test_dscp_comes_in_only_where_it_is_asked_for(dscp_in: bool, expected: int) -> None:
    pair = Pair()
    pair.connect(copies=HeaderCopies(dscp_in=dscp_in))
    packet = with_class(pair.packet(1), 0x28)
    assert arrived(pair, packet, 0xB8) == [with_class(packet, expected)]
    assert arrived(pair, packet, 0) == [with_class(packet, 0 if dscp_in else 0x28)]


@pytest.mark.parametrize("version", [4, 6])
def test_in_transport_mode_there_is_one_header(version: int) -> None:
    pair = Pair(outer=version, mode=Mode.TRANSPORT)
    pair.connect(copies=HeaderCopies(dscp_out=False, ecn=False))
    (got,) = arrived(pair, with_class(pair.packet(1), 0xBA))
    assert traffic_class(got) == 0xBA
    (got,) = arrived(pair, with_class(pair.packet(2), 0xBA), 0xBB)
    assert traffic_class(got) == 0xBB


def test_without_copy_df_the_outer_packet_may_be_cut() -> None:
    """A packet over the path's MTU is not refused: its ESP datagram travels in fragments."""
    for df in (True, False):
        pair = Pair(config=EngineConfig(path_mtu=1000))
        pair.connect(copies=HeaderCopies(df=df))
        pair.send(pair.packet(1, 1300))
        assert [(one.whole, len(one.data) > 1300) for one in pair.left.sink.esp] == ([] if df else [(False, True)])
        assert len(pair.left.received()) == df  # ICMP: too big
