"""CHILD_SAs that Linux says are worn out, in packets by our side and in bytes by strongSwan's: replaced under traffic, without loss."""

from __future__ import annotations

import pytest
from lab.process import wait_until
from lab.tunnel import Tunnel
from realkernel.kernel_gateways import kernel_pair, strongswan, xfrm

pytestmark = pytest.mark.realkernel

PACKETS = {"rekey_packets": "200", "rand_packets": "60", "life_packets": "100000"}
BYTES = {"rekey_bytes": "128K", "rand_bytes": "20K", "life_bytes": "100M"}
SUCCESSORS = 3


def test_what_is_worn_out_is_replaced_and_nothing_is_lost() -> None:
    with kernel_pair(xfrm, strongswan, Tunnel(options_a=PACKETS, options_b=BYTES, connection_options={"encap": "no"})) as both:
        link = both.link
        link.a.initiate()
        link.carries_again()
        seen = {link.a.child().spi_in}

        def replaced() -> bool:
            seen.update(child.spi_in for child in link.a.children())
            return len(seen) > SUCCESSORS

        with link.datagrams_all_the_while(rate=100.0):
            wait_until(replaced, f"{SUCCESSORS} successors", 60.0, 0.1)
        assert both.leaks() == []
        wait_until(lambda: [len(daemon.children()) for daemon in (link.a, link.b)] == [1, 1], "one CHILD_SA on either side", interval=0.2)


def test_what_reaches_its_hard_end_is_made_anew_by_the_next_packet() -> None:
    """Without a soft bound: the kernel drops the SA, the policies stay, and no packet passes in clear."""
    hard = {"rekey_packets": "0", "life_packets": "100", "start_action": "trap"}
    with kernel_pair(xfrm, xfrm, Tunnel(options_a=hard, options_b=hard, connection_options={"encap": "no"})) as both:
        link = both.link
        link.carries_again()
        first = link.a.child().spi_in
        for _ in range(12):
            link.ping(count=10, timeout=2.0)
        wait_until(lambda: any(child.spi_in != first and child.state == "INSTALLED" for child in link.a.children()), "made anew", interval=0.2)
        link.carries_again()
        assert both.leaks() == []
