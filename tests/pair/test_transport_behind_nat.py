"""Transport mode between a host behind a NAT and one in the open (RFC 3948 section 3.1.2): both know the first by different addresses."""

from __future__ import annotations

import pytest
from lab.behind_nat import behind_nat
from lab.pairing import OURS

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


def test_tcp_and_udp_pass_both_ways() -> None:
    with behind_nat(OURS, OURS) as hidden:
        hidden.carries()
