"""TFC padding (RFC 4303 section 2.7): what leaves says nothing of its contents' length, and what comes in loses it again."""

from __future__ import annotations

import pytest
from dataplane_pair import Pair

from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.model import TFC_TO_MTU, Mode


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("padding", [500, TFC_TO_MTU])
def test_short_packets_all_look_alike(inner: int, padding: int) -> None:
    pair = Pair(inner)
    pair.connect(tfc_padding=padding)
    packets = [pair.packet(n, size) for n, size in enumerate((4, 30, 100, 300, 301, 420))]
    pair.send(*packets)
    lengths = {len(datagram) for one in pair.left.sink.esp for datagram in one.datagrams()}
    assert len(lengths) == 1
    assert min(lengths) >= min(padding, 1400)
    assert max(lengths) <= 1500 - 28
    pair.pass_on()
    assert pair.right.received() == packets
    assert pair.left.count("tfc_padded") == len(packets)


def test_longer_packets_go_as_they_are() -> None:
    pair = Pair()
    pair.connect(tfc_padding=500)
    packet = pair.packet(1, 900)
    pair.send(packet)
    assert len(pair.left.sink.esp[0].data) < 1000
    pair.pass_on()
    assert pair.right.received() == [packet]
    assert not pair.left.count("tfc_padded")


@pytest.mark.parametrize("padding", [200, 900, TFC_TO_MTU])
@pytest.mark.parametrize("size", [300, 1386])
def test_the_segments_of_a_flow_are_padded_too(padding: int, size: int) -> None:
    pair = Pair()
    pair.connect(tfc_padding=padding)
    payload = bytes(range(256)) * 40 + b"end"
    pair.left.engine.send(pair.super_frame(payload, size), pair.now)
    pair.left.engine.flush(pair.now)
    shortest = min(len(datagram) for one in pair.left.sink.esp for datagram in one.datagrams())
    assert shortest >= min(padding, 1400)
    pair.pass_on()
    got = pair.right.received()
    header = 20 + 32
    assert b"".join(packet[header:] for packet in got) == payload


def test_there_is_none_in_transport_mode() -> None:
    """The payload's own length is not always in it."""
    pair = Pair(mode=Mode.TRANSPORT)
    pair.connect(tfc_padding=500)
    pair.send(pair.packet(1, 10))
    assert len(pair.left.sink.esp[0].data) < 100


def test_a_narrow_path_bounds_it() -> None:
    pair = Pair(config=EngineConfig(path_mtu=700))
    pair.connect(tfc_padding=1200)
    pair.send(pair.packet(1, 10))
    assert len(pair.left.sink.esp[0].data) <= 700 - 28
