from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import GRE
from scapy.packet import Raw

from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation, NotLabels, begin_of_stack
from kernel_shim.packet.checksum import pseudo_header_sum

STACK = bytes.fromhex("00010b40") + b"payload!"


@pytest.mark.parametrize("encapsulation", Encapsulation)
@given(flow=st.integers(0, 2**32 - 1))
def test_what_goes_on_comes_off(encapsulation: Encapsulation, flow: int) -> None:
    wire = encapsulation.header(len(STACK), flow) + STACK
    assert len(wire) == encapsulation.overhead + len(STACK)
    begin, end = begin_of_stack(encapsulation, wire)
    assert wire[begin:end] == STACK


def test_headers_as_scapy_reads_them() -> None:
    gre = GRE(Encapsulation.GRE.header(len(STACK)) + STACK)
    assert (gre.proto, gre.version, gre.chksum_present) == (0x8847, 0, 0)
    udp = UDP(Encapsulation.UDP.header(len(STACK), 7) + STACK)
    assert (udp.dport, udp.len, udp.chksum) == (UDP_PORT, 8 + len(STACK), 0)
    assert udp.sport >= 49152


def test_optional_fields_of_gre_are_passed_over() -> None:
    wire = bytes(GRE(proto=0x8847, chksum_present=1, key_present=1, seqnum_present=1, key=7, sequence_number=9) / Raw(STACK))
    begin, end = begin_of_stack(Encapsulation.GRE, wire)
    assert wire[begin:end] == STACK
    damaged = wire[:-1] + bytes((wire[-1] ^ 1,))
    with pytest.raises(NotLabels, match="checksum"):
        begin_of_stack(Encapsulation.GRE, damaged)


def test_a_udp_checksum_is_verified() -> None:
    source, destination = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
    whole = bytes(IP(src=str(source), dst=str(destination)) / UDP(sport=50000, dport=UDP_PORT) / Raw(STACK))
    pseudo = pseudo_header_sum(source.packed + destination.packed, 17, len(whole) - 20)
    assert begin_of_stack(17, whole[20:], pseudo) == (8, len(whole) - 20)
    with pytest.raises(NotLabels, match="checksum"):
        begin_of_stack(17, whole[20:-1] + b"?", pseudo)


@pytest.mark.parametrize(
    ("protocol", "wire"),
    [
        (47, bytes.fromhex("00008847")[:3]),
        (47, bytes.fromhex("00000800") + STACK),
        (47, bytes.fromhex("00018847") + STACK),  # version 1
        (47, bytes.fromhex("40008847") + STACK),  # routing
        (47, bytes.fromhex("20008847")),  # a key that is not there
        (17, bytes.fromhex("c00019eb0010")),
        (17, bytes.fromhex("c00019ec00140000") + STACK),  # another port
        (17, bytes.fromhex("c00019eb00150000") + STACK),  # longer than there is
        (17, bytes.fromhex("c00019eb00070000") + STACK),
        (4, STACK),
    ],
)
def test_other_headers_are_refused(protocol: int, wire: bytes) -> None:
    with pytest.raises(NotLabels):
        begin_of_stack(protocol, wire)


@given(st.sampled_from([17, 47, 137, 6]), st.binary(max_size=64), st.one_of(st.none(), st.integers(0, 0xFFFF)))
def test_any_bytes_give_bounds_or_a_refusal(protocol: int, wire: bytes, pseudo: int | None) -> None:
    try:
        begin, end = begin_of_stack(protocol, wire, pseudo)
    except NotLabels:
        return
    assert 0 <= begin <= end <= len(wire)
