"""The MTU of a label tunnel's device: what is sent through it fits the way to the peer, whatever SA protects it."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest
from lab.namespaces import Lab

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.linux import XFRM
from kernel_shim.channel.linux_mpls.mtu import IP_HEADER, SMALLEST, UDP_HEADER, WITHOUT_A_ROUTE, device_mtu, outer_mtu
from kernel_shim.channel.route_socket import RouteSocket
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.node import Tunnel

FOUR = Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2"))
SIX = Tunnel("pe", ip_address("2001:db8::1"), ip_address("2001:db8::2"))


def test_a_device_leaves_room() -> None:
    assert device_mtu(FOUR, 1500) == 1395
    assert device_mtu(SIX, 1500) == 1375
    assert device_mtu(Tunnel("pe", FOUR.local, FOUR.remote, Encapsulation.IP), 1500) == 1399
    assert device_mtu(SIX, 9000) == 8875
    assert device_mtu(SIX, 1280) == SMALLEST


@pytest.mark.parametrize("algorithm", sorted(XFRM.algorithms, key=str), ids=str)
@pytest.mark.parametrize("tunnel", [FOUR, SIX], ids=["IPv4", "IPv6"])
def test_whatever_protects_it_fits(tunnel: Tunnel, algorithm: EspAlgorithm) -> None:
    """RFC 4303 section 2.4: the payload and two octets are padded to whole blocks, of four octets at least."""
    payload = tunnel.encapsulation.overhead + device_mtu(tunnel, 1500)
    header = IP_HEADER[tunnel.local.version]

    def sealed(length: int) -> int:
        block = 16 if algorithm.encryption is EncryptionId.AES_CBC else 4
        return 8 + algorithm.iv_length + length + 2 + -(length + 2) % block + algorithm.icv_length

    assert header + UDP_HEADER + sealed(payload) <= 1500
    if algorithm.aead:
        assert header + sealed(header + payload) <= 1500  # in tunnel mode


@pytest.mark.root
def test_the_way_to_the_peer_says_it() -> None:
    async def told() -> tuple[int, int]:
        async with RouteSocket("test") as route:
            return await outer_mtu(route, FOUR), await outer_mtu(route, SIX)

    with Lab() as lab:
        here, there = lab.namespace("here"), lab.namespace("there")
        assert here.call(lambda: asyncio.run(told())) == (WITHOUT_A_ROUTE, WITHOUT_A_ROUTE)
        lab.veth(here, "wan", there, "wan")
        here.ip("addr add 192.0.2.1/24 dev wan", "addr add 2001:db8::1/64 dev wan nodad", "link set wan mtu 1400")
        assert here.call(lambda: asyncio.run(told())) == (1400, 1400)
        here.ip("route add 192.0.2.2/32 dev wan mtu 1300", "route add 2001:db8::2/128 dev wan mtu 1350")
        assert here.call(lambda: asyncio.run(told())) == (1300, 1350)
