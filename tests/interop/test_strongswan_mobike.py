"""MOBIKE (RFC 4555) with Debian's strongSwan: a roadwarrior's address changes under traffic; the SAs go on."""

from __future__ import annotations

import pytest
from lab.pairing import Pair, facing
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import CHILD, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
NEW = "192.0.2.77"


def roadwarrior(**options: str) -> Tunnel:
    return Tunnel(connection_options={"mobike": "yes", "local_addrs": "%any", "dpd_delay": "5s", **options})


def outer_addresses(link: Pair, since: int) -> set[str]:
    return {str(packet.source) for packet in link.capture.packets()[since:] if packet.is_esp}


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_an_address_changes_under_traffic(ours: Side) -> None:
    with facing(ours, roadwarrior()) as link:
        link.a.initiate()
        link.carries_again()
        ike = [sa.initiator_spi for sa in link.a.ike_sas()]
        rekeyed = link.rekeyed()
        near, far, target = link.ends(Side.A)
        gateway = link.sites.a.gateway
        with udp_sink(far, target) as sink:
            stream = UdpStream(near, [(target, sink.port)], count=30_000, rate=500.0, size=200)
            assert sink.expect(200).received >= 200
            gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
            gateway.ip(f"addr add {NEW}/24 dev wan")
            gateway.ip(f"addr del {link.sites.a.wan4}/24 dev wan", f"route replace {link.sites.b.net4} via {link.sites.b.wan4}")
            link.sites.b.gateway.ip(f"route replace {link.sites.a.net4} via {NEW}")
            old = link.sites.a.wan4
            link.capture.wait_for(lambda packet: packet.is_esp and packet.source not in (old, link.sites.b.wan4), "it goes on from the new address")
            arrived = sink.expect(0).received
            assert sink.expect(arrived + 1500).received >= arrived + 1500
            stream.finish()
        # strongSwan's userspace ESP cannot move an SA, so its side rekeys the CHILD_SA, and sends to where nobody is until then; ours moved it
        rekeyed()
        seen = len(link.capture.packets())
        for side in Side:
            assert link.ping(side).lost == 0
        # which of the paths that it probed strongSwan takes, IPv6 or IPv4, is its own affair
        assert str(link.sites.a.wan4) not in outer_addresses(link, seen)
        assert [sa.initiator_spi for sa in link.a.ike_sas()] == ike, "the IKE SA goes on"
        assert "did not move" not in link.daemon(ours).log()
        # path probes go to every address of a gateway, those of its inner side too
        assert [str(packet) for packet in link.capture.clear_packets(link.sites.inner_networks) if not packet.is_ike] == []
        assert any(child.packets_out for child in link.daemon(ours).children(CHILD))
