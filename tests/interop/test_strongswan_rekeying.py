"""Rekeying with strongSwan, from both sides, while datagrams run both ways: none is lost, and nothing is left behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from lab.pairing import WINDOW, Pair, facing
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import CHILD, CONNECTION, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
RATE = 400.0
SECONDS = 8.0


@contextlib.contextmanager
def datagrams_both_ways(link: Pair) -> Iterator[None]:
    """None of them is lost, doubled or late."""
    count = int(RATE * SECONDS)
    with contextlib.ExitStack() as stack:
        sinks, streams = {}, {}
        for side in Side:
            near, far, target = link.ends(side)
            sinks[side] = stack.enter_context(udp_sink(far, target, acknowledge=WINDOW // 4))
            streams[side] = UdpStream(near, [(target, sinks[side].port)], count=count, rate=RATE, size=256, window=WINDOW)
            stack.callback(streams[side].abandon)
        begin = time.monotonic()
        yield
        assert time.monotonic() - begin < SECONDS, "the datagrams were to run all the while"
        for side in Side:
            sent = streams[side].wait()
            assert sent.sent == count
            assert sent.refused == 0
            received = sinks[side].expect(count, timeout=3.0)
            assert (received.received, received.duplicates) == (count, 0), received


def rekey_in_turn(link: Pair) -> None:
    for _ in range(2):
        for side in Side:
            done = link.rekeyed()
            link.daemon(side).rekey(child=CHILD)
            done()
            done = link.rekeyed(children=False)
            link.daemon(side).rekey(ike=CONNECTION)
            done()


@pytest.mark.parametrize("esp", ["aes128gcm16", "aes128gcm16-x25519"], ids=["without-pfs", "with-pfs"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_rekeying_under_traffic(ours: Side, esp: str) -> None:
    with facing(ours, Tunnel(esp_proposals=esp)) as link:
        link.a.initiate()
        with datagrams_both_ways(link):
            rekey_in_turn(link)
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_both_sides_rekey_at_once(ours: Side) -> None:
    with facing(ours, Tunnel(esp_proposals="aes128gcm16-x25519")) as link:
        link.a.initiate()
        with datagrams_both_ways(link):
            for _ in range(3):
                done = link.rekeyed()
                for side in Side:
                    link.daemon(side).rekey(child=CHILD)
                done()
                done = link.rekeyed(children=False)
                for side in Side:
                    link.daemon(side).rekey(ike=CONNECTION)
                done()
        assert link.leaks() == []


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_another_group_than_the_first_is_wanted(ours: Side) -> None:
    """INVALID_KE_PAYLOAD in CREATE_CHILD_SA (RFC 7296 section 1.3)."""
    tunnel = Tunnel(esp_proposals="aes128gcm16-x25519-ecp256", esp_proposals_b="aes128gcm16-ecp256")  # of no effect in IKE_AUTH
    with facing(ours, tunnel) as link:
        link.a.initiate()
        done = link.rekeyed()
        link.a.rekey(child=CHILD)
        done()
        assert link.ping().lost == 0
