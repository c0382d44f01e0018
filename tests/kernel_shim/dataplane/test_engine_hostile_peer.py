"""A peer with valid keys may seal anything: nothing raises, and no packet comes out that did not go in."""

from __future__ import annotations

import random

import pytest
from dataplane_pair import Pair, endpoints
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.esp.cipher import EspCipher
from kernel_shim.esp.wire import trailer
from kernel_shim.model import Mode


def seal(cipher: EspCipher, sequence: int, payload: bytes, next_header: int, pad: int) -> bytes:
    tail = bytearray(trailer(len(payload), 4, next_header))
    tail[-2] = pad if pad >= 0 else tail[-2]
    packet = memoryview(bytearray(len(payload) + len(tail) + cipher.shape.overhead))
    cipher.seal(sequence, payload + bytes(tail), packet)
    return bytes(packet)


faults = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 79), st.integers(0, 255)), max_size=12)


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(4, Mode.TUNNEL), (6, Mode.TUNNEL), (4, Mode.TRANSPORT), (6, Mode.TRANSPORT)]),
    st.sampled_from(["tcp", "udp"]),
    faults,
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from([-1, 0, 1, 3, 200, 255])), max_size=3),
    st.sampled_from([None, None, 0, 4, 6, 17, 41, 44, 59, 255]),
    st.integers(1, 200),
    st.integers(0, 200),
)
def test_sealed_nonsense(
    kind: tuple[int, Mode], proto: str, damage: list[tuple[int, int, int]], pads: list[tuple[int, int]], header: int | None, size: int, cut: int
) -> None:
    version, mode = kind
    pair = Pair(version, version, mode)
    pair.connect()
    cipher = pair.cipher(True)
    base = 20 if version == 4 else 40
    contents = [bytearray(pair.packet(n, size, proto)) for n in range(30)]
    for index, position, value in damage:
        contents[index][position % len(contents[index])] = value
    payloads = [bytes(content[base if mode is Mode.TRANSPORT else 0 : len(content) - cut % len(content)]) for content in contents]
    upper = 6 if proto == "tcp" else 17
    following = header if header is not None else upper if mode is Mode.TRANSPORT else 4 if version == 4 else 41
    wrong_pads = dict(pads)
    datagrams = [seal(cipher, n + 1, payload, following, wrong_pads.get(n, -1)) for n, payload in enumerate(payloads)]
    local, remote = endpoints(version)
    pair.right.engine.receive(remote, local, b"".join(datagrams), len(datagrams[0]), pair.now)
    got = pair.right.received()
    assert len(got) <= 30
    if mode is Mode.TUNNEL:
        for packet in got:
            # A pad length that lies makes padding a part of the packet; nothing else is ever added.
            assert any(content.startswith(packet) or packet.startswith(content) for content in payloads)


def test_a_batch_of_random_plaintexts() -> None:
    rand = random.Random(11)
    for mode in Mode:
        pair = Pair(4, 4, mode)
        pair.connect()
        cipher = pair.cipher(True)
        local, remote = endpoints()
        sequence = 0
        for size in (2, 6, 18, 22, 38, 42, 62, 998):
            datagrams = []
            for _ in range(10):
                sequence += 1
                packet = memoryview(bytearray(size + 2 + cipher.shape.overhead))
                cipher.seal(sequence, rand.randbytes(size + 2), packet)
                datagrams.append(bytes(packet))
            pair.right.engine.receive(remote, local, b"".join(datagrams), len(datagrams[0]), pair.now)
        pair.right.engine.flush(pair.now)
        assert pair.right.count("in_packets") == 80
