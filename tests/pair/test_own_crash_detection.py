"""A key manager that was killed comes back; its peer learns of it from the first message that it sends (RFC 6290)."""

from __future__ import annotations

import pytest
from lab.gateway import Gateway
from lab.pairing import OURS, pair
from lab.process import wait_until
from lab.tunnel import Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


def test_the_peer_of_a_killed_key_manager_begins_anew_at_once() -> None:
    """With the retransmissions of a dead peer it would take it 165 s."""
    with pair(OURS, OURS, Tunnel(dpd_a="1s")) as link:
        link.a.initiate()
        link.carries_again()
        (old,) = link.a.ike_sas()
        b = link.b
        assert isinstance(b, Gateway)
        b.kill_vpnd()
        b.start_vpnd()
        wait_until(lambda: any(sa.state == "ESTABLISHED" and sa.initiator_spi != old.initiator_spi for sa in link.a.ike_sas()), "a new IKE SA", interval=0.1)
        assert "peer has lost the IKE SA" in link.a.log()
        wait_until(lambda: len(b.ike_sas()) == len(link.a.ike_sas()) == 1, "one IKE SA on either side", interval=0.1)
        link.carries_again()
        assert link.leaks() == []
        secret = next(b.directory.glob("state/*"))
        assert secret.stat().st_mode & 0o777 == 0o600
