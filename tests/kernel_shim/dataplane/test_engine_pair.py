"""Two engines wired back to back: what a host behind one sends, a host behind the other gets."""

from __future__ import annotations

import random

import pytest
from dataplane_pair import Pair, packets_of

from kernel_shim.algorithms import USERSPACE
from kernel_shim.dataplane.engine import EngineConfig
from kernel_shim.model import Mode
from kernel_shim.packet import virtio
from kernel_shim.packet.virtio import MAX_UDP_SEGMENTS

FAMILIES = [(4, 4), (4, 6), (6, 4), (6, 6)]
SHAPES = [(Mode.TUNNEL, *family) for family in FAMILIES] + [(Mode.TRANSPORT, 4, 4), (Mode.TRANSPORT, 6, 6)]
SIZES = [1, 9, 536, 1386, 8900, 21_000, 40_000, 65_000]
LENGTHS = [1, 300, 40_000, 65_400]


@pytest.mark.parametrize(("inner", "outer"), FAMILIES)
def test_single_packets_pass_both_ways(inner: int, outer: int) -> None:
    pair = Pair(inner, outer)
    pair.connect()
    there = [pair.packet(n, 10 + 37 * n) for n in range(30)]
    back = [pair.packet(n, 800 - n, left=False) for n in range(30)]
    pair.send(*there)
    pair.send(*back, left=False)
    pair.pass_on()
    assert pair.right.received() == there
    assert pair.left.received() == back


@pytest.mark.parametrize("outer", [4, 6])
def test_transport_mode_gives_back_the_header(outer: int) -> None:
    pair = Pair(outer, outer, Mode.TRANSPORT)
    pair.connect()
    there = [pair.packet(n, 100 + n) for n in range(5)]
    pair.send(*there)
    pair.pass_on()
    got = pair.right.received()
    header = 20 if outer == 4 else 40
    assert [packet[header:] for packet in got] == [packet[header:] for packet in there]
    assert [packet[header - 8 : header] for packet in got] == [packet[header - 8 : header] for packet in there]


@pytest.mark.parametrize(("mode", "inner", "outer"), SHAPES)
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_super_packet_arrives_as_its_segments_in_one_write(inner: int, outer: int, proto: str, mode: Mode) -> None:
    pair = Pair(inner, outer, mode)
    pair.connect()
    payload = random.Random(1).randbytes(50_000)
    frame = pair.super_frame(payload, 1300, proto)
    pair.left.engine.send(frame, pair.now)
    sent = pair.left.sink.esp
    assert len(sent) == 1
    pair.pass_on()
    assert len(pair.right.sink.frames) == 1
    vnet = virtio.VnetHeader.unpack(pair.right.sink.frames[0])
    assert vnet.gso_size == 1300
    header = len(frame) - len(payload) - virtio.LENGTH
    got = pair.right.received()
    assert b"".join(packet[header:] for packet in got) == payload
    assert {len(packet) for packet in got[:-1]} == {1300 + header}


@pytest.mark.parametrize("algorithm", sorted(USERSPACE, key=repr), ids=lambda a: f"{a.encryption.name}-{a.key_bits}-{a.integrity.name}")
@pytest.mark.parametrize("esn", [False, True])
def test_every_algorithm(algorithm, esn) -> None:
    pair = Pair()
    pair.connect(algorithm=algorithm, esn=esn)
    pair.left.engine.send(pair.super_frame(bytes(20_000), 1000), pair.now)
    pair.send(pair.packet(3))
    pair.pass_on()
    assert len(pair.right.received()) == 21


@pytest.mark.parametrize(("size", "length"), [(size, length) for size in SIZES for length in LENGTHS if length // size <= 3000])
def test_any_size_of_segment_on_a_path_that_takes_it(size: int, length: int) -> None:
    pair = Pair(config=EngineConfig(path_mtu=65535, udp_segmentation=True))
    pair.connect()
    payload = random.Random(size).randbytes(length)
    pair.left.engine.send(pair.super_frame(payload, size), pair.now)
    pair.pass_on()
    assert b"".join(packet[52:] for packet in pair.right.received()) == payload
    assert pair.right.count("in_packets") == -(-length // size)


def test_several_flows_and_sizes_through_one_sa_stay_in_order() -> None:
    pair = Pair()
    pair.connect()
    rand = random.Random(4)
    packets = [pair.packet(n, rand.choice([20, 100, 1000, 1300]), sport=rand.randrange(1, 5)) for n in range(400)]
    pair.send(*packets)
    sent = pair.left.sent()
    assert len(sent) < 400
    pair.right.take(sent, pair.now)
    assert pair.right.received() == packets
    assert pair.right.count("batch_fallbacks") == 0


def test_what_took_two_sends_is_written_once() -> None:
    pair = Pair()
    pair.connect()
    payload = random.Random(5).randbytes(65_400)
    pair.left.engine.send(pair.super_frame(payload, 1334), pair.now)
    assert len(pair.left.sink.esp) == 2
    pair.pass_on()
    assert len(pair.right.sink.frames) == 1
    assert b"".join(packet[52:] for packet in pair.right.received()) == payload


@pytest.mark.parametrize("count", [64, 65, 128, 129, 300])
@pytest.mark.parametrize("mode", [Mode.TUNNEL, Mode.TRANSPORT])
def test_no_write_holds_more_small_datagrams_than_a_kernel_takes(mode: Mode, count: int) -> None:
    """What waited while the process had no processor comes in one wake-up."""
    pair = Pair(mode=mode)
    pair.connect()
    packets = [pair.packet(number) for number in range(count)]
    pair.send(*packets)
    pair.right.take(pair.left.sent(), pair.now)
    assert len(pair.right.sink.frames) == -(-count // MAX_UDP_SEGMENTS)
    assert [packet[20:] for packet in pair.right.received()] == [packet[20:] for packet in packets]


def test_interleaved_flows_are_joined_apart_and_stay_in_order() -> None:
    pair = Pair()
    pair.connect()
    frames = [pair.super_frame(random.Random(n).randbytes(9_000), 1000, proto) for n, proto in enumerate(["tcp", "udp", "tcp", "udp"])]
    for frame in frames:
        pair.left.engine.send(frame, pair.now)
    pair.pass_on()
    assert len(pair.right.sink.frames) == 4
    assert pair.right.received() == [packet for frame in frames for packet in packets_of(frame)]
