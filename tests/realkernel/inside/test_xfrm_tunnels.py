"""vpnd on NETLINK_XFRM: tunnels that a real kernel carries, with each kind of peer."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, DaemonFactory
from lab.tunnel import CONNECTION, Side, Tunnel
from realkernel.kernel_gateways import XfrmGateway, kernel_pair, strongswan, xfrm

pytestmark = pytest.mark.realkernel


@pytest.mark.parametrize("esp", ["aes256gcm16-esn", "chacha20poly1305", "aes128-sha256"])
def test_two_of_ours(esp: str) -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(esp_proposals=esp)) as both:
        a, b = both.link.a, both.link.b
        a.initiate()
        both.carries()
        b.terminate(ike=CONNECTION)
        a.wait_gone()
        b.wait_gone()
        for gateway in (a, b):
            assert isinstance(gateway, XfrmGateway)
            assert gateway.kernel("state") == ""


@pytest.mark.parametrize(("inner", "outer"), [(4, 6), (6, 4)])
def test_address_families(inner: int, outer: int) -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(inner_version=inner, outer_version=outer, connection_options={"encap": "yes"})) as both:
        both.link.a.initiate()
        assert [child.encap for child in both.children()] == [True, True]
        both.carries()


def test_host_to_host_transport() -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(mode="transport", start_a="trap")) as both:
        both.link.carries_again()
        both.carries()


@pytest.mark.parametrize(("a", "b"), [pytest.param(xfrm, OURS, id="xfrm-begins"), pytest.param(OURS, xfrm, id="userspace-begins")])
def test_with_our_userspace_kernel(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel(start_a="trap")) as both:
        assert both.link.ping(count=3, timeout=10.0).lost == 0
        both.carries()


@pytest.mark.parametrize(("a", "b"), [pytest.param(xfrm, strongswan, id="ours-begins"), pytest.param(strongswan, xfrm, id="strongswan-begins")])
def test_with_strongswan_on_the_same_kernel(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel()) as both:
        both.link.a.initiate()
        both.carries()


def test_nothing_is_left_behind() -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(start_a="trap")) as both:
        a, b = both.link.a, both.link.b
        assert isinstance(a, XfrmGateway)
        assert isinstance(b, XfrmGateway)
        assert both.link.ping(Side.A, timeout=10.0).lost == 0
        assert a.traces() != []
        a.stop()
        b.wait_gone()
        b.stop()
        assert a.traces() == []
        assert b.traces() == []
