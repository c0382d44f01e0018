"""Two of our gateways whose SAs live for seconds: traffic goes on from one generation to the next."""

from __future__ import annotations

import contextlib

import pytest
from lab.pairing import OURS, WINDOW, pair
from lab.process import wait_until
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(120)]

RATE = 500.0
COUNT = 4000


def test_no_datagram_is_lost_over_many_generations() -> None:
    """Both sides rekey of their own accord, with their own jitter; sometimes at once."""
    tunnel = Tunnel(
        esp_proposals="aes128gcm16-x25519",
        connection_options={"rekey_time": "3s", "rand_time": "2s", "over_time": "60s"},
        child_options={"rekey_time": "2s", "rand_time": "1s", "life_time": "60s"},
    )
    with pair(OURS, OURS, tunnel) as link, contextlib.ExitStack() as stack:
        link.a.initiate()
        first = {daemon: (daemon.wait_child().spi_in, daemon.ike_sas()[0].initiator_spi) for daemon in (link.a, link.b)}
        sinks, streams = {}, {}
        for side in Side:
            near, far, target = link.ends(side)
            sinks[side] = stack.enter_context(udp_sink(far, target, acknowledge=WINDOW // 4, whole=COUNT))
            streams[side] = UdpStream(near, [(target, sinks[side].port)], count=COUNT, rate=RATE, size=256, window=WINDOW)
            stack.callback(streams[side].abandon)
        for side in Side:
            assert streams[side].wait().refused == 0
            received = sinks[side].expect(COUNT)
            assert (received.received, received.duplicates) == (COUNT, 0), received
        for daemon, (spi, ike) in first.items():
            assert spi not in {child.spi_in for child in daemon.children()}
            assert ike not in {sa.initiator_spi for sa in daemon.ike_sas()}
            # nothing piles up: at most a rekeying and its predecessor
            assert len(daemon.children()) <= 3
            assert len(daemon.ike_sas()) <= 3
        assert link.leaks() == []
        link.a.terminate()
        wait_until(lambda: not link.a.ike_sas() and not link.b.ike_sas(), "no IKE SA left", interval=0.05)
