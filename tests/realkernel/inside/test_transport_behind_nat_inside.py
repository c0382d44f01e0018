"""Transport mode through a NAT, where Linux carries one side or both, and with strongSwan in both roles."""

from __future__ import annotations

import pytest
from lab.behind_nat import behind_nat
from lab.pairing import OURS, DaemonFactory
from realkernel.kernel_gateways import strongswan, xfrm

pytestmark = pytest.mark.realkernel


@pytest.mark.parametrize(
    ("hidden", "open_"),
    [
        pytest.param(xfrm, strongswan, id="xfrm-hidden"),
        pytest.param(strongswan, xfrm, id="strongswan-hidden"),
        pytest.param(OURS, strongswan, id="userspace-hidden"),
        pytest.param(strongswan, OURS, id="strongswan-hidden-from-userspace"),
    ],
)
def test_tcp_and_udp_pass_both_ways(hidden: DaemonFactory, open_: DaemonFactory) -> None:
    with behind_nat(hidden, open_) as places:
        places.carries(bulk=256 << 10, rate=100.0)
