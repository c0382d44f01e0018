"""Super-packets: cut in rows as one by one, joined again as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from kernel_shim.esp.wire import trailer
from kernel_shim.packet import virtio
from kernel_shim.packet.coalesce import Joiner, format_of, runs
from kernel_shim.packet.ip import Malformed
from kernel_shim.packet.segment import complete_checksum, fill_rows, read_super, segment, segments
from kernel_shim.packet.virtio import VnetHeader

KINDS = {("tcp", 4): virtio.GSO_TCPV4, ("tcp", 6): virtio.GSO_TCPV6, ("udp", 4): virtio.GSO_UDP_L4, ("udp", 6): virtio.GSO_UDP_L4}


def packet_of(version: int, proto: str, payload: bytes, *, df: bool = True, flags: str = "PA", seq: int = 0xFFFFF000, timestamp: bool = True) -> bytes:
    ip = IP(src="10.1.2.3", dst="10.4.5.6", flags="DF" if df else 0, id=0xFFFA, tos=2) if version == 4 else IPv6(src="fd00::1", dst="fd00::2", tc=2, fl=77)
    options = [("Timestamp", (11, 22))] if timestamp else []
    upper = TCP(sport=7, dport=8, seq=seq, ack=5, flags=flags, window=99, options=options) if proto == "tcp" else UDP(sport=7, dport=8)
    return bytes(ip / upper / Raw(payload))


def valid(packet: bytes) -> bool:
    """Whether scapy computes the same lengths and checksums."""
    parsed = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
    fresh = parsed.copy()
    if packet[0] >> 4 == 4:
        del fresh.chksum, fresh.len
    else:
        del fresh.plen
    upper = fresh[TCP] if TCP in fresh else fresh[UDP]
    del upper.chksum
    if UDP in fresh:
        del fresh[UDP].len
    return bytes(fresh) == packet


versions_and_protocols = pytest.mark.parametrize(("version", "proto"), [(4, "tcp"), (4, "udp"), (6, "tcp"), (6, "udp")])


@versions_and_protocols
@pytest.mark.parametrize("df", [False, True])
def test_segments_are_whole_packets_in_order(version: int, proto: str, df: bool) -> None:
    payload = random.Random(1).randbytes(10_240)
    big = read_super(VnetHeader(1, KINDS[proto, version], 0, 1000), memoryview(packet_of(version, proto, payload, df=df, flags="PAFC")))
    cut = [bytes(piece) for piece in segments(big)]
    assert len(cut) == big.segments == 11
    assert all(map(valid, cut))
    assert b"".join(piece[big.header :] for piece in cut) == payload
    if proto == "tcp":
        flags = [str(IP(piece)[TCP].flags if version == 4 else IPv6(piece)[TCP].flags) for piece in cut]
        assert flags == ["AC", *["A"] * 9, "FPA"]
    if version == 4:
        ids = [IP(piece).id for piece in cut]
        assert ids == ([0xFFFA] * 11 if df else [(0xFFFA + n) & 0xFFFF for n in range(11)])


@pytest.mark.property
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([4, 6]),
    st.sampled_from(["tcp", "udp"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 1400),
    st.integers(1, 20_000),
    st.integers(0, 40),
    st.sampled_from([4, 16]),
)
def test_rows_are_the_naive_segments(version: int, proto: str, df: bool, transport: bool, size: int, length: int, begin: int, alignment: int) -> None:
    payload = random.Random(length).randbytes(length)
    big = read_super(VnetHeader(1, KINDS[proto, version], 0, size), memoryview(packet_of(version, proto, payload, df=df, flags="PAC")))
    full = (len(big.packet) - big.header) // big.size
    begin = min(begin, full)
    count = min(full - begin, 64)
    if not count:
        return
    strip = big.upper if transport else 0
    tail = trailer(big.segment_length - strip, alignment, 4)
    row = big.segment_length - strip + len(tail)
    memory = bytearray(row * count)
    rows = np.frombuffer(memory, np.uint8).reshape(count, row)
    fill_rows(big, begin, rows, np.frombuffer(memory, "<u4").reshape(count, row // 4), strip, tail)
    for index in range(count):
        assert bytes(rows[index]) == bytes(segment(big, begin + index, big.segments - 1)[strip:]) + tail


def join(packets: list[bytes], *, udp: bool = True) -> list[bytes]:
    """What becomes of packets of one length that arrive together: frames."""
    tail = trailer(len(packets[0]), 4, 4)
    rows = np.frombuffer(bytearray(b"".join(packet + tail for packet in packets)), np.uint8).reshape(len(packets), -1)
    frames: list[bytes] = []
    begin = 0
    while begin < len(rows):
        form = format_of(memoryview(packets[begin]), len(packets[begin]), udp=udp)
        stop = 1
        if form is not None:
            for start, stop in runs(form, rows[begin:], rows[begin:].view("<u4")):
                if stop - start > 1:
                    joiner = Joiner(32)
                    joiner.begin(form, rows[begin + start : begin + stop])
                    frames.append(bytes(joiner.frame()))
                else:
                    frames.append(virtio.NO_OFFLOAD + packets[begin + start])
        else:
            frames.append(virtio.NO_OFFLOAD + packets[begin])
        begin += stop
    return frames


def host(frames: list[bytes]) -> list[bytes]:
    out: list[bytes] = []
    for frame in frames:
        vnet, packet = VnetHeader.unpack(frame), memoryview(bytearray(frame[virtio.LENGTH :]))
        if vnet.gso_type:
            out += [bytes(piece) for piece in segments(read_super(vnet, packet))]
        else:
            if vnet.flags:
                assert complete_checksum(vnet, packet)
            out.append(bytes(packet))
    return out


@versions_and_protocols
def test_what_was_cut_joins_into_one(version: int, proto: str) -> None:
    payload = random.Random(1).randbytes(10_000)
    big = read_super(VnetHeader(1, KINDS[proto, version], 0, 1000), memoryview(packet_of(version, proto, payload)))
    cut = [bytes(piece) for piece in segments(big)]
    frames = join(cut)
    assert len(frames) == 1
    assert VnetHeader.unpack(frames[0]).gso_size == 1000
    assert host(frames) == cut


@pytest.mark.property
@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([4, 6]),
    st.sampled_from(["tcp", "udp"]),
    st.lists(st.tuples(st.integers(0, 39), st.sampled_from(["", "flip", "ip", "ports", "psh", "ttl", "nocheck", "opt"])), max_size=8),
    st.integers(0, 1000),
)
def test_joined_or_not_the_host_gets_the_same_packets(version: int, proto: str, faults: list[tuple[int, str]], seed: int) -> None:
    """Repetitions, reordering, damage and strangers among the packets of a flow."""
    payload = random.Random(seed).randbytes(20_000)
    big = read_super(VnetHeader(1, KINDS[proto, version], 0, 500), memoryview(packet_of(version, proto, payload)))
    packets = [bytes(piece) for piece in segments(big)]
    upper = 20 if version == 4 else 40
    for index, fault in faults:
        damaged = bytearray(packets[index])
        match fault:
            case "flip":
                damaged[-3] ^= 4
            case "ip":
                damaged[10 if version == 4 else 7] ^= 1
            case "ttl":
                damaged[8 if version == 4 else 7] ^= 1
            case "ports":
                damaged[upper] ^= 1
            case "psh" if proto == "tcp":
                damaged = bytearray(packet_of(version, proto, bytes(damaged[big.header :]), flags="PA", seq=0xFFFFF000 + 500 * index & 0xFFFFFFFF))
            case "nocheck" if proto == "udp":
                damaged[upper + 6 : upper + 8] = b"\0\0"
            case "opt" if proto == "tcp":
                damaged[upper + 25] ^= 1
            case _:
                packets[index], packets[0] = packets[0], packets[index]
                continue
        packets[index] = bytes(damaged)
    assert host(join(packets)) == packets


def test_strangers_are_not_joined() -> None:
    one = [packet_of(4, "tcp", bytes(100), flags=flags, seq=100 * n) for n, flags in enumerate(["S", "S", "S"])]
    assert len(join(one)) == 3
    fragments = [bytes(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP() / Raw(bytes(100))) for _ in range(3)]
    assert len(join(fragments)) == 3
    free = [packet_of(4, "udp", bytes(100), df=False) for _ in range(3)]
    assert len(join(free)) == 3
    assert len(join([packet_of(4, "udp", bytes(100))] * 3, udp=False)) == 3


@versions_and_protocols
def test_a_shorter_last_packet_joins_and_an_alien_one_does_not(version: int, proto: str) -> None:
    payload = random.Random(1).randbytes(2_300)
    big = read_super(VnetHeader(1, KINDS[proto, version], 0, 500), memoryview(packet_of(version, proto, payload)))
    cut = [bytes(piece) for piece in segments(big)]
    tail = trailer(len(cut[0]), 4, 4)
    rows = np.frombuffer(bytearray(b"".join(packet + tail for packet in cut[:4])), np.uint8).reshape(4, -1)
    form = format_of(memoryview(cut[0]), len(cut[0]))
    assert form is not None
    for change in (None, len(cut[4]) - 1, big.upper, 8 if version == 4 else 7):
        last = bytearray(cut[4])
        if change is not None:
            last[change] ^= 1
        joiner = Joiner(32)
        joiner.begin(form, rows)
        assert joiner.append(memoryview(last)) is (change is None)
        assert host([bytes(joiner.frame())]) == cut[: 5 if change is None else 4]


@pytest.mark.property
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.integers(0, 255), st.integers(0, 70000), st.sampled_from([0x45, 0x60, 0x4F, None]))
def test_any_super_packet_is_cut_or_malformed(data: bytes, kind: int, size: int, first: int | None) -> None:
    packet = bytearray(data)
    if first is not None and packet:
        packet[0] = first
    try:
        big = read_super(VnetHeader(1, kind, 0, size & 0xFFFF), memoryview(packet))
    except Malformed:
        return
    assert sum(len(piece) - big.header for piece in segments(big)) == len(big.packet) - big.header


@given(st.binary(min_size=20, max_size=200), st.integers(0, 250), st.integers(0, 250))
def test_a_checksum_out_of_bounds_is_refused(data: bytes, start: int, offset: int) -> None:
    fits = start < len(data) and start + offset + 2 <= len(data)
    assert complete_checksum(VnetHeader(1, 0, 0, 0, start, offset), memoryview(bytearray(data))) is fits
