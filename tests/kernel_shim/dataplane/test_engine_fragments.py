"""Datagrams over the path's MTU that must pass: transport mode, and IPv6 on paths that leave it less than 1280 bytes."""

from __future__ import annotations

import random

import pytest
from dataplane_pair import Gateway, Pair, endpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, IPv6ExtHdrFragment, fragment6
from scapy.packet import Raw

from kernel_shim.model import Mode
from kernel_shim.packet.reassembly import MAX_DATAGRAMS_APART, MAX_OCTETS_APART, REASSEMBLY_SECONDS


def cut(pair: Pair, body: bytes, number: int = 7) -> list[bytes]:
    """A datagram as a host hands it to a TUN of 1438 bytes."""
    source, destination = pair.hosts(9)
    if pair.version == 4:
        whole = IP(bytes(IP(src=source, dst=destination, id=number) / UDP(sport=1, dport=2) / Raw(body)))
        return [bytes(piece) for piece in whole.fragment(1400)]
    whole6 = IPv6(src=source, dst=destination) / IPv6ExtHdrFragment(id=number) / UDP(sport=1, dport=2) / Raw(body)
    return [bytes(piece) for piece in fragment6(whole6, 1438)]


def bodies(gateway: Gateway, version: int) -> list[bytes]:
    return [bytes((IP(packet) if version == 4 else IPv6(packet))[UDP].payload) for packet in gateway.received()]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("order", ["as sent", "reversed", "shuffled"])
def test_transport_mode_joins_fragments_and_sends_the_datagram_whole(version: int, order: str) -> None:
    pair = Pair(version, version, Mode.TRANSPORT)
    pair.connect()
    for size in (1401, 3000, 40_000, 65_000):
        body = random.Random(size).randbytes(size)
        pieces = cut(pair, body)
        assert len(pieces) > 1
        if order == "reversed":
            pieces.reverse()
        elif order == "shuffled":
            random.Random(1).shuffle(pieces)
        pair.send(*pieces)
        sent = pair.left.sent()
        assert len(sent) == 1
        assert sent[0].whole is (size == 1401)
        pair.right.take(sent, pair.now)
        assert bodies(pair.right, version) == [body]
    assert pair.left.count("drop_transport_fragment") == 0


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_that_waited_for_their_sa_are_joined(version: int) -> None:
    pair = Pair(version, version, Mode.TRANSPORT)
    body = bytes(5000)
    pair.send(*cut(pair, body))
    pair.connect()
    pair.settle()
    assert bodies(pair.right, version) == [body]


def test_what_does_not_come_whole_is_bounded_and_counted() -> None:
    pair = Pair(4, 4, Mode.TRANSPORT)
    pair.connect()
    for number in range(2 * MAX_DATAGRAMS_APART):
        pair.send(cut(pair, bytes(3000), number)[0])
    assert pair.left.count("drop_transport_fragment") == MAX_DATAGRAMS_APART
    pair.now += REASSEMBLY_SECONDS
    pair.left.engine.flush(pair.now)
    assert pair.left.count("drop_transport_fragment") == 2 * MAX_DATAGRAMS_APART
    for number in range(100):
        pair.send(*cut(pair, bytes(65_000), number)[:-1])
    kept = 100 * 46 - (pair.left.count("drop_transport_fragment") - 2 * MAX_DATAGRAMS_APART)
    assert kept * 1376 <= MAX_OCTETS_APART
    assert pair.left.sent() == []


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_that_overlap_are_thrown_away(version: int) -> None:
    pair = Pair(version, version, Mode.TRANSPORT)
    pair.connect()
    first, *others = cut(pair, bytes(3000))
    pair.send(first, first, *others)
    assert pair.left.sent() == []
    assert pair.left.count("drop_transport_fragment") == 2


@pytest.mark.property
@settings(max_examples=100, deadline=None)
@given(st.sampled_from([4, 6]), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 63), st.integers(0, 255)), max_size=4), st.permutations(range(5)))
def test_damaged_fragments_cost_their_datagram_and_nothing_else(version: int, damage: list[tuple[int, int, int]], order: list[int]) -> None:
    pair = Pair(version, version, Mode.TRANSPORT)
    pair.connect()
    pieces = [bytearray(piece) for piece in cut(pair, bytes(6000), 1)]
    assert len(pieces) == 5
    for index, position, value in damage:
        pieces[index][position] = value
    pair.send(*(bytes(pieces[index]) for index in order))
    pair.left.sent()
    body = random.Random(2).randbytes(6000)
    pair.send(*cut(pair, body, 0x7777))  # an identification that damage does not make
    pair.right.take(pair.left.sent(), pair.now)
    assert bodies(pair.right, version) == [body]


def test_transport_mode_sends_a_packet_without_df_in_fragments() -> None:
    pair = Pair(4, 4, Mode.TRANSPORT)
    pair.connect()
    pair.left.engine.path_mtu(*endpoints(), 1300, pair.now)
    source, destination = pair.hosts(9)
    pair.send(bytes(IP(src=source, dst=destination, id=5) / UDP(sport=1, dport=2) / Raw(bytes(1400))))
    pair.left.engine.send(pair.super_frame(bytes(4000), 1400, "udp", df=False), pair.now)
    pair.left.engine.flush(pair.now)
    sent = pair.left.sent()
    assert [item.whole for item in sent] == [False, False, False, True]
    pair.right.take(sent, pair.now)
    assert [len(body) for body in bodies(pair.right, 4)] == [1400, 1400, 1400, 1200]


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("mode", [Mode.TUNNEL, Mode.TRANSPORT])
def test_ipv6_inside_is_never_told_less_than_1280(outer: int, mode: Mode) -> None:
    if mode is Mode.TRANSPORT and outer == 4:
        pytest.skip("one family")
    pair = Pair(6, outer, mode)
    pair.connect()
    pair.left.engine.path_mtu(*endpoints(outer), 1280, pair.now)
    pair.send(pair.packet(1, 1400))
    error = IPv6(pair.left.received()[0])
    assert error[ICMPv6PacketTooBig].mtu == 1280
    fitting = pair.packet(2, 1280 - 48)
    assert len(fitting) == 1280
    pair.send(pair.packet(3, 100), fitting, pair.packet(4, 100))
    pair.left.engine.send(pair.super_frame(bytes(5000), 1208), pair.now)
    pair.left.engine.flush(pair.now)
    sent = pair.left.sent()
    assert [item.whole for item in sent] == [True, False, True, False, False, False, False, True]
    pair.right.take(sent, pair.now)
    received = pair.right.received()
    assert received[:3] == [pair.packet(3, 100), fitting, pair.packet(4, 100)]
    assert sum(len(packet) - 72 for packet in received[3:]) == 5000
    assert pair.left.count("drop_too_big") == 1
