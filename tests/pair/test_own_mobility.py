"""Two of our gateways: an address changes, or a NAT does, and the tunnel goes on with the SAs that it has."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, DaemonFactory, Pair, counted_alike, pair
from lab.process import wait_until
from lab.strongswan import StrongSwan
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

NEW = "192.0.2.77"


def spis(link: Pair) -> set[tuple[int, int]]:
    return {(child.spi_in, child.spi_out) for child in link.children()}


@pytest.mark.parametrize("encap", ["yes", "no"])
def test_a_roadwarrior_changes_its_address_under_traffic(encap: str) -> None:
    """Nothing is negotiated anew, and what left before the change is the only loss."""
    with pair(OURS, OURS, Tunnel(connection_options={"mobike": "yes", "local_addrs": "%any", "encap": encap})) as link:
        link.a.initiate()
        link.carries_again()
        before, ike = spis(link), [sa.initiator_spi for sa in link.a.ike_sas()]
        near, far, target = link.ends(Side.A)
        a, b = link.sites.a, link.sites.b
        with udp_sink(far, target) as sink:
            stream = UdpStream(near, [(target, sink.port)], count=30_000, rate=500.0, size=200)
            assert sink.expect(200).received >= 200
            a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
            a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
            b.gateway.ip(f"route replace {a.net4} via {NEW}")
            link.capture.wait_for(lambda packet: packet.is_esp and str(packet.source) == NEW, "the stream goes on from the new address")
            arrived = sink.expect(0).received
            assert sink.expect(arrived + 500).received >= arrived + 500
            stream.finish()
        seen = len(link.capture.packets())
        for side in Side:
            assert link.ping(side).lost == 0
        assert {str(packet.source) for packet in link.capture.packets()[seen:] if packet.is_esp} == {NEW, str(b.wan4)}
        assert spis(link) == before
        assert [sa.initiator_spi for sa in link.a.ike_sas()] == ike
        wait_until(lambda: [child.state for child in link.children()] == ["INSTALLED"] * 2, "at rest")


@pytest.mark.parametrize("peer", [pytest.param(OURS, id="ours"), pytest.param(StrongSwan, id="strongSwan")])
def test_without_mobike_it_is_made_anew(peer: DaemonFactory) -> None:
    """The old address is gone: nobody waits until the peer seems dead."""
    options = {"mobike": "no", "local_addrs": "%any", "dpd_delay": "0s"}
    with pair(OURS, peer, Tunnel(connection_options=options, connection_b={"remote_addrs": "%any"})) as link:
        link.a.initiate()
        link.carries_again()
        (before,) = link.a.ike_sas()
        a, b = link.sites.a, link.sites.b
        a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
        a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
        b.gateway.ip(f"route replace {a.net4} via {NEW}")
        wait_until(lambda: [sa.initiator_spi for sa in link.a.ike_sas() if sa.state == "ESTABLISHED"] not in ([], [before.initiator_spi]), "another IKE SA")
        link.carries_again()
        seen = len(link.capture.packets())
        for side in Side:
            assert link.ping(side).lost == 0
        assert {str(packet.source) for packet in link.capture.packets()[seen:] if packet.is_esp} == {NEW, str(b.wan4)}
        wait_until(lambda: len(link.b.ike_sas()) == 1, "the old one is gone there, too")
        assert link.leaks(of=Side.A) == []


def test_no_packet_is_lost_when_a_second_address_takes_over() -> None:
    """The old address stands until the new one is in use: make before break."""
    with pair(OURS, OURS, Tunnel(connection_options={"mobike": "yes", "local_addrs": "%any"})) as link:
        link.a.initiate()
        link.carries_again()
        before = spis(link)
        near, far, target = link.ends(Side.A)
        a, b = link.sites.a, link.sites.b
        with udp_sink(far, target) as sink:
            stream = UdpStream(near, [(target, sink.port)], count=30_000, rate=500.0, size=200)
            assert sink.expect(200).received >= 200
            a.gateway.ip(f"addr add {NEW}/32 dev wan", f"route replace {b.wan4}/32 dev wan src {NEW}")
            link.capture.wait_for(lambda packet: packet.is_esp and str(packet.source) == NEW, "the stream goes on from the new address")
            sent = stream.finish()
            assert sink.expect(sent.sent).received == sent.sent
        assert spis(link) == before
        counted_alike(*link.children())
        seen = len(link.capture.packets())
        assert link.ping().lost == 0
        assert {str(packet.source) for packet in link.capture.packets()[seen:] if packet.is_esp} == {NEW, str(b.wan4)}
