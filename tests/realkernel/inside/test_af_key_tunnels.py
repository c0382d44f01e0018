"""vpnd on AF_KEY: tunnels that a real kernel carries, with each kind of peer."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, DaemonFactory
from lab.process import wait_until
from lab.tunnel import CONNECTION, Side, Tunnel
from realkernel.kernel_gateways import KernelGateway, kernel_pair, pfkey, strongswan, xfrm

pytestmark = pytest.mark.realkernel

PLAIN = {"encap": "no"}  # ESP without UDP
CBC = "aes256-sha512"
GRACE = 120.0  # s, more than ORPHAN_GRACE under emulation


@pytest.mark.parametrize("esp", ["aes128-sha1", "aes128ctr-sha384"])
def test_two_of_ours(esp: str) -> None:
    with kernel_pair(pfkey, pfkey, Tunnel(esp_proposals=esp, connection_options=PLAIN)) as both:
        a, b = both.link.a, both.link.b
        a.initiate()
        assert [child.encap for child in both.children()] == [False, False]
        both.carries()
        b.terminate(ike=CONNECTION)
        a.wait_gone()
        b.wait_gone()
        for gateway in (a, b):
            assert isinstance(gateway, KernelGateway)
            assert gateway.kernel("state") == ""


def test_ipv6_in_ipv4_with_forced_encapsulation() -> None:
    with kernel_pair(pfkey, pfkey, Tunnel(inner_version=6, esp_proposals=CBC, connection_options={"encap": "yes"})) as both:
        both.link.a.initiate()
        assert [child.encap for child in both.children()] == [True, True]
        both.carries()


def test_host_to_host_transport_over_ipv6() -> None:
    tunnel = Tunnel(mode="transport", outer_version=6, inner_version=6, start_a="trap", esp_proposals=CBC, connection_options=PLAIN)
    with kernel_pair(pfkey, pfkey, tunnel) as both:
        both.link.carries_again()
        both.carries()


@pytest.mark.parametrize(("a", "b"), [pytest.param(pfkey, OURS, id="pfkey-begins"), pytest.param(OURS, pfkey, id="userspace-begins")])
def test_with_our_userspace_kernel(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel(start_a="trap", esp_proposals=CBC)) as both:
        assert both.link.ping(count=3, timeout=10.0).lost == 0
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


def test_nothing_is_left_behind() -> None:
    with kernel_pair(pfkey, pfkey, Tunnel(start_a="trap", esp_proposals=CBC)) as both:
        a, b = both.link.a, both.link.b
        assert isinstance(a, KernelGateway)
        assert isinstance(b, KernelGateway)
        assert both.link.ping(Side.A, timeout=10.0).lost == 0
        assert a.traces() != []
        a.stop()
        b.wait_gone()
        b.stop()
        assert a.traces() == []
        assert b.traces() == []


def test_a_killed_key_manager_leaves_its_tunnels_and_its_successor_replaces_them() -> None:
    with kernel_pair(pfkey, pfkey, Tunnel(start_a="trap", esp_proposals=CBC, connection_options=PLAIN)) as both:
        a, b = both.link.a, both.link.b
        assert isinstance(a, KernelGateway)
        assert isinstance(b, KernelGateway)
        assert both.link.ping(Side.A, timeout=10.0).lost == 0
        old = a.child()
        a.kill_vpnd()
        b.kill_vpnd()
        assert both.link.ping(Side.A).lost == 0
        b.start_vpnd()
        a.start_vpnd()
        a.wait_child()
        both.carries()
        # An SA tells no selectors here, so its successor is not known by them: it goes when its time of grace is over.
        spis = [f"{spi:#010x}" for spi in (old.spi_in, old.spi_out)]
        wait_until(lambda: not any(spi in a.kernel("state") + b.kernel("state") for spi in spis), "old SAs to go", GRACE)
