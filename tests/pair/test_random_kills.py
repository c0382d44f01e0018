"""Shims and key managers are killed at random points under traffic: no key is used twice, nothing leaves in clear, both sides end alike."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from lab.capture import WirePacket
from lab.gateway import Gateway
from lab.pairing import OURS, Pair, pair
from lab.process import wait_until
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(240)]

KILLS = 6
LONGEST_PAUSE = 1.5  # s between two kills
SETTLED_SECONDS = 60.0  # an earlier run's SAs have 30 s


def sequence_of(packet: WirePacket) -> tuple[object, bytes]:
    """Sender, and SPI with sequence number: what a nonce is made of, for a key is an SPI's."""
    offset = 0 if packet.protocol == 50 else 8
    return packet.source, packet.payload[offset : offset + 8]


def alike(link: Pair) -> bool:
    """One CHILD_SA on each side, and it is the same."""
    sides = [[child for ike in daemon.ike_sas() for child in ike.children] for daemon in (link.a, link.b)]
    if [len(children) for children in sides] != [1, 1]:
        return False
    (a,), (b,) = sides
    return (a.spi_in, a.spi_out) == (b.spi_out, b.spi_in) and kernel_spis(link.a) == kernel_spis(link.b) == {a.spi_in, a.spi_out}


def kernel_spis(daemon: object) -> set[int]:
    assert isinstance(daemon, Gateway)
    return {int(entry["spi"], 16) for entry in daemon.sad() if entry["state"] != "larval"}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_key_is_used_twice_and_nothing_leaves_in_clear(seed: int) -> None:
    draw = random.Random(seed)
    # A stream of single datagrams: one that is segmented would stand on this wire as one packet.
    with pair(OURS, OURS, Tunnel(start_a="trap", start_b="trap"), offloads=False) as link:
        assert isinstance(link.a, Gateway)
        assert isinstance(link.b, Gateway)
        assert link.ping().lost == 0
        kills: list[tuple[Callable[[], None], Callable[[], None]]] = []
        for gateway in (link.a, link.b):
            kills += [(gateway.kill_shim, gateway.start_shim), (gateway.kill_vpnd, gateway.start_vpnd), (gateway.kill, gateway.start)]
        near, far, target = link.ends(Side.A)
        _, _, back = link.ends(Side.B)
        with udp_sink(far, target) as sink, udp_sink(near, back) as back_sink:
            streams = [
                UdpStream(near, [(target, sink.port)], count=20_000, rate=300.0),
                UdpStream(far, [(back, back_sink.port)], count=20_000, rate=300.0),
            ]
            try:
                sink.expect(20)
                for _ in range(KILLS):
                    kill, start = draw.choice(kills)
                    kill()
                    time.sleep(draw.uniform(0.0, 0.3))
                    start()
                    time.sleep(draw.uniform(0.0, LONGEST_PAUSE))
                for side in Side:
                    link.carries_again(side, timeout=60.0)
            finally:
                for stream in streams:
                    stream.abandon()
        wait_until(lambda: alike(link), "both sides have the same SAs", SETTLED_SECONDS, 0.5)
        assert link.leaks() == []
        sent = Counter(sequence_of(packet) for packet in link.capture.esp())
        assert len(sent) > 1000
        assert [key for key, count in sent.items() if count > 1] == []
