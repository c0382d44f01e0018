"""The lab itself: strongSwan against strongSwan, so that a failure with our gateway is ours."""

from __future__ import annotations

import pytest
from lab.capture import Capture
from lab.certs import KeyKind
from lab.pairing import STRONGSWAN, carries_everything, pair
from lab.process import wait_until
from lab.relay import RelaySettings
from lab.topology import WAN, sites
from lab.traffic import UdpStream, ping, udp_sink
from lab.tunnel import Credentials, Side, Tunnel

pytestmark = pytest.mark.interop


def test_strongswan_carries_traffic_to_strongswan() -> None:
    with pair(STRONGSWAN, STRONGSWAN, Tunnel()) as link:
        link.a.initiate()
        carries_everything(link)
        link.a.terminate()
        link.b.wait_gone()


@pytest.mark.parametrize("kind", list(KeyKind))
def test_strongswan_accepts_the_labs_certificates(kind: KeyKind) -> None:
    with pair(STRONGSWAN, STRONGSWAN, Tunnel(credentials=Credentials.make(kind))) as link:
        link.a.initiate()
        assert link.ping(Side.B).lost == 0


def test_capture_sees_clear_packets() -> None:
    with sites() as places, Capture(places.a.gateway, WAN) as capture:
        assert ping(places.a.host, places.b.host4, count=2).lost == 0
        assert ping(places.a.host, places.b.host6, count=2).lost == 0
        assert len(capture.clear_packets([places.a.net4])) == 4
        assert len(capture.clear_packets([places.b.net6])) == 4


def test_relay_delays() -> None:
    with sites(relay=RelaySettings(delay=0.05)) as places:
        assert min(ping(places.a.host, places.b.host4).times) >= 0.1


def test_relay_loses_doubles_and_reorders_what_it_is_told_to() -> None:
    with sites(relay=RelaySettings(delay=0.002, jitter=0.01, duplicate=0.1, loss=0.1)) as places, udp_sink(places.b.host, places.b.host4) as sink:
        relay = places.relay
        assert relay is not None
        UdpStream(places.a.host, [(places.b.host4, sink.port)], count=1000, rate=5000).wait()
        wait_until(lambda: sink.expect(0).received + relay.counters().lost >= 1000, "the last datagrams arrive, or are lost")
        got, counters = sink.expect(0), relay.counters()
        assert 0 < 1000 - got.received <= counters.lost
        assert 0 < got.duplicates <= counters.duplicated
        assert got.reordered > 0
        relay.change(RelaySettings(cut=True))
        assert ping(places.a.host, places.b.host4, count=1, timeout=0.2).received == 0
