"""IKE fragmentation (RFC 7383) with Debian's strongSwan: certificates that do not fit a datagram, both ways, on narrow paths too."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.certs import KeyKind
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.pairing import Pair, carries_a_little, facing
from lab.strongswan import StrongSwan
from lab.tunnel import Credentials, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

IKE_AUTH = 35
SKF = 53
SIZE = 600  # octets of an IP packet; RSA certificates need two
OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


def theirs(namespace: Namespace, config: Path) -> StrongSwan:
    return StrongSwan(namespace, config, f"fragment_size = {SIZE}")


def certified(**options: str) -> Tunnel:
    return Tunnel(credentials=Credentials.make(KeyKind.RSA), esp_proposals="chacha20poly1305", connection_options={"send_cert": "always", **options})


def pieces(link: Pair, side: Side) -> list[int]:
    """The lengths of the IP packets with fragments of IKE_AUTH that one side sent."""
    source = (link.sites.a if side is Side.A else link.sites.b).wan4
    return [
        packet.length
        for packet in link.capture.packets()
        if packet.source == source and (exchange := packet.ike_exchange) is not None and exchange[0] == IKE_AUTH and packet.payload[12 + 16] == SKF
    ]


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_both_sides_fragment(ours: Side) -> None:
    def mine(namespace: Namespace, config: Path) -> Gateway:
        return Gateway(namespace, config, settings={"fragment_size": str(SIZE)})

    with facing(ours, certified(fragmentation="yes"), mine=mine, theirs=theirs) as link:
        link.a.initiate()
        carries_a_little(link)
        for side in Side:
            lengths = pieces(link, side)
            assert len(lengths) > 1
            assert max(lengths) <= SIZE


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_a_narrow_wire(ours: Side) -> None:
    """Our host knows the path's MTU, as if ICMP had told it."""
    with facing(ours, certified(fragmentation="yes"), theirs=theirs) as link:
        near = link.sites.a if ours is Side.A else link.sites.b
        far = link.sites.b if ours is Side.A else link.sites.a
        near.gateway.ip(f"route add {far.wan4}/32 dev wan mtu 700")
        link.a.initiate()
        lengths = pieces(link, ours)
        assert len(lengths) > 1
        assert max(lengths) <= 700
