"""`unique` with strongSwan: a peer that lost its state comes back, with and without saying so."""

from __future__ import annotations

import pytest
from lab.pairing import facing
from lab.process import wait_until
from lab.tunnel import Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


@pytest.mark.parametrize(("unique", "left"), [("never", 2), ("no", 1), ("replace", 1), ("keep", 1)])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_a_peer_that_forgot_everything_comes_back(ours: Side, unique: str, left: int) -> None:
    """It says INITIAL_CONTACT, unless `unique = never`."""
    with facing(ours, Tunnel(connection_options={"unique": unique})) as link:
        link.a.initiate()
        link.a.kill()
        link.a.start()
        link.a.initiate()
        wait_until(lambda: len([ike for ike in link.b.ike_sas() if ike.state == "ESTABLISHED"]) == left, f"{left} IKE SAs left", interval=0.1)
        if left == 1:
            assert link.ping().lost == 0


def test_the_same_child_is_not_made_twice_by_us() -> None:
    with facing(Side.A, Tunnel()) as link:
        link.a.initiate()
        link.a.initiate()
        assert [len(daemon.children()) for daemon in (link.a, link.b)] == [1, 1]
        assert link.ping().lost == 0
