"""MOBIKE on kernel ESP: a gateway changes its address and its SAs move with their sequence numbers."""

from __future__ import annotations

import pytest
from lab.process import wait_until
from lab.tunnel import Side, Tunnel
from realkernel.kernel_gateways import kernel_pair, xfrm

pytestmark = pytest.mark.realkernel

NEW = "192.0.2.77"


@pytest.mark.parametrize("encap", ["no", "yes"])
def test_a_gateway_changes_its_address(encap: str) -> None:
    with kernel_pair(xfrm, xfrm, Tunnel(connection_options={"mobike": "yes", "local_addrs": "%any", "encap": encap})) as both:
        link = both.link
        link.a.initiate()
        link.carries_again()
        before = link.children()
        a, b = link.sites.a, link.sites.b
        a.gateway.sysctl(ipv4__conf__wan__promote_secondaries=1)  # else the new address goes with the old one
        a.gateway.ip(f"addr add {NEW}/24 dev wan", f"addr del {a.wan4}/24 dev wan", f"route replace {b.net4} via {b.wan4}")
        b.gateway.ip(f"route replace {a.net4} via {NEW}")
        wait_until(lambda: f"src {NEW}" in b.gateway.run(["ip", "xfrm", "state"]).stdout, "the peer knows the new address", 60.0, 0.2)
        link.carries_again(timeout=60.0)
        for side in Side:
            assert link.ping(side).lost == 0
        after = link.children()
        assert [(child.spi_in, child.spi_out) for child in after] == [(child.spi_in, child.spi_out) for child in before]
        for old, new in zip(before, after, strict=True):
            assert new.packets_out > old.packets_out
        assert str(a.wan4) not in a.gateway.run(["ip", "xfrm", "state"]).stdout
        both.carries()
