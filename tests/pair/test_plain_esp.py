"""ESP as protocol 50, without UDP: `encap = no` between gateways with no NAT between them."""

from __future__ import annotations

import socket

import pytest
from lab.pairing import OURS, carries_a_little, pair
from lab.tunnel import Tunnel

pytestmark = [pytest.mark.pair, pytest.mark.timeout(120)]


@pytest.mark.parametrize("version", [4, 6])
def test_a_tunnel_without_udp(version: int) -> None:
    tunnel = Tunnel(connection_options={"encap": "no"}, inner_version=version, outer_version=version)
    with pair(OURS, OURS, tunnel) as link:
        link.a.initiate()
        carries_a_little(link)
        assert {packet.protocol for packet in link.capture.esp()} == {socket.IPPROTO_ESP}
        assert not link.a.child().encap
        assert link.leaks() == []


@pytest.mark.parametrize("encap", ["auto", "yes"])
def test_in_udp_unless_asked_otherwise(encap: str) -> None:
    with pair(OURS, OURS, Tunnel(connection_options={"encap": encap})) as link:
        link.a.initiate()
        assert link.ping().lost == 0
        assert {packet.protocol for packet in link.capture.esp()} == {socket.IPPROTO_UDP}
