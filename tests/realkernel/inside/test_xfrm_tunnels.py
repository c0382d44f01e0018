"""vpnd on NETLINK_XFRM: tunnels that a real kernel carries, with each kind of peer."""

from __future__ import annotations

import pytest
from lab.pairing import OURS, DaemonFactory
from lab.tunnel import Side, Tunnel
from realkernel.kernel_gateways import kernel_pair, strongswan, xfrm

pytestmark = pytest.mark.realkernel

PLAIN = {"encap": "no"}  # ESP without UDP


@pytest.mark.parametrize(
    ("a", "b", "esp", "encap"),
    [
        pytest.param(xfrm, OURS, "aes256gcm16", "no", id="xfrm-begins"),
        pytest.param(OURS, xfrm, "aes128ccm16", "no", id="userspace-begins-ccm"),
        pytest.param(xfrm, OURS, "aes256ccm8", "yes", id="xfrm-begins-in-udp-ccm"),
        pytest.param(OURS, xfrm, "aes128-sha256", "yes", id="userspace-begins-in-udp"),
    ],
)
def test_with_our_userspace_kernel(a: DaemonFactory, b: DaemonFactory, esp: str, encap: str) -> None:
    with kernel_pair(a, b, Tunnel(esp_proposals=esp, start_a="trap", connection_options={"encap": encap})) as both:
        assert both.link.ping(count=3).lost == 0
        assert [child.encap for child in both.children()] == [encap == "yes"] * 2
        both.carries()


@pytest.mark.parametrize(("a", "b"), [pytest.param(xfrm, strongswan, id="ours-begins"), pytest.param(strongswan, xfrm, id="strongswan-begins")])
def test_with_strongswan_on_the_same_kernel(a: DaemonFactory, b: DaemonFactory) -> None:
    with kernel_pair(a, b, Tunnel(connection_options=PLAIN)) as both:
        both.link.a.initiate()
        assert [child.encap for child in both.children()] == [False, False]
        both.carries()


@pytest.mark.parametrize("ours", [pytest.param(OURS, id="userspace"), pytest.param(xfrm, id="xfrm")])
def test_padding_against_traffic_analysis_with_strongswan(ours: DaemonFactory) -> None:
    """RFC 4303 section 2.7: whatever is inside, every packet is as long as the path carries; both take the other's padding away."""
    with kernel_pair(ours, strongswan, Tunnel(child_options={"tfc_padding": "mtu"}, connection_options={"encap": "yes"})) as both:
        both.link.a.initiate()
        for side in Side:
            assert both.link.ping(side).lost == 0
        for sent in (both.sent_a, both.sent_b):
            lengths = {packet.length for packet in sent.esp()}
            assert min(lengths) > 1400, lengths
        assert both.leaks() == []
