"""vpnd on NETLINK_XFRM and on AF_KEY, alike: tunnels between two of ours, what they leave in the kernel, and restarts."""

from __future__ import annotations

import pytest
from lab.pairing import DaemonFactory
from lab.process import wait_until
from lab.tunnel import CONNECTION, Side, Tunnel
from realkernel.kernel_gateways import KernelGateway, KernelPair, kernel_pair, pfkey, xfrm

pytestmark = pytest.mark.realkernel

PLAIN = {"encap": "no"}  # ESP without UDP
GRACE = 120.0  # s, more than ORPHAN_GRACE under emulation
CIPHERS = [
    pytest.param(xfrm, "aes256gcm16-esn", id="xfrm-gcm-esn"),
    pytest.param(xfrm, "aes128-sha256", id="xfrm-cbc"),
    pytest.param(pfkey, "aes128-sha1", id="af-key-cbc"),
    pytest.param(pfkey, "aes128ctr-sha384", id="af-key-ctr"),
]
CHANNELS = [pytest.param(xfrm, "chacha20poly1305", id="xfrm"), pytest.param(pfkey, "aes256-sha512", id="af-key")]


def gateways(both: KernelPair) -> tuple[KernelGateway, KernelGateway]:
    a, b = both.link.a, both.link.b
    assert isinstance(a, KernelGateway)
    assert isinstance(b, KernelGateway)
    return a, b


@pytest.mark.parametrize(("ours", "esp"), CIPHERS)
def test_a_tunnel_carries_and_ends(ours: DaemonFactory, esp: str) -> None:
    with kernel_pair(ours, ours, Tunnel(esp_proposals=esp, connection_options=PLAIN)) as both:
        a, b = gateways(both)
        a.initiate()
        assert [child.encap for child in both.children()] == [False, False]
        both.carries()
        b.terminate(ike=CONNECTION)
        a.wait_gone()
        b.wait_gone()
        wait_until(lambda: [a.kernel("state"), b.kernel("state")] == ["", ""], "no SA left in either kernel", interval=0.2)


@pytest.mark.parametrize(("ours", "esp"), CHANNELS)
def test_ipv6_in_ipv4_with_forced_encapsulation(ours: DaemonFactory, esp: str) -> None:
    with kernel_pair(ours, ours, Tunnel(inner_version=6, esp_proposals=esp, connection_options={"encap": "yes"})) as both:
        both.link.a.initiate()
        assert [child.encap for child in both.children()] == [True, True]
        both.carries()


@pytest.mark.parametrize(("ours", "esp"), CHANNELS)
def test_host_to_host_transport_over_ipv6(ours: DaemonFactory, esp: str) -> None:
    tunnel = Tunnel(mode="transport", outer_version=6, inner_version=6, start_a="trap", esp_proposals=esp, connection_options=PLAIN)
    with kernel_pair(ours, ours, tunnel) as both:
        both.link.carries_again()
        both.carries()


@pytest.mark.parametrize(("ours", "esp"), CHANNELS)
def test_nothing_is_left_behind(ours: DaemonFactory, esp: str) -> None:
    with kernel_pair(ours, ours, Tunnel(start_a="trap", esp_proposals=esp)) as both:
        a, b = gateways(both)
        assert both.link.ping(Side.A).lost == 0
        assert a.traces() != []
        a.stop()
        b.wait_gone()
        b.stop()
        assert a.traces() == []
        assert b.traces() == []


@pytest.mark.parametrize(("ours", "esp"), CHANNELS)
def test_a_killed_key_manager_leaves_its_tunnels_and_its_successor_replaces_them(ours: DaemonFactory, esp: str) -> None:
    with kernel_pair(ours, ours, Tunnel(start_a="trap", esp_proposals=esp, connection_options=PLAIN)) as both:
        a, b = gateways(both)
        assert both.link.ping(Side.A).lost == 0
        old = a.child()
        a.kill_vpnd()
        b.kill_vpnd()
        assert both.link.ping(Side.A).lost == 0
        b.start_vpnd()
        a.start_vpnd()
        a.wait_child()
        both.carries()
        # AF_KEY's SAs tell no selectors, so there a successor is not known by them: the old ones go when their time of grace is over.
        spis = [f"{spi:#010x}" for spi in (old.spi_in, old.spi_out)]
        wait_until(lambda: not any(spi in a.kernel("state") + b.kernel("state") for spi in spis), "old SAs to go", GRACE, 0.5)
        # What the killed runs had found in the kernel's settings is put back by their successors.
        for gateway in (a, b):
            gateway.stop()
            assert gateway.traces() == []
