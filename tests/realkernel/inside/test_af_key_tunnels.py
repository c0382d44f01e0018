"""vpnd on AF_KEY: tunnels that a real kernel carries, with each kind of peer."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, DaemonFactory
from lab.tunnel import Tunnel
from realkernel.kernel_gateways import KernelGateway, kernel_pair, pfkey, strongswan, xfrm

pytestmark = pytest.mark.realkernel

PLAIN = {"encap": "no"}  # ESP without UDP
CBC = "aes256-sha512"


@pytest.mark.parametrize(("a", "b"), [pytest.param(pfkey, OURS, id="pfkey-begins"), pytest.param(OURS, pfkey, id="userspace-begins")])
def test_with_our_userspace_kernel(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel(start_a="trap", esp_proposals=CBC)) as both:
        assert both.link.ping(count=3).lost == 0
        both.carries()


@pytest.mark.parametrize(("a", "b"), [pytest.param(pfkey, strongswan, id="ours-begins"), pytest.param(strongswan, pfkey, id="strongswan-begins")])
def test_with_strongswan(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel(esp_proposals=CBC, connection_options=PLAIN)) as both:
        both.link.a.initiate()
        assert [child.encap for child in both.children()] == [False, False]
        both.carries()


def test_what_it_cannot_do_is_not_proposed() -> None:
    """AF_KEY has no AEAD, no ESN, and cuts HMAC-SHA2-256 short: of all these proposals one is left."""
    offer = "aes256gcm16-esn,aes128-sha256,chacha20poly1305,aes256-sha512-esn-noesn"
    with kernel_pair(pfkey, xfrm, Tunnel(esp_proposals=offer, connection_options=PLAIN)) as both:
        both.link.a.initiate()
        for gateway in (both.link.a, both.link.b):
            assert isinstance(gateway, KernelGateway)
            assert "auth-trunc hmac(sha512)" in gateway.kernel("state")
            assert "esn" not in gateway.kernel("state")
        both.carries()
