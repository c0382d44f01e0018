"""Names of interfaces in nftables text: whoever names one must not thereby say what passes."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from kernel_shim.io.guard import GuardPlan
from kernel_shim.io.leak_guard import LeakGuardPlan

SUBNET = ip_network("10.0.0.0/8")


@pytest.mark.parametrize("name", ['x" accept; #', "eth*", "*", 'a"', "a\\", "a\nb", "a$b"])
def test_a_name_is_a_name(name: str) -> None:
    inbound = GuardPlan("ours", interfaces=("tun0",), mark=1)
    outbound = LeakGuardPlan("ours", tun="tun0", clear_tun="tun1", mark=1)
    for text in (inbound.set_inside({SUBNET: frozenset({name})}), outbound.set_inside({SUBNET: frozenset({name})}), inbound.set_vrfs([name], {name: 1})):
        assert name not in text
        assert "accept" not in text
        assert "add" not in text
    for text in (inbound.set_inside({SUBNET: frozenset({name, "lan0.7"})}), outbound.set_inside({SUBNET: frozenset({name, "lan0.7"})})):
        assert '{ "lan0.7" }' in text
    assert '{ "lan0.7" }' in inbound.set_vrfs([name, "lan0.7"], {})
