"""MOBIKE on kernel ESP: a gateway changes its address and its SAs move with their sequence numbers."""

from __future__ import annotations

import socket
import struct

import pytest
from lab.capture import Capture
from lab.pairing import Pair
from lab.process import wait_until
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import Side, Tunnel
from realkernel.kernel_gateways import kernel_pair, xfrm

pytestmark = pytest.mark.realkernel

NEW = "192.0.2.77"
RATE = 100.0  # datagrams a second each way


def move(link: Pair) -> None:
    a, b = link.sites.a, link.sites.b
    a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
    a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
    b.gateway.ip(f"route replace {a.net4} via {NEW}")
    wait_until(lambda: f"src {NEW}" in b.gateway.run(["ip", "xfrm", "state"]).stdout, "the peer knows the new address", 60.0, 0.2)


def numbers(sent: Capture) -> dict[tuple[int, str], list[int]]:
    """The ESP sequence numbers in order, of each SPI and source."""
    found: dict[tuple[int, str], list[int]] = {}
    for packet in sent.esp():
        spi, number = struct.unpack_from("!II", packet.payload, 0 if packet.protocol == socket.IPPROTO_ESP else 8)
        found.setdefault((spi, str(packet.source)), []).append(number)
    return found


@pytest.mark.parametrize("encap", ["no", "yes"])
def test_a_gateway_changes_its_address(encap: str) -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(connection_options={"mobike": "yes", "local_addrs": "%any", "encap": encap})) as both:
        link = both.link
        link.a.initiate()
        link.carries_again()
        before = link.children()
        near, far, target = link.ends(Side.A)
        _, _, back = link.ends(Side.B)
        # Under way when the address goes: what is sent meanwhile may be lost, never sent under a number that was used.
        with udp_sink(far, target) as sink, udp_sink(near, back) as back_sink:
            streams = [UdpStream(near, [(target, sink.port)], count=20_000, rate=RATE), UdpStream(far, [(back, back_sink.port)], count=20_000, rate=RATE)]
            try:
                sink.expect(20)
                move(link)
                link.carries_again(timeout=60.0)
            finally:
                for stream in streams:
                    stream.abandon()
        for side in Side:
            assert link.ping(side).lost == 0
        after = link.children()
        assert [(child.spi_in, child.spi_out) for child in after] == [(child.spi_in, child.spi_out) for child in before]
        for old, new in zip(before, after, strict=True):
            assert new.packets_out > old.packets_out
        was = str(link.sites.a.wan4)
        sent = numbers(both.sent_a)
        (spi,) = {spi for spi, _ in sent}
        assert sorted(source for _, source in sent) == sorted((was, NEW))
        assert sorted(sent[spi, was]) == sent[spi, was]
        assert sent[spi, was][-1] < sent[spi, NEW][0]
        for capture in (both.sent_a, both.sent_b):
            used = [number for found in numbers(capture).values() for number in found]
            assert len(set(used)) == len(used)
        # What was sent while the policy still knew the old address asked for an SA there: it is refused.
        wait_until(lambda: was not in link.sites.a.gateway.run(["ip", "xfrm", "state"]).stdout, "nothing of the old address is left", interval=0.2)
